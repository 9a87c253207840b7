"""GGUF files read back with the library's own reader; nothing is ever half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pronghorn.errors import ConfigError, ExportError, MissingDependencyError, NotSupportedError, SourceError
from pronghorn.export import files, gguf_engine, gguf_write
from pronghorn.export.gguf_run import model_name
from pronghorn.export.onto import MergeFormat
from pronghorn.export.run import export
from pronghorn.sources.source import Source, SourceKind
from tests import tiny
from tests.export.damage import edit_json, edit_weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
KINDS = ("f32", "f16", "bf16", "q8_0")
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {family: tiny.write_base(home / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", bases["llama"])


@pytest.fixture(scope="module")
def written(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of every family, in one folder per family."""
    home = tmp_path_factory.mktemp("written")
    for family, base in bases.items():
        export(base, home / family, format=f"gguf-{','.join(KINDS)}")
    return {family: home / family for family in bases}


def values(path: Path) -> dict[str, Any]:
    return {name: one.contents() for name, one in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Decoded by the library, in PyTorch's order of dimensions."""
    read = GGUFReader(path).tensors
    return {one.name: dequantize(one.data, one.tensor_type).reshape(one.shape[::-1]) for one in read}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_library_s_own_table(
    bases: dict[str, Path], written: dict[str, Path], family: str
) -> None:
    config = AutoConfig.from_pretrained(bases[family])
    path = written[family] / "model-BF16.gguf"
    kind = values(path)["general.architecture"]
    arch = next(one for one in MODEL_ARCH if MODEL_ARCH_NAMES[one] == kind)
    table = get_tensor_name_map(arch, config.num_hidden_layers)
    weights = {n: t for file in bases[family].glob("*.safetensors") for n, t in load_file(file).items()}
    expected = {
        table.get_name(name, try_suffixes=(".weight", ".bias")): tuple(tensor.shape)
        for name, tensor in weights.items()
    }
    assert {name: one.shape for name, one in tensors(path).items()} == expected
    assert {one.tensor_type.name for one in GGUFReader(path).tensors} == {"BF16", "F32"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_decodes_the_values_that_went_in(
    bases: dict[str, Path], written: dict[str, Path], family: str, kind: str
) -> None:
    """Its reader undoes the order of rows and the offset of norms by code of its own."""
    config = AutoConfig.from_pretrained(bases[family])
    if config.model_type == "mistral":  # read as the Llama it is
        same = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
        config = AutoConfig.for_model("llama", **same)
    found = AutoModelForCausalLM.from_pretrained(
        written[family], gguf_file=f"model-{kind.upper()}.gguf", config=config, dtype=torch.float32
    ).state_dict()
    truth = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32).state_dict()
    assert found.keys() == truth.keys()
    for name, wanted in truth.items():
        if kind == "q8_0" and wanted.dim() > 1:
            step = wanted.reshape(-1, 32).abs().amax(-1, keepdim=True) / 127
            # half a step, and what a scale kept in 16 bit is off by, at most at the largest of 127 steps
            allowed = (step * (0.5 + 127 * 2.0**-11)).expand(-1, 32).reshape(wanted.shape)
        elif kind == "f16" and wanted.dim() > 1:
            allowed = wanted.abs() * 2.0**-11 + 2.0**-25
        else:
            allowed = torch.zeros_like(wanted)
        if "norm" in name:
            allowed = wanted.abs() * 1e-6 + 1e-6  # 1 is added and taken away again in float32
        assert bool(((found[name] - wanted).abs() <= allowed).all()), name


def test_settings_are_those_of_the_config(bases: dict[str, Path], written: dict[str, Path]) -> None:
    found = values(written["gemma3"] / "model-Q8_0.gguf")
    config = AutoConfig.from_pretrained(bases["gemma3"])
    stated = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": [True, False],
        "vocab_size": config.vocab_size,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
    }
    assert {key: found[f"gemma3.{key}"] for key in stated} == stated
    assert found["gemma3.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    assert found["general.file_type"] == 7
    assert values(written["gemma2"] / "model-F32.gguf")["gemma2.attn_logit_softcapping"] == 50.0
    assert found["tokenizer.chat_template"] == tiny.CHATML


def test_an_adapter_is_merged_in_and_verified(adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "merged", verify=False)
    report = export(adapter, tmp_path / "out", format="gguf-bf16")
    assert report.verified
    assert {"logits equal base + adapter", "the file is whole"} <= {row.name for row in report.checks}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-BF16.gguf", "Modelfile"}
    export(tmp_path / "merged", tmp_path / "again", format="gguf-bf16")
    first, second = (tensors(tmp_path / name / "model-BF16.gguf") for name in ("out", "again"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_adapter_alone_holds_its_product(adapter: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    export(adapter, tmp_path / "lora", format="gguf-lora")
    export(adapter, tmp_path / "merged", format="gguf-f32", verify=False)
    export(bases["llama"], tmp_path / "base", format="gguf-f32")
    found = tensors(tmp_path / "lora" / "adapter.gguf")
    settings = values(tmp_path / "lora" / "adapter.gguf")
    assert (settings["general.type"], settings["adapter.type"]) == ("adapter", "lora")
    merged, plain = (tensors(tmp_path / name / "model-F32.gguf") for name in ("merged", "base"))
    modules = {name.rpartition(".")[0] for name in found}
    assert len(modules) == 14
    for module in modules:
        a, b = found[f"{module}.lora_a"], found[f"{module}.lora_b"]
        assert settings["adapter.lora.alpha"] == a.shape[0]  # llama.cpp multiplies by alpha / rank
        update = merged[module] - plain[module]
        assert np.abs(b @ a - update).max() <= np.abs(merged[module]).max() * 2.0**-8  # the merge is bfloat16


def test_memory_holds_one_run_of_rows(
    bases: dict[str, Path], written: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: no read is larger than a run, and the bytes are those of large runs."""
    real, sizes = gguf_write.read_rows, []

    def counted(*arguments: Any) -> torch.Tensor:
        rows = real(*arguments)
        sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(gguf_write, "read_rows", counted)
    monkeypatch.setattr(gguf_write, "_RUN_ELEMENTS", 2048)
    monkeypatch.setattr(gguf_write, "read_tensor", lambda *given: small(read_tensor(*given)))
    from pronghorn.weights.reader import read_tensor

    def small(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dim() == 1
        return tensor

    export(bases["llama"], tmp_path / "small", format="gguf-q8_0")
    assert max(sizes) <= 2048
    assert sum(sizes) == sum(
        one.size for one in tensors(written["llama"] / "model-F32.gguf").values() if one.ndim > 1
    )
    again, first = (path / "model-Q8_0.gguf" for path in (tmp_path / "small", written["llama"]))
    assert again.read_bytes() == first.read_bytes()


def test_rows_that_no_block_divides_are_told(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "qwen3", hidden_size=48, intermediate_size=80)
    report = export(base, tmp_path / "out", format="gguf-q8_0")
    kinds = {
        one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "out" / "model-Q8_0.gguf").tensors
    }
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_output.weight"] == "Q8_0"
    assert any("in F16, no block divides their rows" in told for told in report.changes)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "bad")]
)
def test_an_interrupted_export_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real = gguf_write._encode
    calls = []

    def failing(*arguments: Any) -> bytes:
        calls.append(1)
        if len(calls) > 5:
            raise error
        return real(*arguments)

    monkeypatch.setattr(gguf_write, "_encode", failing)
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ExportError
    with pytest.raises(kind):
        export(adapter, tmp_path / "out", format="gguf-f16", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_checked_before_the_merge(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**5))
    with pytest.raises(ExportError, match=r"needs .* MiB, but its disk has 0\.1 MiB free"):
        export(adapter, tmp_path / "out", format="gguf-f16")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not empty") as caught:
        export(adapter, tmp_path / "out", format="gguf-f16")
    assert "--overwrite" in caught.value.fix
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    export(adapter, tmp_path / "out", format="gguf-f16", overwrite=True, verify=False)
    assert not (tmp_path / "out" / "mine").exists()


def test_a_target_that_cannot_be_written(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot be written"):
        export(bases["llama"], tmp_path / "file" / "out", format="gguf-f16")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_where_one_may_not_write(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ExportError, match="cannot be written: Permission denied"):
        export(bases["llama"], tmp_path / "locked" / "out", format="gguf-f16")


def test_values_beyond_float16_are_named(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", shard="1GB")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    from safetensors.torch import save_file

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_up\.weight holds values beyond float16") as caught:
        export(base, tmp_path / "out", format="gguf-f16")
    assert "gguf-bf16" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_without_a_tokenizer(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"has no tokenizer\.json") as caught:
        export(base, tmp_path / "out", format="gguf-f16")
    assert "save_pretrained" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_other_architectures_are_refused_by_name_before_any_work(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_base(tmp_path / "base", family)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    monkeypatch.setattr("pronghorn.export.gguf_run.StagedFolder", None)
    with pytest.raises(NotSupportedError, match=f"GGUF of '{family}' is not proven here") as caught:
        export(adapter, tmp_path / "out", format="gguf-q8_0")
    assert "merged_16bit" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gguf-q4_k_x", "'q4_k_x' is not a kind"),
        ("gguf-", "'' is not a kind"),
        ("gguf-iq2_xxs", "importance matrix"),
        ("gguf-q8_0,lora", "'lora' is not a kind"),
    ],
)
def test_unknown_kinds(name: str, said: str) -> None:
    with pytest.raises(NotSupportedError, match=said) as caught:
        export("nowhere", "nowhere", format=name)
    assert "q4_k_m" in caught.value.fix


def test_without_the_quantiser_another_way_is_named(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_engine, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="this environment has no llama_cpp") as caught:
        export(adapter, tmp_path / "out", format="gguf-q8_0,q4_k_m")
    assert "pip install llama-cpp-python" in caught.value.fix
    assert "gguf-q8_0" in caught.value.fix
    elsewhere = MergeFormat("gguf-q4_k_m", llama_python=Path(sys.executable))
    with pytest.raises(MissingDependencyError, match="has no llama_cpp"):
        export(adapter, tmp_path / "out", format=elsewhere)
    assert not (tmp_path / "out").exists()


def test_a_quantiser_that_fails_is_quoted(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'unsupported tensor' >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(ExportError, match="code 3: unsupported tensor"):
        gguf_engine.quantise(str(script), tmp_path / "a", tmp_path / "b", "q4_k_m")


def test_without_the_gguf_package(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_write, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="needs the gguf package") as caught:
        export(adapter, tmp_path / "out", format="gguf-f16")
    assert caught.value.fix == "pip install 'pronghorn[gguf]'"


def test_what_has_no_effect_is_refused(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="llama_python does nothing"):
        export(adapter, tmp_path / "out", format=MergeFormat("w4a16", llama_python=Path(sys.executable)))
    with pytest.raises(ConfigError, match=r"is a whole model: base \(--base\) does nothing"):
        export(bases["llama"], tmp_path / "out", format="gguf-f16", base=bases["qwen2"])
    with pytest.raises(NotSupportedError, match="is a whole model, not an adapter"):
        export(bases["llama"], tmp_path / "out", format="gguf-lora")


def test_adapters_that_llama_cpp_cannot_apply(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["qwen2"]  # tied: its head is the embedding
    options = {"target_modules": ["q_proj", "lm_head"]}
    adapter = tiny.write_adapter(tmp_path / "head", base, **options)
    with pytest.raises(NotSupportedError, match=r"it is the embedding in llama\.cpp") as caught:
        export(adapter, tmp_path / "out", format="gguf-lora")
    assert "gguf-f16" in caught.value.fix
    embedded = tiny.write_adapter(tmp_path / "embedding", bases["llama"], target_modules=["embed_tokens"])
    with pytest.raises(NotSupportedError, match="embed_tokens is adapted"):
        export(embedded, tmp_path / "out", format="gguf-lora")


def test_a_name_never_switches_on_the_rule_for_phi_3() -> None:
    def named(name: str, *, strips: bool) -> str:
        return model_name(Source(SourceKind.BASE, Path(), f"/models/{name}", None, {}), strips=strips)

    assert named("my-Phi-3-like", strips=False) == "my-Phi 3-like"
    assert named("tinyphi3", strips=False) == "tinyphi 3"
    assert named("llama", strips=False) == "llama"
    assert named("mine", strips=True) == "Phi-3 mine"
    assert named("Phi-3-mini", strips=True) == "Phi-3-mini"


def test_quantised_models_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": NF4}))
    with pytest.raises(NotSupportedError, match="these are quantised"):
        export(base, tmp_path / "out", format="gguf-f16")


def test_a_base_that_is_not_finite_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))

    def damage(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.1.self_attn.q_proj.weight"][3, 2] = torch.nan

    edit_weights(base, damage)
    with pytest.raises(ExportError, match=r"blk\.1\.attn_q\.weight holds NaN or infinity"):
        export(base, tmp_path / "out", format="gguf-q8_0", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_model_s_own_code_is_never_run(bases: dict[str, Path], tmp_path: Path) -> None:
    model, ran = Path(shutil.copytree(bases["llama"], tmp_path / "model")), tmp_path / "ran"
    (model / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    edit_json(model / "config.json", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Own"]})
    export(model, tmp_path / "out", format="gguf-q8_0", verify=False)
    assert not ran.exists()
