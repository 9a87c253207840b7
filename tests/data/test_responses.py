"""train_on_responses_only on rows a trainer has tokenised, and on a real SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from pronghorn.data.responses import train_on_responses_only
from pronghorn.errors import DataError
from tests import tiny
from tests.data.families import CHAT, FAMILIES, family_tokenizer, tokenizer


def trainer_of(tok: Any, *texts: str, **more: Any) -> Any:
    ids = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "assistant_masks": [[1] * len(row) for row in ids]})
    return SimpleNamespace(processing_class=tok, train_dataset=rows, eval_dataset=None, **more)


def trained(tok: Any, row: dict[str, Any]) -> str:
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return str(tok.decode([label for label in row["labels"] if label != -100]))


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - {"qwen-3", "phi-3"}))
def test_parts_come_from_the_template(name: str) -> None:
    tok = family_tokenizer(name)
    trainer = train_on_responses_only(trainer_of(tok, FAMILIES[name].rendered))
    expected = FAMILIES[name].trained.replace(" ", "")
    assert trained(tok, trainer.train_dataset[0]).replace(" ", "") == expected
    assert "assistant_masks" not in trainer.train_dataset.column_names


def test_earlier_answers_that_the_template_rewrote() -> None:
    tok = family_tokenizer("qwen-3")
    trainer = train_on_responses_only(trainer_of(tok, FAMILIES["qwen-3"].rendered))
    assert trained(tok, trainer.train_dataset[0]) == "Four.<|im_end|><think>\n\n</think>\n\nFive.<|im_end|>"


def test_given_parts() -> None:
    tok = family_tokenizer("chatml")
    trainer = train_on_responses_only(
        trainer_of(tok, FAMILIES["chatml"].rendered),
        instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
    )
    assert trained(tok, trainer.train_dataset[0]) == "Four.<|im_end|>Five.<|im_end|>"


def test_parts_whose_newlines_merge_with_the_text() -> None:
    """Opening and answer share the two newlines that are one token: it is the opening's."""
    tok = family_tokenizer("chatml")
    text = FAMILIES["chatml"].rendered.replace("Four.", "\nFour.")
    trainer = train_on_responses_only(trainer_of(tok, text))
    assert trained(tok, trainer.train_dataset[0]) == "Four.<|im_end|>Five.<|im_end|>"


def test_last_answer_and_evaluation_rows() -> None:
    tok = family_tokenizer("llama-3")
    trainer = trainer_of(tok, FAMILIES["llama-3"].rendered)
    trainer.eval_dataset = {"held": trainer.train_dataset}
    train_on_responses_only(trainer, last_response_only=True)
    assert trained(tok, trainer.train_dataset[0]) == "Five.<|eot_id|>"
    assert trained(tok, trainer.eval_dataset["held"][0]) == "Five.<|eot_id|>"


def test_rows_cut_inside_a_character() -> None:
    tok = family_tokenizer("chatml")
    trainer = trainer_of(tok, FAMILIES["chatml"].rendered + "🎉")
    trainer.train_dataset = trainer.train_dataset.map(
        lambda row: {key: value[:-2] for key, value in row.items()}
    )
    train_on_responses_only(trainer)
    assert trained(tok, trainer.train_dataset[0]) == "Four.<|im_end|>Five.<|im_end|>"


def test_rows_without_an_answer_are_left_out_and_told() -> None:
    tok = family_tokenizer("chatml")
    trainer = trainer_of(tok, "no chat", FAMILIES["chatml"].rendered)
    with pytest.warns(UserWarning, match="1 of 2 training rows have no answer"):
        train_on_responses_only(trainer)
    assert len(trainer.train_dataset) == 1


def test_refusals() -> None:
    tok = family_tokenizer("chatml")
    with pytest.raises(DataError, match="no answer was found in any of the 1 training rows"):
        train_on_responses_only(trainer_of(tok, "no chat"))
    with pytest.raises(DataError, match="one of instruction_part and response_part is missing"):
        train_on_responses_only(trainer_of(tok, "x"), instruction_part="a")
    with pytest.raises(DataError, match="must not be empty"):
        train_on_responses_only(trainer_of(tok, "x"), instruction_part="a", response_part="")
    bare = tokenizer(FAMILIES["chatml"], None)
    with pytest.raises(DataError, match="no chat template to take the parts from"):
        train_on_responses_only(trainer_of(bare, "x"))
    trainer = trainer_of(tok, "x")
    trainer.train_dataset = trainer.train_dataset.rename_column("input_ids", "text")
    with pytest.raises(DataError, match="not tokenised"):
        train_on_responses_only(trainer)


def test_ids_that_do_not_read_back() -> None:
    tok = family_tokenizer("chatml")
    trainer = trainer_of(tok, FAMILIES["chatml"].rendered)
    newline = tok.convert_tokens_to_ids("Ċ")
    ids = [
        newline,
        newline,
        *trainer.train_dataset[0]["input_ids"],
    ]  # two newlines that the tokenizer writes as one
    trainer.train_dataset = datasets.Dataset.from_dict({"input_ids": [ids]})
    with pytest.raises(DataError, match="ids differ from token 0 on"):
        train_on_responses_only(trainer)


def test_on_a_real_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_list([{"messages": CHAT}] * 2)
    tok = tiny.tokenizer()
    config = SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False)
    trainer = SFTTrainer(model=tiny.model("llama"), args=config, train_dataset=rows, processing_class=tok)
    train_on_responses_only(trainer)
    (batch, *_) = trainer.get_train_dataloader()
    labels = batch["labels"][0]
    assert tok.decode(labels[labels != -100]) == "Four.<|im_end|>Five.<|im_end|>"
    assert trainer.train().training_loss > 0
