"""Quantised multimodal folders: the language model in codes, towers and projector the base's own bytes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch

from pronghorn.errors import NotSupportedError
from pronghorn.export.onto import MergeFormat
from pronghorn.export.run import export
from pronghorn.export.verify import verify
from pronghorn.export.verify_codes import coded, codes_complete
from pronghorn.export.verify_decode import DecodedWeights, load_decoded
from pronghorn.export.verify_deep import compute_promises
from pronghorn.export.verify_folder import Folder
from pronghorn.export.verify_stream import compare_weights
from tests import multimodal
from tests.export.damage import edit_json, edit_weights
from tests.export.test_multimodal import logits
from tests.export.test_quantized import tensors
from tests.multimodal import BASES

BESIDE = {
    "gemma3": [r"re:.*vision_tower\..*"],
    "mistral3": [r"re:.*vision_tower\..*", r"re:.*multi_modal_projector\..*"],
    "qwen2_5_vl": [r"re:.*visual\..*"],
    "qwen3_vl": [r"re:.*visual\..*"],
}


@pytest.mark.parametrize(("family", "layout"), BASES)
def test_every_layout_keeps_its_names_and_its_tower(family: str, layout: str, tmp_path: Path) -> None:
    multimodal.require(family, layout)
    base = multimodal.write_base(tmp_path / "base", family, layout)
    report = export(base, tmp_path / "out", format="w4a16", verify=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["ignore"] == [*BESIDE[family], "lm_head"]
    assert "left in 16 bit: all of v" in report.changes[0]
    weights = coded(Folder(tmp_path / "out"))
    assert len(weights) == 14 and all(re.search(r"layers\.\d\.(self_attn|mlp)", name) for name in weights)
    before, after = tensors(base), tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - weights.keys())
    assert compare_weights(Folder(tmp_path / "out"), Folder(base), None).problems == []
    decoded = load_decoded(Folder(tmp_path / "out"), base)
    truth = logits(multimodal.load(base))
    moved, size = ((one.square().mean().sqrt()) for one in (logits(decoded) - truth, truth))
    assert 0 < moved < size / 2**0.5  # unrelated logits are twice as far apart


def test_base_and_adapter_are_held_against_the_folder(tmp_path: Path) -> None:
    base = multimodal.write_base(tmp_path / "base", "qwen2_5_vl")
    adapter = multimodal.write_adapter(tmp_path / "adapter", base)
    export(adapter, tmp_path / "out", format="fp8", verify=False)
    found = compute_promises(tmp_path / "out", adapter, base)
    assert all(row.ok for row in found), found
    rows = {row.name: row.detail for row in found}
    assert "14 tensors hold the codes nearest" in rows["weights equal base + adapter, rounded once"]
    assert "the adapter by" in rows["quality against base + adapter in float32"]


@pytest.mark.parametrize("family", multimodal.FAMILIES)
def test_nf4_is_read_by_transformers_and_bitsandbytes(family: str, tmp_path: Path) -> None:
    multimodal.require(family, "hub")
    base = multimodal.write_base(tmp_path / "base", family)
    report = export(base, tmp_path / "out", format="merged_4bit", verify=False)
    truth, found = multimodal.load(base), multimodal.load(report.folder)
    packed = 0
    for name, module in found.named_modules():
        if isinstance(module, torch.nn.Linear):
            exact, ours = truth.get_submodule(name).weight, module.weight
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                ours = bitsandbytes.functional.dequantize_4bit(ours.data, ours.quant_state)
                packed += 1
                assert 0.05 < (ours - exact).norm() / exact.norm() < 0.11  # NF4's own
            else:
                assert torch.equal(ours, exact), name
    assert packed == 14
    settings = json.loads((report.folder / "config.json").read_text())["quantization_config"]
    skipped = ["lm_head", *(entry.removeprefix("re:.*").removesuffix(r"\..*") for entry in BESIDE[family])]
    assert {name.removeprefix("model.") for name in settings["llm_int8_skip_modules"]} == set(skipped)


def test_a_config_that_does_not_nest_is_multimodal_too(tmp_path: Path) -> None:
    """Qwen2.5-VL's on the hub has the language model's settings beside vision_config."""
    base = multimodal.write_base(tmp_path / "base", "qwen2_5_vl")
    config = json.loads((base / "config.json").read_text())
    text = config.pop("text_config")
    (base / "config.json").write_text(json.dumps({**text, **config}))
    export(base, tmp_path / "out", format="w8a8", verify=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["ignore"] == [*BESIDE["qwen2_5_vl"], "lm_head"]


@pytest.mark.parametrize("tower", ["audio_tower", "image_proj"])
@pytest.mark.parametrize(
    ("ignore", "told"), [("vision", True), ("own name", False), (r"re:.*{tower}\..*", False)]
)
def test_every_kind_of_tower_is_looked_at(
    folders: dict[str, Path], tmp_path: Path, tower: str, ignore: str, told: bool
) -> None:
    folder = Path(shutil.copytree(folders["w4a16"], tmp_path / "folder"))
    name = f"thinker.{tower}.layers.0.fc1"
    edit_weights(folder, lambda held: held.update({f"{name}.weight": torch.zeros(8, 8).bfloat16()}))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    own = {"vision": [], "own name": [name]}.get(ignore, [ignore.format(tower=tower)])
    settings["ignore"] += own
    edit_json(folder / "config.json", quantization_config=settings)
    row = codes_complete(Folder(folder))
    assert (f"{tower}.layers.0.fc1 is in 16 bit and not in" in row.detail) == told, row
    kept = {f"{name}.weight": torch.ones(8, 8)}
    assert torch.equal(DecodedWeights(Folder(folder), kept)[f"{name}.weight"], torch.ones(8, 8))


def test_families_that_are_not_proven_are_refused(tmp_path: Path) -> None:
    base = multimodal.write_base(tmp_path / "base")
    with pytest.raises(NotSupportedError, match="calibration of a multimodal model is not proven"):
        export(base, tmp_path / "out", format=MergeFormat("w4a16", calibrate=tmp_path / "rows.jsonl"))
    edit_json(base / "config.json", model_type="llava")
    with pytest.raises(
        NotSupportedError, match=r"is proven for gemma3, .* only, this is llava with gemma3_text"
    ):
        export(base, tmp_path / "out", format="w4a16")
    config = json.loads((base / "config.json").read_text())
    edit_json(
        base / "config.json", model_type="gemma3", text_config={**config["text_config"], "model_type": "x"}
    )
    with pytest.raises(NotSupportedError, match="this is gemma3 with x"):
        export(base, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()


CLASS = [f"model.vision_tower.encoder.layers.0.{name}" for name in (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2",
)] + [f"model.vision_tower.head.{name}" for name in ("attention.out_proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip
# the ignore list of a folder -> what transformers 5 and vLLM make of w4a16, and of w8a8; as the real ones
# did in tests/external/test_quantized_images.py
IGNORED = {
    "patterns": ([r"re:.*vision_tower\..*"], ("right", "right"), ("right", "right")),
    "nothing": ([], ("refused", "refused"), ("wrong logits", "wrong logits")),
    "names of transformers": (CLASS, ("right", "refused"), ("right", "wrong logits")),
    "names of the hub": (
        [name.replace("model.vision_tower.", "vision_tower.vision_model.") for name in CLASS],
        ("refused", "right"), ("wrong logits", "right"),
    ),
    "patterns of the hub": ([r"re:vision_tower.*"], ("refused", "right"), ("wrong logits", "right")),
    "a broken pattern": (["re:*("], ("refused", "refused"), ("wrong logits", "wrong logits")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("ignored")
    base = multimodal.write_base(home / "base")
    return {name: export(base, home / name, format=name, verify=False).folder for name in ("w4a16", "w8a8")}


@pytest.mark.parametrize("case", IGNORED)
def test_a_tower_that_engines_take_for_codes_is_told(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    ignore, *wanted = IGNORED[case]
    for (name, source), outcomes in zip(folders.items(), wanted, strict=True):
        folder = Path(shutil.copytree(source, tmp_path / name))
        settings = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_json(folder / "config.json", quantization_config={**settings, "ignore": [*ignore, "lm_head"]})
        report = verify(folder)
        told = tuple(report.engine(engine).outcome for engine in ("transformers 5", "vllm"))
        assert told == outcomes, str(report)
        assert report.passed == (case == "patterns")
        assert case == "patterns" or "vision_tower" in str(report.engine("vllm")) + str(report)
