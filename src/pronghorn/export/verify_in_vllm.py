"""Run by vLLM's own interpreter: open folders one after the other in one process; say what each computes.

``python verify_in_vllm.py job.json out.jsonl``. The job is a list of ``{"folder": path, "rows": [[token id,
...], ...], "prompts": [[token id, ...], ...], "max_tokens": n, "chat": [message, ...], "positions": n}``.
Each line of the output answers one:
``{"folder": path, "error": text}`` where vLLM refuses it, else ``"logprobs"``
(of tokens 1, 2, ... of each row), ``"tokens"`` (greedy answers to the prompts, ended as the folder wants) and
``"chat"`` (token ids of the rendered messages, or the text of the error).

It imports vLLM, its torch and the standard library only: nothing of pronghorn is installed where it runs.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAX_MODEL_LEN = 1024
_CACHE_BYTES = 64 << 20  # a few short prompts


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """Open one folder, answer, and take the engine down."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(
            model=asked["folder"],
            max_model_len=min(_MAX_MODEL_LEN, asked["positions"]),
            enforce_eager=True,
            enable_prefix_caching=False,  # a cached prefix gives no prompt log-probabilities
            kv_cache_memory_bytes=_CACHE_BYTES,
            limit_mm_per_prompt={"image": 0} if asked.get("text_only") else None,
        )
        found = _answers(llm, asked)
    except (Exception, SystemExit) as error:
        found = {"error": _short(error)}
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    return {"folder": asked["folder"], **found}


def _answers(llm: Any, asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    scoring = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    rows = llm.generate([{"prompt_token_ids": ids} for ids in asked["rows"]], scoring, use_tqdm=False)
    greedy = SamplingParams(temperature=0.0, max_tokens=asked["max_tokens"])
    said = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], greedy, use_tqdm=False)
    import vllm

    return {
        "error": None,
        "version": vllm.__version__,
        "logprobs": [_logprobs(row) for row in rows],
        "tokens": [list(one.outputs[0].token_ids) for one in said],
        "chat": _attempt(lambda: _chat(llm, asked["chat"])),
    }


def _chat(llm: Any, messages: list[dict[str, str]]) -> list[int]:
    from vllm import SamplingParams

    (output,) = llm.chat([messages], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    return list(output.prompt_token_ids)


def _logprobs(output: Any) -> list[float]:
    scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [entry[token].logprob for token, entry in scored]


def _attempt(ask: Callable[[], list[int]]) -> list[int] | str:
    try:
        return ask()
    except Exception as error:
        return _short(error)


def _short(error: BaseException) -> str:
    """The first error of a chain says why; those behind it say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def main(job: Path, out: Path) -> None:
    """Answer every folder; memory that no tensor of the files fills is NaN, not what the last folder left."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory, too
    with out.open("a") as lines:
        for asked in json.loads(job.read_text()):
            # said first: where the engine ends the whole process, the folder is known
            lines.write(json.dumps({"folder": asked["folder"], "begun": True}) + "\n")
            lines.flush()
            lines.write(json.dumps(look(asked)) + "\n")
            lines.flush()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    main(Path(sys.argv[1]), Path(sys.argv[2]))
