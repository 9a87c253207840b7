"""Recompute (gradient checkpointing) on one model instance, across the names transformers has used for it."""

from __future__ import annotations

from typing import Any

# where transformers keeps the hook that makes embeddings require a gradient; it sets it itself for an adapted
# model that begins to recompute. 4.56 has the first name only
_INPUT_HOOKS = ("_require_grads_hook", "_require_grads_hooks")


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


def inputs_hooked(model: Any) -> bool:
    """Whether the model's embeddings are made to require a gradient."""
    return any(model.__dict__.get(name) for name in _INPUT_HOOKS)


def unhook_inputs(model: Any) -> None:
    """Take that hook away with every trace of it."""
    if inputs_hooked(model):
        model.disable_input_require_grads()
    for name in _INPUT_HOOKS:
        model.__dict__.pop(name, None)
