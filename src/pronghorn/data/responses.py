"""``train_on_responses_only``: label the answers in rows that a trainer has already tokenised.

What is left of such rows is ids, so here, and only here, turns are found by the text around them: by default
the text that the chat template itself writes between two turns, and each answer ends with its end token.
Positions are mapped to tokens by offsets, so merged tokens do not hide a turn.
``pronghorn.train`` needs none of this.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pronghorn.data.tokens import IGNORE, check_tokenizer
from pronghorn.errors import DataError

_QUESTION, _ANSWER, _NEXT = "pronghornquestion", "pronghornanswer", "pronghornnext"
_MASKS = ("assistant_masks", "completion_mask")  # TRL's own, which its collator would prefer or trip over
_TAIL = 4  # tokens at the end of a cut row that may be part of a character


@dataclass(frozen=True)
class _Turns:
    """An answer lies between ``opens`` and the next ``closes``, which trains too if ``inclusive``."""

    opens: str
    closes: str
    inclusive: bool

    def spans(self, text: str, special: re.Pattern[str]) -> list[tuple[int, int]]:
        """``[start, end)`` characters of every answer."""
        spans, at = [], text.find(self.opens)
        while at >= 0:
            start = at + len(self.opens)
            end = text.find(self.closes, start)
            end = len(text) if end < 0 else end + (len(self.closes) if self.inclusive else 0)
            spans.append((start, _without_space_behind(text, start, end, special)))
            at = text.find(self.opens, end)
        return spans


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """Make a trainer's datasets train on answers only. The trainer is changed in place and returned.

    Args:
        trainer: a TRL or transformers trainer whose datasets have the column ``input_ids``.
        instruction_part: text that opens a question; both parts or neither. By default from the template.
        response_part: text that opens an answer.
        force_match: refuse rows whose ids cannot be read back exactly, instead of leaving them out.
        tokenizer: by default the trainer's.
        return_function: return the function for ``Dataset.map`` (batched) and change nothing.
        num_proc: processes, as in ``Dataset.map``.
        last_response_only: only the last answer of each row.

    Raises:
        DataError: one part without the other, no template to take them from, or no row has an answer.
    """
    tokenizer = tokenizer or getattr(trainer, "processing_class", None) or trainer.tokenizer
    check_tokenizer(tokenizer)
    turns = _turns(tokenizer, instruction_part, response_part)
    label = _labeller(tokenizer, turns, force_match=force_match, last_only=last_response_only)
    if return_function:
        return label
    trainer.train_dataset = _labelled(trainer.train_dataset, label, num_proc, "training")
    evaluated = trainer.eval_dataset
    if isinstance(evaluated, Mapping):
        named = {name: _labelled(part, label, num_proc, name) for name, part in evaluated.items()}
        trainer.eval_dataset = named
    elif evaluated is not None:
        trainer.eval_dataset = _labelled(evaluated, label, num_proc, "evaluation")
    return trainer


def _turns(tokenizer: Any, instruction: str | None, response: str | None) -> _Turns:
    if (instruction is None) != (response is None):
        raise DataError("one of instruction_part and response_part is missing", fix="give both, or neither")
    if instruction is not None and response is not None:
        if not instruction or not response:
            raise DataError(
                "instruction_part and response_part must not be empty", fix="give the text of both"
            )
        # The space an opening ends in is often one token with the first word of the answer.
        return _Turns(response.rstrip(" ") or response, instruction, inclusive=False)
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template to take the parts from",
            fix="give instruction_part and response_part",
        )
    chat = [
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _NEXT},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    opens = text[text.index(_QUESTION) + len(_QUESTION) : text.index(_ANSWER)]
    between = text[text.index(_ANSWER) + len(_ANSWER) : text.index(_NEXT)]
    if not opens.strip() or not between.strip():
        raise DataError(
            "the chat template writes nothing between turns", fix="give instruction_part and response_part"
        )
    end = _special(tokenizer).match(between.lstrip())
    opens = opens.rstrip(" ")
    return _Turns(opens, end[0], inclusive=True) if end else _Turns(opens, between, inclusive=False)


def _special(tokenizer: Any) -> re.Pattern[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _without_space_behind(text: str, start: int, end: int, special: re.Pattern[str]) -> int:
    """``end``, or the end of the special token before it if only whitespace lies between."""
    stripped = start + len(text[start:end].rstrip())
    return (
        stripped if any(match.end() == stripped for match in special.finditer(text, start, stripped)) else end
    )


def _labeller(
    tokenizer: Any, turns: _Turns, *, force_match: bool, last_only: bool
) -> Callable[[Mapping[str, Any]], dict[str, list[list[int]]]]:
    special = _special(tokenizer)

    def label(batch: Mapping[str, Any]) -> dict[str, list[list[int]]]:
        rows = [list(ids) for ids in batch["input_ids"]]
        texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in rows]
        encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        labels = []
        for ids, text, again, offsets in zip(
            rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            agreed = next((i for i, (a, b) in enumerate(zip(ids, again, strict=False)) if a != b), len(ids))
            if agreed < len(ids) - _TAIL and force_match:
                raise DataError(
                    f"a row's ids differ from token {agreed} on if its text is encoded again: {text[:80]!r}",
                    fix="use pronghorn.train, which masks by message; or force_match=False to leave them out",
                )
            spans = turns.spans(text, special) if agreed >= len(ids) - _TAIL else []
            labels.append(_labels(ids, offsets, spans[-1:] if last_only else spans))
        return {"labels": labels}

    return label


def _labels(
    ids: Sequence[int], offsets: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]
) -> list[int]:
    labels = [IGNORE] * len(ids)
    for index, (low, high) in enumerate(offsets[: len(ids)]):
        if any(start <= low and high <= end and low < high for start, end in spans):
            labels[index] = ids[index]
    return labels


def _labelled(dataset: Any, label: Callable[..., Any], num_proc: int | None, name: str) -> Any:
    if "input_ids" not in (dataset.column_names or ()):
        raise DataError(
            f"the {name} rows are not tokenised: no column input_ids", fix="give them to SFTTrainer"
        )
    masks = [column for column in _MASKS if column in dataset.column_names]
    labelled = dataset.map(label, batched=True, num_proc=num_proc, remove_columns=masks)
    kept = labelled.filter(lambda row: any(each != IGNORE for each in row["labels"]), num_proc=num_proc)
    if len(kept) == 0:
        raise DataError(
            f"no answer was found in any of the {len(labelled)} {name} rows: all labels would be {IGNORE}",
            fix="check instruction_part and response_part against a decoded row, and max_length",
        )
    if len(kept) < len(labelled):
        warnings.warn(
            f"{len(labelled) - len(kept)} of {len(labelled)} {name} rows have no answer: left out",
            stacklevel=3,
        )
    return kept
