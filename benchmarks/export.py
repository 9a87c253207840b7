"""What each format of an export costs: time beside copying, and memory beside what is stated, with peers.

    python -m benchmarks.export [--gigabytes 1.2] [--rounds 2] [--folder DIR] [--no-results]
        [--llama-python PYTHON] [--compressor-python PYTHON] [--converter convert_hf_to_gguf.py]

Makes the random base and the adapter of benchmarks/merge.py, and measures as it does: every way in a fresh
process, alternating, from reading its inputs to files on the disk (fsync), imports not counted. Memory is the
peak of anonymous memory of the process and those it starts, above what its imports hold.

Peers, in the same run: PEFT (load, merge, save); llm-compressor's round-to-nearest, with an interpreter that
has it; llama.cpp's converter, which the sdist of llama-cpp-python carries (``pip download --no-binary :all:
--no-deps llama-cpp-python``, then vendor/llama.cpp/convert_hf_to_gguf.py). The last two start from a model on
the disk. Exits with 1 where a format needs more memory than it states. Writes benchmarks/results/export.md
and export.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.merge import COMMON, COPY, PEFT, RANK, RESULTS, hardware, listed, make, run, versions

TOKENIZER = Path(__file__).parents[1] / "demo" / "base"
# what docs/serving.md states, in MiB; llama.cpp's quantiser has 32,000 x 2,048 numbers in float32, 250 MiB
STATED = {"lora": 64, "adapter": 64,
          **dict.fromkeys(("merged_16bit", "merged_4bit", "w4a16", "w8a8", "fp8", "nvfp4"), 128),
          "gguf-bf16": 256, "gguf-f16": 256, "gguf-q8_0": 256, "gguf-q4_k_m": 512}  # fmt: skip
COPIED = "copy + sync"

OURS = """
from pronghorn.export.run import export
from pronghorn.export.onto import MergeFormat
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
import torch; torch.ones(64, 64) @ torch.ones(64, 64)
name, llama = sys.argv[4:6]
if name.startswith("gguf"):
    import gguf
begun = begin()
wanted = MergeFormat(name, llama_python=Path(llama) if llama else None)
export(adapter, target, format=wanted, base=None if adapter == base else base, verify=False)
done(*begun)
"""
COMPRESSOR = """
import torch
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
torch.ones(64, 64) @ torch.ones(64, 64)
begun = begin()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme=sys.argv[4], ignore=["lm_head"]))
model.save_pretrained(target, save_compressed=True); sync(target)
done(*begun)
"""
# the converter knows byte-level tokenizers by a hash, and this one it cannot know: it is told what it is
CONVERTER = """
import runpy, torch, transformers
kind, script = sys.argv[4:6]
sys.path[:0] = [str(Path(script).parent), str(Path(script).parent / "gguf-py")]
import gguf
from conversion.base import TextModel
def absent(*_): raise FileNotFoundError
TextModel._set_vocab_sentencepiece = TextModel._set_vocab_llama_hf = absent
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
torch.ones(64, 64) @ torch.ones(64, 64)
target.mkdir()
sys.argv = [script, str(base), "--outtype", kind, "--outfile", str(target / "model.gguf")]
begun = begin()
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
sync(target)
done(*begun)
"""
CHECK = "import sys; from importlib.metadata import version as v; print({n: v(n) for n in sys.argv[1:]})"


@dataclass(frozen=True)
class Way:
    """One line of the table; ``stated`` is the bound of its memory in MiB, for our own."""

    name: str
    run: Callable[[Path, Path, Path], dict[str, float]]
    stated: int | None = None


def ours(format_: str, llama: str = "", *, whole: bool = False) -> Way:
    def measure(base: Path, adapter: Path, target: Path) -> dict[str, float]:
        return run(COMMON + OURS, base, base if whole else adapter, target, format_, llama)

    name = f"pronghorn {format_}{', of a whole model' if whole else ''}"
    return Way(name, measure, STATED[format_])


def peer(name: str, code: str, *more: str, python: str = sys.executable) -> Way:
    return Way(name, lambda *places: run(COMMON + code, *places, *more, python=python))


def ways(options: argparse.Namespace) -> list[Way]:
    """What can be measured here, our formats beside their peers."""
    found = [peer(COPIED, COPY), ours("lora"), ours("adapter"), ours("merged_16bit")]
    found.append(peer("PEFT load + merge + save", PEFT))
    found.append(ours("merged_4bit"))
    schemes = {"w4a16": "W4A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4A16"}
    for name, scheme in schemes.items():
        found.append(ours(name))
        if python := options.compressor_python:
            found.append(
                peer(f"llm-compressor {scheme}, round to nearest", COMPRESSOR, scheme, python=python)
            )
    for kind in ("bf16", "f16", "q8_0"):
        found.append(ours(f"gguf-{kind}"))
    for kind in ("bf16", "q8_0"):
        found.append(ours(f"gguf-{kind}", whole=True))
        if script := options.converter:
            found.append(peer(f"llama.cpp's converter, {kind}", CONVERTER, kind, str(script)))
    if options.llama_python or find_spec("llama_cpp"):
        found.append(ours("gguf-q4_k_m", str(options.llama_python or "")))
    return found


def measure(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    base, adapter, target = place / "base", place / "adapter", place / "target"
    size, layers = make(base, adapter, options.gigabytes)
    for file in TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, base)
    measured: dict[str, list[dict[str, float]]] = {}
    todo = [way for way in ways(options) if way.name == COPIED or options.only in way.name]
    for number in range(options.rounds):  # the base was written just now: it is in the page cache
        for way in todo:
            os.sync()
            result = way.run(base, adapter, target)
            result["size"] = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
            shutil.rmtree(target)
            print(f"round {number + 1} {way.name}: {result['seconds']:.2f} s, "
                  f"{result['anonymous_bytes'] / 2**20:.0f} MiB", flush=True)  # fmt: skip
            measured.setdefault(way.name, []).append(result)
    copied = statistics.median(one["seconds"] for one in measured[COPIED])
    rows = {way.name: _row(measured[way.name], copied, way.stated) for way in todo}
    known = {**versions(), **_other_versions(options)}
    return {"base_bytes": size, "layers": layers, "rank": RANK, "rounds": options.rounds, "rows": rows,
            "hardware": hardware(), "versions": known}  # fmt: skip


def _row(found: list[dict[str, float]], copied: float, stated: int | None) -> dict[str, Any]:
    seconds = statistics.median(one["seconds"] for one in found)
    extra = max(one["anonymous_bytes"] for one in found) / 2**20
    return {
        "seconds": seconds,
        "ratio_to_copy": seconds / copied,
        "cpu_seconds": statistics.median(one["cpu_seconds"] for one in found),
        "extra_anonymous_mib": extra,
        "stated_mib": stated,
        "within": stated is None or extra <= stated,
        "size_bytes": found[0]["size"],
        "all_seconds": [one["seconds"] for one in found],
    }


def _other_versions(options: argparse.Namespace) -> dict[str, str]:
    """Versions in the peers' own environments."""
    asked = ((options.compressor_python, ("llmcompressor", "compressed-tensors", "torch", "transformers")),
             (options.llama_python, ("llama-cpp-python",)))  # fmt: skip
    told: dict[str, str] = {}
    for python, names in asked:
        if python:
            said = subprocess.run([python, "-c", CHECK, *names], capture_output=True, text=True, check=True)
            told[f"of {names[0]}'s environment:"] = said.stdout.strip().strip("{}").replace("'", "")
    return told


def table(result: dict[str, Any]) -> str:
    lines = [
        "# What an export costs",
        "",
        f"A random Llama-shaped bf16 base of {result['base_bytes'] / 1e9:.2f} GB, LoRA rank {result['rank']}",
        "on all linear layers. Warm page cache, each run its own process, until the files are on the disk;",
        f"no imports, no verification; rounds: {result['rounds']}, alternating, medians. Memory is anonymous",
        "memory at its peak, of the process and those it starts, above what the imports hold.",
        "",
        "| | seconds | ratio to copy | CPU seconds | extra memory | stated | written |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        stated = "" if row["stated_mib"] is None else f"{row['stated_mib']} MiB"
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {row['ratio_to_copy']:.2f} | {row['cpu_seconds']:.1f} "
            f"| {row['extra_anonymous_mib']:.0f} MiB | {stated} | {row['size_bytes'] / 1e9:.2f} GB |"
        )
    lines += [
        "",
        "Rows of pronghorn merge the adapter first, except where it is left as it is (lora, adapter) and",
        "where a whole model is converted. llm-compressor and llama.cpp's converter start from a whole one.",
        "",
        *_busy(result["hardware"]),
        f"Hardware: {listed(result['hardware'])}.",
        f"Versions: {listed(result['versions'])}.",
        "",
        "Made by `python -m benchmarks.export`, which says where the peers come from.",
    ]
    return "\n".join(lines) + "\n"


def _busy(where: dict[str, str]) -> list[str]:
    """A warning where other programs took their share of the processor."""
    if float(where["load average during the last minute"]) < 2:
        return []
    return ["Other programs ran meanwhile: seconds and ratios are rough, CPU seconds and memory are not.", ""]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--llama-python", help="an interpreter with llama_cpp, for q4_k_m")
    parser.add_argument("--compressor-python", help="an interpreter with llmcompressor")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--only", default="", help="measure the rows whose name has this text")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        result = measure(Path(place), options)
    text = table(result)
    print(text)
    if not options.no_results:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "export.md").write_text(text, encoding="utf-8")
        (RESULTS / "export.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    over = [name for name, row in result["rows"].items() if not row["within"]]
    if over:
        print(f"needs more memory than stated: {', '.join(over)}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
