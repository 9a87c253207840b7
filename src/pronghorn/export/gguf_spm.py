"""Sentencepiece-like BPE tokenizers: llama.cpp merges by a score per token, tokenizer.json by pairs.

The scores are the ranks of the merges, and the equality of both ways is tried on texts before it is believed:
``tokenize`` is llama.cpp's own procedure.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pronghorn.errors import NotSupportedError

SPACE = "\u2581"
_USE_16 = "serve the merged folder with vLLM or transformers (--format merged_16bit)"
# words, numbers, code, blanks of all lengths, accents, scripts of several bytes
PROBES = (
    "The quick brown fox jumps over the lazy dog, and 1234567890 is not 3.14159.",
    "def f(x):\n    return [x ** 2 for x in range(10)]\n\n\tprint('done')  # ok",
    "Größe, naïve café; δοκιμή, проверка, テスト, 测试, 🦌 and   three blanks",
    "user\nassistant\nsystem\nYou are a helpful assistant.",
)


def merge_scores(model: Mapping[str, Any], count: int) -> list[float]:
    """A score for each id: the earlier a token is merged, the higher; what is never merged comes last."""
    vocabulary, merges = model["vocab"], model["merges"]
    scores = [-float(len(merges) + 1)] * count
    for rank, one in enumerate(merges):
        left, right = one.split(" ") if isinstance(one, str) else one
        number = vocabulary.get(left + right)
        if number is not None and scores[number] < -float(rank):
            scores[number] = -float(rank)
    return scores


def prefix_of(spec: Mapping[str, Any], *, chat: bool) -> tuple[bool, list[str]]:
    """Whether a blank is put before a text, and what llama.cpp does not do alike.

    Raises:
        NotSupportedError: text is changed in a way that llama.cpp has no word for.
    """
    steps = [
        *_steps(spec.get("normalizer"), "normalizers"),
        *_steps(spec.get("pre_tokenizer"), "pretokenizers"),
    ]
    prefix, told = False, []
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE:
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            continue
        elif kind == "Split" and step.get("pattern") == {"String": " "}:
            continue  # there are no blanks any more
        elif kind == "Metaspace" and not step.get("split", True) and step.get("replacement") == SPACE:
            scheme = step.get("prepend_scheme")
            prefix = scheme == "always" or (scheme == "first" and not chat)
            if scheme == "first" and chat:
                told.append(
                    "the tokenizer puts a blank before the first text only, llama.cpp before the text behind "
                    "every special token: chats are made equal, a plain text lacks the first blank"
                )
        else:
            raise NotSupportedError(
                f"the tokenizer changes text by {kind} in a way llama.cpp does not know", fix=_USE_16
            )
    return prefix, told


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return (
        [one for step in part[key] for one in _steps(step, key)] if part.get("type") == "Sequence" else [part]
    )


def differing_text(fast: Any, spec: Mapping[str, Any], scores: Sequence[float]) -> str | None:
    """The first probe that llama.cpp's procedure cuts differently than the tokenizer, if there is one."""
    vocabulary = spec["model"]["vocab"]
    added = [token["content"] for token in spec.get("added_tokens", [])]
    between = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "$^")
    for text in (part for probe in PROBES for part in between.split(probe) if part):
        wanted = fast(text, add_special_tokens=False)["input_ids"]
        starts = wanted and fast.convert_ids_to_tokens(wanted[0]).startswith(SPACE)
        escaped = (SPACE if starts else "") + text.replace(" ", SPACE)
        if tokenize(escaped, vocabulary, scores) != wanted:
            return text
    return None


def tokenize(text: str, vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[int]:
    """llama.cpp's sentencepiece procedure: join the neighbours whose joint token has the highest score."""
    pieces: list[str] = list(text)
    before, after = list(range(-1, len(pieces) - 1)), [*range(1, len(pieces)), -1]
    queue: list[tuple[float, int, int, int]] = []

    def offer(left: int, right: int) -> None:
        number = vocabulary.get(pieces[left] + pieces[right]) if left >= 0 and right >= 0 else None
        if number is not None:
            heapq.heappush(queue, (-scores[number], left, right, len(pieces[left]) + len(pieces[right])))

    for place in range(1, len(pieces)):
        offer(place - 1, place)
    while queue:
        _, left, right, size = heapq.heappop(queue)
        if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != size:
            continue
        pieces[left], pieces[right] = pieces[left] + pieces[right], ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    found: list[int] = []
    for piece in pieces:
        if not piece:
            continue
        number = vocabulary.get(piece)
        found += (
            [number] if number is not None else [vocabulary[f"<0x{byte:02X}>"] for byte in piece.encode()]
        )
    return found
