"""vLLM beside a model in memory: it answers as the model's base, and with adapters that were saved from it.

The engine starts at the first question, not while loading: until then training has all the memory, and what
is free then decides how much the engine takes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

from pronghorn.adapters.origin import Origin
from pronghorn.adapters.portable import ALLOWED_RANKS
from pronghorn.errors import AdapterError, ConfigError
from pronghorn.serving.answers import RequestOutput, request_output, sampling_fields
from pronghorn.serving.vllm import Engine, ServePlan, plan_engine, servable_adapter
from pronghorn.serving.vllm_process import VllmProcess
from pronghorn.sources.resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How the engine is started. Raises ConfigError on values that cannot work."""

    vllm: Engine
    """The interpreter that has vLLM."""
    max_lora_rank: int = 64
    """The largest rank of adapters; vLLM keeps room for it."""
    gpu_memory_utilization: float | None = None
    """The engine's share of the GPU's memory (without one, of the host's); None: what is free."""
    float8_kv_cache: bool = False
    """Keep keys and values in FP8: half the memory, and answers that differ a little."""

    def __post_init__(self) -> None:
        """Check each value."""
        rank, share = self.max_lora_rank, self.gpu_memory_utilization
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= ALLOWED_RANKS[-1]:
            raise ConfigError(f"max_lora_rank is {rank!r}", fix=f"use 1 to {ALLOWED_RANKS[-1]}")
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if share is not None and not (number and 0 < share <= 1):
            raise ConfigError(f"gpu_memory_utilization is {share!r}", fix="use a share above 0, at most 1")


@dataclass(frozen=True)
class LoraRequest:
    """An adapter's folder with the content that was checked; made by ``load_lora``."""

    path: Path
    digest: str
    base: Path

    @property
    def name(self) -> str:
        """Other content has another name: vLLM keeps the keys and values of a prompt under it."""
        return f"{self.path.name}-{self.digest[:16]}"


class FastInference:
    """The engine of one model. Copies and pickles of it start without one."""

    def __init__(self, origin: Origin, dtype: str, options: EngineOptions) -> None:
        """Nothing is started, and that vLLM serves the base was checked before it was loaded."""
        self.origin = origin
        self.dtype = dtype
        self.options = options
        self._process: VllmProcess | None = None
        self._ids: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, which cannot be copied."""
        return {**self.__dict__, "_process": None}

    def plan(self) -> ServePlan:
        """How the engine would be started now.

        Raises:
            ConfigError: there is no memory for it.
        """
        options = self.options
        plan = plan_engine(
            self.origin.path,
            max_lora_rank=options.max_lora_rank,
            longest=self.origin.max_seq_length,
            memory_share=options.gpu_memory_utilization,
        )
        cache = {"kv_cache_dtype": "fp8"} if options.float8_kv_cache else {}
        return replace(plan, arguments={**plan.arguments, "dtype": self.dtype, **cache})

    def load_lora(self, folder: str | Path) -> LoraRequest:
        """Check an adapter for this base and this engine; vLLM reads it with the first question to it.

        Raises:
            NotSupportedError: it has something vLLM refuses or ignores; each such thing is named.
            AdapterError: it does not fit the base, or its rank is above max_lora_rank.
        """
        adapter = servable_adapter(folder, base=self.origin.path)
        if adapter.rank > self.options.max_lora_rank:
            raise AdapterError(
                f"{folder} has rank {adapter.rank}, the engine takes at most {self.options.max_lora_rank}",
                fix=f"from_pretrained(..., max_lora_rank={adapter.rank})",
            )
        for note in adapter.notes:
            print(f"{folder}: {note}")
        return LoraRequest(adapter.path, _digest(adapter.path), self.origin.path)

    def generate(
        self, prompts: Any, sampling_params: Any = None, lora_request: Any = None
    ) -> list[RequestOutput]:
        """Answer ``prompts``, all at once.

        Raises:
            ConfigError: what was asked is malformed, or vLLM refuses it.
            AdapterError: the adapter is of another base, or its folder has other content by now, or is gone.
            PronghornError: vLLM does not start, or ended.
        """
        given = prompts if isinstance(prompts, list | tuple) else [prompts]
        if not given:
            return []
        texts, ids = zip(*map(self._encode, given), strict=True)
        requests = _each(lora_request, "lora_request", len(ids))
        distinct = {id(one): one for one in requests}  # each is a whole file to read
        loras = {key: self._lora(one) for key, one in distinct.items()}
        asked = {
            "prompts": ids,
            "sampling": [sampling_fields(one) for one in _each(sampling_params, "sampling_params", len(ids))],
            "loras": [loras[id(one)] for one in requests],
        }
        answers = self._running().generate(asked)
        return [request_output(text, one) for text, one in zip(texts, answers, strict=True)]

    def stop(self) -> None:
        """End the engine, if there is one, and free its memory; the next question starts it again."""
        if self._process is not None:
            self._process.stop()
        self._process = None

    def _running(self) -> VllmProcess:
        if self._process is None or not self._process.alive:
            self.stop()  # what a crashed one has started may be there, and hold memory
            plan, started = self.plan(), time.monotonic()
            print(f"vLLM {self.options.vllm.version} starts: {plan.python()}")
            for note in plan.notes:
                print(note)
            self._process = VllmProcess(self.options.vllm, plan)
            print(f"ready after {time.monotonic() - started:.0f} s")
        return self._process

    def _encode(self, prompt: Any) -> tuple[str | None, list[int]]:
        """A prompt's text, where it has one, and its token ids by the tokenizer of training."""
        given = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        text: Any = given.get("prompt")
        if not isinstance(text, str) and "prompt_token_ids" not in given:
            raise ConfigError(
                f"a prompt is {str(prompt)[:80]!r}",
                fix='give text or {"prompt_token_ids": [...]}; a conversation becomes text by '
                "tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
            )
        for key in given.keys() - {"prompt", "prompt_token_ids"}:
            raise ConfigError(
                f"a prompt has {key!r}, which does not reach the engine",
                fix="leave it out; pronghorn serve starts vLLM's own server, which takes all that vLLM does",
            )
        if "prompt_token_ids" in given:
            return text, _integers(given["prompt_token_ids"])
        tokenizer = self.origin.tokenizer
        # a rendered chat begins with the token that the tokenizer would put before it once more
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return text, tokenizer(text, add_special_tokens=not begun)["input_ids"]

    def _lora(self, request: Any) -> dict[str, Any] | None:
        if request is None:
            return None
        if not isinstance(request, LoraRequest):
            raise ConfigError(
                f"lora_request is a {type(request).__name__}", fix="make it with model.load_lora(DIR)"
            )
        if request.base != self.origin.path:
            raise AdapterError(
                f"{request.path} was checked for the base {request.base}, this model's is {self.origin.path}",
                fix="load_lora of this model",
            )
        try:
            digest = _digest(request.path)
        except OSError as error:
            raise AdapterError(
                f"{request.path} is gone, or cannot be read: {error.strerror}",
                fix="save it and load_lora again",
            ) from error
        if digest != request.digest:
            raise AdapterError(
                f"{request.path} has other content than when load_lora read it",
                fix="load_lora again, or save each adapter into a folder of its own",
            )
        number = self._ids.setdefault(request.digest, len(self._ids) + 1)
        return {"name": request.name, "id": number, "path": str(request.path)}


def _integers(ids: Any) -> list[int]:
    try:
        return [index(one) for one in ids]
    except TypeError as error:
        raise ConfigError(
            f"prompt_token_ids is {str(ids)[:80]!r}", fix="give one list of integers for each prompt"
        ) from error


def _each(given: Any, name: str, count: int) -> Sequence[Any]:
    """One value for all prompts, or a list with one for each."""
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise ConfigError(
            f"{name} has {len(given)} entries for {count} prompts", fix="one each, or one for all"
        )
    return given


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
