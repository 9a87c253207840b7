"""What each engine makes of a folder, told from headers and JSON files: does it load and compute right?

Every fault that the promises and the readings find has a line in ``CONSEQUENCES``. The table is held against
the real engines, folder by folder (``make verdicts``); an engine that "loads" a folder proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pronghorn.export.verify_folder import Fault, Folder, Row
from pronghorn.export.verify_readings import READINGS

RIGHT, NO_CHAT = "right", "no chat"
UNCLEAR, CHAT, END, LOGITS, REFUSED = "unclear", "wrong chat", "wrong end", "wrong logits", "refused"
ENDLESS = "endless chat"
_RANK = (RIGHT, NO_CHAT, UNCLEAR, CHAT, ENDLESS, END, LOGITS, REFUSED)
# what a word of the table stands for, to a reader
MEANING: Mapping[str, str] = {
    RIGHT: "loads, and computes what the files say",
    NO_CHAT: "loads; has no chat template, so chats are refused",
    UNCLEAR: "cannot be told from the files",
    CHAT: "loads without an error; chats become other tokens",
    ENDLESS: "loads without an error; a chat is not rendered in time or memory",
    END: "loads without an error; answers do not end where they should",
    LOGITS: "loads without an error; computes something else",
    REFUSED: "does not load",
}

VLLM = "vllm"
LLAMA = "llama.cpp"  # opens what the export makes of a folder
# engine -> versions that the table was held against (docs/verdicts.md); others of the same generation
# read the same keys
ENGINES: Mapping[str, str] = {
    "transformers 5": "5.23.0",
    "transformers 4": "4.56.2",
    VLLM: "0.32.0",
    LLAMA: "0.3.36",  # of llama-cpp-python, which carries it
}
# what --for may name -> engines of the table
ASKED: Mapping[str, tuple[str, ...]] = {
    "transformers": ("transformers 5", "transformers 4"),
    "transformers5": ("transformers 5",),
    "transformers4": ("transformers 4",),
    VLLM: (VLLM,),
    LLAMA: (LLAMA,),
}


@dataclass(frozen=True)
class Consequence:
    """What a fault means for transformers 5, transformers 4, vLLM and as GGUF in llama.cpp; the way out."""

    outcomes: tuple[str, str, str, str]
    fix: str


@dataclass(frozen=True)
class Refusal:
    """Why there is no GGUF of a folder, or vLLM does not serve an adapter; and the way out.

    ``sure`` unless it could not be found out; ``silent`` where the engine would compute something else.
    """

    text: str
    fix: str = ""
    sure: bool = True
    silent: bool = False


@dataclass(frozen=True)
class EngineVerdict:
    """``outcome`` of one engine for one folder: a word of ``MEANING``; the reasons, and the ways out."""

    engine: str
    outcome: str
    reasons: tuple[str, ...] = ()
    fixes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The engine and the version that the table was held against."""
        return f"{self.engine.split()[0]} {ENGINES[self.engine]}"

    @property
    def ok(self) -> bool | None:
        """Whether the engine serves the folder rightly; None when that cannot be told."""
        return None if self.outcome == UNCLEAR else self.outcome in (RIGHT, NO_CHAT)

    def __str__(self) -> str:
        told = f"{MEANING[self.outcome]}{': ' if self.reasons else ''}{'; '.join(self.reasons)}"
        return f"{told} (fix: {'; '.join(self.fixes)})" if self.fixes else told


_AGAIN = "write the folder again: what is missing cannot be made up"
_RENAME = "pronghorn verify DIR --fix OUT gives every tensor its own name"
_CLEAN = "pronghorn verify DIR --fix OUT leaves it out"
_BASE = "pronghorn verify DIR --base BASE --fix OUT takes it from the base"
_INDEX = "pronghorn verify DIR --fix OUT writes the index anew"
_BOTH = "pronghorn verify DIR --fix OUT writes the settings for both generations"
_END = "pronghorn verify DIR --fix OUT names the turn's end in generation_config.json"
_SAY = "say which with --base"
_IGNORE = "list it in quantization_config's ignore as 're:.*vision_tower.*' (visual, audio_tower, ...)"
_OURS = "try it in the engine; or quantise the 16-bit model: pronghorn export DIR OUT --format w4a16"
_ON_GPU = "serve it where there is one; elsewhere w4a16 of a dense model, or merged_16bit"

_FINE = (RIGHT, RIGHT, RIGHT, RIGHT)
_ALL_REFUSE = (REFUSED, REFUSED, REFUSED, REFUSED)
_ALL_WRONG = (LOGITS, LOGITS, LOGITS, LOGITS)

CONSEQUENCES: Mapping[str, Consequence] = {
    # files
    "unreadable": Consequence(_ALL_REFUSE, _AGAIN),
    "no weights": Consequence(_ALL_REFUSE, _AGAIN),
    "no index": Consequence((REFUSED, REFUSED, RIGHT, REFUSED), _INDEX),
    "index forgets": Consequence((RIGHT, LOGITS, RIGHT, REFUSED), _INDEX),
    "index misplaces": Consequence((RIGHT, RIGHT, RIGHT, REFUSED), _INDEX),
    "index names ghosts": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, REFUSED), _INDEX),
    "stored twice": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR), _AGAIN),
    "stale single file": Consequence((LOGITS, LOGITS, RIGHT, REFUSED), _CLEAN),
    "stale file": Consequence(_FINE, _CLEAN),
    "adapter beside shards": Consequence((LOGITS, LOGITS, RIGHT, REFUSED), _CLEAN),
    "adapter beside one file": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _CLEAN),
    "adapter config beside": Consequence((REFUSED, REFUSED, RIGHT, REFUSED), _CLEAN),
    "adapter weights beside shards": Consequence(_FINE, _CLEAN),
    "adapter weights beside one file": Consequence((RIGHT, RIGHT, REFUSED, RIGHT), _CLEAN),
    # names and shapes
    "PEFT names": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _RENAME),
    "wrapped names": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _RENAME),
    "multimodal prefix": Consequence((LOGITS, RIGHT, REFUSED, REFUSED), _RENAME),
    "newer multimodal prefix": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _RENAME),
    "no model prefix": Consequence((RIGHT, REFUSED, REFUSED, RIGHT), _RENAME),
    "fused": Consequence((LOGITS, LOGITS, RIGHT, REFUSED), _AGAIN),
    "split": Consequence((LOGITS, LOGITS, RIGHT, REFUSED), _AGAIN),
    "stacked experts": Consequence(
        (RIGHT, LOGITS, REFUSED, REFUSED), "save it with transformers' save_pretrained"
    ),
    "tower one level up": Consequence((RIGHT, LOGITS, REFUSED, REFUSED), _RENAME),
    "linear lost": Consequence(_ALL_WRONG, _AGAIN),
    "expert lost": Consequence((REFUSED, LOGITS, LOGITS, REFUSED), _AGAIN),
    "norm lost": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _AGAIN),
    "unknown tensor": Consequence((RIGHT, RIGHT, REFUSED, REFUSED), _CLEAN),
    "unknown bias": Consequence((RIGHT, RIGHT, RIGHT, REFUSED), _CLEAN),
    "shape": Consequence(_ALL_REFUSE, _BASE),
    "vocabulary": Consequence((REFUSED, REFUSED, REFUSED, RIGHT), _BASE),
    "layers left out": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _BASE),
    "more layers": Consequence((LOGITS, LOGITS, REFUSED, REFUSED), _BASE),
    "head lost": Consequence(_ALL_WRONG, "store lm_head.weight, or take tie_word_embeddings from the base"),
    "head of zeros": Consequence(_ALL_WRONG, _AGAIN),
    "copied head": Consequence(_FINE, _CLEAN),
    "stray head": Consequence((LOGITS, RIGHT, LOGITS, RIGHT), _CLEAN),
    "head not to be tied": Consequence((RIGHT, LOGITS, RIGHT, LOGITS), _BASE),
    "head or embeddings": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR), _SAY),
    # numbers
    "declared dtype": Consequence(_FINE, "state the dtype that is stored"),
    "mixed dtypes": Consequence(_FINE, _AGAIN),
    "codes without a config": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, REFUSED), _AGAIN),
    "fp8 without scales": Consequence((LOGITS, REFUSED, LOGITS, REFUSED), _AGAIN),
    "bitsandbytes config left": Consequence(_ALL_REFUSE, _CLEAN),
    "gptq config left": Consequence(_ALL_REFUSE, _CLEAN),
    "awq config left": Consequence(_ALL_REFUSE, _CLEAN),
    "compressed-tensors config left": Consequence((REFUSED, REFUSED, LOGITS, REFUSED), _CLEAN),
    "fp8 config left": Consequence((LOGITS, REFUSED, LOGITS, REFUSED), _CLEAN),
    "quantization config left": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, REFUSED), _CLEAN),
    "bitsandbytes": Consequence(
        (RIGHT, RIGHT, REFUSED, REFUSED),
        "export with --format w4a16, which vLLM reads itself; or install vllm-bnb-plugin beside vLLM",
    ),
    "tower in 4 bit, transformers": Consequence((REFUSED, UNCLEAR, RIGHT, REFUSED), _IGNORE),
    "tower in 4 bit, vLLM": Consequence((RIGHT, RIGHT, REFUSED, REFUSED), _IGNORE),
    # answers to text are right: images become something else
    "tower in 8 bit, transformers": Consequence((LOGITS, UNCLEAR, RIGHT, REFUSED), _IGNORE),
    "tower in 8 bit, vLLM": Consequence((RIGHT, RIGHT, LOGITS, REFUSED), _IGNORE),
    # engines have code for them, which has not run here
    "foreign codes": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, REFUSED), _OURS),
    # proven by decoding only
    "nvfp4": Consequence((RIGHT, UNCLEAR, UNCLEAR, REFUSED), _ON_GPU),
    "quantised experts": Consequence((RIGHT, UNCLEAR, UNCLEAR, REFUSED), _ON_GPU),
    # config.json
    "no config": Consequence(_ALL_REFUSE, _BASE),
    "no architectures": Consequence(_FINE, _BASE),
    "no model_type": Consequence(_ALL_REFUSE, _BASE),
    "class of another type": Consequence((RIGHT, RIGHT, LOGITS, RIGHT), _BASE),
    "rope of version 5": Consequence((RIGHT, LOGITS, RIGHT, RIGHT), _BOTH),
    "rope differs, version 4": Consequence((RIGHT, LOGITS, RIGHT, RIGHT), _BOTH),
    "rope differs": Consequence(_ALL_WRONG, _BASE),
    "rope contradicts itself": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR), _SAY),
    "rope not stated": Consequence((UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR), _SAY),
    "config differs": Consequence(_ALL_WRONG, _BASE),
    "other activation": Consequence((LOGITS, LOGITS, REFUSED, LOGITS), _BASE),
    # image processor, tokenizer, chat and ends
    "no image processor": Consequence((RIGHT, RIGHT, REFUSED, REFUSED), _BASE),
    "no tokenizer": Consequence(_ALL_REFUSE, _BASE),
    "no tokenizer config": Consequence(_FINE, _BASE),
    "tokenizer of version 5": Consequence((RIGHT, REFUSED, RIGHT, RIGHT), _BOTH),
    "tokenizer differs": Consequence((CHAT, CHAT, CHAT, CHAT), _BASE),
    "special ids differ": Consequence(_FINE, _BASE),  # what it does to ends is a reading of its own
    "no chat template": Consequence((NO_CHAT, NO_CHAT, NO_CHAT, NO_CHAT), _BASE),
    "broken template": Consequence((CHAT, CHAT, CHAT, CHAT), _BASE),
    "endless template": Consequence((ENDLESS, ENDLESS, ENDLESS, REFUSED), _BASE),
    "end unknown to transformers": Consequence((END, END, RIGHT, RIGHT), _END),
    "end unknown to all": Consequence((END, END, END, END), _END),
    "end known to llama.cpp": Consequence((END, END, END, RIGHT), _END),
    "end unknown to vLLM": Consequence((RIGHT, RIGHT, END, RIGHT), _END),
}


def judge(folder: Folder, rows: Iterable[Row]) -> tuple[EngineVerdict, ...]:
    """The verdict of every engine that opens the folder itself."""
    faults = faults_of(folder, rows)
    return tuple(_verdict(number, name, faults) for number, name in enumerate(ENGINES) if name != LLAMA)


def judge_llama(folder: Folder, rows: Iterable[Row], refused: Iterable[Refusal]) -> EngineVerdict:
    """The verdict of llama.cpp: ``refused`` is what the GGUF formats say of the folder."""
    said = tuple(refused)
    if said or folder.is_adapter:
        return judge_refused(LLAMA, said)
    return _verdict(list(ENGINES).index(LLAMA), LLAMA, faults_of(folder, rows))


def judge_refused(engine: str, said: Iterable[Refusal]) -> EngineVerdict:
    """The verdict of an engine that is told by refusals alone."""
    found = tuple(said)
    sure = [one for one in found if one.sure]
    outcome = RIGHT if not found else UNCLEAR if not sure else REFUSED
    if sure and all(one.silent for one in sure):
        outcome = LOGITS
    fixes = dict.fromkeys(one.fix for one in found if one.fix)
    return EngineVerdict(engine, outcome, tuple(one.text for one in found), tuple(fixes))


def faults_of(folder: Folder, rows: Iterable[Row]) -> list[Fault]:
    """The faults of the promises, and those that only engines mind."""
    faults = [fault for row in rows for fault in row.faults]
    for reading in READINGS:
        try:
            faults += reading(folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            faults.append(Fault("", f"cannot be read: {error}"))
    return faults


def _verdict(number: int, engine: str, faults: list[Fault]) -> EngineVerdict:
    found: list[tuple[str, Fault]] = []
    for fault in faults:
        known = CONSEQUENCES.get(fault.code)
        found.append((known.outcomes[number] if known else UNCLEAR, fault))
    worst = max((outcome for outcome, _ in found), key=_RANK.index, default=RIGHT)
    causes = [fault for outcome, fault in found if outcome == worst and worst != RIGHT]
    first = {fault.code: fault for fault in reversed(causes)}
    told = [fault for fault in dict.fromkeys(causes) if first[fault.code] is fault]
    fixes = (CONSEQUENCES[fault.code].fix for fault in told if fault.code in CONSEQUENCES)
    return EngineVerdict(engine, worst, tuple(fault.text for fault in told), tuple(dict.fromkeys(fixes)))


def engines_named(text: str) -> tuple[str, ...]:
    """Engines of the table for ``vllm,transformers``.

    Raises:
        ValueError: a name that is not known here; the text lists those that are.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in ASKED]
    if unknown or not names:
        raise ValueError(f"{', '.join(unknown) or 'nothing'} is no engine; known are {', '.join(ASKED)}")
    return tuple(dict.fromkeys(engine for name in names for engine in ASKED[name]))


def as_json(verdicts: Iterable[EngineVerdict]) -> list[dict[str, Any]]:
    """For the report's JSON."""
    return [
        {"engine": v.engine, "version": ENGINES[v.engine], "outcome": v.outcome, "ok": v.ok,
         "reasons": list(v.reasons), "fixes": list(v.fixes)}
        for v in verdicts
    ]  # fmt: skip
