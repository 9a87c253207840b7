"""Rows a second from a file of short chats to checked, tokenised, masked rows on disk.

    python benchmarks/data.py [ROWS]

Words of the standard library, a byte-level BPE of 8000 tokens trained on them, ChatML. Wall time depends on
what else the machine does, the CPU time of this process (without the renderer's) much less.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pronghorn.data.options import DataOptions
from pronghorn.data.prepare import prepare
from pronghorn.data.templates import library_template

VOCABULARY = 8000
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


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    corpus = texts()
    tok = tokenizer(corpus)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, corpus, count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, isolate, cache in (
            ("renderer apart", True, False),
            ("one process", False, False),
            ("cached", True, True),
        ):
            wall, cpu = time.perf_counter(), time.process_time()
            report = prepare(DataOptions(train=str(path), isolate=isolate, cache=cache), tok, 2048).report
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
            print(
                f"{name}: {count / wall:,.0f} rows/s of {report.tokens / count:.0f} tokens, "
                f"{cpu / count * 1e6:.0f} us CPU a row, memory +{grown} MiB"
            )


if __name__ == "__main__":
    main()
