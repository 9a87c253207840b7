"""What notebooks call on a model to have vLLM answer: fast_generate, load_lora, stop_engine."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pronghorn.adapters.origin import base_of, origin_of
from pronghorn.errors import ConfigError, NotSupportedError
from pronghorn.fast.keywords import Refused, refuse
from pronghorn.loading.options import LoadOptions
from pronghorn.sources.resolve import resolve, resolve_base
from pronghorn.sources.source import Source, SourceKind

if TYPE_CHECKING:
    from pronghorn.serving.answers import RequestOutput
    from pronghorn.serving.fast_inference import EngineOptions, FastInference, LoraRequest

_ATTRIBUTE = "_pronghorn_fast_inference"
_GENERATE_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {"use_tqdm": Refused((None, False), "the engine has a process of its own, and draws no bar here")}
)
_LORA_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "load_tensors": Refused((None, False), "vLLM reads the adapter from its folder"),
        "lora_request_id": Refused((None,), "the number follows from the content"),
    }
)


def engine_options(
    asked: bool,
    vllm_python: str | Path | None,
    max_lora_rank: int | None,
    gpu_memory_utilization: float | None,
    float8_kv_cache: bool,
) -> EngineOptions | None:
    """How vLLM will be started, checked before a model is loaded; None where it is not ``asked`` for.

    Raises:
        NotSupportedError: another keyword without fast_inference=True.
        ConfigError: a value that cannot work.
        MissingDependencyError: vLLM is not installed.
    """
    given: dict[str, Any] = {
        "vllm_python": vllm_python,
        "max_lora_rank": max_lora_rank,
        "gpu_memory_utilization": gpu_memory_utilization,
        "float8_kv_cache": float8_kv_cache or None,
    }
    said = {name: value for name, value in given.items() if value is not None}
    if not asked:
        for name, value in said.items():
            raise NotSupportedError(
                f"{name}={value!r} belongs to fast_inference=True", fix="leave it out, or say both"
            )
        return None
    from pronghorn.serving.fast_inference import EngineOptions
    from pronghorn.serving.vllm import find_vllm

    python = said.pop("vllm_python", None)
    return EngineOptions(vllm=find_vllm(Path(python) if python else None), **said)


def servable(name: str | Path, options: LoadOptions, engine: EngineOptions | None) -> str | Path | Source:
    """What to load; with an ``engine``, checked by its headers before the minutes that loading takes.

    Raises:
        NotSupportedError, SourceError, AdapterError, VerificationError: vLLM does not serve the base.
        ConfigError: the adapter's rank is above max_lora_rank, or there is no memory for the engine.
    """
    if engine is None:
        return name
    from pronghorn.serving.vllm import plan_engine

    code = options.trust_remote_code
    source = resolve(name, revision=options.revision, token=options.token, trust_remote_code=code)
    base = source
    if source.kind is SourceKind.ADAPTER:
        patterns = source.config.get("rank_pattern") or {}
        _check_rank(max([source.config["r"], *patterns.values()]), engine)
        base = resolve_base(source, base=options.base, token=options.token, trust_remote_code=code)
    plan_engine(
        base.path,
        max_lora_rank=engine.max_lora_rank,
        longest=options.max_seq_length,
        memory_share=engine.gpu_memory_utilization,
    )
    return source


def keep_engine(model: Any, options: EngineOptions | None) -> None:
    """Keep on ``model`` how vLLM is started for it."""
    if options is None:
        return
    from pronghorn.serving.fast_inference import FastInference

    origin = origin_of(model)
    assert origin is not None, "load() keeps the origin on the model"
    dtype = origin.quantised_dtype or str(model.dtype).removeprefix("torch.")
    setattr(base_of(model), _ATTRIBUTE, FastInference(origin, dtype, options))
    if origin.quantization:
        print(
            f"fast_generate: vLLM serves {origin.path} as it is stored; here it is held in "
            f"{origin.quantization}, so answers can differ a little"
        )


def check_rank(model: Any, rank: int) -> None:
    """Refuse an adapter that the engine of ``model`` could not take once it is trained.

    Raises:
        ConfigError: ``rank`` is above max_lora_rank.
    """
    engine: FastInference | None = getattr(base_of(model), _ATTRIBUTE, None)
    if engine is not None:
        _check_rank(rank, engine.options)


def _check_rank(rank: int, engine: EngineOptions) -> None:
    if rank > engine.max_lora_rank:
        raise ConfigError(
            f"r is {rank}, and the engine of fast_inference takes at most {engine.max_lora_rank}",
            fix=f"from_pretrained(..., max_lora_rank={rank})",
        )


def bind_generating(model: Any) -> None:
    """Put the methods that ask vLLM on this one instance."""
    model.fast_generate = types.MethodType(_fast_generate, model)
    model.load_lora = types.MethodType(_load_lora, model)
    model.stop_engine = types.MethodType(_stop_engine, model)


def _engine(model: Any, call: str) -> FastInference:
    engine: FastInference | None = getattr(base_of(model), _ATTRIBUTE, None)
    if engine is None:
        raise NotSupportedError(
            f"{call} needs vLLM beside the model",
            fix="load it with fast_inference=True, and vllm_python=PATH where vLLM has its own environment; "
            "generate(...) answers without vLLM",
        )
    return engine


def _fast_generate(
    self: Any, prompts: Any, sampling_params: Any = None, lora_request: Any = None, **other: Any
) -> list[RequestOutput]:
    """Have vLLM answer ``prompts``; starts it the first time.

    Without ``lora_request`` it answers as the base does, from the base's files, and not as the model that is
    trained here: save the adapter with ``save_lora``, and give ``lora_request=model.load_lora(DIR)``.

    Args:
        prompts: a text, ``{"prompt_token_ids": [...]}``, or a list of these. Text becomes tokens by the
            tokenizer that the model was loaded with; a begin token that is there gets no second one.
        sampling_params: vLLM's SamplingParams or a dict of its fields; a list has one for each prompt. None
            is what the base's generation_config.json says, and vLLM's defaults (16 tokens).
        lora_request: from ``load_lora``; a list has one, or None, for each prompt.
        **other: other names of this kind are refused with the reason.

    Returns:
        One ``RequestOutput`` per prompt, with ``prompt``, ``prompt_token_ids`` and ``outputs``; each of these
        has ``text``, ``token_ids``, ``finish_reason``, ``stop_reason`` and, if asked for, ``logprobs``.

    Raises:
        NotSupportedError: the model was loaded without fast_inference=True.
        ConfigError, AdapterError: what was asked cannot be answered; vLLM's own words where they are its own.
        PronghornError: vLLM does not start, or ended.
    """
    refuse("fast_generate", other, _GENERATE_REFUSED, _fast_generate)
    return _engine(self, "fast_generate").generate(prompts, sampling_params, lora_request)


def _load_lora(self: Any, lora_directory: str | Path, **other: Any) -> LoraRequest:
    """An adapter's folder for ``fast_generate(..., lora_request=...)``, checked before vLLM sees it.

    The request stands for the content of now: once the folder is written anew, it has to be loaded again.

    Raises:
        NotSupportedError, AdapterError: vLLM would refuse it, ignore a part of it, or it is of another base.
    """
    refuse("load_lora", other, _LORA_REFUSED, _load_lora)
    return _engine(self, "load_lora").load_lora(lora_directory)


def _stop_engine(self: Any) -> None:
    """End vLLM and free its memory, to train on for example; the next fast_generate starts it again."""
    _engine(self, "stop_engine").stop()
