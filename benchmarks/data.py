"""Rows a second from a file of short chats to checked, tokenised, masked and packed rows on disk.

    python -m benchmarks.data [ROWS ...]

Words of the standard library, a byte-level BPE of 8000 tokens trained on them, ChatML, about 90 tokens a
row. Wall
time depends on what else the machine does, so the CPU time of all processes, the workers' start
included, is given
too; the floor is the tokenizer alone.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
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

RESULT = Path(__file__).parent / "results" / "data.json"
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


def measure(path: Path, count: int, tok: Any, workers: int, folder: Path, packing: bool) -> dict[str, Any]:
    """One run in a process of its own, so that its memory is its own."""
    job = [str(path), str(workers), str(folder / f"cache-{count}-{workers}-{packing}"), str(packing)]
    command = [sys.executable, "-m", "benchmarks.data", "--child", str(folder / "tokenizer"), *job]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    seen = json.loads(answer)
    cpu = seen["cpu_seconds"]
    return {
        "rows": count,
        "workers": workers,
        "packing": packing,
        "tokens_per_row": round(seen["tokens"] / count, 1),
        "seconds": round(seen["seconds"], 1),
        "rows_per_second": round(count / seen["seconds"]),
        "cpu_us_per_row": round(cpu / count * 1e6),
        "rows_per_second_on_two_free_cores": round(2 * count / cpu),
        "peak_mib": seen["peak_mib"],
        "peak_worker_mib": seen["peak_worker_mib"],
        "load_average": os.getloadavg()[0],
    }


def child(tokenizer_folder: str, path: str, workers: str, cache: str, packing: str) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    tok = AutoTokenizer.from_pretrained(tokenizer_folder)
    options = DataOptions(train=path, workers=int(workers), packing=packing == "True")
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    report = prepare(options, tok, LIMIT).report
    wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
    shutil.rmtree(cache)
    mine, theirs = (
        resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    seen = {"seconds": wall, "cpu_seconds": cpu, "tokens": report.tokens}
    print(json.dumps({**seen, "peak_mib": mine, "peak_worker_mib": theirs}))


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


def main() -> None:
    counts = [int(each) for each in sys.argv[1:]] or [100_000, 1_000_000]
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
                results.append(measure(path, count, tok, workers, folder, packing=True))
                print(results[-1], flush=True)
    facts = {
        "hardware": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "versions": {each: version(each) for each in ("tokenizers", "transformers", "datasets", "pyarrow")},
        "alone": alone,
        "runs": results,
    }
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        main()
