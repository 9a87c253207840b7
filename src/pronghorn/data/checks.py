"""What is looked at before a run: each check passes, warns with the rows it concerns, or stops the run."""

from __future__ import annotations

from typing import Any

import numpy as np

from pronghorn.data.options import Format
from pronghorn.data.preference import LAYOUTS as PREFERENCE_LAYOUTS
from pronghorn.data.report import SHOWN, Check, Places
from pronghorn.data.tally import PartTally, Tally
from pronghorn.data.templates import ChatTemplate

# name -> (stops the run, what it means when it fails). A row gets these names as flags while it is encoded.
ROW_CHECKS = {
    "bos": (True, "rows begin with two BOS tokens; serving sends one"),
    "end_token": (
        True,
        "answers that train end without the token that ends a turn: the model would not stop",
    ),
    "masked": (True, "rows in which no token trains"),
    "serving": (True, "rows whose ids differ from those of apply_chat_template"),
    "opening": (
        False,
        "rows whose answer a server opens with text that is not in the row (an opened <think>)",
    ),
    "marks": (
        False,
        "rows whose earlier answers the template rewrites: they train where its generation marks are, not as "
        "they are served; data.rewritten=split gives one row per answer, each as served",
    ),
    "lost_text": (False, "answers of which the chat template leaves out text, thoughts or tool calls"),
    "special_text": (
        False,
        "conversations whose text spells special tokens, which the model will take for real ones",
    ),
    "no_bos": (False, "rows without the BOS that the tokenizer puts before plain text"),
}
PREFERENCE_CHECKS = {
    **{name: rule for name, rule in ROW_CHECKS.items() if name != "marks"},
    "equal_answers": (
        True,
        "rows whose chosen and rejected answer are the same tokens: nothing is preferred",
    ),
    "contradiction": (False, "rows that choose what an earlier row with the same prompt rejects, and back"),
    "boundary": (False, "prompts whose last token merges with the answer: they train without that end"),
    "repeated_prompt": (False, "rows of plain text whose answers both begin with the prompt again"),
}
PROMPT_CHECKS = {name: ROW_CHECKS[name] for name in ("bos", "serving", "special_text", "no_bos")}
_PLAIN = ("prompt_completion", *PREFERENCE_LAYOUTS)  # layouts that come as text and as messages


def run_checks(
    tally: Tally,
    train: PartTally,
    held: PartTally,
    tokenizer: Any,
    template: ChatTemplate | None,
    layout: Format,
) -> tuple[Check, ...]:
    """Every check with its outcome, those that stop first.

    Args:
        tally: flags counted over all rows.
        train: hashes of the training rows.
        held: hashes of the evaluation rows that came from files of their own.
        tokenizer: for its pad and eos token.
        template: None if the rows are no conversations.
        layout: of the rows; it decides which checks there are.
    """
    named = {"preference": PREFERENCE_CHECKS, "prompt_only": PROMPT_CHECKS}.get(layout, ROW_CHECKS)
    checks = [
        Check(name, tally.flagged[name].count == 0, stops, meaning, tally.flagged[name].places())
        for name, (stops, meaning) in named.items()
    ]
    if template is not None:
        dated = "strftime_now" in template.text and "date_string" not in template.options
        meaning = "the chat template writes today's date; fix it with data.template_options.date_string"
        checks.append(Check("date", not dated, False, meaning, Places(0, ())))
    elif layout in _PLAIN:
        meaning = (
            "the rows are plain text, which trains without the chat template that this tokenizer has; "
            "write prompts and answers as lists of messages to use it"
        )
        checks.append(Check("plain_text", not tokenizer.chat_template, False, meaning, Places(0, ())))
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    meaning = "the tokenizer has no pad token" if pad is None else "pad equals eos"
    # Labels are made by position, so an end token that looks like padding trains all the same.
    checks.append(Check("pad_token", pad is not None and pad != eos, False, meaning, Places(0, ())))
    checks.append(_duplicates(tally, train))
    checks.append(_overlap(tally, train, held))
    return tuple(sorted(checks, key=lambda check: not check.stops))


def _duplicates(tally: Tally, train: PartTally) -> Check:
    hashes = np.asarray(train.hashes)
    order = np.argsort(hashes, kind="stable")
    again = np.sort(order[1:][hashes[order[1:]] == hashes[order[:-1]]])
    places = Places(len(again), tuple(tally.place(train, index) for index in again[:SHOWN]))
    return Check("duplicates", not len(again), False, "rows equal to an earlier one", places)


def _overlap(tally: Tally, train: PartTally, held: PartTally) -> Check:
    shared = np.flatnonzero(np.isin(np.asarray(held.hashes), np.asarray(train.hashes)))
    places = Places(len(shared), tuple(tally.place(held, index) for index in shared[:SHOWN]))
    return Check("overlap", not len(shared), False, "evaluation rows that are also trained on", places)
