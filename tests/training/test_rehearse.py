"""What a micro-step takes: from headers alone, beside the same step of the loaded model, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import LoraOptions
from pronghorn.adapters.origin import base_of
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.loading.report import dtype_bytes
from pronghorn.memory import recompute
from pronghorn.memory.upper import upper_step
from pronghorn.patching.accelerate import RECOMPUTE_MODES, accelerate
from pronghorn.patching.trl_head import fuse_trl_head
from pronghorn.training.config import RunConfig, parse_config
from pronghorn.training.rehearse import BatchShape, rehearse
from pronghorn.training.stage import Stage
from pronghorn.training.trainer import add_fused_head
from tests import tiny

WIDE = {"hidden_size": 128, "intermediate_size": 256}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"] * 2
ATTENTION = ["q_proj", "v_proj"]
# name -> (family, changes of its tiny configuration, lora)
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, 6 layers": ("llama", {**WIDE, "num_hidden_layers": 6}, {}),
    "phi3, fused": ("phi3", WIDE, {"r": 2}),
    "qwen3, rank 32": ("qwen3", WIDE, {"r": 32}),
    "gemma2, soft caps": ("gemma2", WIDE, {}),
    "gemma3, mixed": ("gemma3", {**WIDE, "num_hidden_layers": 6, "layer_types": SLIDING}, {}),
    "mistral, one kv head": ("mistral", {**WIDE, "num_key_value_heads": 1}, {}),
    "qwen3_moe": ("qwen3_moe", WIDE, {}),
    "qwen2, tied": ("qwen2", WIDE, {"r": 4}),
    "llama, long vocabulary": ("llama", {**WIDE, "vocab_size": 32_000}, {}),
    "llama, attention only": ("llama", {**WIDE, "num_hidden_layers": 5}, {"targets": ATTENTION}),
}
FAST = ("phi3, fused",)
PADDED = BatchShape(rows=2, tokens=96, padded=True)
ONE_ROW = BatchShape(rows=1, tokens=160)
BINS = BatchShape(rows=1, tokens=160, packed=True)
BOUND = 0.05


def config(folder: Path, lora: dict[str, Any], **training: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"name": str(folder)},
            "data": {"train": "rows.jsonl"},
            "lora": lora,
            "training": training,
            "output": "run",
        }
    )


def real(
    folder: Path,
    lora: dict[str, Any],
    accelerated: bool,
    setting: bool | str,
    tile: int | None = None,
    **options: Any,
) -> Any:
    """The loaded model, prepared as ``train`` prepares it."""
    model, _ = load(folder, LoadOptions(**options), say=None)
    model = attach_lora(model, LoraOptions(**lora), say=None)
    if accelerated:
        accelerate(model, recompute=RECOMPUTE_MODES[setting], activation_bytes=0, mlp_tile_tokens=tile)
    elif setting:
        recompute.enable(base_of(model))
    if add_fused_head(base_of(model)) and accelerated:
        fuse_trl_head(model)
    if setting:
        model.enable_input_require_grads()
    return model


def write(tmp_path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    family, changes, lora = SHAPES[name]
    return tiny.write_base(tmp_path / "base", family, dtype=torch.float32, **changes), lora


def near(predicted: int, measured: int) -> bool:
    return abs(predicted - measured) <= BOUND * measured


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in SHAPES]
)
@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "plain"])
def test_saved_and_peak_bytes_of_ten_shapes_are_known_before(
    name: str, accelerated: bool, tmp_path: Path
) -> None:
    folder, lora = write(tmp_path, name)
    stage = Stage(config(folder, lora, accelerate=accelerated))
    cases = [(PADDED, False), (ONE_ROW, False), (BINS, False), (PADDED, True)]
    kept = real(folder, lora, accelerated, False)
    assert stage.weight_bytes + stage.adapter_bytes == sum(dtype_bytes(kept).values())
    for shape, setting in cases:
        model = real(folder, lora, accelerated, True) if setting else kept
        measured = rehearse(model, shape, stage.how())
        predicted = stage.step(shape, setting)
        assert stage.upper is None
        assert near(predicted.saved, measured.saved), (shape, predicted, measured)
        assert near(predicted.peak, measured.peak), (shape, predicted, measured)
        text = base_of(stage.model).config.get_text_config()
        upper = upper_step(stage.model, text, shape.rows, shape.tokens)
        assert upper.saved >= measured.saved
        assert upper.peak >= measured.peak


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["unsloth", "auto"])
def test_planned_recompute_is_known_too(setting: str, tmp_path: Path) -> None:
    folder, lora = write(tmp_path, "llama, 6 layers")
    stage = Stage(config(folder, lora))
    measured = rehearse(real(folder, lora, True, setting), PADDED, stage.how())
    predicted = stage.step(PADDED, setting, activation_bytes=0)
    assert near(predicted.saved, measured.saved)
    assert near(predicted.peak, measured.peak)


def test_tiles_of_the_mlp_are_known_too(tmp_path: Path) -> None:
    folder, lora = write(tmp_path, "phi3, fused")
    stage, whole = Stage(config(folder, lora, mlp_tile_tokens=16)), Stage(config(folder, lora))
    predicted, without = stage.step(PADDED, False), whole.step(PADDED, False)
    measured = rehearse(real(folder, lora, True, False, tile=16), PADDED, stage.how())
    assert near(predicted.saved, measured.saved) and near(predicted.peak, measured.peak)
    assert predicted.saved < 0.8 * without.saved and predicted.peak < without.peak


def test_a_part_of_the_layers_under_a_budget(tmp_path: Path) -> None:
    folder, lora = write(tmp_path, "llama, 6 layers")
    stage = Stage(config(folder, lora))
    none, every = (stage.step(PADDED, setting) for setting in (False, True))
    budget = (none.saved + every.saved) // 2
    some = stage.step(PADDED, "auto", activation_bytes=budget)
    assert every.saved < some.saved < none.saved
    assert stage.step(PADDED, "auto", activation_bytes=10**9) == none


def test_a_base_in_4_bit(tmp_path: Path) -> None:
    folder = tiny.write_base(tmp_path / "base", "llama", dtype=torch.bfloat16, **WIDE)
    wanted = config(folder, {"r": 4})
    stage = Stage(
        wanted.model_copy(update={"model": wanted.model.model_copy(update={"quantization": "nf4"})})
    )
    model = real(folder, {"r": 4}, True, False, quantization="nf4")
    assert stage.weight_bytes + stage.adapter_bytes == sum(dtype_bytes(model).values())
    measured, predicted = rehearse(model, PADDED, stage.how()), stage.step(PADDED, False)
    assert near(predicted.saved, measured.saved)
    # bitsandbytes decodes a weight inside of one operation, which no counter of tensors sees
    decoded = 2 * WIDE["hidden_size"] * WIDE["intermediate_size"]
    assert measured.peak <= predicted.peak * (1 + BOUND)
    assert predicted.peak <= measured.peak * (1 + BOUND) + 2 * decoded


def test_a_step_that_needs_numbers_gets_an_upper_estimate_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def routed(self: Any, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[..., 0] > 0).nonzero()  # how many rows there are is a matter of numbers
        return forward(self, x) + 0 * chosen.sum()

    monkeypatch.setattr(LlamaMLP, "forward", routed)
    folder, lora = write(tmp_path, "llama, 6 layers")
    stage = Stage(config(folder, lora, accelerate=False))
    predicted = stage.step(PADDED, False)
    assert stage.upper is not None
    assert "cannot be run on shapes alone" in stage.upper
    assert predicted.peak >= rehearse(real(folder, lora, False, False), PADDED, stage.how()).peak
    assert stage.flops(PADDED, False) is None
