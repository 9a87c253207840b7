"""Deep verify: merged folders compute what base + adapter computes, and every wrong one is caught."""

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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from pronghorn.export import verify_deep, verify_model
from pronghorn.export.verify import verify
from pronghorn.export.verify_deep import GREEDY, LOGITS, MOVES, TOKENIZER, WEIGHTS, compute_promises
from pronghorn.export.verify_folder import Row
from tests import tiny

CLASS = "tensors are those of the class"
Q1 = "model.layers.1.self_attn.q_proj.weight"
# One expert chosen otherwise moves every logit, so a mixture of experts is stored in float32 here; float16
# keeps rounding a hundredfold below the adapter in the dense ones.
DTYPES = {"mixtral": torch.float32, "qwen3_moe": torch.float32}


def merge(base: Path, adapter: Path, folder: Path, dtype: torch.dtype) -> Path:
    """The way every tool does it: PEFT's merge, save_pretrained, tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().to(dtype)
    merged.generation_config = GenerationConfig.from_pretrained(base)
    merged.save_pretrained(folder, max_shard_size="10MB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


class Case:
    """Base, adapter and merged folder of one family."""

    def __init__(self, root: Path, family: str, **lora: Any) -> None:
        dtype = DTYPES.get(family, torch.float16)
        self.base = tiny.write_base(root / "base", family, dtype=dtype)
        self.adapter = tiny.write_adapter(root / "adapter", self.base, **lora)
        self.merged = merge(self.base, self.adapter, root / "merged", dtype)

    def rows(self, folder: Path | None = None, adapter: Path | None = None) -> dict[str, Row]:
        rows = compute_promises(folder or self.merged, adapter or self.adapter, self.base)
        return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    return shutil.copytree(case.merged, tmp_path / "folder")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (folder / name).exists():
            tensors = load_file(folder / name)
            edit(tensors)
            save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name)


def base_tensor(case: Case, name: str) -> torch.Tensor:
    return next(t[name] for file in case.base.glob("*.safetensors") if name in (t := load_file(file)))


def signal(row: Row) -> float:
    """How many tolerances the adapter moves the logits, as the row tells."""
    return float(row.detail.split(", ")[1].split(" x ")[0])


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_merged_by_peft_passes_and_a_lost_tensor_fails(family: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family)
    rows = case.rows()
    assert all(row.ok for row in rows.values()), rows
    assert signal(rows[MOVES]) >= 100
    less = shutil.copytree(case.adapter, tmp_path / "less")
    lost = sorted(n for n in load_file(less / "adapter_model.safetensors") if "lora_B" in n)[0]
    edit_weights(less, lambda tensors: tensors.update({lost: torch.zeros_like(tensors[lost])}))
    wrong = merge(case.base, less, tmp_path / "wrong", DTYPES.get(family, torch.float16))
    assert case.rows(wrong)[LOGITS].ok is False


def test_bfloat16_is_within_its_own_rounding(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama")
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    merged = merge(base, adapter, tmp_path / "merged", torch.bfloat16)
    assert all(row.ok for row in compute_promises(merged, adapter, base))


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}}),
        ("llama", {"modules_to_save": ["lm_head", "norm"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
        ("phi3", {"use_dora": True}),
        ("qwen2", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    ],
)
def test_adapter_features_are_understood(family: str, lora: dict[str, Any], tmp_path: Path) -> None:
    case = Case(tmp_path, family, **lora)
    rows = case.rows()
    assert all(row.ok for row in rows.values()), rows


def test_a_grown_vocabulary_is_grown_in_the_truth_too(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama", dtype=torch.float16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(520, mean_resizing=False)
    options = LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = verify_model.load_with_adapter(base, tmp_path / "adapter").merge_and_unload().half()
    merged.generation_config = GenerationConfig.from_pretrained(base)
    merged.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    rows = compute_promises(tmp_path / "merged", tmp_path / "adapter", base)
    assert all(row.ok for row in rows), rows


def unmerged(case: Case, folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({name: base_tensor(case, name) for name in t}))


def one_layer_unmerged(case: Case, folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({n: base_tensor(case, n) for n in t if "layers.1." in n}))


def doubled(case: Case, folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({Q1: (2 * t[Q1].float() - base_tensor(case, Q1).float()).half()}))


def permuted(case: Case, folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({Q1: t[Q1].flip(0)}))


def swapped_layers(case: Case, folder: Path) -> None:
    other = Q1.replace("layers.1", "layers.0")
    edit_weights(folder, lambda t: t.update({Q1: t[other].clone(), other: t[Q1].clone()}))


def other_embeddings(case: Case, folder: Path) -> None:
    edit_weights(
        folder, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"] * 1.5})
    )


def not_a_number(case: Case, folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({Q1: t[Q1] * torch.nan}))


@pytest.mark.parametrize(
    "damage",
    [unmerged, one_layer_unmerged, doubled, permuted, swapped_layers, other_embeddings, not_a_number],
)
def test_wrong_weights_are_caught_twice(
    case: Case, folder: Path, damage: Callable[[Case, Path], None]
) -> None:
    damage(case, folder)
    rows = case.rows(folder)
    assert rows[WEIGHTS].ok is False, rows[WEIGHTS]
    assert rows[LOGITS].ok is False, rows[LOGITS]
    assert ("as far from base + adapter as the base" in rows[LOGITS].detail) == (damage is unmerged)


def test_class_catches_what_is_missing_from_every_layer(case: Case, folder: Path) -> None:
    names = [Q1.replace("layers.1", f"layers.{layer}") for layer in (0, 1)]
    edit_weights(folder, lambda t: ([t.pop(name) for name in names], t.update(stray=torch.ones(1))))
    detail = case.rows(folder)[CLASS].detail
    assert f"{Q1} is missing" in detail
    assert "stray is unexpected" in detail


def test_adapter_that_changes_nothing_is_named(case: Case, tmp_path: Path) -> None:
    zero = shutil.copytree(case.adapter, tmp_path / "zero")
    edit_weights(zero, lambda t: t.update({n: x * 0 for n, x in t.items() if "lora_B" in n}))
    row = case.rows(case.base, zero)[MOVES]
    assert row.ok is False
    assert "the adapter changes nothing" in row.detail


def test_weak_adapter_is_told_by_the_reference_and_lost_one_is_named(case: Case, tmp_path: Path) -> None:
    weak = shutil.copytree(case.adapter, tmp_path / "weak")
    edit_weights(weak, lambda t: t.update({n: x * 1e-3 for n, x in t.items() if "lora_B" in n}))
    merged = merge(case.base, weak, tmp_path / "merged", torch.float16)
    row = case.rows(merged, weak)[MOVES]
    assert row.ok is True
    assert "weak, but" in row.detail
    edit_weights(weak, lambda t: t.update({n: x * 1e-6 for n, x in t.items() if "lora_B" in n}))
    row = case.rows(case.base, weak)[MOVES]
    assert row.ok is False
    assert "rounding to the stored dtype loses all of it" in row.detail


def test_greedy_answers_must_end_at_the_same_place(case: Case, tmp_path: Path) -> None:
    wrapped = verify_model.load_with_adapter(case.base, case.adapter)
    view = verify_deep.Folder(case.base)
    (batch,) = verify_model.prompts(view, None)
    said = verify_model.answer(wrapped, batch, [3]).ids[0, batch.shape[1] :]
    ends = {"eos_token_id": [3, int(said[4])]}
    stopping = Case.__new__(Case)
    stopping.adapter, stopping.base = case.adapter, shutil.copytree(case.base, tmp_path / "base")
    same = shutil.copytree(case.merged, tmp_path / "same")
    for place in (stopping.base, same):
        path = place / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **ends}))
    row = stopping.rows(same)[GREEDY]
    assert row.ok is True
    assert "ended early: 0" not in row.detail
    row = stopping.rows(case.merged)[GREEDY]
    assert row.ok is False
    assert "an end after" in row.detail


def test_parting_at_a_near_tie_is_said_and_allowed() -> None:
    ids = torch.tensor([[5, 7, 8]])
    right = verify_model.Answer(1, ids, torch.tensor([[9.0, 0.01]]), (2,))
    other = verify_model.Answer(1, torch.tensor([[5, 7, 9]]), right.margins, (2,))
    logits = (torch.ones(1, 3, 4),)
    near = verify_deep.Gap(0.1, 0.1)
    truth = verify_deep.Truth((right,), logits, logits, near, near, near)
    assert verify_deep.greedy_row(truth, [other]).ok is True
    assert "near tie" in verify_deep.greedy_row(truth, [other]).detail
    far = verify_model.Answer(1, torch.tensor([[5, 6, 8]]), right.margins, (2,))
    assert verify_deep.greedy_row(truth, [far]).ok is False


def test_other_template_is_named(case: Case, folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "robot"))
    row = case.rows(folder)[TOKENIZER]
    assert (row.ok, "other token ids" in row.detail) == (False, True)


def test_too_little_memory_still_compares_weights(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_model, "available_bytes", lambda: 1000)
    rows = case.rows(folder)
    assert rows[WEIGHTS].ok is True
    assert all(rows[name].ok is None and "needs" in rows[name].detail for name in (LOGITS, MOVES, GREEDY))
    doubled(case, folder)
    assert case.rows(folder)[WEIGHTS].ok is False


def test_available_memory_is_a_plausible_number() -> None:
    assert 1 << 20 < verify_model.available_bytes() < 1 << 50


def test_adapter_folder_and_model_alone(case: Case) -> None:
    assert all(row.ok for row in case.rows(case.adapter).values())
    rows = {row.name: row for row in compute_promises(case.merged, None, None)}
    assert all(row.ok for row in rows.values())
    assert "compared with nothing" in rows[verify_deep.RUNS].detail


def test_without_base_it_is_not_verified(case: Case) -> None:
    (row,) = compute_promises(case.merged, case.adapter, None)
    assert (row.ok, "give --base" in row.detail) == (None, True)


def test_fresh_process_end_to_end(case: Case, folder: Path) -> None:
    """The public call; the base is found through adapter_config.json."""
    report = verify(folder, deep=True, against=case.adapter)
    assert report.passed, str(report)
    assert LOGITS in [row.name for row in report.rows]


def test_nothing_patched_here_leaks_into_the_check(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_deep, "compute_promises", lambda *_: ())
    unmerged(case, folder)
    report = verify(folder, deep=True, against=case.adapter)
    assert report.first_failure is not None
    assert report.first_failure.name == WEIGHTS


def test_broken_files_are_not_loaded_and_a_dead_process_is_not_verified(case: Case, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    command = [
        sys.executable,
        "-m",
        "pronghorn.export.verify",
        str(folder),
        "--deep",
        "--against",
        str(case.adapter),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "it was not loaded" in done.stdout
    assert "no tokenizer.json" in done.stderr
