"""Hold models against each other on the same rows: perplexity, KL, top-1 agreement, speed, memory.

The first model is the reference. Models are loaded one after the other; what the reference said is kept in a
temporary file, so the memory needed is that of one model.
"""

from __future__ import annotations

import gc
import inspect
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pronghorn.adapters.origin import base_of, origin_of
from pronghorn.errors import DataError, NotSupportedError, PronghornError
from pronghorn.export.report import ExportReport
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.loading.report import LoadReport
from pronghorn.loading.strict import no_bars
from pronghorn.serving.rows import IGNORED, scored_rows
from pronghorn.sources.bounds import quantization_of
from pronghorn.sources.resolve import BASE_CONFIG, read_json


@dataclass(frozen=True)
class Candidate:
    """A model or an adapter, and how it is loaded."""

    name: str
    path: str | Path
    options: LoadOptions = field(default_factory=LoadOptions)


@dataclass(frozen=True)
class Measured:
    """One model on the rows.

    ``kl``: mean over tokens of KL(reference, this) in nats; ``agreement``: share of tokens with the
    reference's top guess; both None for the reference. ``added_bytes`` is the resident memory that loading
    took, ``held_bytes`` the storages of the model.
    """

    name: str
    tokens: int
    perplexity: float
    kl: float | None
    agreement: float | None
    tokens_per_second: float
    held_bytes: int
    added_bytes: int | None


def compare(candidates: Sequence[Candidate], rows: str | Path | None = None) -> tuple[Measured, ...]:
    """Measure each candidate on the same rows, tokenised with the first one's tokenizer.

    Args:
        candidates: the reference, then what is held against it.
        rows: a file of rows, as for training; None: the evaluation rows of the run an adapter lies in.

    Raises:
        DataError: there are no rows, none of their tokens is scored, or the vocabularies differ.
        SourceError, AdapterError: as for ``pronghorn.load``.
    """
    found: list[Measured] = []
    scored: list[list[int]] = []
    labels: list[list[int]] = []
    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        said = Path(scratch) / "log_probabilities"
        for candidate in candidates:
            with no_bars():
                model, tokenizer = load(candidate.path, candidate.options, say=None)
            if not scored:
                places = [one.path for one in candidates]
                for ids, wanted in scored_rows(rows, places, tokenizer):
                    scored.append(ids)
                    labels.append(wanted)
            found.append(_measure(candidate.name, model, scored, labels, said))
            del model
            gc.collect()
    return tuple(found)


@torch.no_grad()
def _measure(name: str, model: Any, rows: list[list[int]], labels: list[list[int]], said: Path) -> Measured:
    origin = origin_of(model)
    report = origin.report if origin else None
    assert isinstance(report, LoadReport)
    is_reference = not said.exists()
    loss = divergence = 0.0
    same = tokens = read = 0
    seconds = 0.0
    with said.open("wb" if is_reference else "rb") as file:
        for ids, wanted in zip(rows, labels, strict=True):
            started = time.perf_counter()
            scores, answers = _scores(model, ids, wanted)
            seconds += time.perf_counter() - started
            read += len(ids)
            tokens += len(answers)
            loss -= float(scores.gather(1, answers[:, None]).double().sum())
            if is_reference:
                file.write(scores.numpy().tobytes())
                continue
            raw = bytearray(file.read(scores.nbytes))
            if len(raw) != scores.nbytes:
                raise DataError(
                    f"{name} has a vocabulary of {scores.shape[1]} tokens, the reference another",
                    fix="compare models of one family",
                )
            truth = torch.frombuffer(raw, dtype=torch.float32).view_as(scores)
            divergence += float((truth.exp() * (truth - scores)).double().sum())
            same += int((truth.argmax(1) == scores.argmax(1)).sum())
        if not is_reference and file.read(1):
            raise DataError(
                f"{name} has a smaller vocabulary than the reference", fix="compare models of one family"
            )
    return Measured(
        name,
        tokens,
        math.exp(min(loss / tokens, 700.0)),
        None if is_reference else max(0.0, divergence / tokens),
        None if is_reference else same / tokens,
        read / seconds,
        report.total_bytes,
        report.added_bytes,
    )


def _scores(model: Any, ids: list[int], labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [K, V] (float32, on the CPU) before each scored token, and the tokens [K]."""
    targets = torch.tensor(labels[1:])
    places = (targets != IGNORED).nonzero().flatten()
    batch = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(batch)
    inputs: dict[str, Any] = {"input_ids": batch, "attention_mask": mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(base_of(model).forward).parameters:
        logits = model(**inputs, logits_to_keep=places.to(batch.device)).logits[0]
    else:
        logits = model(**inputs).logits[0, places.to(batch.device)]
    return logits.float().log_softmax(-1).cpu().contiguous(), targets[places]


def drift(report: ExportReport, onto: str, rows: str | Path | None = None) -> tuple[Measured, ...]:
    """How far what an export wrote is from the trained model; see ``compare`` for rows and errors."""
    base = report.trained_on or report.base
    merged = None if report.is_adapter else report.folder
    candidates = drift_candidates(report.adapter, base, merged, onto)
    if len(candidates) == 1:
        raise NotSupportedError(
            f"{base} holds its weights in NF4 only",
            fix="name the 16-bit model it was made from: --onto original --base MODEL",
        )
    return compare(candidates, rows)


def drift_line(report: ExportReport, onto: str, rows: str | Path) -> str:
    """:func:`drift` in a line of text; what cannot be measured is said."""
    try:
        measured = drift(report, onto, rows)
    except PronghornError as error:
        return f"drift from the trained model was not measured: {error}"
    told = (f"{one.name}: KL {one.kl:.3g}, top-1 {one.agreement:.2%}" for one in measured[1:])
    return f"drift from the trained model on {measured[0].tokens} tokens: {'; '.join(told)}"


def drift_candidates(adapter: str | Path, base: Path, merged: Path | None, onto: str) -> list[Candidate]:
    """What a merge is held against: the trained model, what was written, the other choice if there is one.

    The other choice is not written: an adapter on its 16-bit base computes what the merge onto that base
    would, but for rounding. Without a merge, it is the adapter as it is served.
    """
    found = [Candidate("trained: quantised base + adapter", adapter, LoadOptions(base=base))]
    if merged is not None:
        found.append(Candidate(f"merged onto {onto}", merged))
    if (merged is None or onto == "decoded") and quantization_of(read_json(base / BASE_CONFIG)) is None:
        name = "onto original" if merged is not None else "adapter on the 16-bit base"
        found.append(Candidate(name, adapter, LoadOptions(base=base, quantization="none")))
    return found
