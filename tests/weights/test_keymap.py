"""Names of the model and names in the files, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pronghorn.errors import ExportError
from pronghorn.weights import keymap
from pronghorn.weights.folder import open_weights
from tests import tiny

# (name in the model, name in the files)
PAIRS = [
    ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("model.layers.3.mlp.gate.weight", "model.layers.3.block_sparse_moe.gate.weight"),
    ("model.layers.3.self_attn.q_proj.weight", "layers.3.self_attn.q_proj.weight"),
    ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.model.layers.0.mlp.up_proj.weight"),
    ("model.vision_tower.encoder.layers.1.fc1.weight", "vision_tower.encoder.layers.1.fc1.weight"),
    ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear.weight"),
    ("lm_head.weight", "language_model.lm_head.weight"),
    ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
    ("model.visual.blocks.0.attn.qkv.weight", "visual.blocks.0.attn.qkv.weight"),
    (
        "model.vision_tower.encoder.layers.1.fc1.weight",
        "vision_tower.vision_model.encoder.layers.1.fc1.weight",
    ),
    ("model.vision_tower.head.mlp.fc1.weight", "model.vision_tower.vision_model.head.mlp.fc1.weight"),
    ("model.vision_tower.vision_model.head.mlp.fc1.weight", "model.vision_tower.head.mlp.fc1.weight"),
    ("transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
]


@pytest.mark.parametrize(("model", "file"), PAIRS)
def test_names_go_both_ways(model: str, file: str) -> None:
    assert keymap.find(model, {file, "other.weight"}) == file
    assert model in set(keymap.model_names(file))


def test_what_is_not_there_and_what_is_there_twice() -> None:
    assert keymap.find("model.layers.0.x.weight", {"model.layers.1.x.weight"}) is None
    assert (
        keymap.find("lm_head.weight", {"lm_head.weight", "language_model.lm_head.weight"}) == "lm_head.weight"
    )
    with pytest.raises(
        ExportError, match=r"could be any of layers\.0\.block_sparse_moe\.x, layers\.0\.mlp\.x"
    ):
        keymap.find("model.layers.0.mlp.x", {"layers.0.mlp.x", "layers.0.block_sparse_moe.x"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_parameter_of_every_family_has_its_tensors_in_the_files(family: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    stored = open_weights(base).tensors
    model = AutoModelForCausalLM.from_pretrained(base)
    reached: list[str] = []
    for name, _ in model.named_parameters():
        found = keymap.find(name, stored)
        parts = [part.name for part in keymap.expert_parts(name, stored)]
        assert (found is None) == bool(parts), name
        reached += [found] if found else parts
        for part in keymap.expert_parts(name, stored):
            assert (name, part) in set(keymap.stacked_names(part.name))
    assert sorted(reached) == sorted(stored)


def test_expert_parts_come_expert_by_expert() -> None:
    stored = {
        f"m.mlp.experts.{e}.{leaf}.weight" for e in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")
    }
    parts = keymap.expert_parts("m.mlp.experts.gate_up_proj", stored)
    assert [(part.name.split(".")[4], part.expert, part.part, part.parts) for part in parts] == [
        ("gate_proj", 0, 0, 2), ("up_proj", 0, 1, 2), ("gate_proj", 1, 0, 2), ("up_proj", 1, 1, 2),
    ]  # fmt: skip
    assert list(keymap.stacked_names("m.mlp.up_proj.weight")) == []
