"""The tokenizer of a run or of a merged model: the base's own files, with only what training changed.

Saving a tokenizer rewrites its files in today's format even where nothing changed, so files are compared by
what they mean, and the base's file is edited key by key. Every edit is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pronghorn.sources.resolve import read_json

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
CONFIG = "config.json"
GENERATION = "generation_config.json"
# vocabularies of the older, "slow" tokenizers: they say the same as tokenizer.json
SLOW_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json")
TOKENIZER_FILES = (TOKENIZER, SETTINGS, SPECIAL_MAP, ADDED, TEMPLATE, *SLOW_FILES)

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space")
# state of a tokenizer.json that is left over from use and says nothing about the tokens
_STATE = ("version", "truncation", "padding")


@dataclass
class FolderEdits:
    """New content by file name (None: the base's file is left out), and every change in words."""

    files: dict[str, bytes | None] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)

    def document(self, base: Path, name: str) -> dict[str, Any]:
        """A JSON file as it will be written; empty where there is none."""
        edited = self.files.get(name)
        if edited:
            return dict(json.loads(edited))
        return read_json(base / name) if (base / name).is_file() else {}

    def keep_changed(self, documents: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Take the documents that differ from what they were."""
        for name, document in documents.items():
            if document != before.get(name, {}):
                self.files[name] = dump(document)


def tokenizer_files(base: Path, changed: Path) -> FolderEdits:
    """What of the base's tokenizer files differs in meaning from those of a saved tokenizer, and how."""
    edits = FolderEdits()
    documents = {name: read_json(base / name) for name in _SETTINGS if (base / name).is_file()}
    before = json.dumps(documents)
    edit_tokenizer(edits, documents, base, changed, resized=False)
    edits.keep_changed(documents, json.loads(before))
    return edits


_SETTINGS = (SETTINGS, SPECIAL_MAP, ADDED)


def dump(document: Mapping[str, Any]) -> bytes:
    """A JSON file as transformers writes it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def edit_tokenizer(
    edits: FolderEdits, documents: dict[str, dict[str, Any]], base: Path, adapter: Path, *, resized: bool
) -> None:
    """Bring what the tokenizer in ``adapter`` says into ``edits`` and the base's parsed ``documents``."""
    if (adapter / TOKENIZER).is_file():
        theirs = read_json(adapter / TOKENIZER)
        ours = read_json(base / TOKENIZER) if (base / TOKENIZER).is_file() else None
        if (ours is None and resized) or (ours is not None and _meaning(ours) != _meaning(theirs)):
            _take_tokens(edits, documents, base, adapter, ours, theirs)
        ids = _ids(theirs)
    else:
        ids = {}
    if (adapter / SETTINGS).is_file():
        settings = read_json(adapter / SETTINGS)
        _take_special(edits, documents, settings, ids)
    _take_template(edits, documents, base, adapter)


def _meaning(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json without leftover state and without the two ways to write a merge."""
    found = {key: value for key, value in tokenizer.items() if key not in _STATE}
    model = dict(found.get("model") or {})
    if "merges" in model:
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found["model"] = model
    return found


def _but_added(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _meaning(tokenizer).items() if key != "added_tokens"}


def _ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    pairs = (
        vocabulary.items()
        if isinstance(vocabulary, Mapping)
        else ((one[0], i) for i, one in enumerate(vocabulary))
    )
    return {**dict(pairs), **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}


def _take_tokens(
    edits: FolderEdits,
    documents: dict[str, dict[str, Any]],
    base: Path,
    adapter: Path,
    ours: dict[str, Any] | None,
    theirs: dict[str, Any],
) -> None:
    """The adapter's tokenizer.json replaces the base's, and the files that repeat its tokens follow."""
    if ours is not None and _but_added(ours) == _but_added(theirs):
        document = {**ours, "added_tokens": theirs.get("added_tokens", [])}
    else:
        document = {**theirs, **{key: (ours or {}).get(key) for key in _STATE if key in theirs and ours}}
    edits.files[TOKENIZER] = dump(document)
    new = sorted(set(_ids(theirs)) - set(_ids(ours or {}))) if ours else []
    edits.listed.append(
        f"{TOKENIZER}: taken from the adapter ({len(new)} new tokens)" if ours else f"{TOKENIZER}: added"
    )
    added = theirs.get("added_tokens", [])
    vocabulary = (theirs.get("model") or {}).get("vocab") or {}
    if "added_tokens_decoder" in documents.get(SETTINGS, {}):
        keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
        decoder = {str(token["id"]): {key: token[key] for key in keys} for token in added}
        set_key(edits, SETTINGS, documents[SETTINGS], "added_tokens_decoder", decoder)
    if ADDED in documents:
        wanted = {token["content"]: token["id"] for token in added if token["content"] not in vocabulary}
        if documents[ADDED] != wanted:
            documents[ADDED] = wanted
            edits.listed.append(f"{ADDED}: the adapter's added tokens")
    if ours is not None and _meaning(ours)["model"] != _meaning(theirs)["model"]:
        for name in SLOW_FILES:  # another vocabulary altogether: the base's slow files would contradict it
            if (base / name).exists():
                there = (adapter / name).is_file()
                edits.files[name] = (adapter / name).read_bytes() if there else None
                edits.listed.append(f"{name}: {'taken from the adapter' if there else 'left out'}")


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, Mapping) else token


def _take_special(
    edits: FolderEdits, documents: dict[str, dict[str, Any]], theirs: dict[str, Any], ids: dict[str, int]
) -> None:
    ours = documents.setdefault(SETTINGS, {})
    known = {**documents.get(SPECIAL_MAP, {}), **ours}
    for name in _SPECIAL:
        if theirs.get(name) is None or _text(theirs[name]) == _text(known.get(name)):
            continue
        set_key(edits, SETTINGS, ours, name, theirs[name])
        if SPECIAL_MAP in documents:
            set_key(edits, SPECIAL_MAP, documents[SPECIAL_MAP], name, theirs[name])
        if _text(theirs[name]) in ids:
            _set_id(edits, documents, f"{name}_id", ids[_text(theirs[name])])
    for name in (*_LISTS, *_SWITCHES):
        if name in ours and name in theirs and ours[name] != theirs[name]:
            set_key(edits, SETTINGS, ours, name, theirs[name])


def _set_id(edits: FolderEdits, documents: dict[str, dict[str, Any]], key: str, value: int) -> None:
    """A special token's id in the configs; where several end ids are listed, it joins them."""
    config = documents.get(CONFIG, {})
    for name, place in [
        (CONFIG, config),
        (CONFIG, config.get("text_config")),
        (GENERATION, documents.get(GENERATION)),
    ]:
        if not isinstance(place, dict) or key not in place:
            continue
        old = place[key]
        if isinstance(old, list):
            if value not in old:
                set_key(edits, name, place, key, [value, *old])
        elif old != value:
            set_key(edits, name, place, key, value)


def set_key(edits: FolderEdits, where: str, document: dict[str, Any], key: str, value: Any) -> None:
    """Set a key and list the change; nothing where it holds the value already."""
    if document.get(key) == value and key in document:
        return
    shown = f"{_short(document.get(key))} -> {_short(value)}"
    document[key] = value
    edits.listed.append(f"{where}: {key} {shown}")


def _short(value: Any) -> str:
    text = json.dumps(_text(value) or value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def templates(folder: Path) -> Iterator[str]:
    """The chat templates of a folder, the one that counts first."""
    if (folder / TEMPLATE).is_file():
        yield (folder / TEMPLATE).read_text(encoding="utf-8")
    if (folder / SETTINGS).is_file():
        template = read_json(folder / SETTINGS).get("chat_template")
        if isinstance(template, str):
            yield template


def _take_template(
    edits: FolderEdits, documents: dict[str, dict[str, Any]], base: Path, adapter: Path
) -> None:
    theirs, ours = next(templates(adapter), None), next(templates(base), None)
    if theirs is None or theirs == ours:
        return
    if "chat_template" in documents.get(SETTINGS, {}):
        set_key(edits, SETTINGS, documents[SETTINGS], "chat_template", theirs)
    if (base / TEMPLATE).is_file() or "chat_template" not in documents.get(SETTINGS, {}):
        edits.files[TEMPLATE] = theirs.encode()
        edits.listed.append(f"{TEMPLATE}: taken from the adapter")
