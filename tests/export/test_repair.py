"""A repaired copy keeps every promise, holds the same bytes, and appears only when it is right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pronghorn.cli.main import app
from pronghorn.errors import ExportError, NotSupportedError, VerificationError
from pronghorn.export.repair import repair
from pronghorn.export.verify import verify
from tests.export.verdict_folders import CASES, Case, write_folders

# case -> what the repair says; with the base where the case has one to look at
ALONE = {
    "llama as transformers 5 writes it": "in words that both generations",
    "gemma3 as transformers 5 writes it": "the keys of transformers 4",
    "PEFT names": "21 tensors renamed",
    "base_layer in some names": "2 tensors renamed",
    "names of torch.compile": "21 tensors renamed",
    "names without model.": "20 tensors renamed",
    "names of a multimodal folder": "28 tensors renamed",
    "unknown tensor": "model.extra.weight left out",
    "stale single file": "model.safetensors left out",
    "no index": "index written anew",
    "index forgets tensors": "index written anew",
    "bitsandbytes config left": "quantization_config left out",
    "adapter left beside": "adapter_model.safetensors left out",
    "declared float16, stored bfloat16": "dtype bfloat16, as stored",
    "end of the text, not of the turn": "eos_token_id [3, 1]",
}
WITH_BASE = {
    "rope settings lost": "config.json: the base's",
    "rope settings contradict each other": "the keys of transformers 4",
    "stray head although tied": "lm_head.weight left out",
    "untied without a head": "config.json: the base's",
    "fewer layers in the config": "config.json: the base's",
    "more layers in the config": "config.json: the base's",
    "no config": "config.json: the base's",
    "no tokenizer": "tokenizer: the base's",
    "no chat template": "chat_template.jinja: the base's",
    "tokenizer of another model": "tokenizer: the base's",
}
REFUSED = {
    "one linear lost": "q_proj.weight is missing",
    "head of zeros": "lm_head.weight is zero",
    "shard missing": "is named by",
    "fp8 without scales": "no quantization_config",
    "stray head although tied": "other than the embeddings is stored",
}
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    wanted: list[Case] = [BY_NAME[name] for name in {**ALONE, **WITH_BASE, **REFUSED}]
    return write_folders(tmp_path_factory.mktemp("repair"), wanted, train=False)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("model*.safetensors") for name, x in load_file(file).items()}


@pytest.mark.parametrize("name", [*ALONE, *WITH_BASE])
def test_a_repaired_copy_is_right_in_every_engine(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    good = folders[name].parent / "good" / BY_NAME[name].family
    base = good if name in WITH_BASE else None
    done = repair(folders[name], tmp_path / "copy", base=base)
    assert {**ALONE, **WITH_BASE}[name] in "; ".join(done.changes)
    report = verify(tmp_path / "copy", base=base)
    assert report.passed, str(report)
    assert {one.outcome for one in report.engines} == {"right"}, str(report)
    ours, theirs = tensors(tmp_path / "copy"), tensors(good)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_right_is_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    with pytest.raises(NotSupportedError, match="cannot be repaired") as caught:
        repair(folders[name], tmp_path / "copy")
    assert REFUSED[name] in caught.value.message
    assert not (tmp_path / "copy").exists()


def test_without_the_base_it_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError) as caught:
        repair(folders["fewer layers in the config"], tmp_path / "copy")
    assert "--base" in caught.value.fix


def test_a_copy_that_would_not_keep_its_promises_does_not_appear(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Another model's base: its config asks for other sizes."""
    other = folders["stray head although tied"].parent / "good" / "gemma3"
    with pytest.raises((VerificationError, NotSupportedError)):
        repair(folders["no config"], tmp_path / "copy", base=other)
    assert list(tmp_path.iterdir()) == []


def test_the_target_lies_apart_and_is_empty(folders: dict[str, Path], tmp_path: Path) -> None:
    broken = folders["no index"]
    with pytest.raises(ExportError, match="is the folder"):
        repair(broken, broken)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        repair(broken, tmp_path)


def test_the_command(folders: dict[str, Path], tmp_path: Path) -> None:
    runner, broken = CliRunner(), str(folders["llama as transformers 5 writes it"])
    told = runner.invoke(app, ["verify", broken, "--for", "vllm,transformers5"])
    assert told.exit_code == 0, told.output
    with pytest.raises(VerificationError, match="in transformers 4: does not load") as caught:
        runner.invoke(app, ["verify", broken, "--for", "transformers"], catch_exceptions=False)
    assert "--fix OUT" in caught.value.fix
    fixed = runner.invoke(
        app, ["verify", broken, "--fix", str(tmp_path / "copy"), "--for", "vllm,transformers"]
    )
    assert fixed.exit_code == 0, fixed.output
    assert "config.json: rope settings also in the keys of transformers 4" in fixed.output
