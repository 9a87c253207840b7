"""Rows a second from a file of short chats to checked, tokenised, masked and packed rows on disk.

    python -m benchmarks.data [--no-results] [ROWS ...]

Words of the standard library, a byte-level BPE of 8000 tokens trained on them, ChatML, about 90 tokens a
row. Wall time depends on what else the machine does, so the CPU time of all processes, the workers' start
included, is given too; the floor is the tokenizer alone. Memory is looked at from outside, ten times a
second: what a process has for itself (RssAnon) apart from the pages of mapped files, which the system takes
back when it needs them. Writes benchmarks/results/data.json and data.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import prepare
from pronghorn.data.templates import library_template

RESULTS = Path(__file__).parent / "results"
LOOK_SECONDS = 0.1
VOCABULARY = 8000
LIMIT = 2048
WORDS = 34  # of question and answer together; about 90 tokens with the template's own


def texts() -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))]


def tokenizer(corpus: list[str]) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")
    fast.chat_template = library_template("chatml")
    return fast


def write_rows(path: Path, corpus: list[str], count: int) -> None:
    words = " ".join(corpus).split()
    chosen = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            text = chosen.choices(words, k=WORDS)
            question, answer = " ".join(text[: WORDS // 3]), " ".join(text[WORDS // 3 :])
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")


class Memory(threading.Thread):
    """The highest memory of a process, and of it and all that it started together, in MiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.over = threading.Event()
        self.highest = {"anonymous_mib": 0, "anonymous_mib_of_all": 0, "resident_mib": 0}

    def run(self) -> None:
        """Until ``over`` is set."""
        while not self.over.wait(LOOK_SECONDS):
            seen = [_status(pid) for pid in _family(self.pid)]
            (own, resident), total = seen[0], sum(anonymous for anonymous, _ in seen)
            for name, value in zip(self.highest, (own, total, resident), strict=True):
                self.highest[name] = max(self.highest[name], value >> 10)


def _family(pid: int) -> list[int]:
    """A process and all that it and its own have started."""
    try:
        lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it ended
        lists = []
    return [pid, *(each for listed in lists for child in listed for each in _family(int(child)))]


def _status(pid: int) -> tuple[int, int]:
    """Anonymous and all resident memory in KiB."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    sizes = dict(re.findall(r"^(RssAnon|VmRSS):\s*(\d+) kB", text, re.MULTILINE))
    return int(sizes.get("RssAnon", 0)), int(sizes.get("VmRSS", 0))


def measure(path: Path, count: int, workers: int, folder: Path) -> dict[str, Any]:
    """One run in a process of its own, so that its memory is its own."""
    job = [str(folder / "tokenizer"), str(path), str(workers), str(folder / f"cache-{count}-{workers}")]
    load = os.getloadavg()[0]
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.data", "--child", *job], stdout=subprocess.PIPE
    )
    memory = Memory(child.pid)
    memory.start()
    answer = child.communicate()[0].splitlines()[-1]
    memory.over.set()
    seen = json.loads(answer)
    cpu = seen["cpu_seconds"]
    return {
        "rows": count,
        "workers": workers,
        "tokens_per_row": round(seen["tokens"] / count, 1),
        "seconds": round(seen["seconds"], 1),
        "rows_per_second": round(count / seen["seconds"]),
        "cpu_us_per_row": round(cpu / count * 1e6),
        "rows_per_second_on_two_free_cores": round(2 * count / cpu),
        **memory.highest,
        "load_average_before": round(load, 1),
    }


def child(tokenizer_folder: str, path: str, workers: str, cache: str) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    tok = AutoTokenizer.from_pretrained(tokenizer_folder)
    options = DataOptions(train=path, workers=int(workers), packing=True)
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    report = prepare(options, tok, LIMIT).report
    wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
    shutil.rmtree(cache)
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "tokens": report.tokens}))


def floor(path: Path, tok: Any) -> dict[str, float]:
    """CPU microseconds a row of the tokenizer alone, on one thread, and of reading the JSON."""
    lines = path.read_bytes().splitlines()[:20_000]
    start = time.process_time()
    rows = [json.loads(line) for line in lines]
    read = time.process_time() - start
    texts = tok.apply_chat_template([row["messages"] for row in rows], tokenize=False)
    start = time.process_time()
    tok.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    encoded = time.process_time() - start
    times = {"json_us_per_row": read, "tokenizer_us_per_row": encoded}
    return {name: round(seconds / len(lines) * 1e6, 1) for name, seconds in times.items()}


def markdown(facts: dict[str, Any]) -> str:
    """The page for the figures."""
    lines = [
        f"| {run['rows']:,} | {run['workers']} | {run['rows_per_second']:,} | {run['cpu_us_per_row']} us "
        f"| {run['rows_per_second_on_two_free_cores']:,} | {run['anonymous_mib']} MiB "
        f"| {run['anonymous_mib_of_all']} MiB |"
        for run in facts["runs"]
    ]
    load = max(run["load_average_before"] for run in facts["runs"])
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    alone = facts["alone"]
    return f"""# Rows a second, from a file of short chats to checked, masked and packed rows

`python -m benchmarks.data`. ChatML, a byte-level BPE of {VOCABULARY:,} tokens,
{facts["runs"][0]["tokens_per_row"]:.0f} tokens a row. CPU time counts all processes, with the start of the
workers. Load average before a run at most {load}; far above 1, rows a second say little.

| rows | workers | rows/s | CPU a row | rows/s of two free cores | anonymous memory | of all processes |
|---:|---:|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

The tokenizer alone takes {alone["tokenizer_us_per_row"]} us a row, the JSON {alone["json_us_per_row"]}.
Memory is the highest of the main process, and of all processes at one time, the template's own among them.
{growth(facts["runs"])}
Pages of mapped files are not in it: the main process maps the result while it packs it, and the system takes
them back when it needs them.

{facts["hardware"]}. {versions}.
"""


def growth(runs: list[dict[str, Any]]) -> str:
    """How much more anonymous memory more rows take, with equal workers."""
    few, many = runs[-2:] if len(runs) > 1 else (runs[0], runs[0])
    if few["workers"] != many["workers"] or few["rows"] >= many["rows"]:
        return ""
    more, rows = many["anonymous_mib"] - few["anonymous_mib"], many["rows"] - few["rows"]
    return f"It grows by {(more << 20) / rows:.0f} bytes a row: its hash, number, length, and place in a bin."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="*", help="by default 100,000 and 1,000,000")
    parser.add_argument("--no-results", action="store_true", help="print only")
    chosen = parser.parse_args()
    counts = chosen.rows or [100_000, 1_000_000]
    corpus = texts()
    tok = tokenizer(corpus)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tok.save_pretrained(folder / "tokenizer")
        results = []
        for count in counts:
            path = folder / f"rows-{count}.jsonl"
            write_rows(path, corpus, count)
            alone = floor(path, tok)
            for workers in (0, 2) if count == counts[0] else (2,):
                results.append(measure(path, count, workers, folder))
                print(results[-1], flush=True)
    facts = {
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "versions": {each: version(each) for each in ("tokenizers", "transformers", "datasets", "pyarrow")},
        "alone": alone,
        "runs": results,
    }
    if chosen.no_results:
        print(markdown(facts))
    else:
        (RESULTS / "data.json").write_text(json.dumps(facts, indent=1) + "\n")
        (RESULTS / "data.md").write_text(markdown(facts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        main()
