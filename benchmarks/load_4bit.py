"""Peak anonymous memory while a 16-bit model of 2.2 GB is loaded in 4-bit.

``python benchmarks/load_4bit.py DIR`` makes the model in DIR where it is not there yet (hidden 2048, 16
layers, vocabulary 32k, untied). Samples RssAnon every 3 ms; the limit is 1.2 GB above import.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

LIMIT_BYTES = 1.2e9

MAKE = """
import sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.for_model(
    "llama", vocab_size=32000, hidden_size=2048, intermediate_size=7168, num_hidden_layers=16,
    num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False, max_position_embeddings=2048,
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[1], max_shard_size="500MB")
AutoTokenizer.from_pretrained(sys.argv[2]).save_pretrained(sys.argv[1])
"""


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main(folder: str) -> int:
    tokenizer = Path(__file__).parents[1] / "demo" / "base"
    if not (Path(folder) / "config.json").exists():
        subprocess.run([sys.executable, "-c", MAKE, folder, str(tokenizer)], check=True)
    from pronghorn.loading.load import load
    from pronghorn.loading.options import LoadOptions
    from pronghorn.quant.library import bitsandbytes

    bitsandbytes()
    before = peak = anonymous_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.003):
            peak = max(peak, anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    started, cpu = time.perf_counter(), time.process_time()
    model, _ = load(folder, LoadOptions(quantization="nf4"))
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    done.set()
    sampler.join()
    held = anonymous_bytes() - before
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"files {stored / 1e9:.2f} GB; above import: {(peak - before) / 1e9:.2f} GB at the peak, ", end="")
    print(f"{held / 1e9:.2f} GB after; {seconds:.1f} s, {cpu:.1f} CPU s")
    assert model is not None
    return 0 if peak - before < LIMIT_BYTES else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
