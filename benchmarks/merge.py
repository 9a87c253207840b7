"""How long a merge takes: a plain copy with sync, pronghorn, and PEFT, alternating, on one disk in one run.

    python benchmarks/merge.py [--gigabytes 2] [--rounds 3] [--folder DIR] [--no-results]

Makes a random bf16 Llama-shaped base in several shards and a rank-16 adapter on all linear layers. Every way
runs in a fresh process and is timed from reading its inputs to files on the disk (fsync); imports do not
count. Writes benchmarks/results/merge.md and merge.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HIDDEN, INTERMEDIATE, VOCABULARY, RANK = 2048, 5632, 32000, 16

# each prints "begin" after its imports and then one line of JSON: seconds, and extra peak memory since
COMMON = """
import json, os, sys, time, resource, shutil
from pathlib import Path
base, adapter, target = map(Path, sys.argv[1:4])
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def sync(folder):
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY); os.fsync(fd); os.close(fd)
def cpu(): return sum(os.times()[:4])
def begin():
    print("begin", flush=True); time.sleep(0.1)  # who measures from outside looks at what imports hold
    return peak(), time.perf_counter(), cpu()
def done(before, start, clock):
    used = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu() - clock}
    print(json.dumps({**used, "extra_bytes": peak() - before}))
"""
COPY = """
begun = begin()
shutil.copytree(base, target); sync(target)
done(*begun)
"""
OURS = """
from pronghorn.export.run import export
import torch; torch.ones(64, 64) @ torch.ones(64, 64)
begun = begin()
export(adapter, target, base=base, verify=False)
done(*begun)
"""
PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM
torch.ones(64, 64) @ torch.ones(64, 64)
begun = begin()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(target, max_shard_size="500MB"); sync(target)
done(*begun)
"""
WAYS = {"copy + sync": COPY, "pronghorn": OURS, "PEFT load + merge + save": PEFT}

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, get_peft_model
base, adapter, layers, hidden, inter, vocab, rank = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(0)
config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
                     num_attention_heads=hidden // 128, num_key_value_heads=hidden // 512)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(config)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
model.save_pretrained(base, max_shard_size="500MB")
torch.set_default_dtype(torch.float32)
model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.002)
model.save_pretrained(adapter)
"""


def run(code: str, *arguments: str | Path, python: str | Path = sys.executable) -> dict[str, float]:
    """Run a program of its own; returns what its last line says, and its peak of anonymous memory.

    "anonymous_bytes" counts memory that no file stands behind, of the process and those it starts, above
    what it held when it said "begin".
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaint:
        command = [str(python), "-c", code, *map(str, arguments)]
        process = subprocess.Popen(command, stdout=said, stderr=complaint, start_new_session=True)
        peak = _watch(process, said.fileno())
        for file in (said, complaint):
            file.seek(0)
        if process.returncode:
            raise SystemExit(complaint.read())
        lines = said.read().strip().splitlines()
    return {**json.loads(lines[-1]), "anonymous_bytes": peak} if lines else {}


def _watch(process: subprocess.Popen[bytes], said: int) -> int:
    before = peak = looked = 0
    members = {process.pid}
    while process.poll() is None:
        now = sum(map(anonymous_bytes, members))
        if b"begin" in os.pread(said, 2**16, 0):
            before, peak = (now, now) if not before else (before, max(peak, now))
        looked += 1
        if looked % 25 == 0:  # looking through all processes takes longer than a sample
            members |= group_members(process.pid)
        time.sleep(0.004)
    return peak - before


def anonymous_bytes(process: int) -> int:
    """Anonymous resident memory of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def group_members(group: int) -> set[int]:
    """The processes of a process group."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(place.name)) == group:
                found.add(int(place.name))
    return found


def equal_tensors(one: Path, two: Path) -> tuple[int, int]:
    """How many tensors of two folders are equal bit for bit, and how many there are."""
    from pronghorn.weights.folder import open_weights
    from pronghorn.weights.reader import read_tensor

    first, second = open_weights(one), open_weights(two)
    assert set(first.tensors) == set(second.tensors)
    same = sum(
        bool((read_tensor(*first.tensors[name]) == read_tensor(*second.tensors[name])).all())
        for name in first.tensors
    )
    return same, len(first.tensors)


def hardware() -> dict[str, str]:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "system": platform.platform(),
        "load average during the last minute": f"{os.getloadavg()[0]:.1f}",
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("pronghorn", "torch", "transformers", "peft", "safetensors")}


def make(base: Path, adapter: Path, gigabytes: float) -> tuple[int, int]:
    """Write the base and the adapter; returns the base's bytes and layers."""
    layer = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 4 + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((gigabytes * 1e9 - 4 * HIDDEN * VOCABULARY) / layer))
    run(MAKE, base, adapter, *map(str, (layers, HIDDEN, INTERMEDIATE, VOCABULARY, RANK)))
    size = sum(path.stat().st_size for path in base.iterdir())
    print(
        f"base: {size / 1e9:.2f} GB, {len(list(base.glob('*.safetensors')))} shards, {layers} layers",
        flush=True,
    )
    return size, layers


def measure(place: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    base, adapter = place / "base", place / "adapter"
    size, layers = make(base, adapter, gigabytes)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    kept = {name: place / name.split()[0] for name in WAYS}
    for number in range(rounds + 1):  # the first round fills the page cache and is not counted
        for name, code in WAYS.items():
            shutil.rmtree(kept[name], ignore_errors=True)
            os.sync()
            result = run(COMMON + code, base, adapter, kept[name])
            print(f"round {number} {name}: {result['seconds']:.2f} s", flush=True)
            if number:
                times[name].append(result)
    same, count = equal_tensors(kept["pronghorn"], kept["PEFT load + merge + save"])
    seconds = {name: statistics.median(one["seconds"] for one in found) for name, found in times.items()}
    extra = {name: max(one["extra_bytes"] for one in found) for name, found in times.items()}
    cpu = {name: statistics.median(one["cpu_seconds"] for one in found) for name, found in times.items()}
    copy, ours, peft = seconds.values()
    return {
        "base_bytes": size,
        "shards": len(list(base.glob("*.safetensors"))),
        "layers": layers,
        "rank": RANK,
        "rounds": rounds,
        "median_seconds": seconds,
        "median_cpu_seconds": cpu,
        "all_seconds": {name: [one["seconds"] for one in found] for name, found in times.items()},
        "extra_peak_bytes": extra,
        "ratio_to_copy": ours / copy,
        "ratio_to_peft": ours / peft,
        "equal_tensors": [same, count],
        "hardware": hardware(),
        "versions": versions(),
    }


def listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def table(result: dict[str, Any]) -> str:
    seconds, cpu, extra = (
        result[key] for key in ("median_seconds", "median_cpu_seconds", "extra_peak_bytes")
    )
    equal = "{} of {} tensors".format(*result["equal_tensors"])
    lines = [
        "# Merging an adapter into its base, on files",
        "",
        f"A random Llama-shaped bf16 base of {result['base_bytes'] / 1e9:.2f} GB, {result['shards']} shards,",
        f"LoRA rank {result['rank']} on all linear layers. Warm page cache, each run its own process,",
        f"until the files are on the disk; no imports; median of {result['rounds']} runs, alternating.",
        "",
        "| | seconds | ratio to copy | CPU seconds | extra peak memory |",
        "|---|---|---|---|---|",
    ]
    for name, value in seconds.items():
        lines.append(
            f"| {name} | {value:.2f} | {value / seconds['copy + sync']:.2f} | {cpu[name]:.2f} "
            f"| {extra[name] / 2**20:.0f} MiB |"
        )
    lines += [
        "",
        f"pronghorn takes {result['ratio_to_copy']:.2f} x the copy and {result['ratio_to_peft']:.2f} x PEFT. "
        f"{equal} are equal to PEFT's bit for bit (a bf16 model with a float32 adapter).",
        "",
        f"Hardware: {listed(result['hardware'])}.",
        f"Versions: {listed(result['versions'])}.",
        "",
        "Made by `python benchmarks/merge.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--no-results", action="store_true", help="print only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        result = measure(Path(place), options.gigabytes, options.rounds)
    text = table(result)
    print(text)
    if not options.no_results:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "merge.md").write_text(text, encoding="utf-8")
        (RESULTS / "merge.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
