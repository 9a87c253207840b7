"""Bytes saved for backward and share of the forward recomputed, on a layer of Llama-3.1-8B's shape.

    python benchmarks/memory.py [--tokens 512] [--write benchmarks/results/memory.json]

A model of two layers minus one of one layer is what a layer keeps. Counted twice: by hooks on what autograd
saves (distinct storages, parameters left out) and by the storages that are alive between forward and
backward.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from pronghorn.memory.counter import LiveStorages, storage_key
from pronghorn.patching.accelerate import accelerate

HIDDEN, INNER, HEADS, KV_HEADS = 4096, 14336, 32, 8
WEIGHTS = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * INNER

# torch counts addmm but not its in-place form
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, *args, out_shape=None, **kwargs: 2 * a[0] * a[1] * b[1]}


def build(layers: int, *, adapters_in_float32: bool) -> Any:
    """Random bf16 weights; LoRA r16 on every linear with non-zero B."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=layers,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora, autocast_adapter_dtype=adapters_in_float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    model.enable_input_require_grads()  # as every trainer with adapters does
    return model.train()


def measure(layers: int, tokens: int, mode: str, adapters_in_float32: bool) -> dict[str, float]:
    """Saved and live bytes after the forward, and FLOPs of forward and backward."""
    model = build(layers, adapters_in_float32=adapters_in_float32)
    if "pronghorn" in mode:
        report = accelerate(model)
        assert report.count("mlp")[0] == report.count("mlp")[1] == layers, str(report)
    if "recompute" in mode:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 1024, (1, tokens), generator=torch.Generator().manual_seed(1))
    parameters = {storage_key(p) for p in model.parameters()}
    saved: dict[int, int] = {}
    kept = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if storage_key(t) not in parameters:
            saved[storage_key(t)] = t.untyped_storage().nbytes()
            kept.append(t.untyped_storage())
        return t

    def count(hooks: bool) -> tuple[int, int, int]:
        forward = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
        live = LiveStorages(parameters)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t) if hooks else live, forward:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        alive = live.alive()
        backward = FlopCounterMode(display=False, custom_mapping=IN_PLACE)
        with backward:
            loss.backward()
        return alive, forward.get_total_flops(), backward.get_total_flops()

    recompute = "recompute" in mode
    if not recompute:  # torch's own recompute hooks sit inside the layers: there only live storages tell
        count(hooks=True)
        kept.clear()
        model.zero_grad()
    alive, forward, backward = count(hooks=False)
    return {
        "saved": float(sum(saved.values())),
        "alive": float(alive),
        "forward": forward,
        "backward": backward,
    }


def recomputed_share(rows: list[dict[str, Any]]) -> None:
    """Add what each recomputing mode runs beyond the backward of the same mode without recompute."""
    column = "backward / forward products"
    plain = {r["mode"]: r[column] for r in rows if r["adapters"] == "float32"}
    for r in rows:
        r["recomputed share"] = round(r[column] - plain[r["mode"].removesuffix(" + recompute")], 3)


def row(mode: str, tokens: int, adapters_in_float32: bool) -> dict[str, Any]:
    """One line of the table; backward beyond one product per linear is recompute, and 1-2 % adapters."""
    one, two = (measure(layers, tokens, mode, adapters_in_float32) for layers in (1, 2))
    layer = {key: two[key] - one[key] for key in one}
    products = 2 * WEIGHTS * tokens
    return {
        "mode": mode,
        "adapters": "float32" if adapters_in_float32 else "bfloat16",
        "saved KiB/token": round(layer["saved"] / tokens / 1024, 1),
        "alive KiB/token": round(layer["alive"] / tokens / 1024, 1),
        "forward GFLOP/token": round(layer["forward"] / tokens / 1e9, 4),
        "backward GFLOP/token": round(layer["backward"] / tokens / 1e9, 4),
        "backward / forward products": round(layer["backward"] / products, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    modes = [("peft", True), ("peft", False), ("pronghorn", True), ("pronghorn", False)]
    modes += [("peft + recompute", True), ("pronghorn + recompute", True)]
    rows = []
    for mode, wide in modes:
        rows.append(row(mode, options.tokens, wide))
        if len(rows) == 1:
            print(" | ".join(rows[0]))
        print(" | ".join(str(v) for v in rows[-1].values()), flush=True)
    recomputed_share(rows)
    print("recomputed share:", {r["mode"]: r["recomputed share"] for r in rows})
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    if options.write:
        result = {"versions": versions, "machine": platform.machine(), "tokens": options.tokens, "rows": rows}
        options.write.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
