"""Load a tokenizer that is really there: for a folder without one transformers may return an empty one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pronghorn.errors import SourceError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """Load the tokenizer of a folder.

    Raises:
        SourceError: its files are missing, broken, or hold no token.
    """
    if not has_tokenizer(folder):
        raise SourceError(
            f"{folder} has no tokenizer (none of {', '.join(_FILES)})", fix="copy the tokenizer files there"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the Rust parser raises bare Exception
        raise SourceError(
            f"the tokenizer in {folder} cannot be loaded: {type(error).__name__}: {error}",
            fix="copy the tokenizer files again",
        ) from error
    ordinary = len(tokenizer) - len(tokenizer.added_tokens_decoder)
    if ordinary <= 0 or not tokenizer.encode("a", add_special_tokens=False):
        raise SourceError(
            f"the tokenizer in {folder} is empty: it encodes no text", fix="copy the tokenizer files again"
        )
    return tokenizer


def check_rows(folder: Path, tokenizer: Any, rows: int) -> None:
    """Every id of the tokenizer's files, and every special one in use, must have a row in the embedding.

    Ids beyond the files are left out: some tokenizer classes add an unknown token of their own.

    Raises:
        SourceError: there is an id without a row.
    """
    ends = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    highest = max([*_file_ids(folder), *(one for one in ends if one is not None)], default=0)
    if highest >= rows:
        raise SourceError(
            f"the tokenizer in {folder} has token ids up to {highest}, the model's embedding has {rows} rows",
            fix="use the tokenizer that belongs to these weights",
        )


def _file_ids(folder: Path) -> Iterator[int]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    parsed = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = parsed["model"].get("vocab", ())
    yield from vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    yield from (token["id"] for token in parsed.get("added_tokens", ()))
