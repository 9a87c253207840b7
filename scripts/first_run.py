"""Write docs/first-run.md: the README's steps on a folder of one's own, with what they really printed.

``python scripts/first_run.py FOLDER OUT.md`` puts a model (the demo's base) and rows (HTTP status codes and
error numbers of this system, as questions and answers) into FOLDER, then runs each command there in a shell.
"""

from __future__ import annotations

import errno
import http
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every line of the bash blocks."""
    return [line for block in blocks(text, "bash") for line in block.splitlines() if line]


def own_rows() -> Iterator[tuple[str, str]]:
    """Questions and answers a person might have in a table."""
    for status in http.HTTPStatus:
        if status.description:
            yield f"What does HTTP status {status.value} mean?", f"{status.phrase}: {status.description}."
    for number, name in sorted(errno.errorcode.items()):
        yield f"What does {name} mean?", f"{os.strerror(number)}."


def prepare(folder: Path) -> None:
    """A model, rows and run.yaml, as a person would have them."""
    shutil.copytree(ROOT / "demo" / "base", folder / "my-model")
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in own_rows()
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (settings,) = blocks(README.read_text(encoding="utf-8"), "yaml")
    (folder / "run.yaml").write_text(settings)


def session() -> list[str]:
    """What is typed: a look at the files, one interrupted training, then the README's commands."""
    typed = [line for line in commands(README.read_text(encoding="utf-8")) if line.startswith("pronghorn ")]
    train = f"{typed[0]} training.epochs=12 training.learning_rate=5e-3"  # a tiny model wants more
    asked = typed[-1].split(" --prompt ")[0] + ' --prompt "What does HTTP status 404 mean?"'
    return [
        "ls",
        "head -n 2 rows.jsonl",
        "cat run.yaml",
        train,
        train,
        *typed[1:-1],
        asked,
        "ls merged/first",
    ]


def run(command: str, folder: Path, *, interrupt: bool = False) -> str:
    """One command's output and exit code; ``interrupt`` presses Ctrl+C once ten steps are done."""
    path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "110", "PATH": path}
    environment["HF_HOME"] = str(folder / ".cache")  # nothing tokenised before
    with tempfile.TemporaryFile("w+", newline="") as output:
        # exec: the signal must reach the command, not a shell around it
        process = subprocess.Popen(
            f"exec {command}", shell=True, cwd=folder, env=environment, stdout=output, stderr=output
        )
        metrics = folder / "runs" / "first" / "metrics.jsonl"
        while interrupt and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 10):
            time.sleep(0.05)
        if interrupt:
            process.send_signal(signal.SIGINT)
        code = process.wait()
        output.seek(0)
        text = re.sub(r".*\r.*\n?", "", output.read())  # without progress bars
    own = f"{folder}/"
    # in a table the cell keeps its width
    text = re.sub(rf"{re.escape(own)}([^│\n]*)│", lambda cell: f"{cell[1]}{' ' * len(own)}│", text)
    text = text.replace(own, "")
    note = "  # Ctrl+C after ten steps" if interrupt else ""
    return f"$ {command}{note}\n{text}" + (f"[exit code {code}]\n" if code else "")


def transcript(folder: Path) -> str:
    """Run the session in ``folder``; each command with what it printed, machine paths shortened."""
    typed = session()
    first_training = next(i for i, command in enumerate(typed) if command.startswith("pronghorn train"))
    return "\n".join(run(each, folder, interrupt=i == first_training) for i, each in enumerate(typed))


def main(folder: str, out: str) -> None:
    """Prepare, run, write."""
    own = Path(folder).resolve()
    own.mkdir(parents=True)
    prepare(own)
    text = transcript(own)
    Path(out).write_text(
        "# A first run\n\n"
        "The README's steps in a folder with a model and rows of one's own, written by\n"
        "`python scripts/first_run.py FOLDER docs/first-run.md`. The model here is the demo's tiny base, so\n"
        "the learning rate is high and the answers are modest; every step is the same with a large one. The\n"
        "first training is interrupted on purpose.\n\n"
        f"```text\n{text.rstrip()}\n```\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
