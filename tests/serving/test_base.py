"""The base an adapter is served on: quantised ones are known by their values, others are refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pronghorn import LoraOptions, attach_lora, load
from pronghorn.adapters.record import AdapterRecord, write_record
from pronghorn.cli.main import app
from pronghorn.errors import AdapterError, NotSupportedError, VerificationError
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_codes import coded
from pronghorn.export.verify_deep import compute_promises
from pronghorn.export.verify_engines import VLLM, Refusal, judge_refused
from pronghorn.export.verify_folder import Folder
from pronghorn.serving import vllm_check
from pronghorn.serving.card import Result, model_card
from pronghorn.serving.vllm import plan_serving
from pronghorn.sources.resolve import is_compressed, resolve
from pronghorn.weights.folder import fingerprint, open_weights
from tests import four_bit, tiny
from tests.export.damage import DROP, drop, edit_json, edit_weights

# relative distance of normal values to their codes: half a step of 15 levels, 3 bits of mantissa, 7 numbers
ROUNDING = {"w4a16": (0.07, 0.13), "fp8": (0.02, 0.035), "nvfp4": (0.07, 0.13)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("made") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """As pronghorn saves it: with a record of its base."""
    folder = tiny.write_adapter(base.parent / "helper", base)
    recorded = fingerprint(open_weights(base))
    write_record(folder, AdapterRecord(str(base), base_path=str(base), base_fingerprint=recorded))
    return folder


@pytest.fixture(scope="module")
def quantised(base: Path) -> dict[str, Path]:
    """The base itself in each format: merged with an adapter that does nothing."""
    idle = tiny.write_adapter(base.parent / "idle", base, scale=0.0)
    names = (*ROUNDING, "w8a8")
    return {name: export(idle, base.parent / name, format=name, verify=False).folder for name in names}


@pytest.mark.parametrize("name", ROUNDING)
def test_an_adapter_is_served_on_its_base_quantised(
    adapter: Path, quantised: dict[str, Path], name: str
) -> None:
    plan = plan_serving(adapter, base=quantised[name])
    assert (plan.model, plan.adapter) == (quantised[name], adapter)
    (note,) = plan.notes
    found = re.search(r"is quantised \(.*\), so .* but for rounding \((0\.\d+) of their size\)", note)
    assert found, note
    least, most = ROUNDING[name]
    assert least < float(found[1]) < most
    done = CliRunner().invoke(app, ["serve", str(adapter), "--base", str(quantised[name]), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"note:    {note}" in done.output


def test_int8_is_refused_where_vllm_would_end_at_its_start(
    adapter: Path, quantised: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotSupportedError, match=r"8-bit integers \(w8a8\): vLLM's CPU build ends") as caught:
        plan_serving(adapter, base=quantised["w8a8"])
    assert "w4a16 or fp8" in caught.value.fix
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2**33, 2**34))
    assert plan_serving(adapter, base=quantised["w8a8"]).model == quantised["w8a8"]


def test_another_model_quantised_is_told_by_its_values(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", seed=5)
    idle = tiny.write_adapter(tmp_path / "idle", other, scale=0.0)
    export(idle, tmp_path / "w4a16", format="w4a16", verify=False)
    with pytest.raises(AdapterError, match=rf"is not {base} quantised: its weights are 1\.\d+ off") as caught:
        plan_serving(adapter, base=tmp_path / "w4a16")
    assert "--base" in caught.value.fix
    with pytest.raises(AdapterError, match="is not the base the adapter"):
        plan_serving(adapter, base=other)


def test_values_that_are_not_finite_are_no_rounding(
    adapter: Path, quantised: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = Path(shutil.copytree(quantised["fp8"], tmp_path / "broken"))
    edit_weights(broken, lambda held: held[f"{name}_scale"][3].fill_(torch.nan))
    with pytest.raises(AdapterError, match=rf"{name} has values in {broken} that are not finite"):
        plan_serving(adapter, base=broken)


@pytest.mark.parametrize("stored", ["16 bit", "nf4"])
def test_a_matrix_of_another_shape_is_of_another_model(tmp_path: Path, stored: str) -> None:
    write = four_bit.write_base if stored == "nf4" else four_bit.write_full
    trained = write(tmp_path / "trained", intermediate_size=128)
    other = tiny.write_base(tmp_path / "other")
    adapter = tiny.write_adapter(tmp_path / "adapter", other, target_modules=["q_proj"])
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(trained))
    idle = tiny.write_adapter(tmp_path / "idle", other, scale=0.0)
    fp8 = export(idle, tmp_path / "fp8", format="fp8", verify=False).folder
    told = rf"{fp8} is not {trained} quantised: model\..*_proj\.weight is \[\d+, \d+\], there \[64, 128\]"
    with pytest.raises(AdapterError, match=told) as caught:
        plan_serving(adapter, base=fp8)
    assert "--base" in caught.value.fix


def rescaled(held: dict[str, torch.Tensor]) -> None:
    """One scale per tensor, in FP8."""
    for name in [name for name in held if name.endswith(".weight_scale")]:
        held[name] = held[name].amax().reshape(1)


def with_zero_points(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.endswith(".weight_scale")]:
        rows, groups = held[name].shape
        held[name.replace("scale", "zero_point")] = torch.zeros(rows // 8, groups, dtype=torch.int32)


def packed_in_8_bits(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.endswith(".weight_packed")]:
        held[name] = torch.cat([held[name], held[name]], 1)


def with_input_scales(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if name.endswith(".weight_scale")]:
        held[name.replace("weight_scale", "input_global_scale")] = torch.ones(1)


# made of, how, part of the group, what it says there, what is told
FOREIGN: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str, dict[str, object], str]] = {
    "fp8, a scale per tensor": ("fp8", rescaled, "weights", {"strategy": "tensor"}, "strategy 'tensor'"),
    "w4a16 with zero points": ("w4a16", with_zero_points, "weights", {"symmetric": False}, "symmetric False"),
    "w8a16": ("w4a16", packed_in_8_bits, "weights", {"num_bits": 8}, "num_bits 8"),
    "nvfp4 with inputs in 4 bit": (
        "nvfp4", with_input_scales, "input_activations", {"num_bits": 4, "dynamic": "local"}, "a stored scale"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_codes_are_not_known_and_no_base_of_adapters(
    base: Path, adapter: Path, quantised: dict[str, Path], tmp_path: Path, case: str
) -> None:
    name, change, part, says, told = FOREIGN[case]
    folder = Path(shutil.copytree(quantised[name], tmp_path / "foreign"))
    edit_weights(folder, change)
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group[part] = {**(group[part] or {}), **says}
    edit_json(folder / "config.json", **config)
    told = rf"{told}.* in the layout '.*'"
    report = verify(folder)
    assert all(row.ok is not False for row in report.rows), str(report)
    (parts,) = (row for row in report.rows if row.name == "every quantised weight has all its parts")
    assert parts.ok is None and re.match(rf"{told} is not known here", parts.detail), parts
    (deep,) = compute_promises(folder, adapter, base)
    assert deep.ok is None and re.match(told, deep.detail), deep
    outcomes = {report.engine(engine).outcome for engine in ("transformers 4", "transformers 5", "vllm")}
    assert outcomes == {"unclear"}
    assert "--format w4a16" in report.engine("vllm").fixes[0]
    with pytest.raises(NotSupportedError, match=rf"{folder} is quantised with {told}") as caught:
        plan_serving(adapter, base=folder)
    assert "symmetric codes and a scale per group or row" in caught.value.fix
    assert plan_serving(folder).model == folder, "by itself: vLLM may have code for it"
    (fits,) = (row for row in verify(adapter, base=folder).rows if row.name == "every module is in the base")
    assert fits.ok is None and re.match(told, fits.detail)


def test_a_nested_quantization_config_is_one(
    adapter: Path, quantised: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(quantised["w8a8"], tmp_path / "nested"))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    nested = {"quantization_config": settings}
    edit_json(folder / "config.json", quantization_config=DROP, language_config=nested)
    assert is_compressed(resolve(folder, to_serve=True))
    assert len(coded(Folder(folder))) == 14
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NotSupportedError, match=r"8-bit integers \(w8a8\)"):
        plan_serving(adapter, base=folder)


def test_an_adapter_is_not_applied_twice(adapter: Path, tmp_path: Path) -> None:
    merged = export(adapter, tmp_path / "merged", format="w4a16", verify=False).folder
    with pytest.raises(AdapterError, match=r"merged in already \((9\d|10\d)% of its update\)") as caught:
        plan_serving(adapter, base=merged)
    assert caught.value.fix == f"serve it by itself: pronghorn serve {merged}"


def test_without_the_base_of_the_training_it_is_said_what_was_not_checked(
    adapter: Path, quantised: dict[str, Path], tmp_path: Path
) -> None:
    alone = shutil.copytree(adapter, tmp_path / "alone")
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/base"}))
    (alone / "pronghorn.json").unlink()
    (note,) = plan_serving(alone, base=quantised["w4a16"]).notes
    assert "not here to compare values with" in note
    assert "whether it is the same model, without the adapter merged in, was not checked" in note


def damaged(folder: Path, change: Callable[[Path], object], target: Path) -> Path:
    shutil.copytree(folder, target)
    change(target)
    return target


def test_names_shapes_and_parts_of_codes_are_checked(
    adapter: Path, quantised: dict[str, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj"
    broken = damaged(quantised["w4a16"], drop(f"{name}.weight_scale"), tmp_path / "broken")
    with pytest.raises(VerificationError, match=rf"config.json asks for: {name}.weight is missing"):
        plan_serving(adapter, base=broken)
    wide = tiny.write_base(tmp_path / "wide", intermediate_size=128)
    wider = tiny.write_adapter(tmp_path / "wider", wide, target_modules=["up_proj"])
    with pytest.raises(AdapterError, match=r"update of .*up_proj is \[128, 64\], the class of .* \[96, 64\]"):
        plan_serving(wider, base=quantised["fp8"])
    for folder in (quantised["w4a16"], quantised["w8a8"]):
        fits = {row.name: row for row in verify(adapter, base=folder).rows}["every module is in the base"]
        assert (fits.ok, fits.detail) == (True, "14 modules by name and widths")
        (row,) = (row for row in verify(wider, base=folder).rows if row.name == fits.name)
        assert row.ok is False
        assert "the adapter is for [128, 64], the base has [96, 64]" in row.detail


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_bitsandbytes_is_refused_with_both_ways_out(tmp_path: Path, quantization: str) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = four_bit.write_full(tmp_path / "base")
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    if quantization == "nf4":
        folder = four_bit.write_base(tmp_path / "stored")
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
        folder = tmp_path / "stored"
        AutoModelForCausalLM.from_pretrained(base, quantization_config=settings).save_pretrained(folder)
    with pytest.raises(NotSupportedError, match=r"by bitsandbytes \(bitsandbytes, .*reads no more") as caught:
        plan_serving(adapter, base=folder)
    assert "16-bit model it was made from with --base" in caught.value.fix
    assert f"pronghorn export {adapter} DIR --format w4a16" in caught.value.fix


def test_an_adapter_trained_in_4_bit_says_so_wherever_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = four_bit.write_base(tmp_path / "stored")
    full = tmp_path / "stored-full"
    model = attach_lora(load(stored)[0], LoraOptions(r=4))
    four_bit.randomise(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    told = "the adapter was trained on the decoded NF4 values of 14 tensors; on other values of that base"
    with pytest.raises(NotSupportedError, match="vLLM reads no more"):
        plan_serving(tmp_path / "adapter")
    (note,) = plan_serving(tmp_path / "adapter", base=full).notes  # known by its values
    assert note.startswith(told)
    report = export(tmp_path / "adapter", tmp_path / "served", format="adapter", verify=False)
    assert str(report.onto).startswith(told)
    assert told in str(report)
    gguf = export(tmp_path / "adapter", tmp_path / "gguf", format="gguf-lora", verify=False)
    assert gguf.onto == report.onto
    for kind in ("lora", "adapter"):
        card = model_card("owner/name", Result(report.folder, kind, report.adapter, stored, ()))
        assert f"- {told}" in card.split("## How it was verified")[0]
    (again,) = plan_serving(tmp_path / "served", base=full).notes
    assert again == note
    idle = tiny.write_adapter(tmp_path / "idle", full, scale=0.0)
    w4a16 = export(idle, tmp_path / "w4a16", format="w4a16", verify=False).folder
    first, second = plan_serving(tmp_path / "served", base=w4a16).notes
    assert first == note
    assert re.search(rf"values are those of {stored} but for rounding \(0\.1\d\d", second)
    plain = attach_lora(load(full)[0], LoraOptions(r=4))
    plain.save_pretrained(tmp_path / "plain")
    assert plan_serving(tmp_path / "plain").notes == ()


def test_verify_of_an_adapter_asks_the_pre_flight(base: Path, tmp_path: Path) -> None:
    dora = tiny.write_adapter(tmp_path / "dora", base, use_dora=True)
    report = verify(dora)
    assert report.engines == (), "it costs seconds, and was not asked for"
    with pytest.raises(VerificationError, match=r"in vllm: does not load.*\n?.*vLLM refuses DoRA") as caught:
        report.raise_unless_served("transformers,vllm")
    assert "merged_16bit" in caught.value.fix
    (dora / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(VerificationError, match="breaks a promise: adapter weights are complete"):
        verify(dora).raise_unless_served("transformers")


def test_what_the_pre_flight_says_becomes_the_verdict(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny.write_base(tmp_path / "wide", intermediate_size=128)
    wider = tiny.write_adapter(tmp_path / "wider", wide, target_modules=["up_proj"])
    dora = tiny.write_adapter(tmp_path / "dora", base, use_dora=True)
    expected: tuple[tuple[tuple[Path, ...], str, bool | None], ...] = (
        ((adapter,), "right", True),
        ((dora, base), "refused", False),
        ((wider, base), "wrong logits", False),  # vLLM would not notice
        ((adapter, wide), "unclear", None),  # not its base: what it is on its own is not known
    )
    for places, outcome, ok in expected:
        vllm_check.main(*map(str, places))
        said = (Refusal(**one) for one in json.loads(capsys.readouterr().out))
        found = judge_refused(VLLM, said)
        assert (found.outcome, found.ok) == (outcome, ok)
