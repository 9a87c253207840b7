"""Proves the stored verdicts again: the folders of ``verdict_folders`` in the real engines.

``python -m tests.external.verdicts [--engine NAME] [--write]`` trains the good folders, damages them, opens
all of them in each engine, and says where an outcome is not the stored one; ``--write`` stores what was
found, and writes docs/verdicts.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import pronghorn
from tests.export.verdict_folders import CASES, write_folders
from tests.external import memorised

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "verdicts.md"
STORE = ROOT / "tests" / "export" / "verdicts.json"
CHAT = [{"role": "user", "content": "Hello there"}]
RANDOM_ROWS, RANDOM_TOKENS = 3, 40
# a good folder's own distance from transformers 5 in float32 may be doubled; the least is float32's own
FACTOR, LEAST = 2.0, 1e-3

_LOOK = ROOT / "tests" / "external" / "transformers_look.py"
_EXPORT = ROOT / "src" / "pronghorn" / "export"
_GGUF = "gguf-bf16"  # the good folders are stored so: nothing is rounded on the way to llama.cpp
# engine -> (interpreter, the program that answers, the module with its version)
ENGINES: Mapping[str, tuple[Path, Path, str]] = {
    "transformers 5": (Path(sys.executable), _LOOK, "transformers"),
    "transformers 4": (ROOT / ".venv-oldest" / "bin" / "python", _LOOK, "transformers"),
    "vllm": (ROOT / ".venv-vllm" / "bin" / "python", _EXPORT / "verify_in_vllm.py", "vllm"),
    "llama.cpp": (ROOT / ".venv-llama" / "bin" / "python", _EXPORT / "verify_in_llama.py", "llama_cpp"),
}

Answer = dict[str, Any]


def job(folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """The same questions to every folder: memorised answers, and rows that no model has seen."""
    rows = [p + a for p, a in zip(memorised.PROMPTS, memorised.answers(memorised.BASE), strict=True)]
    generator = torch.Generator().manual_seed(3)
    rows += torch.randint(4, 512, (RANDOM_ROWS, RANDOM_TOKENS), generator=generator).tolist()
    asked = {"rows": rows, "prompts": memorised.PROMPTS, "max_tokens": memorised.MAX_TOKENS, "chat": CHAT,
             "positions": 256}  # fmt: skip
    return [{"folder": str(folder), **asked} for folder in folders.values()]


def ask(engine: str, folders: Mapping[str, Path], scratch: Path) -> dict[str, Answer]:
    """Open every folder in one process of an engine; where it ends a process, go on with the next folder."""
    python, program, _ = ENGINES[engine]
    out = scratch / f"{engine.replace(' ', '-')}.jsonl"
    out.touch()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    waiting = dict(folders)
    while waiting:
        (scratch / "job.json").write_text(json.dumps(job(waiting)))
        command = [python, program, scratch / "job.json", out]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        begun = {line["folder"] for line in lines}
        if not begun & {str(path) for path in waiting.values()}:
            raise SystemExit(f"{engine} does not start:\n{done.stderr[-3000:]}")
        waiting = {name: path for name, path in waiting.items() if str(path) not in begun}
    found = {line["folder"]: line for line in lines if "begun" not in line}
    ended = {"error": "the process ended"}
    return {name: found.get(str(path), ended) for name, path in folders.items()}


def ask_llama(folders: Mapping[str, Path], scratch: Path) -> dict[str, Answer]:
    """The same for llama.cpp, which opens what our GGUF format makes of a folder."""
    made, refused = {}, {}
    for name, folder in folders.items():
        try:
            report = pronghorn.export(folder, scratch / "gguf" / folder.name, format=_GGUF)
        except pronghorn.PronghornError as error:
            refused[name] = {"error": f"not written: {error.message}"}
        else:
            made[name] = report.folder
    return {**ask("llama.cpp", made, scratch), **refused}


def distance(one: Answer, other: Answer) -> float:
    """Mean distance of log-probabilities; infinite where one is no number."""
    gaps = [abs(a - b) for x, y in zip(one["logprobs"], other["logprobs"], strict=True)
            for a, b in zip(x, y, strict=True)]  # fmt: skip
    return sum(gaps) / len(gaps) if all(map(math.isfinite, gaps)) else math.inf


def outcome(found: Answer, truth: Answer, noise: float) -> str:
    """A word of ``verify_engines.MEANING`` for what an engine did with one folder."""
    if found["error"]:
        return "refused"
    if distance(found, truth) > max(FACTOR * noise, LEAST):
        return "wrong logits"
    if found["tokens"] != truth["tokens"]:
        return "wrong end"
    if isinstance(found["chat"], str):
        return "no chat"
    return "right" if found["chat"] == truth["chat"] else "wrong chat"


def outcomes(engine: str, answers: Mapping[str, Answer], truths: Mapping[str, Answer]) -> dict[str, str]:
    """Case -> outcome; ``truths``: each family's good folder in transformers 5, float32."""
    good = {case.family: answers[case.name] for case in CASES if case.name == f"good {case.family}"}
    noise = {
        family: 0.0 if good[family]["error"] else distance(good[family], truths[family]) for family in truths
    }
    return {case.name: outcome(answers[case.name], truths[case.family], noise[case.family]) for case in CASES}


def version(engine: str) -> str:
    """The engine's version as it says itself."""
    python, _, module = ENGINES[engine]
    command = [python, "-c", f"import {module}; print({module}.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


def prove(engines: list[str], scratch: Path) -> dict[str, dict[str, Any]]:
    """Engine -> its version and outcomes, found now."""
    folders = write_folders(scratch / "folders", CASES, train=True)
    first = ask("transformers 5", folders, scratch)
    truths = {case.family: first[case.name] for case in CASES if case.name == f"good {case.family}"}
    found = {}
    for engine in engines:
        if engine == "llama.cpp":
            answers = ask_llama(folders, scratch)
        else:
            answers = first if engine == "transformers 5" else ask(engine, folders, scratch)
        found[engine] = {"version": version(engine), "outcomes": outcomes(engine, answers, truths)}
    return found


def table(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/verdicts.md: what each engine does with each folder."""
    engines = list(ENGINES)
    silent = sum(
        any(stored[engine]["outcomes"][case.name].startswith("wrong") for engine in engines) for case in CASES
    )
    heads = [f"{engine.split()[0]} {stored[engine]['version']}" for engine in engines]
    lines = [
        "# What engines make of good and broken folders",
        "",
        f"{len(CASES)} folders of tiny models, opened in each engine on a CPU. {silent} of them load without",
        "an error and answer wrongly in at least one engine. `make verdicts` opens them all again;",
        "`python -m tests.external.verdicts --write` writes this table, which a test holds against",
        "`pronghorn verify`.",
        "",
        f"| folder | family | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for case in CASES:
        words = [stored[engine]["outcomes"][case.name] for engine in engines]
        told = " | ".join(f"**{word}**" if word.startswith("wrong") else word for word in words)
        lines.append(f"| {case.name} | {case.family} | {told} |")
    lines += [
        "",
        "`right`: greedy answers, their ends, log-probabilities and the rendered chat are those of the",
        "good folder in transformers 5, float32. **wrong logits**, **wrong end**, **wrong chat**: loaded",
        "without an error. `no chat`: right, and chats are refused. `refused`: an error. In vLLM new memory",
        "is filled with NaN, so that a weight it never read is not taken from the folder before. llama.cpp",
        "opens what `pronghorn export --format gguf-bf16` makes of the folder; there `refused` also says",
        "that nothing is made. Its version is that of llama-cpp-python.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="only this engine")
    parser.add_argument("--write", action="store_true", help="store what was found")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pronghorn-verdicts-") as scratch:
        found = prove(options.engine or list(ENGINES), Path(scratch))
    stored = json.loads(STORE.read_text()) if STORE.exists() else {}
    changed = 0
    for engine, told in found.items():
        before = stored.get(engine, {}).get("outcomes", {})
        for name, now in told["outcomes"].items():
            if before.get(name) != now:
                changed += 1
                print(f"{engine} {told['version']}: {name}: {now}, stored {before.get(name)}")
        loads = [now for now in told["outcomes"].values() if now.startswith("wrong")]
        said = f"{len(told['outcomes'])} folders, {len(loads)} wrong without an error"
        print(f"{engine} {told['version']}: {said}")
    if options.write:
        STORE.write_text(json.dumps({**stored, **found}, indent=1) + "\n")
        TABLE.write_text(table({**stored, **found}))
        return 0
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
