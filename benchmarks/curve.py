"""The demo's run with and without acceleration: is it one loss curve?

    python benchmarks/curve.py [--steps N] [--no-results]

Same seed, rows, adapters and order; only ``training.accelerate`` differs. Both compute the same numbers in
another order of float32 operations, and training carries a rounding on from step to step. What rounding
alone does is measured: plain runs whose base weights were moved by one rounding of float32 (a factor of 1 +
2^-24 times a normal number). Fails where acceleration moves the curve by more than three times as much.
Writes benchmarks/results/curve.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from make_rows import all_rows, split, write_jsonl
from run import DEMO, run_config

from benchmarks.merge import hardware
from pronghorn.training.manifest import run_versions
from pronghorn.training.run import RunResult, train

RESULTS = Path(__file__).parent / "results" / "curve.md"
ROUNDED = 2  # plain runs on moved weights
BOUND = 3.0  # times what they show


def rounded_base(folder: Path, seed: int) -> Path:
    """The demo's base with each weight moved by one rounding of float32."""
    shutil.copytree(DEMO / "base", folder)
    generator = torch.Generator().manual_seed(seed)
    path = folder / "model.safetensors"
    moved = {}
    for name, weight in load_file(path).items():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        moved[name] = (weight.double() * (1 + 2.0**-24 * noise)).float()
    save_file(moved, path, metadata={"format": "pt"})
    return folder


def one_run(work: Path, name: str, base: Path, steps: int | None, *, accelerate: bool) -> RunResult:
    """A whole run of the demo's configuration."""
    config: dict[str, Any] = run_config()
    config["model"]["name"] = str(base)
    config["data"].update(train=str(work / "train.jsonl"), eval=str(work / "heldout.jsonl"), cache=False)
    config["training"]["accelerate"] = accelerate
    config["eval"]["at_start"] = False
    if steps is not None:
        config["training"]["max_steps"] = steps
    config["logging"] = {"progress": "none"}
    config["output"] = {"folder": str(work / name)}
    return train(config)


def difference(one: RunResult, two: RunResult) -> list[float]:
    """Of the losses, step by step, relative."""
    pairs = zip(one.losses, two.losses, strict=True)
    return [abs(mine - theirs) / theirs for mine, theirs in pairs]


def table(plain: RunResult, fast: RunResult, rounded: list[RunResult]) -> tuple[str, bool]:
    """The report, and whether acceleration stays within the bound."""
    ours = difference(fast, plain)
    noise = [max(values) for values in zip(*(difference(one, plain) for one in rounded), strict=True)]
    count = len(ours)
    edges = sorted({0, 1, *(count * part // 5 for part in range(1, 6))})
    lines = [
        "| steps | plain loss | accelerated loss | moved by acceleration | moved by one rounding |",
        "|---|---|---|---|---|",
    ]
    for start, stop in pairwise(edges):
        lines.append(
            f"| {start + 1}-{stop} | {plain.losses[stop - 1]:.6f} | {fast.losses[stop - 1]:.6f} "
            f"| {max(ours[start:stop]):.1e} | {max(noise[start:stop]):.1e} |"
        )
    assert plain.eval is not None and fast.eval is not None
    ratio = max(ours) / max(noise)
    lines += [
        "",
        f"Largest over all {count} steps: {max(ours):.1e} by acceleration, {max(noise):.1e} by one rounding "
        f"({ratio:.2f} times; the bound is {BOUND:g}).",
        f"Held-out loss after the run: {plain.eval['eval_loss']:.6f} plain, "
        f"{fast.eval['eval_loss']:.6f} accelerated.",
    ]
    return "\n".join(lines), ratio <= BOUND


def main() -> None:
    """Run, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="of each run; all of the demo's by default")
    parser.add_argument("--no-results", action="store_true", help="only print")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for rows, name in zip(split(all_rows()), ("train", "heldout"), strict=True):
            write_jsonl(work / f"{name}.jsonl", rows)
        plain = one_run(work, "plain", DEMO / "base", asked.steps, accelerate=False)
        fast = one_run(work, "fast", DEMO / "base", asked.steps, accelerate=True)
        rounded = [
            one_run(
                work,
                f"rounded-{seed}",
                rounded_base(work / f"base-{seed}", seed),
                asked.steps,
                accelerate=False,
            )
            for seed in range(ROUNDED)
        ]
        text, within = table(plain, fast, rounded)
    versions = ", ".join(f"{name} {version}" for name, version in run_versions().items())
    whole = f"""# One loss curve, with and without acceleration

The demo's run (`demo/run.py`), float32 on the CPU: same seed, rows and order, `training.accelerate` on and
off. Moved: the largest relative difference to the plain run's loss in these steps. Moved by one rounding: the
same for {ROUNDED} plain runs whose base weights were moved by one rounding of float32. Made by
`python benchmarks/curve.py`.

{text}

{versions}; {", ".join(hardware().values())}.
"""
    print(whole)
    if not asked.no_results:
        RESULTS.write_text(whole, encoding="utf-8")
    sys.exit(None if within else "acceleration moves the curve by more than rounding does")


if __name__ == "__main__":
    main()
