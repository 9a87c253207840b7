"""When are two modules of one make? Then the expensive part of a proof is run on the first of them only."""

from __future__ import annotations

from typing import Any

from torch import nn

_NOT_BEHAVIOUR = frozenset({"training", "layer_idx", "calls", "enabled"})


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Classes, plain attributes, shapes, dtypes and trainability of a module and everything below it."""
    return tuple(
        (
            name,
            type(part),
            tuple(sorted((key, repr(value)) for key, value in vars(part).items() if _plain(key, value))),
            tuple(
                (key, tuple(p.shape), p.dtype, p.requires_grad)
                for key, p in part.named_parameters(recurse=False)
            ),
        )
        for name, part in module.named_modules()
    )


def _plain(key: str, value: Any) -> bool:
    if key in _NOT_BEHAVIOUR:
        return False
    if isinstance(value, dict):
        return not key.startswith("_") and all(isinstance(v, (int, float, bool, str)) for v in value.values())
    return isinstance(value, (int, float, bool, str))
