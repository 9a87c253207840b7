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
from typing import Any

import llama_cpp
import numpy as np


def open_model(job: dict[str, Any]) -> tuple[Any, Any]:
    """The model and a context with float32 keys and values."""
    model = llama_cpp.llama_model_load_from_file(
        job["model"].encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        sys.exit(f"llama.cpp does not load {job['model']}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = job.get("context", 256)
    params.n_batch = params.n_ubatch = params.n_ctx
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, params)
    if job.get("lora"):
        adapter = llama_cpp.llama_adapter_lora_init(model, job["lora"].encode())
        if not adapter:
            sys.exit(f"llama.cpp does not load {job['lora']}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    return model, context


def logits(context: Any, row: list[int], vocabulary: int) -> np.ndarray:
    """Logits behind every token, [tokens, vocabulary]."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    batch = llama_cpp.llama_batch_init(len(row), 0, 1)
    batch.n_tokens = len(row)
    for place, token in enumerate(row):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    found = llama_cpp.llama_get_logits(context)
    return np.ctypeslib.as_array(found, shape=(len(row), vocabulary)).copy()


def ids(vocab: Any, text: str, *, special: bool) -> list[int]:
    """The tokens of a text; control tokens in it are recognised."""
    raw = text.encode()
    room = (llama_cpp.llama_token * (len(raw) + 8))()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, len(room), special, True)
    return list(room[:count])


def main(job_path: str, out_path: str) -> None:
    """Run the whole job in one process."""
    with open(job_path) as file:  # noqa: PTH123
        jobs = json.load(file)
    answers: dict[str, Any] = {}
    for number, job in enumerate(jobs):
        model, context = open_model(job)
        vocab = llama_cpp.llama_model_get_vocab(model)
        size = llama_cpp.llama_vocab_n_tokens(vocab)
        for place, row in enumerate(job["rows"]):
            answers[f"logits-{number}-{place}"] = logits(context, row, size)
        continued = []
        for prompt in job.get("prompts", []):
            row = list(prompt)
            for _ in range(job["max_tokens"]):
                row.append(int(logits(context, row, size)[-1].argmax()))
                if llama_cpp.llama_vocab_is_eog(vocab, row[-1]):
                    break
            continued.append(row[len(prompt) :])
        template = llama_cpp.llama_model_chat_template(model, None)
        said = {
            "plain": [ids(vocab, text, special=False) for text in job.get("texts", [])],
            "full": [ids(vocab, text, special=True) for text in job.get("texts", [])],
            "ends": [i for i in range(size) if llama_cpp.llama_vocab_is_eog(vocab, i)],
            "continued": continued,
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
