"""The demo: fine-tune a tiny model on real rows, on a CPU, with the commands a person would type.

Rows, loss before, training (killed once and resumed), merge, verify, loss after, chat. It fails when the
held-out loss gets less than a quarter better, or when any command fails.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import measure
import yaml
from make_rows import all_rows, split, write_jsonl
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
WORK = ROOT / ".demo"
TRAIN, HELD_OUT = WORK / "train.jsonl", WORK / "heldout.jsonl"
CONFIG, RUN, MERGED = WORK / "run.yaml", WORK / "run", WORK / "merged"
PRONGHORN = Path(sys.executable).with_name("pronghorn")

REQUIRED_GAIN = 0.25  # of the held-out loss
SHOWN = 3  # questions whose answers are shown
CHECKPOINT_STEPS = 30
KILL_AFTER = CHECKPOINT_STEPS + 8  # steps: past a checkpoint, so that some work is lost and done again
# No network; one thread: matrices this small gain little from a second, and lose much on a busy machine.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

Rows = list[list[dict[str, str]]]
console = Console(width=110, highlight=False)


def say(text: str) -> None:
    """Print a line of the story."""
    console.print(escape(text))


def heading(text: str) -> None:
    """Print what the next step shows."""
    console.print(f"\n[bold cyan]{escape(text)}[/]")


def shown(path: Path) -> str:
    """A path as a person at the root of the repository would type it."""
    return str(path.relative_to(ROOT))


def command(*arguments: str) -> list[str]:
    """Print a pronghorn command as it would be typed, and give it back ready to start."""
    console.print(f"[bold]$ pronghorn {escape(shlex.join(arguments))}[/]")
    return [str(PRONGHORN), *arguments]


def call(*arguments: str) -> None:
    """Run a pronghorn command in the root of the repository; its failure is the demo's."""
    done = subprocess.run(command(*arguments), cwd=ROOT, env=os.environ | ENVIRONMENT, check=False)
    if done.returncode:
        sys.exit(f"pronghorn {arguments[0]} failed with exit code {done.returncode}")


def make_rows() -> tuple[Rows, Rows]:
    """Write the rows, show two, and give back (train, held-out)."""
    heading("1. Rows: what does a function of the standard library do? Its docstring says so")
    train, held_out = split(all_rows())
    write_jsonl(TRAIN, train)
    write_jsonl(HELD_OUT, held_out)
    for row in (train[0], held_out[0]):
        say(f"  {row.question}\n    -> {row.sentence}")
    say(f"{len(train)} rows to train on, {len(held_out)} held out: other modules, and no sentence in both")
    return measure.read_rows(TRAIN), measure.read_rows(HELD_OUT)


def measure_before(train: Rows, held_out: Rows) -> tuple[float, list[str]]:
    """The base's loss and answers on held-out rows."""
    heading("2. The base before training: it has read Python, and answers everything with code")
    model, tokenizer = measure.load(DEMO / "base")
    size = sum(parameter.numel() for parameter in model.parameters())
    before = measure.loss(model, tokenizer, held_out)
    counting = measure.unigram_loss(tokenizer, train, held_out)
    say(
        f"{shown(DEMO / 'base')}: {size / 1e6:.1f} million weights, made from other text by demo/make_base.py"
    )
    say(f"held-out loss of counting how often each token occurs: {counting:.3f} nats per token")
    say(f"held-out loss of the base:                             {before:.3f}")
    if before >= counting:
        sys.exit("the base is no better than counting, so a gain would prove nothing; run demo/make_base.py")
    return before, [measure.answer(model, tokenizer, row) for row in held_out[:SHOWN]]


def run_config() -> dict[str, Any]:
    """The run.yaml of the demo."""
    config: dict[str, Any] = {
        "model": {"name": shown(DEMO / "base"), "max_seq_length": 128, "dtype": "float32"},
        "data": {"train": shown(TRAIN), "eval": shown(HELD_OUT)},
        "lora": {"r": 32, "alpha": 32},
        "training": {"epochs": 1, "batch_size": 16, "gradient_accumulation": 1, "learning_rate": 5e-3},
        "eval": {"at_start": True, "batch_size": 50},
        "checkpoints": {"every_steps": CHECKPOINT_STEPS},
        "logging": {"every_steps": 20},
        "output": {"folder": shown(RUN)},
    }
    config["training"]["recompute"] = False  # the activations of so small a model fit anywhere
    return config


def write_config() -> None:
    """Write run.yaml and show it."""
    heading("3. The run: LoRA on every linear layer, the base stays as it is")
    CONFIG.write_text(yaml.safe_dump(run_config(), sort_keys=False), encoding="utf-8")
    say(f"{shown(CONFIG)}:")
    console.print(escape(CONFIG.read_text(encoding="utf-8").rstrip()), style="dim")


def metrics() -> list[dict[str, Any]]:
    """What the run has logged so far."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def train_and_kill() -> None:
    """Start the run and kill it, as a power cut would, a few steps after a checkpoint."""
    heading("4. Train, and kill it on purpose: SIGKILL, no time to save anything")
    process = subprocess.Popen(command("train", shown(CONFIG)), cwd=ROOT, env=os.environ | ENVIRONMENT)
    while process.poll() is None:
        step = max((row["step"] for row in metrics()), default=0)
        if step >= KILL_AFTER and any((RUN / "checkpoints").glob("step-*")):
            process.send_signal(signal.SIGKILL)
            process.wait()
            say(f"killed at step {step}; sealed on the disk: {', '.join(sealed())}")
            return
        time.sleep(0.1)
    sys.exit(f"pronghorn train ended with exit code {process.returncode} before it could be killed")


def sealed() -> list[str]:
    """Names of the checkpoints on the disk."""
    return sorted(path.name for path in (RUN / "checkpoints").glob("step-*"))


def resume() -> None:
    """Run the same command again, and show how the loss fell over both parts."""
    heading("5. The same command again goes on from the checkpoint")
    call("train", shown(CONFIG))
    rows = metrics()
    losses = [row["loss"] for row in rows if "loss" in row]
    steps = [row["step"] for row in rows if "loss" in row]
    if steps != list(range(1, len(steps) + 1)):
        sys.exit(f"{shown(RUN / 'metrics.jsonl')} has a doubled or missing step")
    say(f"training loss, steps 1 to {steps[-1]}: {losses[0]:.2f} {sparkline(losses)} {losses[-1]:.2f}")


def sparkline(values: list[float], width: int = 60) -> str:
    """The values as a row of bars, each the mean of its share of them."""
    width = min(width, len(values))
    cuts = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def export_and_verify() -> None:
    """Merge, and prove the merged folder equal to base and adapter."""
    heading("6. Merge the adapter into the base, file to file; the export verifies itself in a fresh process")
    call("export", shown(RUN / "adapter"), shown(MERGED))
    heading("7. The same proof on request")
    call("verify", shown(MERGED), "--deep", "--against", shown(RUN / "adapter"))


def measure_after(held_out: Rows, before: float, earlier: list[str]) -> float:
    """Measure the merged folder with plain transformers, show old and new answers; the gain as a share."""
    heading("8. The merged folder in plain transformers: held-out loss and answers")
    model, tokenizer = measure.load(MERGED)
    after = measure.loss(model, tokenizer, held_out)
    table = Table(show_lines=True)
    for title in ("held-out question", "base", "after LoRA", "the docstring"):
        table.add_column(title, overflow="fold", ratio=1)
    for row, old in zip(held_out[:SHOWN], earlier, strict=True):
        cells = (row[0]["content"], old, measure.answer(model, tokenizer, row), row[1]["content"])
        table.add_row(*(escape(cell) for cell in cells))
    console.print(table)
    say("So few weights learn how a docstring is put, English instead of code; facts take a larger base.")
    gain = 1 - after / before
    trained = [row["eval_loss"] for row in metrics() if "eval_loss" in row]
    say(f"held-out loss as pronghorn train measured it: {trained[0]:.3f} -> {trained[-1]:.3f}")
    say(f"held-out loss in plain transformers:          {before:.3f} -> {after:.3f}  ({gain:.0%} better)")
    return gain


def chat(question: str) -> None:
    """Ask the merged folder one question through the command line."""
    heading("9. Ask it")
    call("chat", shown(MERGED), "--prompt", question)


def print_own_commands() -> None:
    """Print how the same is done on a person's own model and rows."""
    heading("The same on your own model and rows")
    say(f"  cp {shown(CONFIG)} run.yaml   # then edit model.name, data.train, data.eval, output.folder")
    say("  pronghorn train run.yaml                 # again after a stop: it resumes")
    say("  pronghorn export RUN/adapter MODEL       # merged, and verified in a fresh process")
    say("  pronghorn verify MODEL --deep --against RUN/adapter")
    say("  pronghorn chat MODEL")


def main() -> None:
    """Tell the whole story, in a fresh work folder."""
    started = time.monotonic()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Else a pipe would get our lines after those of the commands.
        sys.stdout.reconfigure(line_buffering=True)
    disable_progress_bar()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir()
    train, held_out = make_rows()
    before, earlier = measure_before(train, held_out)
    write_config()
    train_and_kill()
    resume()
    export_and_verify()
    gain = measure_after(held_out, before, earlier)
    chat(held_out[0][0]["content"])
    if gain < REQUIRED_GAIN:
        sys.exit(f"the held-out loss got {gain:.1%} better; the demo promises {REQUIRED_GAIN:.0%}")
    print_own_commands()
    say(f"\nAll of this took {time.monotonic() - started:.0f} s and lies in {shown(WORK)}.")


if __name__ == "__main__":
    main()
