"""The model card of what is pushed: base, data, metrics and how it was verified, from the files of the run.

A card that a person wrote is never replaced: ours ends with a hash of itself, so an edited one is known.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn import __version__
from pronghorn.export.onto import adapter_note
from pronghorn.export.verify_folder import Row
from pronghorn.sources.hub import CARD, read_card
from pronghorn.sources.record import read_record
from pronghorn.sources.resolve import ADAPTER_CONFIG, read_json
from pronghorn.training.folder import RunFolder
from pronghorn.training.metrics import read_metrics

_MARK = re.compile(r"<!-- made by pronghorn ([0-9a-f]{64}) -->\s*\Z")
_LICENSE_KEYS = ("license", "license_name", "license_link")
_PEFT_LINES = ("### Framework versions", "- PEFT ")


@dataclass(frozen=True)
class Result:
    """What a card is about.

    ``adapter``: the trained adapter's folder, for its record and its run; ``checks``: the promises that were
    checked, with what was found; ``onto``: where the training's base was quantised, what that means for this
    result.
    """

    folder: Path
    format: str
    adapter: Path | None
    base: Path | None
    checks: tuple[Row, ...]
    warnings: tuple[str, ...] = ()
    onto: str | None = None


def model_card(repo: str, result: Result) -> str:
    """The text of README.md for the hub."""
    base, run = _base_of(result), _run_of(result.adapter)
    lines = [*_head(base, result), "", f"# {repo.rpartition('/')[2]}", "", _summary(result, base)]
    lines += ["", "## Base", "", *_told_base(base), *_told_values(result)]
    if run is not None:
        lines += ["", "## Data", "", *_told_data(run), "", "## Metrics", "", *_told_metrics(run)]
    lines += ["", "## How it was verified", "", *_told_checks(result), ""]
    lines += [f"Made with pronghorn {__version__}.", ""]
    text = "\n".join(lines)
    return f"{text}<!-- made by pronghorn {_digest(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card was made here and not edited since."""
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def is_empty(text: str, template: frozenset[str]) -> bool:
    """Whether a card is the one PEFT writes, with nothing filled in."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return all(not line or line in template or line.startswith(_PEFT_LINES) for line in body.splitlines())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class _Base:
    """``id``: its name on the hub; None for a folder of this machine, of which ``name`` is the last part."""

    name: str
    id: str | None
    revision: str | None
    fingerprint: str | None
    license: Mapping[str, str]


def _base_of(result: Result) -> _Base | None:
    record = read_record(result.adapter) if result.adapter is not None else None
    config = _json(result.adapter / ADAPTER_CONFIG) if result.adapter is not None else {}
    if record is not None:
        named, revision, on_hub = record.base_name, record.base_revision, record.base_revision is not None
    else:
        named, revision = (
            config.get("base_model_name_or_path") or str(result.base or ""),
            config.get("revision"),
        )
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", named) is not None and not Path(named).is_dir()
    if not named:
        return None
    folder = result.base or Path(record.base_path if record and record.base_path else named)
    own = folder / CARD
    card = (
        own.read_text(encoding="utf-8") if own.is_file() else read_card(named, revision) if on_hub else None
    )
    fingerprint = record.base_fingerprint if record is not None else None
    return _Base(Path(named).name, named if on_hub else None, revision, fingerprint, _license(card or ""))


def _license(card: str) -> dict[str, str]:
    """The license that a card's header names, as it names it."""
    header = re.match(r"---\n(.*?)\n---", card, flags=re.DOTALL)
    found = re.findall(r"^(license\w*):[ \t]*(\S.*)$", header[1] if header else "", flags=re.MULTILINE)
    return {key: value.strip().strip("'\"") for key, value in found if key in _LICENSE_KEYS}


def _run_of(adapter: Path | None) -> dict[str, Any] | None:
    """manifest.json of the run that made the adapter, and its metrics up to then."""
    if adapter is None:
        return None
    # RUN/adapter, or RUN/checkpoints/step-N
    folder = next((one for one in list(adapter.parents)[:2] if RunFolder(one).manifest.is_file()), None)
    if folder is None:
        return None
    last = _json(adapter / "trainer_state.json").get("global_step", math.inf)
    rows = [row for row in read_metrics(RunFolder(folder).metrics) if row["step"] <= last]
    return {**_json(RunFolder(folder).manifest), "rows": rows}


def _head(base: _Base | None, result: Result) -> Iterator[str]:
    """The header that the hub reads; a JSON text is a YAML text."""
    yield "---"
    if base is not None and base.id is not None:
        relation = "adapter" if _is_adapter(result) else "quantized" if _is_quantised(result) else "finetune"
        yield f"base_model: {json.dumps(base.id)}"
        yield f"base_model_relation: {relation}"
    if base is not None:
        yield from (f"{key}: {json.dumps(value)}" for key, value in base.license.items())
    if not result.format.startswith("gguf"):
        yield f"library_name: {'peft' if _is_adapter(result) else 'transformers'}"
    yield "pipeline_tag: text-generation"
    yield "---"


def _is_adapter(result: Result) -> bool:
    return result.format in ("lora", "adapter", "gguf-lora")


def _is_quantised(result: Result) -> bool:
    return result.format not in ("merged_16bit", "model")


def _summary(result: Result, base: _Base | None) -> str:
    of = f" of {base.name}" if base is not None else ""
    if _is_adapter(result):
        return f"A LoRA adapter{of} (format: {result.format})."
    if result.adapter is None:
        return f"A complete model{of}."
    return f"A fine-tuned version{of}, complete: the adapter is merged in (format: {result.format})."


def _told_base(base: _Base | None) -> Iterator[str]:
    if base is None:
        yield "Not recorded."
        return
    link = f"[{base.id}](https://huggingface.co/{base.id})"
    yield f"- name: {link if base.id else f'{base.name} (a folder of its own, not from the hub)'}"
    if base.revision:
        yield f"- revision: `{base.revision}`"
    if base.fingerprint:
        yield f"- fingerprint of its weights: `{base.fingerprint}`"
    named = base.license.get("license_name") or base.license.get("license")
    yield f"- license: {named or 'its card names none, or could not be read'}"


def _told_values(result: Result) -> Iterator[str]:
    """Of a base that was quantised at training: which of its values the result is on."""
    told = result.onto
    if told is None and _is_adapter(result) and result.adapter is not None:
        told = adapter_note(read_record(result.adapter))
    if told is not None:
        yield f"- {told}"


def _told_data(run: Mapping[str, Any]) -> Iterator[str]:
    data = run.get("data", {})
    yield f"- rows: {data.get('train_rows')} to train on, {data.get('eval_rows')} to evaluate on"
    yield f"- tokens: {data.get('tokens')}, of which {data.get('trained_tokens')} are trained"
    yield f"- layout: {data.get('format')}"
    yield f"- hash of the rows: `{data.get('data_hash')}`"


def _told_metrics(run: Mapping[str, Any]) -> Iterator[str]:
    measured = [row for row in run["rows"] if "eval_loss" in row]
    steps = [row for row in run["rows"] if "loss" in row]
    if measured:
        first, last = measured[0], measured[-1]
        when = "before training" if first["step"] == 0 else f"at step {first['step']}, the first one measured"
        yield f"- evaluation loss: {first['eval_loss']:.4f} {when}"
        yield f"- evaluation loss: {last['eval_loss']:.4f} at step {last['step']}"
    else:
        yield "- evaluation loss: not measured"
    for row in steps[:1] + steps[1:][-1:]:
        yield f"- training loss: {row['loss']:.4f} at step {row['step']}"


def _told_checks(result: Result) -> Iterator[str]:
    deep = any(row.name.startswith(("logits equal", "quality against")) for row in result.checks)
    beside = "base + adapter" if result.adapter is not None else "the base"
    how = f"computing with it beside {beside}, in a fresh process" if deep else "headers and JSON files"
    yield f"Each promise below was kept, checked by {how}."
    yield ""
    here = {str(path): path.name for path in (result.folder, result.base, result.adapter) if path is not None}
    for row in result.checks:
        detail = row.detail
        for path, short in here.items():
            detail = detail.replace(path, short)
        yield f"- {row.name}: {detail}"
    yield from (f"- warning: {warning}" for warning in result.warnings)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
