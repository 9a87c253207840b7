"""Run by an interpreter with some transformers: what does each folder compute there?

Job and output are those of ``pronghorn/export/verify_in_vllm.py``. Imports torch and transformers only.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

transformers.logging.set_verbosity_error()


@torch.no_grad()
def look(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        model = AutoModelForCausalLM.from_pretrained(
            asked["folder"], dtype=torch.float32, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(asked["folder"], local_files_only=True)
        rows, prompts = ([torch.tensor([ids]) for ids in asked[key]] for key in ("rows", "prompts"))
        logprobs = []
        for ids in rows:
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            logprobs.append(scores.gather(-1, ids[0, 1:, None])[:, 0].tolist())
        made = [
            model.generate(input_ids=ids, max_new_tokens=asked["max_tokens"], do_sample=False)[
                0, ids.shape[1] :
            ]
            for ids in prompts
        ]
        found = {"error": None, "logprobs": logprobs, "tokens": [one.tolist() for one in made]}
    except Exception as error:
        return {
            "folder": asked["folder"],
            "error": " ".join(f"{type(error).__name__}: {error}".split())[:400],
        }
    try:
        text = tokenizer.apply_chat_template(asked["chat"], add_generation_prompt=True, tokenize=False)
        found["chat"] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:
        found["chat"] = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return {"folder": asked["folder"], **found}


if __name__ == "__main__":
    job, out = map(Path, sys.argv[1:])
    with out.open("a") as lines:
        for asked in json.loads(job.read_text()):
            lines.write(json.dumps(look(asked)) + "\n")
            lines.flush()
