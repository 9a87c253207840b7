"""Counting the bytes of tensors, real or of shapes only: what is alive, the highest it was, what is saved.

One way of counting for the plan, the run and the benchmarks, so that predicted and measured mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# a new peak is looked for only where it could be higher by this share: looking costs a pass over all storages
RESOLUTION = 1e-3


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Remembers every storage made inside the block: ``alive`` sums those that still exist.

    ``peak`` is the highest sum so far, seen after each operation, to ``RESOLUTION``.

    Args:
        ignore: storages by ``storage_key`` that were there before, such as those of the weights.
    """

    def __init__(self, ignore: Iterable[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ignore = frozenset(ignore)
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if self._bound > self.peak * (1 + RESOLUTION):
            self.peak = max(self.peak, self.alive())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        # a weak reference keeps the address: a key that is known is the same storage, alive or not
        if key not in self.ignore and key not in self._seen:
            self._seen[key] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
            self._bound += storage.nbytes()

    def alive(self) -> int:
        """Bytes of the storages that were made inside the block and still exist."""
        self._seen = {
            key: found
            for key, found in self._seen.items()
            if not found[0].expired()  # type: ignore[no-untyped-call]
        }
        self._bound = sum(size for _, size in self._seen.values())
        return self._bound


def storage_key(tensor: Tensor) -> int:
    """The same number for all tensors that share a storage, as long as the storage exists."""
    key: int = tensor.untyped_storage()._cdata
    return key


def held_storages(model: nn.Module) -> dict[int, int]:
    """Bytes of each storage of a model's parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes of the distinct storages that ``run()`` saves for backward, parameters left out."""
    parameters = {storage_key(p) for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(t: Tensor) -> Tensor:
        if storage_key(t) not in parameters:
            found[storage_key(t)] = t.untyped_storage().nbytes()
            alive.append(t.untyped_storage())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(found.values())
