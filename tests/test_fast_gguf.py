"""model.save_pretrained_gguf: Unsloth's names where they mean the same, and a reason where there is none."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from pronghorn.errors import AdapterError, ConfigError, MissingDependencyError, NotSupportedError
from pronghorn.export import gguf_engine
from pronghorn.fast.model import FastLanguageModel
from tests import tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model with an adapter that does something, and its tokenizer."""
    base = tiny.write_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3")
    model, tokenizer = FastLanguageModel.from_pretrained(base)
    model = FastLanguageModel.get_peft_model(model, r=4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, tokenizer


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_names_of_notebooks(
    trained: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = trained
    report = model.save_pretrained_gguf(
        tmp_path / "one", tokenizer, quantization_method=["not_quantized", "fast_quantized"]
    )
    assert report.verified
    assert "gguf-bf16,q8_0 on" in capsys.readouterr().out
    assert (
        inspect.signature(model.save_pretrained_gguf).parameters["quantization_method"].default
        == "fast_quantized"
    )
    assert names(tmp_path / "one") == {"model-BF16.gguf", "model-Q8_0.gguf", "Modelfile"}
    assert hasattr(model, "peft_config")  # the live model stays as it is


def test_the_trained_weights_are_in_the_file(trained: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = trained
    neutral = {"first_conversion": None, "push_to_hub": False, "token": None, "imatrix_file": None}
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, "f32", **neutral)
    read = {one.name: one for one in GGUFReader(tmp_path / "out" / "model-F32.gguf").tensors}
    found = read["blk.0.ffn_up.weight"]
    values = dequantize(found.data, found.tensor_type).reshape(found.shape[::-1])
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    expected = (layer.base_layer.weight.float() + layer.get_delta_weight("default").float()).detach().numpy()
    assert np.abs(values - expected).max() <= np.abs(expected).max() * 2.0**-8  # rounded once to bfloat16
    assert np.abs(values - layer.base_layer.weight.detach().float().numpy()).max() > 0.01


def test_the_adapter_alone(trained: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = trained
    report = model.save_pretrained_gguf(tmp_path / "lora", tokenizer, save_method="lora")
    assert report.format == "gguf-lora"
    assert names(tmp_path / "lora") == {"adapter.gguf"}


def test_kinds_of_the_quantiser_need_it(
    trained: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_engine, "find_spec", lambda _: None)
    for method in ("q4_k_m", "quantized", "q5_k"):
        with pytest.raises(MissingDependencyError, match="own quantiser"):
            trained[0].save_pretrained_gguf(tmp_path / "x", trained[1], quantization_method=method)
    with pytest.raises(MissingDependencyError, match="has no llama_cpp"):
        trained[0].save_pretrained_gguf(tmp_path / "x", trained[1], "q4_k_m", llama_python=sys.executable)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"quantization_method": "q9"}, NotSupportedError, "'q9' is not a kind of GGUF"),
        ({"quantization_method": "iq2_xs"}, NotSupportedError, "importance matrix"),
        ({"imatrix_file": "x.dat"}, NotSupportedError, "no importance matrix is used"),
        ({"first_conversion": "f16"}, NotSupportedError, "starts from the merged weights"),
        ({"push_to_hub": True}, NotSupportedError, "nothing is uploaded"),
        ({"merge_is_disposable": False}, NotSupportedError, "the merge is always removed"),
        ({"save_method": "merged_16bit"}, ConfigError, "save_method is 'merged_16bit'"),
        ({"quantisation_method": "f16"}, ConfigError, "did you mean quantization_method"),
    ],
)
def test_what_is_not_done_is_said(
    trained: tuple[Any, Any], arguments: dict[str, Any], kind: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        trained[0].save_pretrained_gguf(tmp_path / "x", trained[1], **arguments)
    assert not (tmp_path / "x").exists()


def test_without_an_adapter(tmp_path: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(tiny.write_base(tmp_path / "base"))
    with pytest.raises(AdapterError, match="no adapter"):
        model.save_pretrained_gguf(tmp_path / "x", tokenizer)
