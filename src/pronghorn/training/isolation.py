"""Before a packed run: proof that rows in one bin do not see each other, on the very model that trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from pronghorn.errors import NotSupportedError
from pronghorn.training.collate import NOT_FOR_THE_MODEL, PackCollator, PadCollator, wants_varlen

BINS = ((11, 17), (9,))  # rows of two bins; the second bin is filled up with padding
MORE = 6  # tokens behind a row that may not change what came before them

# Of the largest logit. Measured in float32: rounding 2e-7 to 1.3e-6 (2 to 48 layers), leaks 2e-4 (lfm2, not
# trained) to 1.3. Layers that compute in 16 bits whatever they are given raise the bound, as far as leaks
# still show.
LEAST_BOUND = 1e-4
MOST_BOUND = 5e-2
CONTROL_FACTOR = 4.0
_NARROW = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Isolation:
    """Largest difference between a row's logits packed and alone, and what is allowed.

    ``control`` is the difference that mere rounding makes: a row alone, and as the start of a longer one.
    """

    difference: float
    control: float
    largest: float

    @property
    def bound(self) -> float:
        """The largest difference that is taken for rounding."""
        wanted = max(CONTROL_FACTOR * self.control, LEAST_BOUND * self.largest)
        return min(wanted, MOST_BOUND * self.largest)

    @property
    def holds(self) -> bool:
        """Whether rows are isolated; a NaN is not."""
        return self.difference <= self.bound

    def __str__(self) -> str:
        return f"logits packed and alone differ by {self.difference:.1e} (bound {self.bound:.1e})"


def require_isolation(model: Any) -> Isolation:
    """Refuse packing where rows of one bin would see each other.

    Raises:
        NotSupportedError: names the figure and the bound, or why the model cannot be packed at all.
    """
    off = "set data.packing=false"
    name = type(getattr(model, "get_base_model", lambda: model)()).__name__
    try:
        found = measure_isolation(model)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise NotSupportedError(f"{name} cannot compute packed rows: {error}", fix=off) from error
    if not found.holds:
        raise NotSupportedError(
            f"packed rows see each other in {name}: {found}; the largest logit is {found.largest:.2g}",
            fix=off,
        )
    return found


def measure_isolation(model: Any) -> Isolation:
    """Compare random rows packed and alone, in float32, without dropout; the model is left as it was.

    Gradients stay enabled, because layers may compute in another way where they are not needed.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    longer = [
        [torch.randint(vocabulary, (length + MORE,), generator=generator).tolist() for length in lengths]
        for lengths in BINS
    ]
    rows = [
        [row[:length] for row, length in zip(members, lengths, strict=True)]
        for members, lengths in zip(longer, BINS, strict=True)
    ]
    with _evaluated_in_float32(model):
        bins = [_row([*chain.from_iterable(members)], [*map(len, members)]) for members in rows]
        packed = _logits(model, PackCollator(0, wants_varlen(model))(bins))
        difference = control = largest = 0.0
        for index, members in enumerate(rows):
            start = 0
            for row, extended in zip(members, longer[index], strict=True):
                alone = _logits(model, PadCollator(0)([_row(row)]))[0]
                inside = packed[index, start : start + len(row)]
                as_prefix = _logits(model, PadCollator(0)([_row(extended)]))[0, : len(row)]
                difference = _worse(difference, inside - alone)
                control = _worse(control, as_prefix - alone)
                largest = _worse(largest, alone)
                start += len(row)
    return Isolation(difference, control, largest)


def _row(ids: list[int], lengths: Sequence[int] = ()) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids, "lengths": list(lengths)}


def _worse(so_far: float, values: torch.Tensor) -> float:
    """The larger of a number and the largest magnitude; NaN wins over both."""
    return float(torch.maximum(torch.tensor(so_far), values.abs().max().float().cpu()))


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
        if name not in NOT_FOR_THE_MODEL
    }
    logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits.detach().float()


@contextlib.contextmanager
def _evaluated_in_float32(model: Any) -> Iterator[None]:
    """Dropout off, and 16-bit weights as float32: those of a layer while it computes, the others throughout.

    A head may be applied when its logits are read, after the model's forward; hooks would be too late for it.
    """
    training = {module: module.training for module in model.modules()}
    precision = torch.get_float32_matmul_precision()
    narrow: dict[nn.Parameter, torch.Tensor] = {}

    def widen(tensors: Iterable[nn.Parameter]) -> None:
        for tensor in tensors:
            if tensor.dtype in _NARROW:
                narrow[tensor] = tensor.data
                tensor.data = tensor.data.float()

    def restore(tensors: Iterable[nn.Parameter]) -> None:
        for tensor in tensors:
            if tensor in narrow:
                tensor.data = narrow.pop(tensor)

    layers = [layer for layers in _outermost_lists(model) for layer in layers]
    in_layers = {tensor for layer in layers for tensor in layer.parameters()}
    hooks = [layer.register_forward_pre_hook(lambda layer, _: widen(layer.parameters())) for layer in layers]
    hooks += [layer.register_forward_hook(lambda layer, *_: restore(layer.parameters())) for layer in layers]
    try:
        torch.set_float32_matmul_precision("highest")
        model.eval()
        widen(tensor for tensor in model.parameters() if tensor not in in_layers)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore([*narrow])
        torch.set_float32_matmul_precision(precision)
        for module, flag in training.items():
            module.training = flag


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of layers that are not inside another list; a layer is widened as a whole."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)
