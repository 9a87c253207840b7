"""How good a model is at the demo's rows, measured with plain transformers: held-out loss and answers.

A loss is the mean negative log-likelihood, in nats, of the answers' tokens, with the one that ends each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Encoded = tuple[list[int], list[int]]
"""(token ids of the question, token ids of the answer with its end token)."""


def load(folder: Path) -> tuple[Any, Any]:
    """The model, computing in float32, and the tokenizer of a local folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_rows(path: Path) -> list[list[dict[str, str]]]:
    """The conversations of a file of rows."""
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Encoded:
    """A conversation of one question and one answer as token ids."""
    question = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    answer = messages[1]["content"] + tokenizer.eos_token
    return tokenizer(question)["input_ids"], tokenizer(answer)["input_ids"]


@torch.no_grad()
def loss(model: Any, tokenizer: Any, rows: list[list[dict[str, str]]]) -> float:
    """The model's loss on the rows' answers."""
    total, tokens = 0.0, 0
    for row in rows:
        question, answer = encode(tokenizer, row)
        logits = model(input_ids=torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    return total / tokens


def unigram_loss(
    tokenizer: Any, train: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]
) -> float:
    """The loss on the held-out answers of one who only counted the tokens of the train rows' answers.

    Token t has the probability (count(t) + 1) / (all counts + vocabulary size): add-one smoothing.
    """
    counts = Counter(token for row in train for token in encode(tokenizer, row)[1])
    whole = counts.total() + len(tokenizer)
    answers = [token for row in held_out for token in encode(tokenizer, row)[1]]
    return sum(-math.log((counts[token] + 1) / whole) for token in answers) / len(answers)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The model's greedy answer to the question of a conversation."""
    question, _ = encode(tokenizer, messages)
    output = model.generate(
        input_ids=torch.tensor([question]),
        attention_mask=torch.ones(1, len(question), dtype=torch.long),
        max_new_tokens=32,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, len(question) :], skip_special_tokens=True)).strip()
