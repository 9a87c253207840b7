"""Run by the vLLM environment's own interpreter: questions about images, put to transformers and to vLLM.

``python image_answers.py job.json out.pt``. The job is ``{"engine": "processor" | "transformers" | "vllm",
"folders": [path, ...], "asked": [[text, npy file], ...], "max_tokens": n}``. For each folder the answer
lists, per question, ``inputs`` (what the folder's processor makes of it: tensors by name; of vLLM the
prompt's ``input_ids``), and of the engines ``tokens``, the greedy answer, and ``logprobs`` of these tokens;
transformers computes in float32, and again in bfloat16: ``rounded``.

This file imports the engines, PIL, numpy and the standard library only.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def processed(folder: str, asked: list[list[str]]) -> list[dict[str, Any]]:
    """What the folder's own processor makes of each question."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return [
        {"inputs": dict(processor(text=text, images=[picture(file)], return_tensors="pt"))}
        for text, file in asked
    ]


def picture(file: str) -> Image.Image:
    """The image of an array [height, width, 3]."""
    return Image.fromarray(np.load(file))


@torch.no_grad()
def by_transformers(folder: str, asked: list[list[str]], max_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers in float32; the log-probabilities of their tokens, and those in bfloat16."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = processed(folder, asked)
    for one in found:
        inputs = one["inputs"]
        said = model.generate(
            **inputs, max_new_tokens=max_tokens, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        one["tokens"] = said.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        one["logprobs"] = _scored(said.logits, one["tokens"])
    model.to(torch.bfloat16)
    for one in found:
        inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in one["inputs"].items()}
        forced = _Forced(one["tokens"], inputs["input_ids"].shape[1])
        said = model.generate(
            **inputs, max_new_tokens=len(one["tokens"]), do_sample=False, output_logits=True,
            return_dict_in_generate=True, logits_processor=[forced],
        )  # fmt: skip
        one["rounded"] = _scored(said.logits, one["tokens"])
    return found


class _Forced:
    """A logits processor that has the model say these tokens; the logits that are returned are its own."""

    def __init__(self, tokens: list[int], prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[ids.shape[1] - self.prompt]] = 0.0
        return only


def _scored(logits: tuple[torch.Tensor, ...], tokens: list[int]) -> list[float]:
    pairs = zip(logits, tokens, strict=True)
    return [float(row[0].float().log_softmax(-1)[token]) for row, token in pairs]


def by_vllm(folder: str, asked: list[list[str]], max_tokens: int) -> list[dict[str, Any]]:
    """Greedy answers and the log-probabilities of their tokens; the engine is taken down afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=folder, max_model_len=128, enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        limit_mm_per_prompt={"image": 1},
    )  # fmt: skip
    questions = [{"prompt": text, "multi_modal_data": {"image": picture(file)}} for text, file in asked]
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=0)
    found = []
    for output in llm.generate(questions, sampling, use_tqdm=False):
        (said,) = output.outputs
        scored = zip(said.token_ids, said.logprobs, strict=True)
        found.append(
            {
                "inputs": {"input_ids": torch.tensor([output.prompt_token_ids])},
                "tokens": list(said.token_ids),
                "logprobs": [entry[token].logprob for token, entry in scored],
            }
        )
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return found


def main(job: Path, out: Path) -> None:
    """One list of answers for each folder."""
    given = json.loads(job.read_text())
    asked, most = given["asked"], given.get("max_tokens", 0)
    each = {
        "processor": lambda folder: processed(folder, asked),
        "transformers": lambda folder: by_transformers(folder, asked, most),
        "vllm": lambda folder: by_vllm(folder, asked, most),
    }[given["engine"]]
    torch.save([each(folder) for folder in given["folders"]], out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
