"""Serve a folder with vLLM: pre-flight without it, the exact command, and the server until it is ready."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from pronghorn.adapters.portable import max_lora_rank
from pronghorn.errors import (
    AdapterError,
    ConfigError,
    MissingDependencyError,
    NotSupportedError,
    PronghornError,
)
from pronghorn.export.portable import served_pairs
from pronghorn.export.verify import VerifyReport, verify
from pronghorn.export.verify_engines import LOGITS, MEANING, REFUSED
from pronghorn.export.verify_model import available_bytes
from pronghorn.serving.base import base_notes, base_to_serve
from pronghorn.sources.bounds import quantization_of
from pronghorn.sources.resolve import ADAPTER_CONFIG, BASE_CONFIG, is_compressed, read_json, resolve
from pronghorn.sources.source import Source, SourceKind

# vLLM's LoRA kernels index tokens by a grid of at most 65,535 blocks; 65,528 is the last multiple of 8
MOST_BATCHED_TOKENS = 65_528
# enough for a full prefill step; larger steps need more memory and gain little
_USUAL_BATCHED_TOKENS = 8192
_GIB = 2**30
# beyond the weights: activations, CUDA graphs, the runtime
_RESERVED_BYTES = 2 * _GIB
_LARGEST_SHARE, _CPU_CACHE_GIB = 0.92, 4
_FEWEST_TOKENS = 256  # a shorter context answers nothing
_MORE_BESIDE = "free memory, give a larger gpu_memory_utilization or a smaller max_seq_length"
_MORE_TO_SERVE = (
    "where there is more memory, raise --gpu-memory-utilization (on a CPU VLLM_CPU_KVCACHE_SPACE) and "
    "--max-model-len"
)
_INT8_LAYOUT = "int-quantized"
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_INSTALL = (
    "install vLLM in an environment of its own and name its interpreter: --vllm-python PATH, in a notebook "
    "from_pretrained(..., vllm_python=PATH)"
)
# what the user's own environment may still change: no chatter, and nothing about the use is sent anywhere
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
)


@dataclass(frozen=True)
class ServePlan:
    """How vLLM is to be started for one folder.

    ``model`` is the folder vLLM loads; with ``adapter``, requests name the model ``name`` to get it.
    ``arguments`` are keyword arguments of ``LLM``; ``environment`` variables to set; ``notes`` are what the
    answers depend on and no check can decide, and where memory is short, in words.
    """

    model: Path
    name: str
    adapter: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """``vllm serve`` with its arguments."""
        words = ["vllm", "serve", str(self.model)]
        for key, value in self.arguments.items():
            flag = "--" + key.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
        if self.adapter is None:
            return [*words, "--served-model-name", self.name]
        return [*words, "--lora-modules", f"{self.name}={self.adapter}"]

    def line(self) -> str:
        """The command as one types it, the environment in front."""
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join(self.command())])

    def python(self) -> str:
        """The same engine from Python."""
        given = ", ".join(f"{key}={value!r}" for key, value in self.arguments.items())
        call = f"LLM(model={str(self.model)!r}{', ' if given else ''}{given})"
        if self.adapter is None:
            return call
        return f"{call}, and LoRARequest({self.name!r}, 1, {str(self.adapter)!r}) with each request"


def plan_serving(folder: str | Path, *, base: str | Path | None = None, name: str | None = None) -> ServePlan:
    """Check a folder for vLLM, which need not be installed, and work out how it is started.

    Args:
        folder: A merged, quantised or base model, or an adapter (in any form that vLLM applies rightly).
        base: For an adapter, where its base is; by default the recorded place. It may be quantised
            (compressed-tensors), or in 16 bit where the adapter was trained on a folder stored in NF4.
        name: The name requests use; by default the folder's.

    Raises:
        NotSupportedError: something vLLM refuses or ignores; each such thing is named with its remedy.
        AdapterError: a module that vLLM would not find under its name; a base of another model, or one
            that has the adapter merged in.
        SourceError, VerificationError: the folder is incomplete or breaks a promise.
    """
    path = Path(folder).expanduser()
    if not (path / ADAPTER_CONFIG).is_file() or (path / BASE_CONFIG).is_file():
        _check_model(path)
        arguments, environment, short = _resources(path.resolve())
        notes = _room_notes(short, _MORE_TO_SERVE)
        return ServePlan(path.resolve(), name or path.resolve().name, None, arguments, environment, notes)
    adapter = servable_adapter(path, base=base)
    arguments, environment, short = _with_adapters(adapter.base, adapter.rank)
    if (adapter.path / "tokenizer_config.json").is_file():
        arguments["tokenizer"] = str(adapter.path)  # vLLM does not look for one beside an adapter
    if not torch.cuda.is_available():
        # vLLM's CPU kernels apply the last slot to requests of the base beside an adapter's: it stays empty
        arguments["max_loras"] = 2
    name = name or adapter.path.name
    notes = adapter.notes + _room_notes(short, _MORE_TO_SERVE)
    return ServePlan(adapter.base.path, name, adapter.path, arguments, environment, notes)


def plan_engine(
    base: Path, *, max_lora_rank: int, longest: int | None = None, memory_share: float | None = None
) -> ServePlan:
    """As ``plan_serving``, for a base whose adapters come later.

    Args:
        base: The base's folder.
        max_lora_rank: The largest rank they may have.
        longest: Tokens of the longest context; None is the model's own.
        memory_share: Of the accelerator's memory, or of the host's where there is none; None is what is free.

    Raises:
        NotSupportedError, SourceError, VerificationError: as ``plan_serving``; or it comes with code.
        ConfigError: memory is left for no more than 256 tokens.
    """
    source = resolve(base, trust_remote_code=True)  # its code is not run, and refused below
    if source.config.get("auto_map"):
        raise NotSupportedError(
            f"{base} comes with Python code (auto_map), which vLLM is not told to run",
            fix="leave fast_inference out; generate(...) answers without vLLM",
        )
    arguments, environment, short = _with_adapters(source, max_lora_rank, memory_share, longest)
    if short and arguments["max_model_len"] <= _FEWEST_TOKENS:
        raise ConfigError(short, fix=_MORE_BESIDE)
    return ServePlan(base, base.name, None, arguments, environment, _room_notes(short, _MORE_BESIDE))


@dataclass(frozen=True)
class ServableAdapter:
    """An adapter that vLLM applies rightly to ``base``.

    ``rank`` is its largest; ``notes`` as in ServePlan.
    """

    path: Path
    base: Source
    rank: int
    notes: tuple[str, ...]


def servable_adapter(folder: str | Path, *, base: str | Path | None = None) -> ServableAdapter:
    """Check an adapter for vLLM.

    Raises:
        NotSupportedError, AdapterError, SourceError: as ``plan_serving``.
    """
    source = resolve(Path(folder).expanduser())
    if source.kind is not SourceKind.ADAPTER:
        raise AdapterError(f"{folder} is not an adapter", fix="give the adapter's folder")
    found = base_to_serve(source, base)
    adapter, served = served_pairs(source.path, found.path)
    wrong = [one for one in served if one.module + ".weight" != one.pair.parameter]
    if wrong:
        raise AdapterError(
            f"{folder} names {wrong[0].pair.parameter.removesuffix('.weight')}, the class that serves "
            f"{found.path} {wrong[0].module}; vLLM would ignore the adapter and answer as the base",
            fix=f"pronghorn export {folder} DIR --format adapter --base "
            + ("the same base in 16 bit" if is_compressed(found) else str(found.path)),
        )
    if is_compressed(found):
        _check_model(found.path)  # a scale that is missing loads as NaN
    rank = max(pair.rank for pair in adapter.pairs)
    return ServableAdapter(source.path.resolve(), found, rank, base_notes(source, adapter, found))


def _with_adapters(
    base: Source, rank: int, memory_share: float | None = None, longest: int | None = None
) -> tuple[dict[str, Any], dict[str, str], str]:
    """As ``_resources``, for ``base`` and adapters of up to ``rank``."""
    _check_engine(base.path, verify(base.path))
    _check_adapters(base.path, base.config)
    arguments, environment, short = _resources(base.path, memory_share, longest)
    most = min(arguments["max_num_batched_tokens"], MOST_BATCHED_TOKENS)
    lora = {"enable_lora": True, "max_lora_rank": max_lora_rank(rank)}
    return {**arguments, "max_num_batched_tokens": most, **lora}, environment, short


def _check_model(path: Path) -> None:
    report = verify(path)
    report.raise_if_broken(allow_unverified=True)
    _check_engine(path, report)


def _check_engine(path: Path, report: VerifyReport) -> None:
    """vLLM loads the model and computes the same; a base may have faults that vLLM does not mind."""
    found = report.engine("vllm")
    if found.outcome in (REFUSED, LOGITS):
        raise NotSupportedError(
            f"{path} in vLLM: {MEANING[found.outcome]}: {'; '.join(found.reasons)}",
            fix="; ".join(found.fixes),
        )


def _check_adapters(base: Path, config: Mapping[str, Any]) -> None:
    """Without a GPU, vLLM 0.32 fails at its start with any adapter on a mixture of experts, or on int8."""
    if torch.cuda.is_available():
        return
    if (quantization_of(config) or {}).get("format") == _INT8_LAYOUT:
        raise NotSupportedError(
            f"{base} is in 8-bit integers (w8a8): vLLM's CPU build ends at its start with any adapter on it",
            fix="serve it on a GPU, quantise the base as w4a16 or fp8, or merge the adapter: --format w8a8",
        )
    text = config.get("text_config") or config
    if any(text.get(key) for key in _EXPERTS):
        raise NotSupportedError(
            f"{base} is a mixture of experts: vLLM's CPU build ends at its start with any adapter on it",
            fix="serve it on a GPU, or merge the adapter: --format merged_16bit",
        )


def _resources(
    model: Path, memory_share: float | None = None, longest: int | None = None
) -> tuple[dict[str, Any], dict[str, str], str]:
    """Arguments and environment for a model on this machine, and in words where memory is short."""
    config = read_json(model / BASE_CONFIG)
    text = config.get("text_config") or config
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    per_token = _cache_bytes(text)
    arguments: dict[str, Any] = {}
    environment: dict[str, str] = {}
    share, total = memory_share, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        share = share or int(100 * min(_LARGEST_SHARE, max(0.1, (free - _GIB) / total))) / 100
    if share:  # vLLM's CPU build takes it of the host's memory
        arguments["gpu_memory_utilization"] = share
        cache = int(share * total) - weights - _RESERVED_BYTES
    else:
        room = (available_bytes() - 2 * weights) // 2 // _GIB
        gibibytes = max(1, min(_CPU_CACHE_GIB, room))
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(gibibytes)
        cache = gibibytes * _GIB
    own = int(text.get("max_position_embeddings") or _USUAL_BATCHED_TOKENS)
    wanted, fits = min(own, longest or own), max(0, cache // per_token // 16 * 16)
    arguments["max_model_len"] = min(wanted, max(_FEWEST_TOKENS, fits))
    arguments["max_num_batched_tokens"] = _USUAL_BATCHED_TOKENS
    told = (
        f"{model}: beside {weights / _GIB:.1f} GiB of weights there is memory for keys and values of {fits} "
        f"tokens, and contexts of {wanted} are asked for"
    )
    return arguments, environment, told if fits < wanted else ""


def _room_notes(short: str, more: str) -> tuple[str, ...]:
    return (f"{short}: {more}",) if short else ()


def _cache_bytes(text: Mapping[str, Any]) -> int:
    """Bytes of keys and values per token, in 16 bit."""
    heads = text.get("num_attention_heads") or 1
    width = text.get("head_dim") or (text.get("hidden_size") or heads) // heads
    return (
        2
        * 2
        * int(text.get("num_hidden_layers") or 1)
        * int(text.get("num_key_value_heads") or heads)
        * width
    )


@dataclass(frozen=True)
class Engine:
    """An interpreter with vLLM, its version, and the name of its distribution."""

    python: Path
    version: str
    distribution: str = "vllm"

    def start(self, plan: ServePlan) -> list[str]:
        """The module that serves, with its arguments."""
        if self.distribution == "vllm":
            return ["vllm.entrypoints.cli.main", *plan.command()[1:]]
        # `vllm serve` asks for a distribution named vllm and fails with vllm-cpu; this is what it starts
        return ["vllm.entrypoints.openai.api_server", "--model", *plan.command()[2:]]


def find_vllm(python: Path | None = None) -> Engine:
    """The interpreter that has vLLM: the one named, else this one.

    Raises:
        MissingDependencyError: vLLM is not installed there.
        ConfigError: ``python`` is no interpreter.
    """
    if python is None and find_spec("vllm") is None:
        raise MissingDependencyError("vLLM is not installed beside pronghorn", fix=_INSTALL)
    # not resolved: an environment's interpreter is a link, and the link's place names the environment
    interpreter = Path(python or sys.executable).expanduser().absolute()
    program = (
        "from importlib.metadata import distributions\n"
        "found = [d for d in distributions() if d.metadata['Name'] in ('vllm', 'vllm-cpu')][:1]\n"
        "print(*(text for d in found for text in (d.version, d.metadata['Name'])))"
    )
    try:
        done = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{interpreter} is not a Python interpreter ({error})", fix=_INSTALL) from error
    found = done.stdout.split()
    if len(found) != 2:
        raise MissingDependencyError(f"vLLM is not installed for {interpreter}", fix=_INSTALL)
    return Engine(interpreter, *found)


def serve(
    plan: ServePlan,
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    ready_seconds: float = 900,
    say: Callable[[str], None] = print,
) -> int:
    """Run vLLM until it ends or Ctrl+C; says when requests are answered. Returns vLLM's exit code.

    Raises:
        PronghornError: vLLM ended, or did not answer in ``ready_seconds``, before it was ready.
    """
    environment = {**ENVIRONMENT, **plan.environment, **os.environ}
    started = time.monotonic()
    command = [str(engine.python), "-m", *engine.start(plan), "--host", host, "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    try:
        address = f"http://{host}:{port}"
        while plan.name not in _models(address):
            if process.poll() is not None:
                raise PronghornError(
                    f"vLLM {engine.version} ended with code {process.returncode} before it was ready; "
                    "its last lines above say why",
                    fix="pronghorn doctor --vllm-python PATH compares versions",
                )
            if time.monotonic() - started > ready_seconds:
                raise PronghornError(
                    f"vLLM was not ready after {ready_seconds:.0f} s", fix="allow more: --ready-seconds N"
                )
            time.sleep(0.5)
        say(f"ready after {time.monotonic() - started:.0f} s: {address}/v1, model {plan.name!r}")
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(process)


def _models(address: str) -> list[str]:
    """The models a server offers; none while it does not answer."""
    try:
        with urllib.request.urlopen(f"{address}/v1/models", timeout=2) as answer:
            return [str(model["id"]) for model in json.load(answer)["data"]]
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError):
        return []


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
