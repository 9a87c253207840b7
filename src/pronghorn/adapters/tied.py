"""Models with one matrix for embedding and output: training it needs a choice, made before it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pronghorn.adapters.options import LoraOptions
from pronghorn.adapters.targets import Targets
from pronghorn.errors import AdapterError, NotSupportedError

Tied = Literal["keep", "untie"]


@dataclass(frozen=True)
class Embeddings:
    """Full names of the input embedding and the output head, and whether they are one matrix."""

    inputs: str | None
    outputs: str | None
    tied: bool


def embeddings(model: Any) -> Embeddings:
    """Look at the live modules; a config flag alone proves nothing."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = (
        getattr(first, "weight", None) is not None
        and getattr(last, "weight", None) is not None
        and first.weight is last.weight
    )
    return Embeddings(names.get(id(first)), names.get(id(last)), tied)


def settle(model: Any, options: LoraOptions, targets: Targets) -> tuple[LoraOptions, Targets, Tied | None]:
    """Apply the choice for tied embeddings; returns options and targets to use, and the choice if it counts.

    "keep": the embedding is trained in full and the head is the same matrix. "untie": each named
    module gets its own update and the others stay as they are; a merge then writes both matrices.

    Raises:
        AdapterError: an embedding or head of a tied model would train and ``options.tied`` says nothing.
        NotSupportedError: "keep" with LoRA factors on the tied matrix.
    """
    found = embeddings(model)
    ends = tuple(name for name in (found.inputs, found.outputs) if name)
    saved = [name for name in ends if _names(options.modules_to_save, name)]
    adapted = [name for name in ends if name in targets.modules]
    if not found.tied or not (saved or adapted):
        return options, targets, None
    if options.tied is None:
        raise AdapterError(
            f"{' and '.join(saved or adapted)} would be trained, but this model uses one matrix for "
            f"{found.inputs} and {found.outputs}: training one of them can mean two things",
            fix='tied="keep" (ensure_weight_tying=True) trains both as one; tied="untie" '
            "(ensure_weight_tying=False) separates them, and a merge writes both",
        )
    if options.tied == "untie":
        return options, targets, "untie"
    assert found.inputs is not None
    if saved:
        others = [name for name in options.modules_to_save if not any(_names([name], end) for end in ends)]
        options = replace(options, modules_to_save=(*others, found.inputs.rpartition(".")[2]))
        modules = tuple(name for name in targets.modules if name not in ends)
        return options, replace(targets, modules=modules), "keep"
    raise NotSupportedError(
        f"LoRA on {' and '.join(adapted)} of a model with tied weights cannot be kept tied: the head's "
        "factors are the embedding's transposed, two tensors that drift apart in training",
        fix='train the matrix in full with modules_to_save=["embed_tokens"] and tied="keep", or choose '
        'tied="untie"',
    )


def _names(listed: Any, full: str) -> bool:
    return any(full == name or full.endswith("." + name) for name in listed)
