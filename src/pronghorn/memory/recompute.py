"""Recompute (gradient checkpointing) on one model instance, across the names transformers has used for it."""

from __future__ import annotations

from typing import Any


def is_on(model: Any) -> bool:
    """Whether any layer of the model recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def enable(model: Any) -> None:
    """Turn on stock recompute in its non-reentrant form."""
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.23 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def disable(model: Any) -> None:
    """Turn recompute off."""
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
