"""How one op reads what another saved, so that nothing is saved twice.

A norm keeps its input; the linear behind it needs the norm's *output*, which is a cheap elementwise function
of that input. So the linear saves nothing and rebuilds its input from the norm's node. The node of a tensor
is its ``grad_fn``: an in-place change or another op puts a different node there, and the linear then saves
its input itself. Backward always runs the reader before the node it reads from.

Parameters are held by reference with a version check instead of through ``save_for_backward``: offload and
recompute hooks then see activations only, and a recompute stops as soon as the last *activation* is back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Node = Any  # a torch.autograd.graph.Node of one of our functions


# a mixture of experts flattens batch and sequence; the names are those of autograd's nodes
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})


def source_of(x: Tensor) -> Node | None:
    """The node that can rebuild the rows of ``x`` in backward, or None if ``x`` has to be saved.

    A view that keeps the last dimension is looked through: the rows are the same, in the same order.
    """
    node: Any = x.grad_fn
    output = x.output_nr
    if node is not None and node.name() in _VIEWS:
        if node._saved_self_sym_sizes[-1] != x.shape[-1]:
            return None
        node, output = node.next_functions[0]
    return node if node is not None and hasattr(node, "rebuild") and output == 0 else None


def saved(node: Node) -> tuple[Tensor, ...]:
    """The saved tensors of a node; unpacked once per backward, as torch's recompute hooks demand."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return tuple(node.unpacked)


def release(node: Node) -> tuple[Tensor, ...]:
    """The saved tensors of a node in its own backward; later readers of this pass do not exist."""
    tensors = saved(node)
    node.unpacked = None
    return tensors


def record(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, which torch leaves untyped."""
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers: what would be decided by its numbers has to be assumed."""
    return isinstance(tensor, FakeTensor)


class Held:
    """Parameters a backward will need, by reference; ``get`` refuses one that changed in place meanwhile."""

    __slots__ = ("tensors", "versions")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tuple(tensors)
        self.versions = tuple(None if t is None or t.is_inference() else t._version for t in tensors)

    def get(self) -> tuple[Tensor | None, ...]:
        """The tensors, unchanged since the forward.

        Raises:
            RuntimeError: one was modified in place between forward and backward, as autograd itself would
            say.
        """
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if tensor is not None and version is not None and tensor._version != version:
                raise RuntimeError(
                    "a parameter needed for gradient computation was modified in place: shape "
                    f"{tuple(tensor.shape)} is at version {tensor._version}, expected {version}"
                )
        return self.tensors


def graph_is_kept() -> bool:
    """Whether the running backward keeps its graph: if not, what a node saved may be overwritten by it.

    Torch has no public way to ask; where its private one is missing, the answer is the safe one.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def flat_rows(x: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]``."""
    return x.reshape(-1, x.shape[-1])


def like_input(rows: Tensor, shape: torch.Size) -> Tensor:
    """``[rows, n]`` as ``[*shape[:-1], n]``, without being a view of it.

    A model may scale the result in place (Gemma 3n does), which autograd forbids for views made inside a
    function.
    """
    out: Tensor = torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[-1]))
    return out


def grad_needed(*tensors: Tensor | None) -> bool:
    """Whether a backward through any of these can happen."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
