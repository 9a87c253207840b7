"""The export format "gguf-lora": the portable adapter as one GGUF file for llama.cpp's --lora."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pronghorn.adapters.files import LoraPair, read_adapter
from pronghorn.errors import NotSupportedError
from pronghorn.export.files import check_space
from pronghorn.export.gguf_check import require_lora
from pronghorn.export.gguf_models import Architecture, llama_cpp_name, rotary_heads, settings_of
from pronghorn.export.gguf_write import Output, interleave, lazy, write_file
from pronghorn.export.job import Job, verified
from pronghorn.export.portable import write_portable
from pronghorn.export.report import ExportReport
from pronghorn.sources.source import SourceKind
from pronghorn.weights.reader import read_tensor
from pronghorn.weights.shards import Shard
from pronghorn.weights.writer import StagedFolder

FILE = "adapter.gguf"
_FLOAT_BYTES = 4


def write_lora(job: Job) -> ExportReport:
    """Write the adapter; scaling is folded into B, so that llama.cpp's rule (alpha / rank) gives 1.

    Raises:
        NotSupportedError: a whole model, or something llama.cpp cannot apply; it is named.
        AdapterError, ExportError, VerificationError: as the format "adapter".
    """
    if job.adapter.kind is not SourceKind.ADAPTER:
        raise NotSupportedError(f"{job.adapter.path} is a whole model, not an adapter", fix="use gguf-f16")
    architecture, adapter, _ = require_lora(job.adapter.path, job.base)
    rank = max(pair.rank for pair in adapter.pairs)
    size = sum((pair.a.shape[1] + pair.b.shape[0]) * rank * _FLOAT_BYTES for pair in adapter.pairs)
    check_space(job.target, 2 * size)
    with StagedFolder(job.target, job.overwrite) as staging:
        report = write_portable(replace(job, target=staging / ".scratch", overwrite=False))
        portable = read_adapter(report.folder)
        settings = settings_of(job.base.path)
        outputs = [
            one for pair in portable.pairs for one in _pair(architecture, settings, portable.shard, pair)
        ]
        metadata = {
            "general.type": "adapter",
            "general.name": job.target.name,
            "adapter.type": "lora",
            "adapter.lora.alpha": float(rank),
        }
        written = write_file(staging / FILE, architecture.name, metadata, outputs, job.progress)
        shutil.rmtree(report.folder)
        checks = verified(job, staging, against=None) if job.verify else ()
    return replace(
        report,
        folder=job.target,
        format="gguf-lora",
        bytes_written=written,
        checks=(*report.checks, *checks),
    )


def _pair(
    architecture: Architecture, settings: Mapping[str, Any], shard: Shard, pair: LoraPair
) -> Iterator[Output]:
    """A and B in float32; B has the rows of the matrix it belongs to, so they are interleaved with it."""
    name = llama_cpp_name(architecture, pair.parameter)
    heads = rotary_heads(architecture, pair.parameter, settings)
    yield lazy(f"{name}.lora_a", pair.a.shape, lambda: read_tensor(shard, pair.a).float())
    yield lazy(f"{name}.lora_b", pair.b.shape, lambda: interleave(read_tensor(shard, pair.b).float(), heads))
