"""Quantised formats: the codes are the nearest to base + adapter, and a folder that lost a part is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pronghorn.errors import NotSupportedError
from pronghorn.export import merged
from pronghorn.export.codes import choose_scheme, encode
from pronghorn.export.formats import QUANTISED
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_codes import coded
from pronghorn.export.verify_decode import decode, load_decoded
from pronghorn.export.verify_folder import Folder
from pronghorn.serving.vllm import plan_serving
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("made")
    base = tiny.write_base(folder / "base", "qwen2")
    return base, tiny.write_adapter(folder / "adapter", base)


@pytest.fixture(scope="module")
def written(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("written")
    for name in QUANTISED:
        export(made[1], folder / name, format=name, verify=False)
    return {name: folder / name for name in QUANTISED}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def by_hand(weight: torch.Tensor, name: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (unpacked, as float) and bfloat16 scales of a float32 matrix, one group after the other."""
    codes, scales = torch.zeros_like(weight), []
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            top = {"w4a16": 7.5, "w8a8": 127.5, "fp8": 448.0}[name]
            scale = (part.abs().max() / top).bfloat16()
            scales.append(scale)
            units = part / scale.float()
            if name == "fp8":
                units = units.clamp(-448, 448).to(torch.float8_e4m3fn).float()
            else:
                units = units.round().clamp(-int(top + 0.5), int(top))
            codes[row, start : start + group] = units
    return codes, torch.stack(scales).reshape(weight.shape[0], -1)


@pytest.mark.parametrize("name", QUANTISED)
def test_every_linear_layer_holds_the_nearest_codes(
    made: tuple[Path, Path], written: dict[str, Path], name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32)
    truth = PeftModel.from_pretrained(model, made[1]).merge_and_unload().state_dict()
    found = tensors(written[name])
    modules = sorted(key.removesuffix(".weight_scale") for key in found if key.endswith(".weight_scale"))
    assert len(modules) == 14
    for module in modules:
        weight = truth[f"{module}.weight"]
        group = 32 if name == "w4a16" else weight.shape[1]  # of 64 and 96 inputs
        codes, scales = by_hand(weight, name, group)
        assert torch.equal(found[f"{module}.weight_scale"], scales)
        if name == "w4a16":
            packed = found[f"{module}.weight_packed"]
            unpacked = (
                torch.stack([(packed >> shift) & 15 for shift in range(0, 32, 4)], -1).reshape_as(codes) - 8
            )
            assert found[f"{module}.weight_shape"].tolist() == list(weight.shape)
            assert f"{module}.weight" not in found
        else:
            unpacked = found[f"{module}.weight"].float()
        assert (unpacked == codes).float().mean() > 0.9999  # a tie may fall to the other side by one ulp
        assert (unpacked - codes).abs().max() <= (32 if name == "fp8" else 1)
    assert found["model.embed_tokens.weight"].dtype is torch.bfloat16


def test_config_says_what_both_engines_read(written: dict[str, Path]) -> None:
    config = {name: json.loads((folder / "config.json").read_text())["quantization_config"]
              for name, folder in written.items()}  # fmt: skip
    four = config["w4a16"]
    assert (four["quant_method"], four["format"]) == ("compressed-tensors", "pack-quantized")
    assert (four["quantization_status"], four["ignore"]) == ("compressed", ["lm_head"])
    assert four["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True,
        "strategy": "group", "group_size": 32, "dynamic": False,
    }  # fmt: skip
    for name, layout, kind in (("w8a8", "int-quantized", "int"), ("fp8", "float-quantized", "float")):
        group = config[name]["config_groups"]["group_0"]
        assert config[name]["format"] == layout
        shared = {"num_bits": 8, "type": kind, "symmetric": True}
        assert group["weights"] == {**shared, "strategy": "channel", "dynamic": False}
        assert group["input_activations"] == {**shared, "strategy": "token", "dynamic": True}


def test_small_tiles_give_the_same_bytes(
    made: tuple[Path, Path], written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merged.tiles

    def small(rows: int, columns: int) -> list[tuple[int, int]]:
        return (
            [(at, min(at + 16, rows)) for at in range(0, rows, 16)] if rows % 16 == 0 else real(rows, columns)
        )

    monkeypatch.setattr(merged, "tiles", small)
    export(made[1], tmp_path / "again", format="w4a16", verify=False)
    first, second = tensors(written["w4a16"]), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_groups_and_refused_widths() -> None:
    groups = {width: choose_scheme("w4a16", {width, 256}).group for width in (128, 192, 96, 40)}
    assert groups == {128: 128, 192: 64, 96: 32, 40: None}
    assert choose_scheme("w8a8", {36}).group is None
    with pytest.raises(NotSupportedError, match="36 inputs") as caught:
        choose_scheme("w4a16", {36})
    assert "w8a8" in caught.value.fix


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_of_zeros_and_extremes_stay_finite(name: str) -> None:
    weight = torch.zeros(4, 32)
    weight[1] = torch.linspace(-3e4, 3e4, 32)
    weight[2, 5] = 1e-30
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        codes, scale = encode(weight, choose_scheme(name, {32}), dtype)
        assert bool(torch.isfinite(scale).all())
        assert codes.dtype is torch.uint8
        assert float(scale[0]) == 1.0


@pytest.mark.parametrize("name", QUANTISED)
def test_verify_measures_what_quantising_costs(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    report = export(made[1], tmp_path / name, format=name)
    rows = dict(report.checks)
    assert "14 tensors hold the codes nearest" in rows["weights equal base + adapter, rounded once"]
    told = rows["quality against base + adapter in float32"]
    assert "KL " in told
    assert "perplexity" in told
    assert "14 linear layers" in report.changes[0]
    assert "--served-model-name" in plan_serving(tmp_path / name).line()


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        held = tensors(folder)
        change(held)
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
            file.unlink()
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


DOWN = "model.layers.1.mlp.down_proj"
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "status": (edit_config(lambda c: c["quantization_config"].pop("quantization_status")),
               "quantization_status"),
    "key": (edit_config(lambda c: c.update(compression_config=c.pop("quantization_config"))),
            "compression_config"),
    "scale": (edit_tensors(lambda t: t.pop(f"{DOWN}.weight_scale")), "weight_scale is missing"),
    "shape": (edit_tensors(lambda t: t.pop(f"{DOWN}.weight_shape")), "weight_shape is missing"),
    "codes": (edit_tensors(lambda t: t.pop(f"{DOWN}.weight_packed")), "no codes"),
    "scales": (edit_tensors(lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(64, 1).bfloat16()})),
               "expected [64, 3]"),
    "head": (edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
             "lm_head is in 16 bit and not in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_lost_a_part_is_found(written: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(written["w4a16"], tmp_path / "broken"))
    assert verify(folder).passed
    breaking, said = BROKEN[kind]
    if kind == "head":
        edit_config(lambda c: c["quantization_config"].update(ignore=[]))(folder)
    breaking(folder)
    broken = [row for row in verify(folder).rows if row.ok is False]
    assert any(said in row.detail for row in broken), broken


def test_other_codes_are_found_by_the_deep_check(
    made: tuple[Path, Path], written: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(written["w4a16"], tmp_path / "broken"))

    def flip(held: dict[str, torch.Tensor]) -> None:
        held[f"{DOWN}.weight_packed"][3, 2] ^= 0b10

    edit_tensors(flip)(folder)
    report = verify(folder, deep=True, against=made[1], base=made[0])
    assert report.first_failure is not None
    assert f"{DOWN}.weight is not base + adapter: its codes" in report.first_failure.detail


def test_the_decoder_reads_what_the_encoder_wrote(made: tuple[Path, Path], written: dict[str, Path]) -> None:
    for folder in written.values():
        one = coded(Folder(folder))[f"{DOWN}.weight"]
        whole, step = decode(one, 0, 64)
        part, _ = decode(one, 10, 20)
        assert torch.equal(whole[10:20], part)
        assert step.shape == whole.shape == (64, 96)
        model = load_decoded(Folder(folder), made[0])
        assert torch.equal(model.get_parameter(f"{DOWN}.weight"), whole)


@pytest.mark.parametrize(("family", "said"), [("mixtral", "mixture of experts")])
def test_models_that_are_not_proven_are_refused(tmp_path: Path, family: str, said: str) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(NotSupportedError, match=said) as caught:
        export(adapter, tmp_path / "out", format="w4a16")
    assert "merged_16bit" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "said", "fix"),
    [
        ("nf4", "vllm-bnb-plugin", "use w4a16"),
        ("bitsandbytes", "vllm-bnb-plugin", "use w4a16"),
        ("nvfp4", "GPUs only", "use fp8"),
        ("gptq", "calibration", "use w4a16"),
        ("gguf", "GGUF", "gguf-q8_0"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(asked: str, said: str, fix: str) -> None:
    with pytest.raises(NotSupportedError, match=said) as caught:
        export("nowhere", "nowhere", format=asked)
    assert fix in caught.value.fix
