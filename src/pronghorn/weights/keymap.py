"""The one place that knows how a parameter of the model in memory is called in the files of its base.

Most names are equal. Where they are not, the tables below say so, and are read in both directions: a name of
the model gives candidates among which the files decide; a name in the files gives the model's names for it.
A new layout is a new line in a table.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pronghorn.errors import ExportError

# (name in the model, name in the files), as the start of a tensor's name
PREFIXES: tuple[tuple[str, str], ...] = (
    # multimodal models on the hub before transformers 4.52
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
    # the same for Qwen 2 VL and 2.5 VL; the former also where the files hold the language model alone
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    # SigLIP towers have one level less since transformers 5
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "model.vision_tower."),
    ("model.vision_tower.vision_model.", "vision_tower."),
    ("model.", ""),  # a base saved without its head, e.g. LlamaModel
    ("transformer.", ""),  # the same for GPT-2
)

# (module in the model, module in the files), anywhere in a name, between dots
MODULES: tuple[tuple[str, str], ...] = (("mlp", "block_sparse_moe"),)  # Mixtral's files and transformers 5

# stacked expert parameter -> the file tensors of one expert, stacked along the output rows in this order
EXPERTS: Mapping[str, tuple[tuple[str, ...], ...]] = MappingProxyType(
    {
        "gate_up_proj": (("gate_proj.weight", "up_proj.weight"), ("w1.weight", "w3.weight")),
        "down_proj": (("down_proj.weight",), ("w2.weight",)),
    }
)

# model types whose experts are stored [experts, in, out] rather than [experts, out, in]
EXPERTS_IN_OUT = frozenset({"gpt_oss", "llama4", "llama4_text"})
# model types whose attention and MLP weights are Conv1D, stored [in, out]
CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})

# (input embedding, output head), by their names in the model: the pairs that tie_word_embeddings ties
TIED: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("gpt_neox.embed_in.weight", "embed_out.weight"),
)

_EXPERT_NAME = re.compile(r"(?P<module>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>.+)")


@dataclass(frozen=True)
class ExpertPart:
    """One file tensor that holds some rows of one expert of a stacked parameter."""

    name: str
    expert: int
    part: int
    parts: int


def file_names(name: str) -> Iterator[str]:
    """What a tensor of the model may be called in the files, the equal name first."""
    for candidate in (name, *_swap_modules(name, 0)):
        yield candidate
        for model_side, file_side in PREFIXES:
            if candidate.startswith(model_side):
                yield file_side + candidate.removeprefix(model_side)


def model_names(name: str) -> Iterator[str]:
    """What a tensor in the files may be called in the model; the inverse of ``file_names``."""
    for candidate in (name, *_swap_modules(name, 1)):
        yield candidate
        for model_side, file_side in PREFIXES:
            if candidate.startswith(file_side):
                yield model_side + candidate.removeprefix(file_side)


def _swap_modules(name: str, side: int) -> Iterator[str]:
    for pair in MODULES:
        parts = name.split(".")
        if pair[side] in parts:
            yield ".".join(pair[1 - side] if part == pair[side] else part for part in parts)


def find(name: str, stored: Collection[str]) -> str | None:
    """The file tensor that holds the model's tensor ``name``; None where there is none.

    Raises:
        ExportError: several file tensors could be meant.
    """
    if name in stored:
        return name
    found = sorted({candidate for candidate in file_names(name) if candidate in stored})
    if len(found) > 1:
        raise ExportError(f"{name} of the model could be any of {', '.join(found)} in the base's files")
    return found[0] if found else None


def expert_parts(name: str, stored: Collection[str]) -> tuple[ExpertPart, ...]:
    """The per-expert file tensors that make up a stacked parameter (``...experts.gate_up_proj``).

    Returns:
        All parts, expert by expert, or nothing where the files do not hold the parameter expert by expert.
    """
    module, _, leaf = name.rpartition(".")
    for leaves in EXPERTS.get(leaf, ()):
        for candidate in file_names(module + "."):
            parts = tuple(_expert_parts(candidate, leaves, stored))
            if parts:
                return parts
    return ()


def _expert_parts(module: str, leaves: tuple[str, ...], stored: Collection[str]) -> Iterator[ExpertPart]:
    expert = 0
    while all(f"{module}{expert}.{leaf}" in stored for leaf in leaves):
        for part, leaf in enumerate(leaves):
            yield ExpertPart(f"{module}{expert}.{leaf}", expert, part, len(leaves))
        expert += 1


def stacked_names(name: str) -> Iterator[tuple[str, ExpertPart]]:
    """The stacked parameters that a per-expert tensor may be part of; the inverse of ``expert_parts``."""
    match = _EXPERT_NAME.fullmatch(name)
    if match is None:
        return
    for parameter, layouts in EXPERTS.items():
        for leaves in layouts:
            if match["leaf"] in leaves:
                part = ExpertPart(name, int(match["number"]), leaves.index(match["leaf"]), len(leaves))
                for module in model_names(match["module"] + "."):
                    yield f"{module}{parameter}", part
