"""Two models on the same rows, and the drift of a merge from the model that was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pronghorn import FastLanguageModel, LoadOptions, LoraOptions, attach_lora, export, load, train
from pronghorn.cli.main import app
from pronghorn.errors import DataError
from pronghorn.serving.compare import Candidate, compare, drift_candidates
from tests import four_bit, tiny


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"number {i}", "completion": f"is {i * i}, said the owl"} for i in range(12)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_a_model_against_itself_and_its_4_bit_form(tmp_path: Path, rows: Path) -> None:
    base = four_bit.write_full(tmp_path / "base")
    nf4 = Candidate("nf4", base, LoadOptions(quantization="nf4"))
    first, same, packed = compare((Candidate("a", base), Candidate("b", base), nf4), rows)
    assert (first.kl, first.agreement) == (None, None)
    assert (same.kl, same.agreement) == (0.0, 1.0)
    assert same.perplexity == first.perplexity
    assert packed.kl is not None and packed.kl > 1e-4
    assert packed.agreement is not None and packed.agreement < 1.0
    assert packed.held_bytes < first.held_bytes
    assert first.tokens == same.tokens == packed.tokens > 50
    assert first.tokens_per_second > 0


def test_numbers_are_those_of_the_definition(tmp_path: Path, rows: Path) -> None:
    from pronghorn.data.options import DataOptions
    from pronghorn.data.prepare import prepare

    one, other = (tiny.write_base(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    measured = compare((Candidate("1", one), Candidate("2", other)), rows)
    _, tokenizer = load(one, say=None)
    loss = divergence = same = count = 0.0
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for path in (one, other)]
    for row in prepare(DataOptions(train=(str(rows),)), tokenizer, 256).train:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            p, q = (model(ids).logits[0, :-1].float().log_softmax(-1)[labels != -100] for model in models)
        wanted = labels[labels != -100]
        loss -= float(q.gather(1, wanted[:, None]).sum())
        divergence += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(1) == q.argmax(1)).sum())
        count += len(wanted)
    assert measured[1].tokens == count
    assert measured[1].perplexity == pytest.approx(torch.tensor(loss / count).exp().item(), rel=1e-4)
    assert measured[1].kl == pytest.approx(divergence / count, rel=1e-4)
    assert measured[1].agreement == pytest.approx(same / count)


def test_rows_and_vocabularies_that_do_not_fit(tmp_path: Path, rows: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    with pytest.raises(DataError, match="no candidate lies in a run folder"):
        compare((Candidate("a", base), Candidate("b", base)))
    wide = tiny.write_base(tmp_path / "wide", vocab_size=640)
    with pytest.raises(DataError, match="vocabulary of 640 tokens, the reference another"):
        compare((Candidate("a", base), Candidate("b", wide)), rows)
    with pytest.raises(DataError, match=r"smaller vocabulary|another"):
        compare((Candidate("a", wide), Candidate("b", base)), rows)


def test_a_notebooks_merge_tells_its_drift(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = four_bit.write_full(tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(base, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=4, accelerate=False)
    four_bit.randomise(model, 0.05)
    capsys.readouterr()
    model.save_pretrained_merged(tmp_path / "merged", tokenizer, rows=rows)
    told = capsys.readouterr().out
    found = re.search(r"on (\d+) tokens: merged onto decoded: KL (\S+), .*; onto original: KL (\S+),", told)
    assert found is not None, told
    assert float(found[2]) < 1e-3 < float(found[3])
    model.save_pretrained_merged(tmp_path / "original", tokenizer, onto="original")
    told = capsys.readouterr().out
    assert "not the model that was trained" in told
    assert "drift from the trained model was not measured: give rows=FILE" in told


@pytest.mark.slow
def test_a_notebooks_adapter_tells_its_drift(
    tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(
        four_bit.write_full(tmp_path / "base"), load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=4, accelerate=False)
    four_bit.randomise(model, 0.05)
    capsys.readouterr()
    model.save_lora(tmp_path / "served", tokenizer, rows=rows)
    told = capsys.readouterr().out
    assert "the adapter was trained on the decoded NF4 values of 14 tensors" in told
    found = re.search(r"on \d+ tokens: adapter on the 16-bit base: KL (\S+),", told)
    assert found is not None and float(found[1]) > 1e-3, told


def test_drift_of_a_merge_on_the_runs_own_rows(tmp_path: Path, rows: Path) -> None:
    base = four_bit.write_full(tmp_path / "base")
    run = train(
        {
            "model": {"name": str(base), "quantization": "nf4", "max_seq_length": 64},
            "data": {"train": str(rows), "eval_fraction": 0.5},
            "lora": {"r": 4},
            "training": {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2},
            "logging": {"progress": "none"},
            "output": {"folder": str(tmp_path / "run")},
        }
    )
    arguments = ["export", str(run.adapter), str(tmp_path / "merged"), "--no-verify"]
    finished = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert finished.exit_code == 0, finished.output
    assert "drift from the trained model" in finished.output
    assert "onto original" in finished.output
    trained, decoded, original = compare(drift_candidates(run.adapter, base, tmp_path / "merged", "decoded"))
    assert decoded.kl is not None and original.kl is not None
    assert original.kl > 10 * decoded.kl
    assert trained.held_bytes < decoded.held_bytes
    arguments[2:] = [str(tmp_path / "served"), "--format", "adapter", "--no-verify"]
    finished = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert finished.exit_code == 0, finished.output
    assert "the adapter was trained on the decoded NF4 values of 14 tensors" in finished.output
    assert "note:" not in finished.output, "told already"
    arguments[2:] = [str(tmp_path / "lora"), "--format", "lora", "--no-verify"]
    plain = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert "note:    the adapter was trained on the decoded NF4 values of 14 tensors" in plain.output
    served = re.search(r"adapter on the 16-bit base .*", finished.output)
    assert served is not None and f"{original.kl:.3g}" in served[0], finished.output


def test_the_command(tmp_path: Path, rows: Path) -> None:
    base = four_bit.write_base(tmp_path / "base")
    model = attach_lora(load(base)[0], LoraOptions(r=4))
    four_bit.randomise(model, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "merged", verify=False)
    arguments = ["compare", str(tmp_path / "adapter"), str(tmp_path / "merged"), "--rows", str(rows)]
    finished = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert finished.exit_code == 0, finished.output
    assert "perplexity" in finished.output
    assert "reference" in finished.output
