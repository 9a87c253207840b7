"""Run where compressed-tensors is installed: logits of quantised folders by plain transformers.

``python transformers_logits.py job.json out.json``. The job is ``{"models": [folder, ...], "ids": [[token id,
...], ...]}``; the answer has for each model and row a matrix of logits. Shares no code with what it checks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


@torch.no_grad()
def logits(folder: str, rows: list[list[int]]) -> list[list[list[float]]]:
    """Logits [tokens, vocabulary] of each row."""
    (named,) = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures
    kind = getattr(transformers, named)
    model = kind.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    found = [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
    return [scores.tolist() for scores in found]


if __name__ == "__main__":
    job, out = map(Path, sys.argv[1:])
    asked = json.loads(job.read_text())
    out.write_text(json.dumps([logits(folder, asked["ids"]) for folder in asked["models"]]))
