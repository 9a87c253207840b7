"""The export formats "gguf-...": GGUF files from merged 16-bit weights, and a Modelfile for Ollama."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from pronghorn.adapters.tokenizer_files import TOKENIZER
from pronghorn.export.files import check_space
from pronghorn.export.formats import GGUF_LORA
from pronghorn.export.gguf_check import refusals
from pronghorn.export.gguf_engine import quantise, quantiser
from pronghorn.export.gguf_lora import write_lora
from pronghorn.export.gguf_models import ModelPlan, check_model, plan_model, settings_of
from pronghorn.export.gguf_ollama import MODELFILE, modelfile
from pronghorn.export.gguf_tokens import STRIPPING_NAMES, TokenPlan, padded, plan_tokens
from pronghorn.export.gguf_write import WRITTEN, Output, computed, require_gguf, stored, write_file
from pronghorn.export.job import Job, verified
from pronghorn.export.onto import base_weights, without_quantization
from pronghorn.export.report import ExportReport
from pronghorn.sources.resolve import BASE_CONFIG, read_json
from pronghorn.sources.source import Source
from pronghorn.weights.folder import WeightFolder, open_weights
from pronghorn.weights.writer import StagedFolder

Merge = Callable[[Job], ExportReport]
# bits per weight, for the check of the disk; llama.cpp's own kinds take 3 (q2_k) to 6.6 (q6_k)
_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5}
_QUANTISED_BITS = 7.0
_TOKENS_BYTES = 16 * 2**20
_SCRATCH = ".scratch"
_SUPER_BLOCKS = ("_k", "_k_s", "_k_m", "_k_l", "iq4_xs")  # kinds whose blocks are 256 wide


@dataclass(frozen=True)
class GgufJob:
    """``kinds`` are written beside each other; ``python`` has llama_cpp, where a kind needs its quantiser."""

    job: Job
    kinds: tuple[str, ...]
    python: Path | None
    merge: Merge


def write_gguf(work: GgufJob) -> ExportReport:
    """Write an adapter merged into its base, or a whole model, as GGUF.

    Raises:
        MissingDependencyError: the gguf package, or llama.cpp's quantiser, is not installed.
        NotSupportedError: a model, tokenizer or setting that llama.cpp would compute differently.
        SourceError: there is no tokenizer.
        ExportError: the disk cannot hold it, or a value does not fit; nothing appears.
        VerificationError: the merge or a file broke a promise; nothing appears.
    """
    job = work.job
    require_gguf()
    if work.kinds == (GGUF_LORA,):
        return write_lora(job)
    python = quantiser(work.python) if set(work.kinds) - set(WRITTEN) else ""
    _check_first(work)
    with StagedFolder(job.target, job.overwrite) as staging:
        scratch = staging / _SCRATCH
        scratch.mkdir()
        report = _sixteen_bit(work, scratch)
        made = _Files(report.folder, staging, scratch, job, python)
        for kind in work.kinds:
            made.write(kind)
        (staging / MODELFILE).write_text(modelfile(file_name(work.kinds[0]), made.tokens), encoding="utf-8")
        shutil.rmtree(scratch)
        checks = verified(job, staging, against=None) if job.verify else ()
        written = sum(path.stat().st_size for path in staging.iterdir())
    return replace(
        report,
        folder=job.target,
        format=f"gguf-{','.join(work.kinds)}",
        bytes_written=written,
        onto=None,
        changes=(*report.changes, *((report.onto,) if report.onto else ()), *made.told),
        warnings=(*report.warnings, *made.plan.warnings, *made.tokens.warnings, *made.warnings),
        left_out=(),
        verified=True if job.verify else None,
        checks=(*report.checks, *checks),
    )


def file_name(kind: str) -> str:
    """The name of a model's file in the folder."""
    return f"model-{kind.upper()}.gguf"


def _check_first(work: GgufJob) -> None:
    """Everything that can be refused before a byte is written."""
    job = work.job
    config = dict(job.base.config)
    if not job.whole:
        without_quantization(config)  # the merge decodes what was quantised
        weights = base_weights(job.base, job.read_adapter().record, job.onto).weights
        check_model(config, settings_of(job.base.path))
        tokens = plan_tokens(job.tokenizer if (job.tokenizer / TOKENIZER).is_file() else job.base.path)
        modelfile(file_name(work.kinds[0]), tokens)
    else:
        weights = open_weights(job.base.path)
        for refused in refusals(job.base.path):
            raise refused
    check_space(job.target, _needed_bytes(work, weights))


def _needed_bytes(work: GgufJob, weights: WeightFolder) -> int:
    elements = sum(prod(entry.shape) for _, entry in weights.tensors.values())
    bits = sum(_BITS.get(kind, _QUANTISED_BITS) for kind in work.kinds)
    if set(work.kinds) - set(WRITTEN):
        bits += 32.0 if _sixteen_bit_kind(weights) == "f32" else 16.0
    merged = 0 if work.job.whole else max(weights.nbytes, 2 * elements)
    return merged + int(elements * bits / 8) + _TOKENS_BYTES * len(work.kinds)


def _sixteen_bit_kind(weights: WeightFolder) -> str:
    """The type that holds what llama.cpp's quantiser starts from without rounding it first."""
    kinds = {entry.dtype for _, entry in weights.tensors.values() if len(entry.shape) > 1}
    return "bf16" if kinds == {"BF16"} else "f16" if kinds == {"F16"} else "f32"


def _sixteen_bit(work: GgufJob, scratch: Path) -> ExportReport:
    """The merged model in ``scratch``; a model that is complete already stays where it is."""
    job = work.job
    if not job.whole:
        return work.merge(replace(job, target=scratch / "merged", overwrite=False, finished=None))
    return ExportReport(
        folder=job.base.path, format="", adapter=job.base.path, base=job.base.path,
        tensors_merged=0, tensors_copied=len(open_weights(job.base.path).tensors), bytes_written=0,
        changed_share=None, warnings=(), changes=(), left_out=(), seconds=0.0,
    )  # fmt: skip


class _Files:
    """The GGUF files of one merged model."""

    def __init__(self, merged: Path, staging: Path, scratch: Path, job: Job, python: str) -> None:
        self.staging, self.scratch, self.job, self.python = staging, scratch, job, python
        self.weights = open_weights(merged)
        self.plan: ModelPlan = plan_model(self.weights, read_json(merged / BASE_CONFIG), settings_of(merged))
        self.tokens: TokenPlan = plan_tokens(merged)
        self.told: list[str] = []
        self.warnings: list[str] = []
        self._source: Path | None = None

    def write(self, kind: str) -> None:
        """Write one kind into the staging folder."""
        target = self.staging / file_name(kind)
        if kind in WRITTEN:
            self._write_here(target, kind)
            return
        if self._source is None:
            first = _sixteen_bit_kind(self.weights)
            self._source = self.scratch / file_name(first)
            self._write_here(self._source, first)
        quantise(self.python, self._source, target, kind)
        odd = [
            one.name
            for one in self.plan.tensors
            if len(one.base[1].shape) > 1 and one.base[1].shape[-1] % 256
        ]
        if odd and kind.endswith(_SUPER_BLOCKS):
            self.warnings.append(
                f"{target.name}: the rows of {len(odd)} tensors are no multiple of 256, so llama.cpp took a "
                f"larger type for them (first {odd[0]})"
            )
        self.told.append(f"{target.name}: quantised by llama.cpp from {self._source.stem.partition('-')[2]}")

    def _write_here(self, target: Path, kind: str) -> None:
        wanted, file_type = WRITTEN[kind]
        outputs: list[Output] = [computed(name, values) for name, values in self.plan.computed.items()]
        outputs += [stored(tensor, wanted) for tensor in self.plan.tensors]
        other = [one.name for one in outputs if len(one.shape) > 1 and one.kind != wanted]
        if other:
            self.told.append(
                f"{target.name}: {len(other)} tensors in F16, no block divides their rows ({other[0]})"
            )
        write_file(target, self.plan.architecture.name, self._metadata(file_type), outputs, self.job.progress)

    def _metadata(self, file_type: str) -> Mapping[str, Any]:
        from gguf import GGML_QUANT_VERSION, LlamaFileType

        vocabulary = self.plan.vocabulary
        sized = {f"{self.plan.architecture.name}.vocab_size": vocabulary}
        return {
            "general.type": "model",
            "general.name": model_name(self.job.base, strips=self.tokens.strips),
            "general.file_type": int(LlamaFileType[file_type]),
            "general.quantization_version": int(GGML_QUANT_VERSION),
            **self.plan.metadata,
            **sized,
            **padded(self.tokens, vocabulary),
        }


def model_name(base: Source, *, strips: bool) -> str:
    """The base's name; "phi-3" stands in it exactly where llama.cpp may treat special tokens as Phi-3's."""
    name = Path(base.name).name or "model"
    says = any(mark in name.lower() for mark in STRIPPING_NAMES)
    if strips and not says:
        return f"Phi-3 {name}"
    if says and not strips:
        for mark in STRIPPING_NAMES:
            at = name.lower().find(mark)
            name = name if at < 0 else f"{name[: at + 3]} {name[at + len(mark) - 1 :]}"
    return name
