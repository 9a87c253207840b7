"""What ``fast_generate`` is asked and what it answers: what notebooks use of vLLM's own objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pronghorn.errors import ConfigError, NotSupportedError

# fields of SamplingParams that the engine sets itself
_ENGINES_OWN = frozenset({"output_kind", "skip_clone", "output_text_buffer_length"})
_NOT_CARRIED = "prompt_logprob_token_ids"


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, its rank among all tokens (1 is the best), and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# of each position its tokens by id; the first position of a prompt has none
Logprobs = tuple[Mapping[int, Logprob] | None, ...]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. ``finish_reason`` is "stop" or "length", ``stop_reason`` the stop string or token id."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt (None where token ids were given) with its ``n`` answers."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: Logprobs | None
    outputs: tuple[CompletionOutput, ...]


def request_output(prompt: str | None, answer: Mapping[str, Any]) -> RequestOutput:
    """The objects of one entry of ``outputs`` of ``generate_in_vllm.py``."""
    outputs = (
        CompletionOutput(
            **{**one, "token_ids": tuple(one["token_ids"]), "logprobs": _logprobs(one["logprobs"])}
        )
        for one in answer["outputs"]
    )
    ids = tuple(answer["prompt_token_ids"])
    return RequestOutput(prompt, ids, _logprobs(answer["prompt_logprobs"]), tuple(outputs))


def _logprobs(positions: Any) -> Logprobs | None:
    if positions is None:
        return None
    return tuple(at and {token: Logprob(*rest) for token, *rest in at} for at in positions)


def sampling_fields(given: Any) -> dict[str, Any] | None:
    """The fields of vLLM's ``SamplingParams`` that differ from their defaults; a dict and None as they are.

    Raises:
        ConfigError: it is neither.
        NotSupportedError: a field asks for something that the answers here do not carry.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        fields = dict(given)
    elif hasattr(given, "__struct_fields__"):  # vLLM's class, told without importing vLLM
        fields = {name: getattr(given, name) for name in given.__struct_fields__ if _is_asked(name)}
    else:
        raise ConfigError(
            f"sampling_params is a {type(given).__name__}",
            fix="give vLLM's SamplingParams, or a dict of its fields: dict(temperature=0.8, max_tokens=64)",
        )
    if fields.pop(_NOT_CARRIED, None) is not None:
        raise NotSupportedError(f"{_NOT_CARRIED}: its answer is not carried over", fix="use prompt_logprobs")
    if isinstance(given, Mapping):
        return fields
    default = type(given)()
    return {name: _plain(value) for name, value in fields.items() if value != getattr(default, name)}


def _is_asked(field: str) -> bool:
    return not field.startswith("_") and field not in _ENGINES_OWN


def _plain(value: Any) -> Any:
    """An object such as vLLM's StructuredOutputsParams as a dict."""
    if not dataclasses.is_dataclass(value):
        return value
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
