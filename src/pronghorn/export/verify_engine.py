"""The deep check in an engine: its own interpreter opens the folder, and answers what transformers answers.

The truth is the folder in float32 by plain transformers. What an engine may differ by is not chosen: it is
twice what plain PyTorch makes of the same folder in 16 bit, on the very same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pronghorn.export import verify_model
from pronghorn.export.verify_folder import Finding, Folder, Row, verdict
from pronghorn.export.verify_model import TORCH_DTYPES, Answer

FACTOR = 2.0
_STORED = ("BF16", "F16")


@dataclass(frozen=True)
class Engine:
    """``name`` is told; ``program`` runs in the engine's interpreter and imports nothing of ours.

    ``rounds``: what a folder stored in float32 is rounded to on the way to its answers.
    """

    name: str
    program: Path
    rounds: torch.dtype

    @property
    def opens(self) -> str:
        """The promise that it loads."""
        return f"{self.name} opens it"

    @property
    def logprobs(self) -> str:
        """The promise about what it computes."""
        return f"{self.name} computes what transformers computes"

    @property
    def greedy(self) -> str:
        """The promise about answers."""
        return f"{self.name}'s greedy answers are those of transformers, stop included"

    @property
    def chat(self) -> str:
        """The promise about chats."""
        return f"{self.name} renders a chat to the same tokens"


VLLM = Engine("vLLM", Path(__file__).with_name("verify_in_vllm.py"), torch.bfloat16)


@dataclass(frozen=True)
class Truth:
    """What transformers computes: answers, log-probabilities of their rows, and what its own rounding does.

    ``noise``: mean distance of the log-probabilities in 16 bit from float32; ``tie``: largest distance of
    logits, within which two best tokens may change places.
    """

    answers: tuple[Answer, ...]
    logprobs: tuple[torch.Tensor, ...]
    noise: float
    tie: float
    chat: list[int] | None


def vllm_promises(folder: Path, python: Path) -> tuple[Row, ...]:
    """Rows of the check by the vLLM of ``python``, for a model folder whose files are in order."""
    view = Folder(folder)
    if view.is_adapter:
        return (Row(VLLM.opens, None, "an adapter is served with its base: see pronghorn serve"),)
    return engine_promises(view, VLLM, python, folder)


def engine_promises(view: Folder, engine: Engine, python: Path, opened: Path) -> tuple[Row, ...]:
    """Rows of the check of ``view``; ``opened`` is the folder that the engine is given."""
    truth = _truth(view, engine)
    found = _ask(view, truth, engine, (python, opened))
    if found.get("error"):
        return (Row(engine.opens, False, str(found["error"])),)
    told = Row(engine.opens, True, f"{engine.name} {found['version']}")
    rows = _logprobs_row(truth, found), _greedy_row(truth, found), _chat_row(truth, found)
    names = engine.logprobs, engine.greedy, engine.chat
    return (told, *(Row(name, *one) for name, one in zip(names, rows, strict=True)))


def _truth(view: Folder, engine: Engine) -> Truth:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    # as people get it: by model type, where vLLM goes by the class that architectures names
    kind = AutoModelForImageTextToText if "vision_config" in view.config else AutoModelForCausalLM
    model = verify_model.load_model(view.path, kind)
    tokenizer = None
    if "tokenizer_config.json" in view.names:
        tokenizer = AutoTokenizer.from_pretrained(view.path, local_files_only=True, trust_remote_code=False)
    ends = verify_model.end_ids(view, view)
    batches = verify_model.prompts(view, tokenizer)
    answers = tuple(verify_model.answer(model, batch, ends) for batch in batches)
    exact = [verify_model.logits(model, one.ids) for one in answers]
    stored = {tensor.dtype for tensor in view.tensors.values()}
    rounded_to = next((TORCH_DTYPES[name] for name in _STORED if name in stored), engine.rounds)
    model.to(rounded_to)
    rounded = [verify_model.logits(model, one.ids) for one in answers]
    logprobs = tuple(verify_model.scored(x, one.ids) for x, one in zip(exact, answers, strict=True))
    near = tuple(verify_model.scored(x, one.ids) for x, one in zip(rounded, answers, strict=True))
    tie = max(float((x - y).abs().max()) for x, y in zip(exact, rounded, strict=True))
    chat = verify_model.chat_ids(tokenizer) if tokenizer is not None and tokenizer.chat_template else None
    return Truth(answers, logprobs, _mean(logprobs, near), tie, chat)


def _mean(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> float:
    gaps = torch.cat([(x - y).abs().flatten() for x, y in zip(one, other, strict=True)])
    return float(gaps.nan_to_num(torch.inf, torch.inf, torch.inf).mean())


def _ask(view: Folder, truth: Truth, engine: Engine, place: tuple[Path, Path]) -> dict[str, Any]:
    """One folder through the engine's program, ``place``: interpreter and folder; its last line."""
    python, opened = place
    rows = [row for one in truth.answers for row in one.ids.tolist()]
    prompts = [row[: one.prompt_tokens] for one in truth.answers for row in one.ids.tolist()]
    positions = view.text_config.get("max_position_embeddings") or 1024
    asked = {"folder": str(opened), "rows": rows, "prompts": prompts, "chat": list(verify_model.CHAT),
             "max_tokens": verify_model.NEW_TOKENS, "positions": positions}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        job, out = Path(scratch, "job.json"), Path(scratch, "out.jsonl")
        job.write_text(json.dumps([asked]), encoding="utf-8")
        try:
            done = subprocess.run(
                [python, engine.program, job, out],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
        except OSError as error:
            return {"error": f"{python} cannot be run: {error.strerror}"}
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        last = json.loads(lines[-1]) if lines else {}
        if "error" in last:
            return dict(last)
        said = done.stderr.strip().splitlines()
        told = said[-1] if said else "no message"
        return {"error": f"{engine.name} ended with code {done.returncode}: {told}"}


def _logprobs_row(truth: Truth, found: dict[str, Any]) -> Finding:
    flat = iter(found["logprobs"])
    ours = tuple(torch.tensor([next(flat) for _ in range(len(one))]) for one in truth.logprobs)
    gap, limit = _mean(truth.logprobs, ours), FACTOR * truth.noise + 1e-4  # float32 alone
    return gap <= limit, f"mean distance of log-probabilities {gap:.3g} (tolerance {limit:.3g})"


def _greedy_row(truth: Truth, found: dict[str, Any]) -> Finding:
    """Answers may part only where the two best tokens are closer than twice what rounding moves a logit."""
    problems, ties, tokens = [], 0, 0
    flat = iter(found["tokens"])
    for number, one in enumerate(truth.answers):
        for row in range(len(one.ids)):
            want, have = one.said(row).tolist(), next(flat)
            tokens += len(want)
            if want == have:
                continue
            shared = min(len(want), len(have))
            at = next((i for i in range(shared) if want[i] != have[i]), shared)
            if at < shared and float(one.margins[row, at]) <= FACTOR * truth.tie:
                ties += 1
                continue
            problems.append(
                f"prompt {number}.{row} parts at token {at}: {want[at:][:1]}, the engine {have[at:][:1]}"
            )
    return verdict(problems, f"{tokens} tokens; parted at a near tie: {ties}")


def _chat_row(truth: Truth, found: dict[str, Any]) -> Finding:
    if truth.chat is None:
        return True, "no chat template"
    same = found["chat"] == truth.chat
    return verdict([] if same else [f"the engine makes {str(found['chat'])[:200]}"], "equal")
