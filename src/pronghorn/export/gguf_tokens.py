"""The tokenizer inside a GGUF file: what transformers' tokenizer does, said in llama.cpp's terms.

The truth is the tokenizer that transformers builds from the folder, not the files beside it: two generations
of transformers build it differently. What llama.cpp would tokenize differently is refused or told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoTokenizer

from pronghorn.adapters.tokenizer_files import GENERATION, TOKENIZER
from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.export.gguf_spm import SPACE, differing_text, merge_scores, prefix_of
from pronghorn.export.verify_readings import LLAMA_ENDS
from pronghorn.sources.resolve import BASE_CONFIG, read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_USE_16 = "serve the merged folder with vLLM or transformers (--format merged_16bit)"

_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_CASED_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTE_LEVEL, _DIGITS = "byte level words", "single digits"
# (how tokenizer.json splits, model.ignore_merges) -> llama.cpp's name for it (llama-vocab.cpp)
PRE_TYPES: Mapping[tuple[tuple[str, ...], bool], str] = MappingProxyType(
    {
        ((_BYTE_LEVEL,), False): "gpt-2",
        ((_DIGITS, _BYTE_LEVEL), False): "smollm",
        ((rf"(?i:{_WORDS})|{_START}\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}",), True): "llama-bpe",
        ((rf"(?i:{_WORDS})|{_START}\p{{L}}+|\p{{N}}{{1,3}}{_TAIL}",), False): "smaug-bpe",
        ((rf"(?i:{_WORDS})|{_START}\p{{L}}+|\p{{N}}{_TAIL}",), False): "qwen2",
        ((rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}{_CASED_TAIL}",), True): "tekken",
        (
            (
                rf"{_START}{_UPPER}*{_LOWER}+(?i:{_WORDS})?|{_START}{_UPPER}+{_LOWER}*(?i:{_WORDS})?"
                rf"|\p{{N}}{{1,3}}{_CASED_TAIL}",
            ),
            False,
        ): "gpt-4o",
    }
)
# a model whose general.name holds one of these: llama.cpp strips blanks after all special tokens but _KEPT
STRIPPING_NAMES = ("phi-3", "phi3")
_KEPT = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True)
class TokenPlan:
    """GGUF metadata of a tokenizer; ``strips``: the model's general.name has to say phi-3.

    ``stops`` are the texts that end an answer, ``fast`` is transformers' tokenizer.
    """

    metadata: Mapping[str, Any]
    count: int
    strips: bool
    stops: tuple[str, ...]
    template: str | None
    fast: Any
    warnings: tuple[str, ...]


def plan_tokens(folder: Path) -> TokenPlan:
    """Read the tokenizer of a model folder.

    Raises:
        SourceError: there is none, or transformers cannot build it.
        NotSupportedError: llama.cpp has no such tokenizer; what is different is named.
    """
    fast = _load(folder)
    spec = json.loads(fast.backend_tokenizer.to_str())
    # classes of transformers 5 add tokens that no file has, and no embedding: left out
    known = _ids(read_json(folder / TOKENIZER))
    added = {token["id"]: token for token in spec.get("added_tokens", []) if token["id"] in known}
    warnings: list[str] = []
    model = spec["model"]
    if model.get("type") != "BPE":
        raise NotSupportedError(
            f"the tokenizer of {folder} is {model.get('type')}; BPE and sentencepiece BPE are written",
            fix=_USE_16,
        )
    vocabulary = {int(number): text for text, number in model["vocab"].items() if number in known}
    texts = {**vocabulary, **{number: token["content"] for number, token in added.items()}}
    count = max(texts) + 1
    if model.get("byte_fallback"):
        own = _sentencepiece(folder, fast, spec, texts, warnings)
    else:
        own = _byte_level(folder, spec)
    types = _types(texts, added, model)
    metadata: dict[str, Any] = {
        **own,
        "tokenizer.ggml.tokens": _token_list(texts, types, sentencepiece=bool(model.get("byte_fallback"))),
        "tokenizer.ggml.token_type": [types.get(number, UNUSED) for number in range(count)],
    }
    stops = _stop_ids(folder, fast)
    metadata |= _special(folder, fast, spec, texts, stops)
    template = _template(fast, metadata)
    strips = _strips(added, texts, types, warnings)
    warnings += _stop_warnings(stops, texts, metadata)
    ends = tuple(texts[number] for number in stops if number in texts)
    return TokenPlan(metadata, count, strips, ends, template, fast, tuple(warnings))


def padded(plan: TokenPlan, rows: int) -> dict[str, Any]:
    """The metadata for an embedding of ``rows`` rows: llama.cpp wants a token for each.

    Raises:
        NotSupportedError: more tokens than rows.
    """
    if plan.count > rows:
        raise NotSupportedError(
            f"the tokenizer has {plan.count} tokens, the embedding {rows} rows",
            fix="give the tokenizer that belongs to the model",
        )
    metadata, known = dict(plan.metadata), set(plan.metadata["tokenizer.ggml.tokens"])
    tokens = list(metadata["tokenizer.ggml.tokens"])
    tokens += [_unused(number, known) for number in range(plan.count, rows)]
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.token_type"] += [UNUSED] * (rows - plan.count)
    if "tokenizer.ggml.scores" in metadata:
        scores = metadata["tokenizer.ggml.scores"]
        metadata["tokenizer.ggml.scores"] = scores + [min(scores)] * (rows - plan.count)
    return metadata


def _unused(number: int, known: set[str]) -> str:
    text = f"[PAD{number}]"
    while text in known:
        text = f"[{text}]"
    known.add(text)
    return text


def _ids(tokenizer: Mapping[str, Any]) -> set[int]:
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = vocabulary.values() if isinstance(vocabulary, Mapping) else range(len(vocabulary))
    return {*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))}


def _load(folder: Path) -> Any:
    if not (folder / TOKENIZER).is_file():
        raise SourceError(
            f"{folder} has no {TOKENIZER}, so llama.cpp could not tokenize",
            fix="save the tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)",
        )
    try:
        fast = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise SourceError(f"transformers cannot load the tokenizer of {folder}: {error}") from error
    if getattr(fast, "backend_tokenizer", None) is None:
        raise SourceError(
            f"the tokenizer of {folder} is Python code only", fix="give one with a tokenizer.json"
        )
    return fast


def _types(texts: Mapping[int, str], added: Mapping[int, Any], model: Mapping[str, Any]) -> dict[int, int]:
    found = {}
    for number, text in texts.items():
        if number in added and _searched(added[number]):
            found[number] = CONTROL if added[number]["special"] else USER_DEFINED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            found[number] = BYTE
        else:
            found[number] = NORMAL
        if model.get("byte_fallback") and text == model.get("unk_token"):
            found[number] = UNKNOWN
    return found


def _searched(token: Mapping[str, Any]) -> bool:
    """Whether transformers searches this added token in plain text: escaped blanks are not there."""
    return bool(token["normalized"]) or SPACE not in token["content"]


def _token_list(texts: Mapping[int, str], types: Mapping[int, int], *, sentencepiece: bool) -> list[str]:
    """One text per id; llama.cpp searches user-defined tokens in the text before blanks are escaped."""
    known = set(texts.values())
    tokens = [texts.get(number) or _unused(number, known) for number in range(max(texts) + 1)]
    if sentencepiece:
        tokens = [
            text.replace(SPACE, " ") if types.get(number) == USER_DEFINED else text
            for number, text in enumerate(tokens)
        ]
    return tokens


def _byte_level(folder: Path, spec: Mapping[str, Any]) -> dict[str, Any]:
    splits = tuple(_splits(spec.get("pre_tokenizer")))
    model = spec["model"]
    pre = PRE_TYPES.get((splits, bool(model.get("ignore_merges"))))
    if pre is None:
        told = " then ".join(splits) or "no splitting"
        raise NotSupportedError(
            f"the tokenizer of {folder} splits text in a way not known here ({told}, ignore_merges "
            f"{bool(model.get('ignore_merges'))}): llama.cpp would be told the wrong pre-tokenizer",
            fix=_USE_16,
        )
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):  # llama.cpp does not normalise; NFC leaves nearly all text alone
        raise NotSupportedError(
            f"the tokenizer normalises text by {normalizer}, llama.cpp does not", fix=_USE_16
        )
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}


def _splits(part: Mapping[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer that split text, each by its rule."""
    if part is None:
        return
    kind = part.get("type")
    if kind == "Sequence":
        for one in part["pretokenizers"]:
            yield from _splits(one)
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        if part.get("use_regex", True):
            yield _BYTE_LEVEL
    elif kind == "Digits" and part.get("individual_digits"):
        yield _DIGITS
    elif kind == "Split" and not part.get("invert") and part.get("behavior") == "Isolated":
        pattern = part["pattern"]
        yield pattern.get("Regex") or f"exactly {pattern.get('String')!r}"
    else:
        yield json.dumps(part)


def _sentencepiece(
    folder: Path, fast: Any, spec: Mapping[str, Any], texts: Mapping[int, str], warnings: list[str]
) -> dict[str, Any]:
    prefix, told = prefix_of(spec, chat=bool(fast.chat_template))
    warnings += told
    scores = merge_scores(spec["model"], max(texts) + 1)
    wrong = differing_text(fast, spec, scores)
    if wrong is not None:
        raise NotSupportedError(
            f"the tokenizer of {folder} has byte_fallback, but its merges are not those of a sentencepiece "
            f"model: llama.cpp would cut {wrong!r} differently",
            fix=_USE_16,
        )
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _stop_ids(folder: Path, fast: Any) -> list[int]:
    """The ids at which transformers' generate stops, in its order of precedence."""
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    config = read_json(folder / BASE_CONFIG) if (folder / BASE_CONFIG).is_file() else {}
    for given in (generation.get("eos_token_id"), config.get("eos_token_id"), fast.eos_token_id):
        if given is not None:
            return [given] if isinstance(given, int) else list(given)
    raise NotSupportedError(
        f"{folder} names no end token (eos_token_id)", fix="set it in generation_config.json"
    )


def _special(
    folder: Path, fast: Any, spec: Mapping[str, Any], texts: Mapping[int, str], stops: list[int]
) -> dict[str, Any]:
    plain, full = fast("a", add_special_tokens=False)["input_ids"], fast("a")["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
    before, after = full[:at], full[at + len(plain) :]
    if before not in ([], [fast.bos_token_id]) or after not in ([], [fast.eos_token_id]):
        raise NotSupportedError(
            f"the tokenizer of {folder} adds {before} before and {after} behind a text; llama.cpp adds only "
            "bos and eos",
            fix=_USE_16,
        )
    end = stops[0] if fast.eos_token_id is None else int(fast.eos_token_id)
    config = read_json(folder / BASE_CONFIG) if (folder / BASE_CONFIG).is_file() else {}
    bos = fast.bos_token_id if fast.bos_token_id is not None else config.get("bos_token_id")
    values: dict[str, Any] = {
        "bos_token_id": int(bos) if isinstance(bos, int) and bos in texts else end,
        "eos_token_id": end,
        "add_bos_token": bool(before),
        "add_eos_token": bool(after),
    }
    if fast.pad_token_id is not None:
        values["padding_token_id"] = int(fast.pad_token_id)
    unknown = spec["model"].get("unk_token")
    if unknown is not None and fast.unk_token_id is not None:
        values["unknown_token_id"] = int(fast.unk_token_id)
    rest = [number for number in stops if number != end and texts.get(number) not in LLAMA_ENDS]
    values |= dict(zip(("eot_token_id", "eom_token_id"), rest, strict=False))
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def _stop_warnings(stops: list[int], texts: Mapping[int, str], metadata: Mapping[str, Any]) -> Iterator[str]:
    named = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    lost = [
        texts.get(number, str(number))
        for number in stops
        if number not in named and texts.get(number) not in LLAMA_ENDS
    ]
    if lost:
        yield f"llama.cpp has no place for more end tokens: it does not stop at {', '.join(lost)}"
    more = sorted(
        text
        for number, text in texts.items()
        if (text in LLAMA_ENDS or number in named) and number not in stops
    )
    if more:
        yield f"llama.cpp also ends an answer at {', '.join(more)}, where transformers would go on"


def _template(fast: Any, metadata: dict[str, Any]) -> str | None:
    given = fast.chat_template
    if isinstance(given, Mapping):
        others = {name: text for name, text in given.items() if name != "default"}
        for name, text in others.items():
            metadata[f"tokenizer.chat_template.{name}"] = text
        if others:
            metadata["tokenizer.chat_templates"] = list(others)
        given = given.get("default")
    if given:
        metadata["tokenizer.chat_template"] = given
    return given or None


def _strips(
    added: Mapping[int, Any], texts: Mapping[int, str], types: Mapping[int, int], warnings: list[str]
) -> bool:
    """Whether llama.cpp's rule for Phi-3 (blanks after a special token are dropped) is this tokenizer's."""
    right = {token["content"] for token in added.values() if token.get("rstrip")}
    left = sorted(token["content"] for token in added.values() if token.get("lstrip"))
    if left:
        warnings.append(f"blanks before {', '.join(left)} are kept by llama.cpp, transformers drops them")
    if not right:
        return False
    special = {texts[number] for number, kind in types.items() if kind in (CONTROL, USER_DEFINED, UNKNOWN)}
    if right == (special | {"</s>"}) - _KEPT and _KEPT | {"</s>"} <= set(texts.values()):
        return True
    warnings.append(f"blanks after {', '.join(sorted(right))} are kept by llama.cpp, transformers drops them")
    return False
