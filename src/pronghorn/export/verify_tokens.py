"""Promises about the tokenizer, the special token ids and the chat template of a model folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pronghorn.export.verify_folder import (
    Fault,
    Finding,
    Folder,
    UnreadableError,
    promise,
    read_json,
    verdict,
)
from pronghorn.export.verify_render import EndlessError, RenderError, UnrenderedError, rendered, syntax_errors

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_SPECIAL = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class TokenTable:
    """Token text -> id, the special tokens by name, and the added ones, as the tokenizer files give them."""

    ids: dict[str, int]
    special: dict[str, str]
    added: frozenset[str] = frozenset()

    def id_of(self, name: str) -> int | None:
        """The id of ``bos_token`` and so on; None when none is named, or its id is not readable here."""
        return self.ids.get(self.special.get(name, ""))


def token_table(folder: Folder) -> TokenTable:
    """Read tokenizer.json, tokenizer_config.json, added_tokens.json and special_tokens_map.json."""
    whole, settings = folder.json("tokenizer.json"), folder.json("tokenizer_config.json")
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else folder.json("vocab.json")
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids.update(vocabulary)
    elif isinstance(vocabulary, list):  # unigram models: a list of [text, score]
        ids.update({entry[0]: position for position, entry in enumerate(vocabulary)})
    ids.update(folder.json("added_tokens.json"))
    decoder = settings.get("added_tokens_decoder", {})
    ids.update({str(token.get("content")): int(number) for number, token in decoder.items()})
    ids.update({token["content"]: token["id"] for token in whole.get("added_tokens", [])})
    added = frozenset(token["content"] for token in whole.get("added_tokens", []))
    added |= {str(token.get("content")) for token in decoder.values()}
    given = {**folder.json("special_tokens_map.json"), **settings}
    texts = {
        name: given[name]["content"] if isinstance(given[name], dict) else given[name]
        for name in given
        if name in _SPECIAL
    }
    return TokenTable(ids, {name: text for name, text in texts.items() if isinstance(text, str)}, added)


@promise("tokenizer files are present and parse")
def tokenizer_present(folder: Folder) -> Finding:
    """The tokenizer's files are there, parse, and hold tokens."""
    found = [file for file in _VOCABULARIES if file in folder.names]
    problems = [] if found else [Fault("no tokenizer", "no tokenizer.json (or other vocabulary file)")]
    if "tokenizer_config.json" not in folder.names:
        problems.append(Fault("no tokenizer config", "tokenizer_config.json is missing"))
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        try:
            folder.json(file)
        except UnreadableError as error:
            problems.append(Fault("no tokenizer", str(error)))
    if not problems and "tokenizer.json" in found and not token_table(folder).ids:
        problems.append(Fault("no tokenizer", "tokenizer.json holds no token"))
    return verdict(problems, ", ".join(found))


@promise("special token ids agree in every file")
def special_ids_agree(folder: Folder) -> Finding:
    """bos, eos and pad ids are in range, and the same in config.json, generation_config.json and tokenizer.

    Several end ids are common (a turn's end and the text's end): then the sets must share the tokenizer's.
    """
    config = {**folder.text_config, **{k: v for k, v in folder.config.items() if v is not None}}
    table = token_table(folder)
    problems: list[Fault] = []
    told = []
    try:
        generation = folder.json("generation_config.json")
    except UnreadableError as error:  # every engine goes on without it
        problems, generation = [Fault("special ids differ", str(error))], {}
    for token in _SPECIAL:
        stated = {
            "config.json": _as_set(config.get(f"{token}_id")),
            "generation_config.json": _as_set(generation.get(f"{token}_id")),
            "the tokenizer": _as_set(table.id_of(token)),
        }
        stated = {where: ids for where, ids in stated.items() if ids}
        if token in table.special and table.id_of(token) is None and table.ids:
            lost = f"{token} {table.special[token]!r} is not in the vocabulary"
            problems.append(Fault("special ids differ", lost))
        if stated and not set.intersection(*stated.values()):
            told_ids = ", ".join(f"{sorted(ids)} in {where}" for where, ids in stated.items())
            problems.append(Fault("special ids differ", f"{token}_id differs: {told_ids}"))
        size = config.get("vocab_size")
        every = set().union(*stated.values())
        if isinstance(size, int):
            problems += [
                Fault("special ids differ", f"{token}_id {i} is outside the vocabulary of {size}")
                for i in every
                if i >= size or i < 0
            ]
        if every:
            told.append(f"{token.removesuffix('_token')} {'/'.join(map(str, sorted(every)))}")
    return verdict(problems, ", ".join(told) or "none stated")


def _as_set(value: Any) -> set[int]:
    """The ids of a config entry: a number, a list or nothing. -1 is the old way to write nothing."""
    values = value if isinstance(value, list) else [value]
    return {number for number in values if isinstance(number, int) and number != -1}


def chat_templates(folder: Folder) -> dict[str, str]:
    """Every chat template of the folder, by where it is written."""
    found: dict[str, str] = {}
    if "chat_template.jinja" in folder.names:
        found["chat_template.jinja"] = (folder.path / "chat_template.jinja").read_text(encoding="utf-8")
    extra = folder.path / "additional_chat_templates"
    for path in sorted(extra.glob("*.jinja")) if extra.is_dir() else ():
        found[f"additional_chat_templates/{path.name}"] = path.read_text(encoding="utf-8")
    for file in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        value = read_json(folder.path / file).get("chat_template") if file in folder.names else None
        if isinstance(value, str):
            found[file] = value
        elif isinstance(value, list):
            found.update({f"{file} ({entry['name']})": entry["template"] for entry in value})
    return found


@promise("chat template parses")
def template_parses(folder: Folder) -> Finding:
    """Every chat template is valid Jinja, and the first renders a short chat in time."""
    templates = chat_templates(folder)
    if not templates:
        return True, "no chat template"
    try:
        problems = [Fault("broken template", said) for said in syntax_errors(templates)]
        if not problems:
            _two_turns(folder, token_table(folder))
    except ImportError:
        return None, "jinja2 is not installed"
    except EndlessError as error:
        problems = [Fault("endless template", f"the chat template does not render a short chat: {error}")]
    except UnrenderedError as error:
        return None, f"the chat template could not be rendered: {error}"
    except RenderError:
        pass  # a template that wants more than messages
    return verdict(problems, ", ".join(templates))


_MARK = "what an assistant says"


def turn_end(folder: Folder, table: TokenTable) -> int | None:
    """The id of the special token that the chat template puts after an assistant's words; None: unknown."""
    try:
        said = _two_turns(folder, table)
    except RenderError:
        return None  # a template that wants more than messages
    after = said.rpartition(_MARK)[2]
    special = {token for token in table.added if token and token in after}
    first = min(special, key=lambda token: (after.index(token), -len(token)), default=None)
    return None if first is None else table.ids.get(first)


def _two_turns(folder: Folder, table: TokenTable) -> str:
    """A question and its answer as the folder's chat template writes them; nothing without a template."""
    text = next(iter(chat_templates(folder).values()), "")
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": _MARK}]
    return rendered(text, turns, table.special, prompt=False) if text else ""
