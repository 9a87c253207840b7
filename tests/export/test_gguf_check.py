"""``verify --for llama.cpp``: what the GGUF formats refuse of a folder is told, each reason with its fix."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pronghorn.errors import ConfigError, VerificationError
from pronghorn.export.gguf_check import refusals
from pronghorn.export.verify import VerifyReport, check_files, verify
from pronghorn.export.verify_engines import LLAMA
from tests import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("check") / "base", "llama")


def test_every_reason_is_told_with_its_fix(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "folder")
    config, tokenizer = (folder / name for name in ("config.json", "tokenizer.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_act": "gelu"}))
    spec = json.loads(tokenizer.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\d+"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    tokenizer.write_text(json.dumps(spec))
    report = verify(folder)
    assert LLAMA not in [one.engine for one in report.engines], "it costs seconds, and was not asked for"
    found = report.asking("vllm,llama.cpp").engine(LLAMA)
    assert (found.outcome, found.ok) == ("refused", False)
    first, second = found.reasons
    assert "hidden_act is 'gelu'; llama.cpp's llama computes silu" in first
    assert r"splits text in a way not known here (\d+" in second
    assert found.fixes == ("serve the merged folder with vLLM or transformers (--format merged_16bit)",)


def test_an_adapter_is_told_as_well(base: Path, tmp_path: Path) -> None:
    plain = tiny.write_adapter(tmp_path / "plain", base)
    assert refusals(plain, base) == ()
    dora = tiny.write_adapter(tmp_path / "dora", base, use_dora=True)
    with pytest.raises(VerificationError, match=r"in llama.cpp: does not load.*\n?.*DoRA") as error:
        verify(dora, base=base).raise_unless_served("llama.cpp")
    assert "merge it" in error.value.fix
    embedding = tiny.write_adapter(tmp_path / "embedding", base, target_modules=["embed_tokens", "q_proj"])
    (refused,) = refusals(embedding, base)
    assert "llama.cpp applies adapters to linear layers only" in refused.message


def test_a_bias_that_no_class_reads_is_refused(tmp_path: Path) -> None:
    """llama.cpp would add it, transformers does not; the other way round it would be missing."""
    from tests.export.damage import drop, edit_weights

    llama, qwen = (tiny.write_base(tmp_path / family, family) for family in ("llama", "qwen2"))
    name = "model.layers.1.self_attn.q_proj.bias"
    edit_weights(llama, lambda tensors: tensors.update({name: torch.ones(64, dtype=torch.bfloat16)}))
    (refused,) = refusals(llama)
    assert f"tensors have no place in llama.cpp's llama, first {name}" in refused.message
    drop(name)(qwen)
    (refused,) = refusals(qwen)
    assert f"lacks {name}" in refused.message


def test_a_gguf_file_is_for_llama_cpp_only(tmp_path: Path) -> None:
    report = VerifyReport(tmp_path / "model.gguf", "gguf", ())
    report.raise_unless_served("llama.cpp")
    with pytest.raises(ConfigError, match=r"is GGUF, and what vllm makes of that is not told here"):
        report.raise_unless_served("vllm,llama.cpp")
    with pytest.raises(ConfigError, match=r"known are transformers, .*llama\.cpp"):
        check_files(tmp_path, None).raise_unless_served("ollama")
