"""Run in .venv-llama: ``python llama_run.py job.json answers.npz``; drives llama.cpp through its C API.

A job is a list of models: {"model": file, "lora": file or null, "rows": [[id, ...], ...], "texts": [...],
"prompts": [[id, ...], ...], "max_tokens": n, "context": n}. The answers hold, for model i and row j,
``logits-i-j`` [tokens, vocabulary], and ``said-i``: JSON with the ids of the texts (with and without what the
tokenizer adds), the greedy continuations up to a token that ends an answer, the texts of all ids, and the
chat template.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_DRIVER = Path(__file__).resolve().parents[2] / "src" / "pronghorn" / "export" / "verify_in_llama.py"


def driver() -> Any:
    """The program that ``pronghorn verify`` runs here."""
    spec = spec_from_file_location(_DRIVER.stem, _DRIVER)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_lora(model: Any, context: Any, file: str) -> None:
    """Apply an adapter to the context."""
    adapter = llama_cpp.llama_adapter_lora_init(model, file.encode())
    if not adapter:
        sys.exit(f"llama.cpp does not load {file}")
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(1.0)
    assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0


def main(job_path: str, out_path: str) -> None:
    """Run the whole job in one process."""
    with open(job_path) as file:  # noqa: PTH123
        jobs = json.load(file)
    drive = driver()
    answers: dict[str, Any] = {}
    for number, job in enumerate(jobs):
        model, context = drive.open_model(job["model"], job.get("context", 256))
        if job.get("lora"):
            add_lora(model, context, job["lora"])
        vocab = llama_cpp.llama_model_get_vocab(model)
        size = llama_cpp.llama_vocab_n_tokens(vocab)
        for place, row in enumerate(job["rows"]):
            answers[f"logits-{number}-{place}"] = drive.logits(context, row, size)
        prompts = job.get("prompts", [])
        template = llama_cpp.llama_model_chat_template(model, None)
        said = {
            "plain": [drive.ids(vocab, text, special=False) for text in job.get("texts", [])],
            "full": [drive.ids(vocab, text, special=True) for text in job.get("texts", [])],
            "ends": [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)],
            "continued": [drive.continued(context, vocab, row, job["max_tokens"]) for row in prompts],
            "template": template.decode() if template else None,
            "bos": llama_cpp.llama_vocab_bos(vocab),
            "eos": llama_cpp.llama_vocab_eos(vocab),
        }
        answers[f"said-{number}"] = json.dumps(said)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    np.savez(out_path, **answers)


if __name__ == "__main__":
    llama_cpp.llama_backend_init()
    main(*sys.argv[1:])
