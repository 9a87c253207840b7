"""One optimizer step over the same rows, cut in every way: is it one loss and one gradient?

    python benchmarks/parity.py [--no-results]

Tiny random models in float32 with a LoRA adapter on all linear layers, on the CPU. Each way is a whole run:
pronghorn's, TRL's SFTTrainer and transformers' Trainer with the collators they come with. The truth is the
sum over trained tokens divided by their number, row by row in float64. Writes benchmarks/results/parity.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from peft import PeftModel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import parity_pairs
from benchmarks.one_step import (
    Found,
    Recorder,
    arguments_for_a_step,
    evaluated_and_stepped,
    gradient_of,
    line,
)
from pronghorn.training.config import parse_config
from pronghorn.training.manifest import run_versions
from pronghorn.training.material import gather
from pronghorn.training.metrics import read_metrics
from pronghorn.training.progress import Narrator
from pronghorn.training.run import train
from tests import tiny
from tests.training.conftest import write_rows

RESULTS = Path(__file__).parent / "results" / "parity.md"
FAMILIES = ("llama", "gemma3", "qwen3_moe")
PAIRS = "Preference rows, llama"
PAIRS_TEXT = """Rows of `rows_for_trl` through TRL's DPOTrainer, the reference being the model without
its adapter. The truth is what each loss says of all pairs of the step at once. `sigmoid` and `ipo` are means
over pairs; `sft`, here added to `sigmoid`, is a mean over the tokens of chosen answers. What it shows: TRL
averages means of forward passes. That is the mean over pairs as long as all passes have equally many, and
for evaluation always, for it weighs them. In a last step of 2 + 1 the pair alone counts twice. `sft` is
another loss with every cut."""
LIMIT = 48  # tokens of a row, and of a bin
# name, passes in a step, rows or bins in a pass, rows, packed
CUTS = (
    ("8x1", 8, 1, 8, False),
    ("4x2", 4, 2, 8, False),
    ("1x8", 1, 8, 8, False),
    ("packed, a bin a pass", 8, 1, 8, True),
    ("packed, two bins a pass", 4, 2, 8, True),
    ("partial step 3x1 of 8x1", 8, 1, 3, False),
    ("partial step 2+1 of 4x2", 4, 2, 3, False),
)


def configuration(adapter: Path, rows: Path, folder: Path, cut: tuple[Any, ...]) -> dict[str, Any]:
    _, passes, batch, _, packed = cut
    return {
        "model": {"name": str(adapter), "max_seq_length": LIMIT},
        "data": {"train": str(rows), "eval": str(rows), "packing": packed, "cache": False},
        "training": {
            "batch_size": batch,
            "gradient_accumulation": passes,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "recompute": False,
        },
        "eval": {"at_start": True},
        "logging": {"progress": "none"},
        "output": {"folder": str(folder)},
    }


def loaded(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter, is_trainable=True).to(dtype)


def row_by_row(base: Path, adapter: Path, rows: Any, dtype: torch.dtype) -> Found:
    model = loaded(base, adapter, dtype)
    if hasattr(model.base_model.model, "set_experts_implementation"):
        model.base_model.model.set_experts_implementation("eager")  # grouped products know no float64
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    total = 0.0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        (loss / count).backward()
        total += loss.item()
    return Found(total / count, gradient_of(model), total / count)


def ours(base: Path, adapter: Path, path: Path, rows: Any, cut: tuple[Any, ...], folder: Path) -> Found:
    recorder = Recorder()
    result = train(configuration(adapter, path, folder, cut), callbacks=[recorder])
    logged = read_metrics(result.folder / "metrics.jsonl")
    before = next(row["eval_loss"] for row in logged if row["step"] == 0)
    return Found(result.losses[0], recorder.gradient, before)


def library(kind: Any) -> Callable[..., Found]:
    def run(base: Path, adapter: Path, path: Path, rows: Any, cut: tuple[Any, ...], folder: Path) -> Found:
        _, passes, batch, _, packed = cut
        recorder = Recorder()
        options = arguments_for_a_step(folder, passes, batch)
        shared = {"train_dataset": rows, "eval_dataset": rows, "callbacks": [recorder]}
        model, tokenizer = loaded(base, adapter, torch.float32), tiny.tokenizer()
        if kind is trl.SFTTrainer:
            arguments = trl.SFTConfig(
                **options,
                max_length=LIMIT,
                packing=packed,
                eval_packing=False,
                gradient_checkpointing=False,
            )
            trainer = kind(model=model, args=arguments, processing_class=tokenizer, **shared)
        else:
            collator = transformers.DataCollatorForSeq2Seq(tokenizer, padding=True)
            trainer = kind(
                model=model, args=transformers.TrainingArguments(**options), data_collator=collator, **shared
            )
        return evaluated_and_stepped(trainer, recorder)

    return run


WAYS: tuple[tuple[str, Callable[..., Found]], ...] = (
    ("pronghorn", ours),
    ("TRL SFTTrainer", library(trl.SFTTrainer)),
    ("transformers Trainer", library(transformers.Trainer)),
)


def lines(family: str, folder: Path) -> Iterator[str]:
    base = tiny.write_base(folder / "base", family, dtype=torch.float32)
    adapter = tiny.write_adapter(folder / "adapter", base)
    truths: dict[int, Found] = {}
    for count in sorted({cut[3] for cut in CUTS}):
        path = write_rows(folder / f"{count}.jsonl", count)
        config = parse_config(configuration(adapter, path, folder / "unused", CUTS[0]))
        rows = datasets.Dataset.from_list(gather(config, Narrator(quiet=True)).rows.to_list())
        truths[count] = row_by_row(base, adapter, rows, torch.float64)
        single = row_by_row(base, adapter, rows, torch.float32)
        yield line(f"{family}, {count} rows", "rows one by one, float32", single, truths[count])
        for number, cut in enumerate(cut for cut in CUTS if cut[3] == count):
            for name, way in WAYS:
                if cut[4] and name == "transformers Trainer":
                    continue  # has no packing
                target = folder / f"{name.split()[0]}-{count}-{number}"
                yield line(cut[0], name, way(base, adapter, path, rows, cut, target), truths[count])


def report(body: dict[str, list[str]]) -> str:
    versions = run_versions()
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "trl"))
    head = "| cut | way | loss off by | gradient off by | evaluation off by |\n|---|---|---|---|---|\n"
    texts = {PAIRS: f"{PAIRS_TEXT}\n\n"}
    tables = "\n".join(
        f"## {name}\n\n{texts.get(name, '')}{head}" + "\n".join(rows) + "\n" for name, rows in body.items()
    )
    return f"""# One loss, however the batch is cut

One optimizer step over the same rows of uneven length, prompts not trained, as whole runs. Off by: relative
to the truth, the sum over the trained tokens of all rows of the step divided by their number, row by
row in float64; for gradients the norm of the difference over the norm. `4x2` is 4 forward passes of 2 rows.
The evaluation is of the same rows before the step, padded, in batches of that size. Tiny random models in
float32 on the CPU, LoRA on all linear layers, sdpa attention. The first line of each count is plain PyTorch
in float32: what rounding alone does.

What it shows: in training, these versions of all three agree, for every cut. TRL's loss for a mixture of
experts is another one by design: it adds a balancing term, a mean per forward pass. In evaluation TRL and
transformers average the means of batches, so the figure moves with the batch size; pronghorn's does not.

{tables}
{platform.machine()}, {os.cpu_count()} cores. {named}.

Made by `python benchmarks/parity.py`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = os.environ["CI"] = "1"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    body: dict[str, list[str]] = {}
    for name in (*FAMILIES, PAIRS):
        with tempfile.TemporaryDirectory() as folder:
            body[name] = []
            made = parity_pairs.lines(Path(folder)) if name == PAIRS else lines(name, Path(folder))
            for text in made:
                print(f"{name}: {text}", flush=True)
                body[name].append(text)
    if not options.no_results:
        RESULTS.write_text(report(body), encoding="utf-8")
        print(json.dumps(run_versions()))


if __name__ == "__main__":
    main()
