"""Computing with tensors that have shapes, dtypes and storages, and no numbers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class ShapesOnly:
    """Inside the block every tensor made is fake, on the device it was asked for; may be entered again."""

    def __init__(self) -> None:
        self._fake = FakeTensorMode()
        self._entered: list[ExitStack] = []

    def __enter__(self) -> ShapesOnly:
        stack = ExitStack()
        stack.enter_context(self._fake)
        stack.enter_context(_GroupedProducts())  # type: ignore[no-untyped-call]
        self._entered.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.pop().close()


class _GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Grouped products in every dtype: torch's own rule for shapes refuses all but bfloat16."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _GROUPED and isinstance(args[0], FakeTensor):
            offsets = args[2] if len(args) > 2 else kwargs.get("offs")
            groups = 0 if offsets is None else int(offsets.shape[0])
            return _grouped(*args[:2], dtype=kwargs.get("out_dtype"), groups=groups)
        return func(*args, **kwargs)


_GROUPED = torch.ops.aten._grouped_mm.default if hasattr(torch.ops.aten, "_grouped_mm") else None


def _grouped(a: Tensor, b: Tensor, *, dtype: torch.dtype | None, groups: int) -> Tensor:
    """Rows or columns in groups give a matrix; ``[M, K] x [K, N]``, K in groups, gives one of each group."""
    shape: tuple[int, ...] = (a.shape[-2], b.shape[-1])
    if a.dim() == b.dim():
        shape = (groups or a.shape[0], *shape)
    return a.new_empty(shape, dtype=dtype or a.dtype)
