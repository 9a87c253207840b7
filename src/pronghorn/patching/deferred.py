"""Logits that are not there: a tensor that remembers hidden states, head and pending elementwise steps.

``cross_entropy`` of it runs in tiles and the matrix never exists. Slicing positions, reshaping rows and
scalar steps (scale, softcap, cast) are remembered; anything else makes the true logits, so meaning never
changes, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from pronghorn.ops import select
from pronghorn.ops.reference import logits
from pronghorn.ops.shapes import LogitStep

# attributes and methods that tell shape, type and place, which are known without making the logits
_GETTERS = ("shape", "dtype", "device", "ndim", "layout", "is_sparse", "is_cuda", "is_quantized", "is_meta")
_METHODS = ("size", "dim", "numel", "element_size", "is_floating_point", "__len__")
_READ_ONLY = frozenset(
    [getattr(Tensor, name).__get__ for name in (*_GETTERS, "is_nested", "is_mkldnn")]
    + [getattr(Tensor, name) for name in _METHODS]
)


class DeferredLogits(Tensor):
    """Stands for ``steps(hidden @ weight.T + bias)``; see the module docstring."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    steps: tuple[LogitStep, ...]
    made: Tensor | None
    count: dict[str, int]

    @staticmethod
    def __new__(
        cls: type[DeferredLogits],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        steps: tuple[LogitStep, ...],
        count: dict[str, int],
    ) -> DeferredLogits:
        """``hidden [..., H]``, ``weight [V, H]``; ``count`` collects what needed the true logits."""
        dtype = next((s.value for s in reversed(steps) if s.kind == "to"), hidden.dtype)
        shape = (*hidden.shape[:-1], weight.shape[0])
        make: Any = Tensor._make_wrapper_subclass
        self: DeferredLogits = make(cls, shape, dtype=dtype, device=hidden.device)
        self.hidden, self.weight, self.bias, self.steps, self.count = hidden, weight, bias, steps, count
        self.made = None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def then(self, step: LogitStep) -> DeferredLogits:
        """The same logits after one more step."""
        return DeferredLogits(self.hidden, self.weight, self.bias, (*self.steps, step), self.count)

    def rows(self, hidden: Tensor) -> DeferredLogits:
        """The same steps on other rows of the hidden states."""
        return DeferredLogits(hidden, self.weight, self.bias, self.steps, self.count)

    def make(self, why: str) -> Tensor:
        """The true logits, made once."""
        if self.made is None:
            self.count[why] = self.count.get(why, 0) + 1
            self.made = logits(self.hidden, self.weight, self.bias, self.steps)
        return self.made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READ_ONLY:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, DeferredLogits) and first.made is None:
            result = _remember(func, first, args[1:], {k: v for k, v in kwargs.items() if k != "input"})
            if result is not NotImplemented:
                return result
        name = getattr(func, "__name__", str(func))
        args, kwargs = pytree.tree_map_only(DeferredLogits, lambda t: t.make(name), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls from below autograd see the true values, without their graph."""
        given = (args, kwargs or {})
        args, kwargs = pytree.tree_map_only(DeferredLogits, lambda t: t.make(str(func)).detach(), given)
        return func(*args, **(kwargs or {}))


def _scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.requires_grad
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _remember(
    func: Callable[..., Any], logits: DeferredLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of ``func`` without making the logits, or NotImplemented."""
    name = getattr(func, "__name__", "")
    if func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
        return logits.hidden.requires_grad
    if func is functional.cross_entropy:
        return _cross_entropy(logits, rest, kwargs)
    if name == "contiguous" and not rest:
        return logits
    if name in _ARITHMETIC and len(rest) == 1 and not kwargs and _scalar(rest[0]):
        return logits.then(LogitStep(_ARITHMETIC[name], rest[0]))
    if name in _IN_PLACE and len(rest) == 1 and not kwargs and _scalar(rest[0]):
        logits.steps += (LogitStep(_IN_PLACE[name], rest[0]),)
        return logits
    if name == "tanh" and not rest and not kwargs:
        return logits.then(LogitStep("tanh"))
    if name == "float" and not rest and not kwargs:
        return logits.then(LogitStep("to", torch.float32))
    if name == "to":
        return _to(logits, rest, kwargs)
    if name in ("view", "reshape") and not kwargs:
        return _reshape(logits, rest)
    if name == "__getitem__":
        return _index(logits, rest[0])
    return NotImplemented


_ARITHMETIC: dict[str, Any] = {
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), "mul"),
    **dict.fromkeys(("div", "__truediv__", "true_divide", "divide"), "div"),
}
_IN_PLACE: dict[str, Any] = {
    **dict.fromkeys(("mul_", "__imul__"), "mul"),
    **dict.fromkeys(("div_", "__itruediv__"), "div"),
}


def _to(logits: DeferredLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [*rest, *kwargs.values()]
    if not given or not all(isinstance(v, (torch.dtype, torch.device, str)) for v in given):
        return NotImplemented
    devices = [torch.device(v) for v in given if isinstance(v, (torch.device, str))]
    here = logits.device
    if any(d.type != here.type or d.index not in (None, here.index) for d in devices):
        return NotImplemented
    dtype = next((v for v in given if isinstance(v, torch.dtype)), None)
    return logits if dtype is None else logits.then(LogitStep("to", dtype))


def _reshape(logits: DeferredLogits, rest: tuple[Any, ...]) -> Any:
    sizes = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    if len(sizes) < 2 or not all(isinstance(size, int) for size in sizes) or sizes[-1] != logits.shape[-1]:
        return NotImplemented
    return logits.rows(logits.hidden.reshape(*sizes[:-1], logits.hidden.shape[-1]))


def _index(logits: DeferredLogits, index: Any) -> Any:
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(part is Ellipsis for part in parts):
        at = next(i for i, part in enumerate(parts) if part is Ellipsis)
        parts[at : at + 1] = [slice(None)] * (logits.dim() - len(parts) + 1)
    if len(parts) == logits.dim() and parts[-1] == slice(None):
        parts = parts[:-1]
    if len(parts) >= logits.dim() or not all(_selects_rows(part) for part in parts):
        return NotImplemented
    return logits.rows(logits.hidden[tuple(parts)])


def _selects_rows(part: Any) -> bool:
    return isinstance(part, (slice, int)) or (type(part) is Tensor and part.dtype in (torch.bool, torch.long))


def _cross_entropy(logits: DeferredLogits, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tiled loss for the plain cases: class indices, no weights, no smoothing, summed or averaged."""
    options = {"reduction": "mean", "ignore_index": -100, **kwargs}
    labels = rest[0] if rest else options.pop("target", None)
    reduction, ignore_index = options.pop("reduction"), options.pop("ignore_index")
    known = len(rest) <= 1 and all(value in (None, 0.0) for value in options.values())
    plain = isinstance(labels, Tensor) and labels.dtype == torch.long and labels.dim() == 1
    if not (known and plain and logits.dim() == 2 and reduction in ("mean", "sum")):
        return NotImplemented
    return select.linear_cross_entropy(
        logits.hidden,
        logits.weight,
        logits.bias,
        labels,
        chain=logits.steps,
        ignore_index=ignore_index,
        mean=reduction == "mean",
    )
