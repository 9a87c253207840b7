"""The loss of rows: a merge passes within its rounding, one with a wrong scaling does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from pronghorn.errors import ConfigError, DataError
from pronghorn.export import verify_model
from pronghorn.export.verify import verify
from pronghorn.export.verify_deep import compute_promises
from pronghorn.export.verify_folder import Row
from pronghorn.export.verify_loss import LOSS, Rows, read_rows, token_losses
from pronghorn.serving.rows import write_rows
from tests import tiny
from tests.stack import require_models_on_disk


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("loss") / "base", "llama")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return tiny.write_adapter(base.parent / "adapter", base)


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    """Of three lengths; the first half of each trains nothing."""
    generator = torch.Generator().manual_seed(2)
    lines = []
    for length in (9, 30, 17):
        ids = torch.randint(4, 512, (length,), generator=generator).tolist()
        half = length // 2
        lines.append(json.dumps({"input_ids": ids, "labels": [-100] * half + ids[half:]}))
    file = base.parent / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def merge(base: Path, adapter: Path, folder: Path, scaling: float = 1.0) -> Path:
    """PEFT's merge in bfloat16, with the update times ``scaling``."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, adapter)
    for module in wrapped.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value * scaling for name, value in module.scaling.items()}
    merged = wrapped.merge_and_unload().to(torch.bfloat16)
    merged.generation_config = GenerationConfig.from_pretrained(base)
    merged.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def loss(folder: Path, adapter: Path, base: Path, rows: Path) -> Row:
    found = {row.name: row for row in compute_promises(folder, adapter, base, rows=rows)}
    return found[LOSS]


def test_a_merge_has_the_loss_of_base_and_adapter(
    base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    row = loss(merge(base, adapter, tmp_path / "merged"), adapter, base, rows)
    assert row.ok is True, row.detail
    wrapped = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    own = []
    for line in rows.read_text().splitlines():  # one row at a time, by transformers' own loss
        batch = {name: torch.tensor([values]) for name, values in json.loads(line).items()}
        own += [wrapped(**batch).loss.item()] * int((batch["labels"][:, 1:] != -100).sum())
    assert f"base + adapter {sum(own) / len(own):.5g}" in row.detail
    assert "29 tokens of 3 rows" in row.detail


def test_the_loss_of_a_model_that_does_not_fit_in_memory(
    base: Path, adapter: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_models_on_disk(tmp_path)
    merged = merge(base, adapter, tmp_path / "merged")
    monkeypatch.setattr(verify_model, "needed_bytes", lambda _: 1 << 60)  # then module by module
    assert loss(merged, adapter, base, rows).ok is True


@pytest.mark.parametrize("scaling", [0.5, 1.25, 2.0])
def test_a_wrong_scaling_is_caught(
    base: Path, adapter: Path, rows: Path, tmp_path: Path, scaling: float
) -> None:
    row = loss(merge(base, adapter, tmp_path / "merged", scaling), adapter, base, rows)
    assert row.ok is False, row.detail


def test_rows_that_the_adapter_does_not_move_are_not_verified(
    base: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    weak = tiny.write_adapter(tmp_path / "weak", base, lora_alpha=1e-9)
    row = loss(merge(base, weak, tmp_path / "merged"), weak, base, rows)
    assert row.ok is None
    assert "the base's is as near" in row.detail


def test_padding_changes_nothing(base: Path, rows: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    given = read_rows(rows)
    alone = [token_losses(model, Rows((i,), (j,))) for i, j in zip(given.ids, given.labels, strict=True)]
    torch.testing.assert_close(token_losses(model, given), torch.cat(alone), rtol=0, atol=2e-6)


def test_rows_are_read_from_a_file_or_the_run(base: Path, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(adapter)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": f"{n}!"}) + "\n" for n in "abc"))
    write_rows(tmp_path / "named.jsonl", file, adapter, base)
    (run / "run.yaml").write_text(
        f"model: {{name: {base}}}\ndata: {{train: [{file}], eval: [{file}]}}\noutput: {{folder: {run}}}\n"
    )
    write_rows(tmp_path / "found.jsonl", None, run, base)
    named, found = (read_rows(tmp_path / name) for name in ("named.jsonl", "found.jsonl"))
    assert named == found
    assert len(named.ids) == 3
    (run / "run.yaml").write_text(
        f"model: {{name: {base}}}\ndata: {{train: [{file}]}}\noutput: {{folder: {run}}}\n"
    )
    with pytest.raises(DataError, match="there are no rows to compare on"):
        write_rows(tmp_path / "none.jsonl", None, run, base)


def test_bad_rows_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input_ids": [1, 2], "labels": [1]}\n')
    with pytest.raises(ValueError, match="line 1: input_ids and labels of one length"):
        read_rows(file)
    file.write_text('{"input_ids": [1, 2], "labels": [1, -100]}\n')
    with pytest.raises(ValueError, match="no token that is trained"):
        read_rows(file)
    with pytest.raises(ConfigError, match="add --deep --against ADAPTER"):
        verify(base, rows=file)
