"""Shallow verify: every broken folder fails, names the promise, and loads no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.errors import SourceError, VerificationError
from pronghorn.export.verify import VerifyReport, verify
from pronghorn.export.verify_folder import Row
from tests import tiny
from tests.export.damage import (
    INDEX,
    config,
    drop,
    edit_index,
    edit_json,
    edit_weights,
    generation,
    put,
    remove,
    write,
)

Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for family in tiny.FAMILIES:
        tiny.write_base(root / family, family)
    return root


@pytest.fixture
def folder(bases: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bases / "llama", tmp_path / "folder")


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def stale_single(folder: Path) -> None:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model.safetensors")


def forget_half(folder: Path) -> None:
    edit_index(folder, lambda names: [names.pop(name) for name in list(names)[::2]])


def escape(folder: Path) -> None:
    edit_index(folder, lambda names: names.update({Q1: "../model-00001-of-00003.safetensors"}))


def quantised_without_config(folder: Path) -> None:
    edit_weights(
        folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.weight_scale": torch.ones(64, 1)})
    )


def cast_one(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({Q1: tensors[Q1].float()}))


def peft_names(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({f"base_model.model.{name}": t.pop(name) for name in list(t)}))


def own_head_although_tied(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)


def token_outside(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|nowhere|>")


def missing_shard(folder: Path) -> None:
    (folder / "model-00003-of-00003.safetensors").unlink()


def hole_in_header(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [2, 6]}}).encode()
    (folder / "model-00001-of-00003.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(6)
    )


COMPLETE, EXACT = "weight files are complete", "index lists exactly the tensors present"
STALE, BESIDE = "no stale weight file", "no adapter beside the weights"
QUANT, DTYPE = (
    "quantization_config agrees with the weights",
    "dtype in config.json agrees with the stored one",
)
LAYERS, TIED = "tensors are those config.json asks for", "tie_word_embeddings agrees with lm_head"
VOCAB, NAMES = "vocab_size equals the embedding rows", "tensor names are the model's own"
CONFIG, TOKENS = "config.json is usable", "tokenizer files are present and parse"
SPECIAL, TEMPLATE = "special token ids agree in every file", "chat template parses"

TRAPS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing linear": (drop(Q1), LAYERS, Q1),
    "missing norm": (drop("model.layers.0.input_layernorm.weight"), LAYERS, "0.input_layernorm.weight"),
    "missing block": (
        drop(*(f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))),
        LAYERS, "layers.1.mlp",
    ),
    "missing head": (drop("lm_head.weight"), TIED, "no lm_head.weight"),
    "head stored although tied": (own_head_although_tied, TIED, "other than the embeddings"),
    "PEFT names": (peft_names, NAMES, "base_model.model"),
    "base_layer name": (put(model__q_proj__base_layer__weight=torch.ones(1)), NAMES, "base_layer"),
    "stale single file": (stale_single, STALE, "model.safetensors"),
    "stale pickle": (write("pytorch_model.bin", b"x"), STALE, "pytorch_model.bin"),
    "no index": (remove(INDEX), EXACT, "no model.safetensors.index.json"),
    "index forgets half": (forget_half, EXACT, "not in the index"),
    "index names a ghost": (lambda f: edit_index(f, lambda n: n.update({"ghost": n[Q1]})), EXACT, "ghost"),
    "index outside the folder": (escape, COMPLETE, "inside the folder"),
    "missing shard": (missing_shard, COMPLETE, "model-00003-of-00003.safetensors"),
    "truncated shard": (truncate, COMPLETE, "model-00002-of-00003.safetensors is truncated"),
    "hole in a header": (hole_in_header, COMPLETE, "starts at byte"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], COMPLETE, "no safetensors weights"),
    "adapter config beside": (write("adapter_config.json", "{}"), BESIDE, "adapter_config.json"),
    "adapter weights beside": (write("adapter_model.safetensors", b"x"), BESIDE, "adapter_model.safetensors"),
    "quantization_config left": (config(quantization_config={"quant_method": "bnb"}), QUANT, "json has"),
    "quantization_config left inside": (
        config(text_config={"quantization_config": {"load_in_4bit": True}, "vocab_size": 512}), QUANT,
        "text_config.quantization_config",
    ),
    "quantised without config": (quantised_without_config, QUANT, "weight_scale"),
    "vocabulary": (config(vocab_size=500), VOCAB, "has 512 rows, vocab_size is 500"),
    "one tensor of another dtype": (cast_one, DTYPE, Q1),
    "declared dtype": (config(dtype="float16"), DTYPE, "config.json says float16"),
    "no config": (remove("config.json"), CONFIG, "config.json is missing"),
    "damaged config": (write("config.json", "{"), CONFIG, "config.json"),
    "no architectures": (config(architectures="DROP"), CONFIG, "architectures"),
    "absurd layers": (config(num_hidden_layers=10**9), CONFIG, "num_hidden_layers is 1000000000"),
    "absurd width": (config(hidden_size=-4), CONFIG, "hidden_size is -4"),
    "no tokenizer": (remove("tokenizer.json"), TOKENS, "no tokenizer.json"),
    "no tokenizer config": (remove("tokenizer_config.json"), TOKENS, "tokenizer_config.json is missing"),
    "damaged tokenizer": (write("tokenizer.json", "{"), TOKENS, "tokenizer.json"),
    "other end id": (generation(eos_token_id=2), SPECIAL, "eos_token_id differs"),
    "end id outside": (generation(eos_token_id=[3, 512]), SPECIAL, "512 is outside the vocabulary of 512"),
    "end token unknown": (token_outside, SPECIAL, "'<|nowhere|>' is not in the vocabulary"),
    "damaged template": (write("chat_template.jinja", "{% for m in x %}"), TEMPLATE, "jinja, line 1"),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_broken_folder_is_named(folder: Path, trap: str) -> None:
    damage, promise, said = TRAPS[trap]
    damage(folder)
    report = verify(folder)
    broken = {row.name: row.detail for row in report.rows if row.ok is False}
    assert not report.passed
    assert promise in broken
    assert said in broken[promise]


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_good_folder_passes(bases: Path, family: str) -> None:
    report = verify(bases / family)
    assert report.passed, str(report)
    assert report.first_failure is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (put(extra=torch.ones(3, dtype=torch.bfloat16)), "extra is not in the base"),
        (drop(*(f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))), "of the base is missing"),
        (
            lambda f: edit_weights(f, lambda t: t.update({n: x.half() for n, x in t.items()})),
            "in the base BF16",
        ),
        (lambda f: edit_weights(f, lambda t: t.update({Q1: t[Q1][:32]})), "in the base [64, 64]"),
    ],
)
def test_differences_from_the_base_are_named(
    folder: Path, bases: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(folder)
    row = next(
        row for row in verify(folder, base=bases / "llama").rows if row.name == "same tensors as the base"
    )
    assert row.ok is False
    assert said in row.detail


def test_an_untied_head_and_added_rows_are_no_difference(bases: Path, tmp_path: Path) -> None:
    base = bases / "qwen2"
    folder = shutil.copytree(base, tmp_path / "folder")
    rows = torch.zeros(8, 64, dtype=torch.bfloat16)

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], rows])
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() + 1

    edit_weights(folder, grow)
    edit_json(folder / "config.json", vocab_size=520, tie_word_embeddings=False)
    report = verify(folder, base=base)
    assert report.passed, str(report)


def test_a_tied_copy_of_the_embeddings_is_harmless(bases: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bases / "qwen2", tmp_path / "folder")
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert verify(folder).passed


def test_layers_that_differ_by_design_are_settled_by_the_class(tmp_path: Path) -> None:
    """Qwen3-MoE with a dense layer is fine as it is; an attention bias in one layer only is not."""
    folder = tiny.write_base(tmp_path / "base", "qwen3_moe", mlp_only_layers=[0])
    assert verify(folder).passed
    edit_weights(
        folder, lambda t: t.update({Q1.replace("weight", "bias"): torch.zeros(64, dtype=torch.bfloat16)})
    )
    row = next(row for row in verify(folder).rows if row.name == LAYERS)
    assert row.ok is False
    assert "Qwen3MoeForCausalLM" in row.detail or "unexpected" in row.detail


def test_several_end_ids_may_share_one(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[3, 2])
    assert verify(folder).passed


def test_templates_may_mark_generation(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% generation %}{{ messages[0] }}{% endgeneration %}")
    assert verify(folder).passed


def test_shallow_loads_no_torch_and_takes_a_second(folder: Path) -> None:
    code = (
        "import sys; from pronghorn.export.verify import verify; r = verify(sys.argv[1]); "
        "sys.exit(not r.passed or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False, timeout=30).returncode == 0


def test_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no folder '.*nowhere'"):
        verify(tmp_path / "nowhere")


def test_a_folder_without_a_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds neither a model nor an adapter"):
        verify(tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"did you mean .*/adapter\?"):
        verify(tmp_path)


def test_report_raises_for_the_first_failure_and_for_unverified() -> None:
    rows = (Row("a", True, ""), Row("b", None, "no memory"), Row("c", False, "gone"))
    with pytest.raises(VerificationError, match="breaks a promise: c: gone"):
        VerifyReport(Path("x"), "model", rows).raise_if_broken(allow_unverified=True)
    report = VerifyReport(Path("x"), "model", rows[:2])
    assert not report.passed
    with pytest.raises(VerificationError, match="not verified: b: no memory"):
        report.raise_if_broken()
    report.raise_if_broken(allow_unverified=True)
    VerifyReport(Path("x"), "model", rows[:1]).raise_if_broken()


def test_module_prints_a_table_and_exits_with_the_failure(folder: Path) -> None:
    command = [sys.executable, "-m", "pronghorn.export.verify", str(folder)]
    good = subprocess.run(command, capture_output=True, text=True, check=False)
    assert good.returncode == 0
    assert "index lists exactly the tensors present" in good.stdout
    (folder / "tokenizer.json").unlink()
    bad = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert json.loads(bad.stdout)["passed"] is False
    assert "no tokenizer.json" in bad.stderr


@pytest.fixture(scope="module")
def adapter(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_adapter(tmp_path_factory.mktemp("adapter") / "a", bases / "llama")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def edit_adapter(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")


ADAPTER_TRAPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "A alone": (lambda f: edit_adapter(f, lambda t: t.pop(A.replace("lora_A", "lora_B"))), "has lora_A only"),
    "rank": (lambda f: edit_adapter(f, lambda t: t.update({A: t[A][:3]})), "do not multiply"),
    "stated rank": (lambda f: edit_json(f / "adapter_config.json", r=8), "adapter_config.json says 8"),
    "no rank": (lambda f: edit_json(f / "adapter_config.json", r=0), "r is 0"),
    "other method": (lambda f: edit_json(f / "adapter_config.json", peft_type="IA3"), "peft_type is 'IA3'"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors is missing",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "truncated",
    ),
    "other width": (
        lambda f: edit_adapter(f, lambda t: t.update({A: t[A][:, :60]})),
        "the adapter is for [64, 60]",
    ),
    "absent layer": (
        lambda f: edit_adapter(
            f, lambda t: t.update({n.replace("layers.0", "layers.7"): t.pop(n) for n in list(t)})
        ),
        "layers.7",
    ),
}


def test_good_adapter_passes(adapter: Path) -> None:
    report = verify(adapter)
    assert (report.kind, report.passed) == ("adapter", True), str(report)
    assert report.rows[-1].name == "every module is in the base"


@pytest.mark.parametrize("trap", ADAPTER_TRAPS)
def test_broken_adapter_is_named(adapter: Path, bases: Path, tmp_path: Path, trap: str) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    damage, said = ADAPTER_TRAPS[trap]
    damage(folder)
    report = verify(folder, base=bases / "llama")
    assert report.kind == "adapter"
    assert any(said in row.detail for row in report.rows if row.ok is False), str(report)
