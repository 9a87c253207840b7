"""Run by the vLLM environment's own interpreter: greedy generation for a list of folders.

``python vllm_generate.py job.json out.json``. The job is a list of engines, each ``{"model": folder,
"adapters": [folder, ...], "prompts": [[token id, ...], ...], "max_tokens": n}``. The answer has a list for
each engine, with one entry for the plain model and one for each adapter, each holding for every prompt
``{"tokens": [generated id, ...], "logprobs": [of each of them, ...]}`` and, in engines without adapters,
``"prompt_logprobs"``: the log-probabilities of prompt tokens 1, 2, ...

This file imports vLLM and the standard library only: it must not share code with what it checks.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def generate(engine: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Start one engine, answer all prompts without and with each adapter, and take the engine down."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    adapters = engine.get("adapters", [])
    lora = {"enable_lora": True, "max_lora_rank": 16} if adapters else {}
    llm = LLM(
        model=engine["model"],
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
        enable_prefix_caching=False,  # a cached prefix gives no prompt log-probabilities
        **lora,
    )
    # vLLM's CPU kernels fail on prompt log-probabilities where LoRA is enabled (einsum shapes)
    scores = None if adapters else 0
    sampling = SamplingParams(
        temperature=0.0, max_tokens=engine["max_tokens"], logprobs=0, prompt_logprobs=scores
    )
    prompts = [{"prompt_token_ids": ids} for ids in engine["prompts"]]
    requests = [None, *(LoRARequest(f"adapter-{i}", i, path) for i, path in enumerate(adapters, start=1))]
    answers = []
    for request in requests:
        outputs = llm.generate(prompts, sampling, lora_request=request, use_tqdm=False)
        answers.append([_answer(output) for output in outputs])
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return answers


def _answer(output: Any) -> dict[str, Any]:
    (said,) = output.outputs
    tokens = list(said.token_ids)
    scored = zip(tokens, said.logprobs, strict=True)
    answer: dict[str, Any] = {"tokens": tokens, "logprobs": [entry[token].logprob for token, entry in scored]}
    if output.prompt_logprobs is not None:
        scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        answer["prompt_logprobs"] = [entry[token].logprob for token, entry in scored]
    return answer


if __name__ == "__main__":
    job, out = map(Path, sys.argv[1:])
    out.write_text(json.dumps([generate(engine) for engine in json.loads(job.read_text())]))
