"""Tokenizer, template and config files of a merged model: the base's own, with only what training changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pronghorn.adapters.tokenizer_files import (
    ADDED,
    CONFIG,
    GENERATION,
    SETTINGS,
    SPECIAL_MAP,
    TOKENIZER_FILES,
    FolderEdits,
    dump,
    edit_tokenizer,
    set_key,
)
from pronghorn.export.onto import without_quantization
from pronghorn.export.verify_readings import version_4_rope, version_4_tokenizer
from pronghorn.sources.resolve import read_json


def merged_files(base: Path, adapter: Path, *, vocabulary: int | None, untied: bool) -> FolderEdits:
    """Work out which of the base's small files change, and how.

    Args:
        base: the base's folder.
        adapter: the adapter's folder, which may hold the tokenizer it was trained with.
        vocabulary: number of embedding rows where it was resized.
        untied: embedding and head are written as two matrices.
    """
    edits = FolderEdits()
    documents = {name: read_json(base / name) for name in _DOCUMENTS if (base / name).is_file()}
    before = json.dumps(documents)
    if not any((base / name).exists() for name in TOKENIZER_FILES):
        for name in TOKENIZER_FILES:
            if (adapter / name).is_file():
                edits.files[name] = (adapter / name).read_bytes()
                edits.listed.append(f"{name}: taken from the adapter, the base has none")
    else:
        edit_tokenizer(edits, documents, base, adapter, resized=vocabulary is not None)
    if vocabulary is not None:
        _set_config(edits, documents[CONFIG], "vocab_size", vocabulary)
    if untied:
        _set_config(edits, documents[CONFIG], "tie_word_embeddings", False)
    edits.keep_changed(documents, json.loads(before))
    return edits


def remove_quantization(edits: FolderEdits, base: Path) -> None:
    """Take every quantization_config out of config.json: what is written is in 16-bit."""
    document = edits.document(base, CONFIG)
    if without_quantization(document):
        edits.files[CONFIG] = dump(document)
        edits.listed.append(f"{CONFIG}: quantization_config removed")


def for_both_generations(edits: FolderEdits, base: Path) -> None:
    """Say what only transformers 5 reads in the words of 4, too: rope settings, tokenizer class."""
    config = edits.document(base, CONFIG)
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    added = {} if text.get("rope_theta") or text.get("rope_scaling") else version_4_rope(text)
    if added:
        text.update(added)
        edits.files[CONFIG] = dump(config)
        edits.listed.append(f"{CONFIG}: {', '.join(added)} added, for transformers 4")
    settings = edits.document(base, SETTINGS)
    readable = version_4_tokenizer(settings)
    if readable != settings:
        edits.files[SETTINGS] = dump(readable)
        edits.listed.append(f"{SETTINGS}: in the words of transformers 4, which both generations read")


_DOCUMENTS = (CONFIG, GENERATION, SETTINGS, SPECIAL_MAP, ADDED)


def _set_config(edits: FolderEdits, config: dict[str, Any], key: str, value: Any) -> None:
    """A key of config.json, and of its text part where that has it; transformers 4 ties by the latter's."""
    text = config.get("text_config")
    if isinstance(text, dict) and (key in text or key == "tie_word_embeddings"):
        set_key(edits, f"{CONFIG} text_config", text, key, value)
    if key in config or not isinstance(text, dict) or key == "tie_word_embeddings":
        set_key(edits, CONFIG, config, key, value)
