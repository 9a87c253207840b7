"""Rows handed to the real DPOTrainer and GRPOTrainer: they train on the ids that the inspector shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from peft import LoraConfig

from benchmarks import parity_pairs
from pronghorn import inspect_data, rows_for_trl
from pronghorn.data.for_trl import _dataset
from pronghorn.data.preference import to_compared
from pronghorn.data.preference_rows import examine_preferences
from pronghorn.data.rows import Row, open_data
from pronghorn.errors import DataError
from tests import tiny
from tests.data.families import FAMILIES, tokenizer
from tests.data.test_preference import ASK, FIVE, FOUR, pair

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
TOOLS_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' ~ tools | tojson ~ '<|im_end|>\\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}"
    "{%- if 'tool_calls' in m %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}"
    "{{- '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DATA: dict[str, list[dict[str, Any]]] = {
    "messages": [
        pair("absent", [ASK, FOUR], [ASK, FIVE]),
        pair(chosen="Four, of course.\n", rejected="Fünf 🎉"),
        pair(chosen="x" * 300),
    ],
    "tools": [
        pair(chosen=[CALL, {"role": "tool", "content": "4"}, FOUR], tools=[{"function": {"name": "add"}}]),
        pair(),
    ],
    "text": [pair("The sky is", " blue.", " green."), pair("absent", "H: a\n\nA: Good", "H: a\n\nA: Bad")],
}


def train(model: Any, rows: Any, tok: Any, folder: Path) -> Any:
    options = trl.DPOConfig(
        output_dir=str(folder),
        max_length=200,
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
    )
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trl.DPOTrainer(model, args=options, train_dataset=rows, processing_class=tok, peft_config=lora)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", DATA)
def test_dpo_trains_on_the_ids_that_are_shown(kind: str, tmp_path: Path) -> None:
    tok = tiny.tokenizer()
    if kind == "tools":
        tok.chat_template = TOOLS_TEMPLATE
    shown = inspect_data(DATA[kind], tok, max_length=200, examples=9)
    train_rows, held, options = open_data(DATA[kind], {})
    examined = examine_preferences("preference", train_rows, held, options, tok, 200)
    rows = rows_for_trl(DATA[kind], tok, max_length=200).train
    trainer = train(tiny.model("llama"), rows, tok, tmp_path)
    assert all(
        torch.isfinite(torch.tensor(log["loss"])) for log in trainer.state.log_history if "loss" in log
    )
    assert len(trainer.train_dataset) == len(shown.examples) == len(rows)
    for number, (trained, example) in enumerate(zip(trainer.train_dataset, shown.examples, strict=True)):
        encoded = examined.encoded(number)
        assert trained["prompt_ids"] == encoded.prompt
        cut = [trained[f"{answer.side}_ids"][: answer.tokens] for answer in example.answers]
        assert cut == [*encoded.answers]
        batch = trainer.data_collator([trained])
        columns = (batch["input_ids"], batch["completion_mask"].bool(), batch["attention_mask"].bool())
        for answer, ids, mask, seen in zip(example.answers, *columns, strict=True):
            assert tok.decode(ids[mask]) == "".join(piece.text for piece in answer.pieces)
            assert int(mask.sum()) == answer.tokens
            assert tok.decode(ids[seen & ~mask]) == "".join(piece.text for piece in example.pieces)


def test_dpo_is_the_mean_over_pairs_of_equal_passes(tmp_path: Path) -> None:
    """As benchmarks/parity.py, and what docs/data.md says of unequal passes."""
    base = tiny.write_base(tmp_path / "base", dtype=torch.float32)
    adapter = tiny.write_adapter(tmp_path / "adapter", base)
    rows = parity_pairs.pairs(3)
    truth = parity_pairs.all_at_once(base, adapter, rows, ["sigmoid"], torch.float64)
    even = parity_pairs.through_trl(base, adapter, rows, ["sigmoid"], passes=3, batch=1)
    assert even.loss == pytest.approx(truth.loss, rel=2e-6)
    assert float((even.gradient - truth.gradient).norm() / truth.gradient.norm()) < 1e-5
    uneven = parity_pairs.through_trl(base, adapter, rows, ["sigmoid"], passes=2, batch=2)
    assert abs(uneven.loss / truth.loss - 1) > 1e-3
    assert uneven.evaluation == pytest.approx(truth.loss, rel=2e-6)


def test_grpo_asks_the_prompts_that_are_shown(tmp_path: Path) -> None:
    data = [{"prompt": [ASK], "answer": "four"}, {"prompt": [ASK, FOUR, ASK], "answer": "4"}]
    tok = tiny.tokenizer()
    shown = inspect_data(data, tok, max_length=200, examples=2)
    asked: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        asked.update(prompts=prompts, answer=answer)
        return [float(len(str(completion))) for completion in completions]

    options = trl.GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    rows = rows_for_trl(data, tok, max_length=200).train
    trainer = trl.GRPOTrainer(
        tiny.model("llama"), reward, args=options, train_dataset=rows, processing_class=tok
    )
    trainer.train()
    assert sorted(set(asked["answer"])) == ["4", "four"]
    texts = {tok.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in asked["prompts"]}
    assert texts == {"".join(piece.text for piece in example.pieces) for example in shown.examples}


def test_evaluation_rows_and_report() -> None:
    rows = rows_for_trl([pair(chosen=str(n)) for n in range(20)], tiny.tokenizer(), eval_fraction=0.2)
    assert (len(rows.train), len(rows.eval), rows.report.train_rows) == (16, 4, 16)
    assert rows_for_trl([pair()], tiny.tokenizer()).eval is None


def test_columns_of_prompt_only_rows_are_kept() -> None:
    data = [{"prompt": [ASK]}, {"prompt": [ASK], "answer": "4", "level": 3}]
    rows = rows_for_trl(data, tiny.tokenizer()).train
    assert rows[0] == {"prompt": [ASK], "answer": None, "level": None}
    assert rows[1] == {"prompt": [ASK], "answer": "4", "level": 3}
    with pytest.raises(DataError, match="the columns answer do not make a table"):
        rows_for_trl([{"prompt": "a", "answer": 4}, {"prompt": "b", "answer": "x"}], tiny.tokenizer())


def test_uneven_messages_come_back_without_nulls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As columns of a table both messages would have tool_calls, and one of them null."""
    import datasets

    tok = tiny.tokenizer()
    tok.chat_template = TOOLS_TEMPLATE
    rows = rows_for_trl(DATA["tools"], tok).train
    assert rows[0]["chosen"][0]["tool_calls"] == CALL["tool_calls"]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": "Four."}]
    assert rows[1]["tools"] is None
    monkeypatch.delattr(datasets, "Json")
    compared = [to_compared(Row("x", 1, row), "preference", chat=True) for row in DATA["tools"]]
    with pytest.raises(DataError, match="the messages of column chosen have different keys"):
        _dataset(compared)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([{"messages": [ASK, FOUR]}], {}, "the rows are messages, neither preference"),
        ([pair()], {"template": "chatml"}, "data.template has no effect on the rows"),
        ([pair()], {"template_options": {"a": 1}}, "data.template_options have no effect"),
        ([pair(chosen="x", rejected="x")], {}, "equal_answers"),
        ([pair(), pair(chosen="")], {}, "1 of 2 rows cannot be used"),
    ],
)
def test_refusals(data: Any, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_for_trl(data, tokenizer(FAMILIES["chatml"], tiny.CHATML), isolate=False, **options)
