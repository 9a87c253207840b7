"""Quantised formats: the codes are the nearest to base + adapter, and a folder that lost a part is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pronghorn.errors import ConfigError, MissingDependencyError, NotSupportedError, PronghornError
from pronghorn.export import merged
from pronghorn.export.codes import choose_scheme, encode
from pronghorn.export.formats import QUANTISED
from pronghorn.export.onto import MergeFormat
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_codes import coded
from pronghorn.export.verify_decode import decode, load_decoded
from pronghorn.export.verify_folder import Folder
from pronghorn.export.verify_stream import compare_weights
from pronghorn.serving.vllm import plan_serving
from tests import tiny
from tests.stack import experts_are_stacked


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


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def by_hand_nvfp4(weight: torch.Tensor, divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values on the E2M1 grid and FP8 scales of a float32 matrix, one group after the other."""
    values, scales = torch.zeros_like(weight), []
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], 16):
            part = weight[row, start : start + 16]
            scale = (part.abs().max() / 6 * divisor).to(torch.float8_e4m3fn)
            scales.append(scale.float())
            units = part * divisor / scale.float()
            nearest = E2M1[(units.abs()[:, None] - E2M1).abs().argmin(1)]
            values[row, start : start + 16] = nearest * units.sign()
    return values, torch.stack(scales).reshape(weight.shape[0], -1)


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


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "fp8"])
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


def test_nvfp4_holds_the_nearest_codes_and_one_divisor_for_what_engines_fuse(
    made: tuple[Path, Path], written: dict[str, Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[0], dtype=torch.float32)
    truth = PeftModel.from_pretrained(model, made[1]).merge_and_unload().state_dict()
    found = tensors(written["nvfp4"])
    modules = sorted(key.removesuffix(".weight_packed") for key in found if key.endswith(".weight_packed"))
    assert len(modules) == 14
    for module in modules:
        siblings = [one for one in modules if one.rpartition(".")[0] == module.rpartition(".")[0]]
        largest = max(float(truth[f"{one}.weight"].abs().max()) for one in siblings)
        divisor = found[f"{module}.weight_global_scale"]
        assert divisor.tolist() == pytest.approx([448 * 6 / largest], rel=1e-6)
        values, scales = by_hand_nvfp4(truth[f"{module}.weight"], float(divisor))
        assert torch.equal(found[f"{module}.weight_scale"].float(), scales)
        packed = found[f"{module}.weight_packed"]
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape_as(values).long()
        assert torch.equal(E2M1[codes & 7] * (1 - 2 * (codes >> 3)), values)
        assert f"{module}.weight_shape" not in found


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
    assert config["nvfp4"]["format"] == "nvfp4-pack-quantized"
    assert config["nvfp4"]["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16,
        "dynamic": False, "scale_dtype": "torch.float8_e4m3fn",
    }  # fmt: skip
    assert config["nvfp4"]["config_groups"]["group_0"]["input_activations"] is None
    for name, layout, kind in (("w8a8", "int-quantized", "int"), ("fp8", "float-quantized", "float")):
        group = config[name]["config_groups"]["group_0"]
        assert config[name]["format"] == layout
        shared = {"num_bits": 8, "type": kind, "symmetric": True}
        assert group["weights"] == {**shared, "strategy": "channel", "dynamic": False}
        assert group["input_activations"] == {**shared, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("name", ["w4a16", "nvfp4"])
def test_small_tiles_give_the_same_bytes(
    made: tuple[Path, Path],
    written: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    real = merged.tiles

    def small(rows: int, columns: int) -> list[tuple[int, int]]:
        return (
            [(at, min(at + 16, rows)) for at in range(0, rows, 16)] if rows % 16 == 0 else real(rows, columns)
        )

    monkeypatch.setattr(merged, "tiles", small)
    export(made[1], tmp_path / "again", format=name, verify=False)
    first, second = tensors(written[name]), tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)


def test_groups_and_refused_widths() -> None:
    groups = {width: choose_scheme("w4a16", {width, 256}).group for width in (128, 192, 96, 40)}
    assert groups == {128: 128, 192: 64, 96: 32, 40: None}
    assert choose_scheme("w8a8", {36}).group is None
    with pytest.raises(NotSupportedError, match="36 inputs") as caught:
        choose_scheme("w4a16", {36})
    assert "w8a8" in caught.value.fix
    assert choose_scheme("nvfp4", {48}).group == 16
    with pytest.raises(NotSupportedError, match="nvfp4 has groups of 16, and a linear layer has 40 inputs"):
        choose_scheme("nvfp4", {40})


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_of_zeros_and_extremes_stay_finite(name: str) -> None:
    weight = torch.zeros(4, 32)
    weight[1] = torch.linspace(-3e4, 3e4, 32)
    weight[2, 5] = 1e-30
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        codes, scale = encode(weight, choose_scheme(name, {32}), dtype, 448 * 6 / 3e4)
        assert bool(torch.isfinite(scale.float()).all())
        assert codes.dtype is torch.uint8
        assert bool((scale[0].float() > 0).all()) and (name == "nvfp4" or float(scale[0]) == 1.0)


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "nvfp4"])
def test_verify_measures_what_quantising_costs(made: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    report = export(made[1], tmp_path / name, format=name)
    rows = {row.name: row.detail for row in report.checks}
    assert "14 tensors hold the codes nearest" in rows["weights equal base + adapter, rounded once"]
    told = rows["quality against base + adapter in float32"]
    assert "KL " in told
    assert "perplexity" in told
    assert "14 linear layers" in report.changes[0]
    assert report.changes[0].endswith("left in 16 bit: lm_head")
    figures = {what: (before, after) for what, before, after in report.quality}
    assert list(figures) == ["perplexity", "KL, nats a token", "best token equal", "size"]
    assert 0 < float(figures["KL, nats a token"][1]) < 1
    held = sum(one.nbytes for one in tensors(tmp_path / name).values())
    assert figures["size"][1].startswith(f"{held / 1e6:,.1f} MB")
    assert all(what in str(report) for what in figures)
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
    "divisor": (edit_tensors(lambda t: t.pop(f"{DOWN}.weight_global_scale")),
                "weight_global_scale is missing"),
    "head": (edit_tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})),
             "lm_head is in 16 bit and not in"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_lost_a_part_is_found(written: dict[str, Path], tmp_path: Path, kind: str) -> None:
    name = "nvfp4" if kind == "divisor" else "w4a16"
    folder = Path(shutil.copytree(written[name], tmp_path / "broken"))
    assert verify(folder).passed
    assert verify(folder).engine("vllm").outcome == ("unclear" if name == "nvfp4" else "right")
    breaking, said = BROKEN[kind]
    if kind == "head":
        edit_config(lambda c: c["quantization_config"].update(ignore=[]))(folder)
    breaking(folder)
    broken = [row for row in verify(folder).rows if row.ok is False]
    assert any(said in row.detail for row in broken), broken


@pytest.mark.parametrize("name", ["w4a16", "nvfp4"])
def test_other_codes_are_found_by_the_deep_check(
    made: tuple[Path, Path], written: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(written[name], tmp_path / "broken"))

    def flip(held: dict[str, torch.Tensor]) -> None:
        held[f"{DOWN}.weight_packed"][3, 2] ^= 0b100

    edit_tensors(flip)(folder)
    (problem,) = compare_weights(Folder(folder), Folder(made[0]), made[1]).problems
    assert f"{DOWN}.weight is not base + adapter: its codes" in problem


def test_the_decoder_reads_what_the_encoder_wrote(made: tuple[Path, Path], written: dict[str, Path]) -> None:
    for folder in written.values():
        one = coded(Folder(folder))[f"{DOWN}.weight"]
        whole, step = decode(one, 0, 64)
        part, _ = decode(one, 10, 20)
        assert torch.equal(whole[10:20], part)
        assert step.shape == whole.shape == (64, 96)
        model = load_decoded(Folder(folder), made[0])
        assert torch.equal(model.get_parameter(f"{DOWN}.weight"), whole)


MIXTURES = {"mixtral": ("block_sparse_moe", "w1", "w3"), "qwen3_moe": ("mlp", "gate_proj", "up_proj")}


@pytest.mark.parametrize(("family", "name"), [("mixtral", "fp8"), ("qwen3_moe", "w4a16")])
def test_experts_are_quantised_and_routers_are_not(tmp_path: Path, family: str, name: str) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    report = export(adapter, tmp_path / "out", format=name, verify=False)
    assert verify(tmp_path / "out", base=base).passed
    assert compare_weights(Folder(tmp_path / "out"), Folder(base), adapter).coded_tensors == 32
    assert ".gate (2)" in report.changes[0] and report.changes[0].startswith("32 linear layers")
    module, gate, up = MIXTURES[family]
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["re:.*\\.gate$", "lm_head"]
    assert verify(tmp_path / "out").engine("vllm").outcome == "unclear"
    held = tensors(tmp_path / "out")
    assert held[f"model.layers.0.{module}.gate.weight"].dtype is torch.bfloat16
    model = load_decoded(Folder(tmp_path / "out"), base)
    weights = coded(Folder(tmp_path / "out"))
    parts = [weights[f"model.layers.1.{module}.experts.3.{leaf}.weight"] for leaf in (gate, up)]
    decoded = torch.cat([decode(one, 0, one.shape[0])[0] for one in parts])
    if experts_are_stacked():
        experts = model.get_submodule("model.layers.1.mlp.experts").gate_up_proj[3]
    else:
        expert = model.get_submodule(f"model.layers.1.{module}.experts.3")
        experts = torch.cat([expert.get_submodule(leaf).weight for leaf in (gate, up)])
    assert torch.equal(experts, decoded)


@pytest.mark.parametrize(("family", "name", "said"), [
    ("mixtral", "w8a8", "does not read such experts"), ("qwen3_moe", "nvfp4", "does not read such experts"),
])  # fmt: skip
def test_mixtures_that_no_engine_reads_are_refused(tmp_path: Path, family: str, name: str, said: str) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    with pytest.raises(NotSupportedError, match=said) as caught:
        export(adapter, tmp_path / "out", format=name)
    assert "w4a16 or fp8" in caught.value.fix
    with pytest.raises(NotSupportedError, match="calibration of a mixture of experts is not proven"):
        export(adapter, tmp_path / "out", format=MergeFormat("w4a16", calibrate=tmp_path / "rows.jsonl"))
    edit_config(lambda config: config.update(model_type="olmoe"))(base)
    with pytest.raises(NotSupportedError, match="for mixtral and qwen3_moe only, this is olmoe"):
        export(adapter, tmp_path / "out", format="fp8")
    stack = {"model.layers.0.mlp.experts.down_proj": torch.zeros(4, 64, 32).bfloat16()}
    edit_tensors(lambda held: held.update(stack))(base)
    with pytest.raises(NotSupportedError, match=r"experts\.down_proj holds all experts of a layer"):
        export(adapter, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "said", "fix"),
    [
        ("nf4", "vllm-bnb-plugin", "use w4a16"),
        ("bitsandbytes", "vllm-bnb-plugin", "use w4a16"),
        ("mxfp4", "GPUs only", "use nvfp4"),
        ("gptq", "calibration", "use w4a16"),
        ("gguf", "GGUF", "gguf-q8_0"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(asked: str, said: str, fix: str) -> None:
    with pytest.raises(NotSupportedError, match=said) as caught:
        export("nowhere", "nowhere", format=asked)
    assert fix in caught.value.fix


@pytest.mark.parametrize(("name", "python", "error", "said"), [
    ("fp8", None, ConfigError, "calibrate does nothing for the format fp8"),
    ("gguf-q8_0", None, ConfigError, "calibrate does nothing for the format gguf-q8_0"),
    ("w4a16", Path("/no/python"), MissingDependencyError, "/no/python has no llmcompressor"),
])  # fmt: skip
def test_calibration_that_cannot_be_is_refused_first(
    made: tuple[Path, Path], tmp_path: Path, name: str, python: Path | None, error: type[Exception], said: str
) -> None:
    wanted = MergeFormat(name, calibrate=tmp_path / "rows.jsonl", calibrate_python=python)
    with pytest.raises(error, match=said) as caught:
        export(made[1], tmp_path / "out", format=wanted)
    assert isinstance(caught.value, PronghornError)
    assert python is None or "pronghorn[gptq]" in caught.value.fix
    with pytest.raises(ConfigError, match="no rows to calibrate on"):
        MergeFormat("w4a16", calibrate_python=Path("/no/python"))
    assert not any(tmp_path.iterdir())


MEMORY = """
import resource, sys
from pathlib import Path
from pronghorn.export.run import export
import transformers, torch
torch.ones(99, 99) @ torch.ones(99, 99)
export(Path(sys.argv[1]), Path(sys.argv[2]) / "small", format=sys.argv[4], verify=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export(Path(sys.argv[3]), Path(sys.argv[2]) / "large", format=sys.argv[4], verify=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4a16", "fp8", "nvfp4"])
def test_extra_memory_is_bounded_whatever_the_size(
    made: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    """200 MB of weights in three tensors take less than 64 MiB more than a tiny model does."""
    base = tiny.write_base(
        tmp_path / "base", "llama", hidden_size=1024, intermediate_size=32_768, num_hidden_layers=1
    )
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["up_proj", "down_proj"])
    command = [sys.executable, "-c", MEMORY, str(made[1]), str(tmp_path), str(adapter), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 64 * 2**20
    assert len(coded(Folder(tmp_path / "large"))) == 7
