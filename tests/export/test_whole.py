"""Formats made from a whole 16-bit folder: the weights are those of base + adapter in the same format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pronghorn.errors import AdapterError, ConfigError, ExportError, NotSupportedError
from pronghorn.export.formats import QUANTISED
from pronghorn.export.onto import MergeFormat
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_deep import compute_promises
from pronghorn.export.verify_folder import Folder
from pronghorn.export.verify_stream import compare_weights
from tests import multimodal, tiny
from tests.export.damage import edit_json, edit_weights
from tests.export.test_quantized import tensors

DOWN = "model.layers.1.mlp.down_proj"


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders have the same weight files, byte for byte."""
    left, right = ({file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
                   for folder in (one, other))  # fmt: skip
    return left == right and bool(left)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter and its merge in float32, where the merge in between rounds nothing."""
    home = tmp_path_factory.mktemp("exact")
    adapter = tiny.write_adapter(home / "adapter", tiny.write_base(home / "base", dtype=torch.float32))
    export(adapter, home / "merged", verify=False)
    return adapter, home / "merged"


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter and its merge in bfloat16."""
    home = tmp_path_factory.mktemp("rounded")
    adapter = tiny.write_adapter(home / "adapter", tiny.write_base(home / "base", "qwen2"))
    export(adapter, home / "merged", verify=False)
    return adapter, home / "merged"


@pytest.mark.parametrize("name", QUANTISED)
def test_a_merged_folder_becomes_what_base_and_adapter_become(
    exact: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    adapter, merged = exact
    export(adapter, tmp_path / "at once", format=name, verify=False)
    report = export(merged, tmp_path / "in two steps", format=name, verify=False)
    assert same_weights(tmp_path / "at once", tmp_path / "in two steps")
    configs = [
        json.loads((tmp_path / one / "config.json").read_text()) for one in ("at once", "in two steps")
    ]
    assert configs[0] == configs[1]
    assert report.adapter == report.base == merged
    assert (report.whole, report.changed_share, report.tensors_merged) == (True, None, 0)


def test_a_merge_in_16_bit_in_between_moves_few_codes(rounded: tuple[Path, Path], tmp_path: Path) -> None:
    """Merged rows are quantised before they are rounded; a folder's are rounded already."""
    for source, folder in zip(rounded, ("at once", "in two steps"), strict=True):
        export(source, tmp_path / folder, format="w8a8", verify=False)
    one, two = tensors(tmp_path / "at once"), tensors(tmp_path / "in two steps")
    coded = [name for name in one if one[name].dtype is torch.int8]
    apart = torch.cat([(one[name].int() - two[name].int()).abs().flatten() for name in coded])
    assert len(coded) == 14
    assert 0 < (apart > 0).float().mean() < 0.2 and apart.max() <= 2


def test_nf4_goes_through_16_bit_either_way(rounded: tuple[Path, Path], tmp_path: Path) -> None:
    for source, folder in zip(rounded, ("at once", "in two steps"), strict=True):
        export(source, tmp_path / folder, format="merged_4bit", verify=False)
    assert same_weights(tmp_path / "at once", tmp_path / "in two steps")


def test_it_is_verified_against_the_model_itself(rounded: tuple[Path, Path], tmp_path: Path) -> None:
    report = export(rounded[1], tmp_path / "out", format="w4a16")
    rows = {row.name: row.detail for row in report.checks}
    assert "14 tensors hold the codes nearest to the base;" in rows["weights equal the base, rounded once"]
    assert "quantising moves the logits" in rows["quality against the base in float32"]
    assert not any("adapter" in text for text in (*rows.values(), *rows) if "beside" not in text)
    assert [name for name, _, _ in report.quality][-1] == "size"
    assert report.changes[0].startswith("14 linear layers as 4-bit int")

    def flip(held: dict[str, torch.Tensor]) -> None:
        held[f"{DOWN}.weight_packed"][3, 2] ^= 0b100

    edit_weights(tmp_path / "out", flip)
    (problem,) = compare_weights(Folder(tmp_path / "out"), Folder(rounded[1]), None).problems
    assert f"{DOWN}.weight is not base + adapter: its codes" in problem


def test_the_language_model_of_a_multimodal_folder_alone(tmp_path: Path) -> None:
    base = multimodal.write_base(tmp_path / "base", dtype=torch.float32)
    adapter = multimodal.write_adapter(tmp_path / "adapter", base)
    export(adapter, tmp_path / "merged", verify=False)
    export(tmp_path / "merged", tmp_path / "text", format=MergeFormat(text_only=True), verify=False)
    rows = compute_promises(tmp_path / "text", tmp_path / "merged", tmp_path / "merged")
    assert all(row.ok for row in rows), rows
    assert {"weights equal the base, rounded once", "logits equal the base"} <= {row.name for row in rows}
    export(adapter, tmp_path / "at once", format=MergeFormat("w4a16", text_only=True), verify=False)
    export(tmp_path / "text", tmp_path / "in two steps", format="w4a16", verify=False)
    assert same_weights(tmp_path / "at once", tmp_path / "in two steps")
    config = json.loads((tmp_path / "at once" / "config.json").read_text())
    assert config == json.loads((tmp_path / "in two steps" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == ["lm_head"]


def test_what_makes_no_sense_is_refused(rounded: tuple[Path, Path], tmp_path: Path) -> None:
    merged = rounded[1]
    for format_ in ("merged_16bit", "adapter", "lora"):
        with pytest.raises(AdapterError, match="merged is a whole model, not an adapter") as caught:
            export(merged, tmp_path / "out", format=format_)
        assert "w4a16" in caught.value.fix
    for option, value in (("base", merged), ("adapter_name", "poet")):
        with pytest.raises(
            ConfigError, match=rf"is a whole model: {option} \(--{option.replace('_', '-')}\)"
        ):
            export(merged, tmp_path / "out", format="w4a16", **{option: value})
    with pytest.raises(ConfigError, match=r"is a whole model: onto \(--onto\) does nothing"):
        export(merged, tmp_path / "out", format=MergeFormat("w4a16", onto="original"))
    with pytest.raises(ConfigError, match="nothing was trained on rows"):
        verify(merged, deep=True, against=merged, rows=tmp_path / "rows.jsonl")
    quantised = Path(shutil.copytree(merged, tmp_path / "quantised"))
    config = json.loads((merged / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    for format_ in ("w4a16", "merged_4bit"):
        with pytest.raises(NotSupportedError, match="quantised is quantised already") as refused:
            export(quantised, tmp_path / "out", format=format_)
        assert refused.value.fix == "give the 16-bit model it was made from"
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_its_quantised_base_s_config_is_an_adapter(
    rounded: tuple[Path, Path], tmp_path: Path
) -> None:
    """Trainers save the config of the model that was trained along with the adapter."""
    adapter = Path(shutil.copytree(rounded[0], tmp_path / "adapter"))
    edit_json(adapter / "config.json", model_type="qwen2", quantization_config={"load_in_4bit": True})
    report = export(adapter, tmp_path / "out", format="w8a8", verify=False)
    assert (report.whole, report.adapter) == (False, adapter)


def test_a_model_s_own_code_is_copied_and_never_run(
    rounded: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    model = Path(shutil.copytree(rounded[1], tmp_path / "model"))
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit_json(model / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})
    export(model, tmp_path / "fp8", format="fp8", verify=False)
    assert (tmp_path / "fp8" / "own.py").is_file()
    monkeypatch.setattr("builtins.input", lambda _: "y")  # transformers asks where it knows no such type
    edit_json(model / "config.json", model_type="own")
    for format_ in ("w4a16", "merged_4bit"):
        with pytest.raises(ExportError, match=r"does not build the Qwen2ForCausalLM of .*model: ValueError"):
            export(model, tmp_path / "out", format=format_, verify=False)
    assert not ran.exists()


@pytest.mark.parametrize("given", [{"model_type": "nonesuch"}, {"hidden_act": "nosuch"}])
def test_a_config_that_builds_no_model_is_named(
    rounded: tuple[Path, Path], tmp_path: Path, given: dict[str, str]
) -> None:
    model = Path(shutil.copytree(rounded[1], tmp_path / "model"))
    edit_json(model / "config.json", **given)
    for format_ in ("w4a16", "merged_4bit"):
        with pytest.raises(ExportError, match=r"does not build the Qwen2ForCausalLM of .*model: ") as caught:
            export(model, tmp_path / "out", format=format_)
        assert "merged_16bit" in caught.value.fix
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_base_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def damage(held: dict[str, torch.Tensor]) -> None:
        held[name][3, 2] = value

    base = tiny.write_base(tmp_path / "base", dtype=torch.float16)
    edit_weights(base, damage)
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    cases = [(given, format_) for given in (base, adapter) for format_ in (*QUANTISED, "merged_4bit")]
    for given, format_ in [*cases, (adapter, "merged_16bit")]:
        with pytest.raises(ExportError, match=rf"^{name} of {base} holds NaN or infinity") as caught:
            export(given, tmp_path / "out", format=format_, verify=False)
        assert "copy or download the base again" in caught.value.fix
    assert not (tmp_path / "out").exists()
