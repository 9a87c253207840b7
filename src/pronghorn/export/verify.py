"""Does a folder keep its promises? The public ``verify`` and ``python -m pronghorn.export.verify``.

The shallow part reads headers and JSON files in this process, without torch. The deep part computes, and
always runs in a fresh Python process, so that nothing patched or cached here can hide a fault. Every promise
is one small function; the lists below are the whole order of service.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pronghorn.errors import ConfigError, PronghornError, SourceError, VerificationError
from pronghorn.export.verify_adapter import adapter_complete, adapter_config_sane, pairs_fit, pairs_fit_base
from pronghorn.export.verify_codes import codes_complete, settings
from pronghorn.export.verify_engines import (
    LLAMA,
    MEANING,
    VLLM,
    EngineVerdict,
    Refusal,
    as_json,
    engines_named,
    judge,
    judge_llama,
    judge_refused,
)
from pronghorn.export.verify_folder import (
    ADAPTER_CONFIG,
    FLOATS,
    Folder,
    Promise,
    Row,
    base_of,
    without_quantization,
)
from pronghorn.export.verify_gguf import check_gguf, gguf_files
from pronghorn.export.verify_names import expected, tensors_agree
from pronghorn.export.verify_readings import config_as_base, tokens_as_base
from pronghorn.export.verify_tokens import special_ids_agree, template_parses, tokenizer_present
from pronghorn.export.verify_weights import (
    config_sane,
    dtype_agrees,
    index_exact,
    no_adapter_beside,
    no_peft_names,
    no_stale_weights,
    quantization_agrees,
    same_as_base,
    shards_complete,
    tying_agrees,
    vocabulary_agrees,
)

MODEL_PROMISES: tuple[Promise, ...] = (
    shards_complete,
    index_exact,
    config_sane,
    no_stale_weights,
    no_adapter_beside,
    no_peft_names,
    tensors_agree,
    quantization_agrees,
    codes_complete,
    dtype_agrees,
    vocabulary_agrees,
    tying_agrees,
    tokenizer_present,
    special_ids_agree,
    template_parses,
)
MODEL_PROMISES_WITH_BASE: tuple[Promise, ...] = (same_as_base, config_as_base, tokens_as_base)
ADAPTER_PROMISES: tuple[Promise, ...] = (adapter_config_sane, adapter_complete, pairs_fit)
ADAPTER_PROMISES_WITH_BASE: tuple[Promise, ...] = (pairs_fit_base,)

_RECORD = "pronghorn.json"
# programs, not imports: what refuses is never part of this process
_AS_GGUF, _SERVED = "pronghorn.export.gguf_check", "pronghorn.serving.vllm_check"


@dataclass(frozen=True)
class VerifyReport:
    """What was checked in ``folder`` (``kind``: "model", "adapter" or "gguf"), one row per promise.

    ``engines``: what each engine makes of a model folder, told from its files; ``base``: what it was held
    against.
    """

    folder: Path
    kind: str
    rows: tuple[Row, ...]
    engines: tuple[EngineVerdict, ...] = ()
    base: Path | None = None

    @property
    def passed(self) -> bool:
        """Every promise was checked and kept."""
        return all(row.ok is True for row in self.rows)

    @property
    def first_failure(self) -> Row | None:
        """The first broken promise; without one, the first that could not be checked."""
        broken = [row for row in self.rows if row.ok is False]
        return next(iter(broken + [row for row in self.rows if row.ok is None]), None)

    def raise_if_broken(self, *, allow_unverified: bool = False) -> None:
        """Raise for the first broken promise, or for one that could not be checked unless that is allowed.

        Raises:
            VerificationError: the message names the folder, the promise and what is wrong.
        """
        failure = self.first_failure
        if failure is None or (failure.ok is None and allow_unverified):
            return
        if failure.ok is None:
            raise VerificationError(
                f"{self.folder}: not verified: {failure.name}: {failure.detail}",
                fix="remove the cause, or accept the folder unverified with --allow-unverified",
            )
        raise VerificationError(
            f"{self.folder} breaks a promise: {failure.name}: {failure.detail}",
            fix="write the folder again with pronghorn export, or repair the file that is named",
        )

    def engine(self, name: str) -> EngineVerdict:
        """The verdict of one engine of ``verify_engines.ENGINES``, for a model folder."""
        return next(one for one in self.engines if one.engine == name)

    def asking(self, engines: str) -> VerifyReport:
        """The report with the verdicts that take a process of their own, for the engines that are named.

        llama.cpp's: what GGUF would be of the folder; vLLM's of an adapter: the pre-flight of
        ``pronghorn serve``.

        Raises:
            ConfigError: a name that is no engine, or none that opens GGUF files.
        """
        told = {one.engine for one in self.engines}
        asked = [name for name in self._names(engines) if name not in told and self.kind != "gguf"]
        found = []
        if VLLM in asked:  # of models it is told already
            found.append(judge_refused(VLLM, _refused(_SERVED, self.folder, self.base)))
        if LLAMA in asked:
            said = _refused(_AS_GGUF, self.folder, self.base)
            found.append(judge_llama(_view(self.folder, self.base), self.rows, said))
        return replace(self, engines=(*self.engines, *found))

    def raise_unless_served(self, engines: str) -> None:
        """Raise for the first of the named engines that does not serve the folder rightly.

        An adapter is opened by PEFT for transformers: it has to keep its promises.

        Args:
            engines: Names with commas between: vllm, transformers, transformers5, transformers4, llama.cpp.

        Raises:
            ConfigError: a name that is no engine, or none that opens GGUF files.
            VerificationError: names the folder, the engine, the reasons and the way out.
        """
        names = self._names(engines)
        if self.kind == "adapter":
            self.raise_if_broken(allow_unverified=True)
        for verdict in self.asking(engines).engines:
            if verdict.engine in names and not verdict.ok:
                reasons = "; ".join(verdict.reasons)
                raise VerificationError(
                    f"{self.folder} in {verdict.engine}: {MEANING[verdict.outcome]}: {reasons}",
                    fix="; ".join(verdict.fixes),
                )

    def _names(self, engines: str) -> tuple[str, ...]:
        try:
            names = engines_named(engines)
        except ValueError as error:
            raise ConfigError(f"--for: {error}", fix="choose among these") from error
        others = ", ".join(name for name in names if name != LLAMA)
        if self.kind == "gguf" and others:
            raise ConfigError(
                f"--for: {self.folder} is GGUF, and what {others} makes of that is not told here",
                fix="--for llama.cpp, or check the folder it was written from",
            )
        return names

    def to_json(self) -> str:
        """The report as one JSON object."""
        rows = [asdict(row) for row in self.rows]
        told = {"folder": str(self.folder), "kind": self.kind, "passed": self.passed, "rows": rows}
        return json.dumps({**told, "engines": as_json(self.engines)})

    def __str__(self) -> str:
        marks = {True: "ok", False: "BROKEN", None: "not verified"}
        lines = [f"{self.folder} ({self.kind})"]
        lines += [f"  {marks[row.ok]:<12}  {row.name}: {row.detail}" for row in self.rows]
        lines += [f"  {one.outcome:<12}  {one.engine}: {one}" for one in self.engines]
        return "\n".join(lines)


def verify(
    folder: str | Path,
    *,
    deep: bool = False,
    against: str | Path | None = None,
    base: str | Path | None = None,
    onto: str = "decoded",
    vllm_python: Path | None = None,
    llama_python: Path | None = None,
    rows: Path | None = None,
) -> VerifyReport:
    """Check a model or adapter folder, or GGUF files, made by pronghorn or by any other tool.

    Args:
        folder: Merged, base or adapter folder; a GGUF file, or a folder of them.
        deep: Also load it, in a fresh process, and compare what it computes.
        against: The adapter folder that it was merged from. With ``deep``, logits and greedy answers must be
            those of base + adapter, computed by plain PEFT in float32. Where no adapter was merged: the whole
            model that it was quantised from, or whose language model it is.
        base: The base folder. By default the one recorded beside the adapter.
        vllm_python: With ``deep``, the interpreter of an environment with vLLM, which opens the folder, too.
        llama_python: The same with llama-cpp-python, which opens what the export makes of the folder.
        onto: "original": of a base that was in 4-bit at training, the 16-bit values were merged onto.
        rows: With ``deep`` and ``against``, tokenised rows (JSON lines of input_ids and labels, -100 where
            nothing is trained): the folder's loss on them must be that of base + adapter.

    Raises:
        ConfigError: ``rows`` without what they are compared with.
        SourceError: ``folder``, ``against`` or ``base`` is not a folder, or ``folder`` holds no model.
    """
    if rows is not None and not (deep and against is not None):
        raise ConfigError(
            "rows (--rows) have their loss compared with base + adapter", fix="add --deep --against ADAPTER"
        )
    if found := gguf_files(Path(folder).expanduser()):
        if deep or against is not None:
            raise SourceError(
                f"{folder}: GGUF files are checked by their header, they are not loaded",
                fix="leave out deep and against (--deep, --against)",
            )
        place = _existing(base, "base folder") if base is not None else None
        return VerifyReport(Path(folder).expanduser().resolve(), "gguf", check_gguf(found, place))
    path = _existing(folder, "folder")
    _require_content(path)
    source = source_folder(against, rows) if against is not None else None
    base_path = _base_folder(base, source, path)
    if deep:
        options = ["--onto", onto]
        options += ["--vllm-python", str(vllm_python)] if vllm_python else []
        options += ["--llama-python", str(llama_python)] if llama_python else []
        options += ["--rows", str(rows)] if rows else []
        return _in_fresh_process(path, source, base_path, options)
    return check_files(path, base_path)


def check_files(folder: Path, base: Path | None) -> VerifyReport:
    """The shallow part: headers and JSON files only."""
    view = _view(folder, base)
    if view.is_adapter:
        promises = ADAPTER_PROMISES + (ADAPTER_PROMISES_WITH_BASE if view.base else ())
    else:
        promises = MODEL_PROMISES + (MODEL_PROMISES_WITH_BASE if view.base else ())
    rows = [promise(view) for promise in promises]
    for promise, row in zip(promises, rows, strict=True):
        alone = promise is tensors_agree and row.ok is False and all(r.ok for r in rows if r is not row)
        if alone and expected(view.config) is None:
            rows[rows.index(row)] = _asked_class(folder, row)
    if view.is_adapter:
        return VerifyReport(folder, "adapter", tuple(rows), base=base)
    return VerifyReport(folder, "model", tuple(rows), judge(view, rows), base)


def _view(folder: Path, base: Path | None) -> Folder:
    view = Folder(folder)
    if base is not None and base != folder:
        view = Folder(folder, base=base_of(view, base))
    if view.base is None or not (_in_4bit(view) or _in_4bit(view.base)):
        return view
    if view.is_adapter and settings(view.base):
        return view  # codes tell the shapes as well
    return Folder(folder)  # 4-bit and 16-bit have other tensors; the deep check decodes a base in 4-bit


def _in_4bit(view: Folder) -> bool:
    """Whether the config is of a quantised folder whose weights are quantised."""
    try:
        packed = any(tensor.dtype not in FLOATS for tensor in view.tensors.values())
        return packed and view.config != without_quantization(view.config)
    except (OSError, ValueError):
        return False  # broken promises, which say so


def _asked_class(folder: Path, row: Row) -> Row:
    """Layers may differ by design: the class itself decides, in a process of its own (it loads torch)."""
    command = [sys.executable, "-m", "pronghorn.export.verify_class", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=_offline(), check=False)
    try:
        answer = Row.of(json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError, KeyError, TypeError):
        return row
    if answer.ok:
        return Row(row.name, True, f"layers differ as their class wants them ({answer.detail})")
    return Row(row.name, answer.ok, f"{row.detail}; {answer.detail}", row.faults)


def _refused(program: str, folder: Path, base: Path | None) -> tuple[Refusal, ...]:
    """What ``_AS_GGUF`` or ``_SERVED`` refuses: who writes or serves it says so, in a process of its own."""
    command = [sys.executable, "-m", program, str(folder), *([str(base)] if base else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=_offline(), check=False)
    try:
        return tuple(Refusal(**one) for one in json.loads(done.stdout.strip().splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        said = done.stderr.strip().splitlines()
        reason = f"the process of {program} ended with code {done.returncode}: {said[-1] if said else ''}"
        return (Refusal(reason, sure=False),)


def _existing(folder: str | Path, what: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise SourceError(f"there is no {what} {str(folder)!r}", fix="check the path for typing errors")
    return path.resolve()


def _require_content(path: Path) -> None:
    """A folder with nothing to check is a mistyped path, not a list of broken promises."""
    marks = ("config.json", ADAPTER_CONFIG, "*.safetensors", "*.safetensors.index.json", "*.bin")
    if any(next(path.glob(mark), None) for mark in marks):
        return
    inner = sorted(str(config.parent) for config in path.glob(f"*/{ADAPTER_CONFIG}"))
    raise SourceError(
        f"{path} holds neither a model nor an adapter",
        fix=f"did you mean {' or '.join(inner)}?" if inner else "give the folder of a model or an adapter",
    )


def source_folder(against: str | Path, rows: Path | None) -> Path:
    """What a folder was made from: an adapter, in ``against`` or its only subfolder, or a whole model.

    Raises:
        ConfigError: a whole model, and ``rows`` to compare the loss on.
        SourceError: there is neither.
    """
    source = _source_folder(_existing(against, "adapter folder"))
    if rows is not None and _is_whole(source):
        raise ConfigError(f"{against} is a whole model: nothing was trained on rows", fix="leave out --rows")
    return source


def _source_folder(path: Path) -> Path:
    """PEFT puts named adapters one level down."""
    if (path / ADAPTER_CONFIG).is_file():
        return path
    inner = sorted(config.parent for config in path.glob(f"*/{ADAPTER_CONFIG}"))
    if not inner and (path / "config.json").is_file():
        return path
    if len(inner) != 1:
        names = ", ".join(folder.name for folder in inner) or "no adapter"
        raise SourceError(
            f"{path} holds {names}, expected one {ADAPTER_CONFIG}", fix="give the adapter's own folder"
        )
    return inner[0]


def _is_whole(source: Path) -> bool:
    return not (source / ADAPTER_CONFIG).is_file()


def _base_folder(given: str | Path | None, source: Path | None, folder: Path) -> Path | None:
    """The base that was given; a whole model is its own; else the one recorded with the adapter."""
    if given is not None:
        return _existing(given, "base folder")
    if source is not None and _is_whole(source):
        return source
    return recorded_base(source or folder)


def recorded_base(folder: Path) -> Path | None:
    """The local base folder an adapter names: in pronghorn's record first, then in adapter_config.json."""
    for file, keys in ((_RECORD, ("base_path", "base_name")), (ADAPTER_CONFIG, ("base_model_name_or_path",))):
        for place in (folder, folder.parent):
            try:
                record = json.loads((place / file).read_bytes())
            except (OSError, ValueError):
                continue
            for key in keys:
                value = record.get(key) if isinstance(record, dict) else None
                if isinstance(value, str) and value and (Path(value) / "config.json").is_file():
                    return Path(value).resolve()
            break
    return None


def _in_fresh_process(
    folder: Path, against: Path | None, base: Path | None, options: list[str]
) -> VerifyReport:
    command = [sys.executable, "-m", "pronghorn.export.verify", str(folder), "--deep", "--json"]
    command += ["--against", str(against)] if against else []
    command += ["--base", str(base)] if base else []
    command += options
    done = subprocess.run(command, capture_output=True, text=True, env=_offline(), check=False)
    try:
        report = json.loads(done.stdout.strip().splitlines()[-1])
        files = check_files(folder, base)
        return replace(files, rows=tuple(Row.of(row) for row in report["rows"]))
    except (IndexError, ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines()
        reason = (
            f"the checking process ended with code {done.returncode}: {said[-1] if said else 'no message'}"
        )
        files = check_files(folder, base)
        return replace(files, rows=(*files.rows, Row("the deep check ran", None, reason)))


def _offline() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m pronghorn.export.verify``: print the table; 0 when every promise is kept."""
    parser = argparse.ArgumentParser(prog="pronghorn.export.verify", description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--deep", action="store_true", help="load it and compare what it computes")
    parser.add_argument("--against", help="the adapter folder it was merged from, or a whole model")
    parser.add_argument("--base", help="the base folder; by default the recorded one")
    parser.add_argument("--onto", choices=("decoded", "original"), default="decoded", help="of a 4-bit base")
    parser.add_argument("--vllm-python", type=Path, help="with --deep: vLLM's interpreter opens it, too")
    parser.add_argument(
        "--llama-python", type=Path, help="with --deep: llama.cpp's interpreter opens it, too"
    )
    parser.add_argument("--rows", type=Path, help="with --deep and --against: tokenised rows, for the loss")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--allow-unverified", action="store_true", help="0 although something was not checked"
    )
    options = parser.parse_args(arguments)
    try:
        report = _run_here(options)
        print(report.to_json() if options.json else report)
        report.raise_if_broken(allow_unverified=options.allow_unverified)
    except PronghornError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run_here(options: argparse.Namespace) -> VerifyReport:
    """Shallow, then deep, both in this process: it is the fresh one. Broken files are not loaded."""
    report = verify(options.folder, against=options.against, base=options.base)
    if not options.deep:
        return report
    if any(row.ok is False for row in report.rows):
        skipped = Row("the deep check ran", None, "a promise about the files is broken; it was not loaded")
        return replace(report, rows=(*report.rows, skipped))
    from pronghorn.export.verify_deep import compute_promises

    source = _source_folder(_existing(options.against, "adapter folder")) if options.against else None
    base = _base_folder(options.base, source, report.folder)
    rows = compute_promises(report.folder, source, base, decode=options.onto == "decoded", rows=options.rows)
    if options.vllm_python is not None and not any(row.ok is False for row in rows):
        from pronghorn.export.verify_engine import vllm_promises

        rows += vllm_promises(report.folder, options.vllm_python)
    if options.llama_python is not None and not any(row.ok is False for row in rows):
        from pronghorn.export.verify_llama import llama_promises

        rows += llama_promises(report.folder, options.llama_python)
    return replace(report, rows=report.rows + rows)


if __name__ == "__main__":
    sys.exit(main())
