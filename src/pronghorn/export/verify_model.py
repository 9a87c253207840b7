"""Models for the deep check: plain transformers and PEFT, float32, one in memory at a time."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from pronghorn.export.verify_class import model_class
from pronghorn.export.verify_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FLOATS, Folder, read_header
from pronghorn.export.verify_render import rendered
from pronghorn.export.verify_tokens import token_table
from pronghorn.export.verify_weights import embedding_rows

RANDOM_PROMPTS, RANDOM_TOKENS, CHAT_TOKENS, NEW_TOKENS = 3, 24, 64, 24
CHAT = ({"role": "user", "content": "Name three colours, then stop."},)
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_MIB = 1 << 20
_VOCABULARY = ("embed_tokens", "wte", "lm_head")


def available_bytes() -> int:
    """Memory that this process may still take: the machine's, or its container's where that is less."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        group = Path("/sys/fs/cgroup")
        most, now = (
            (group / file).read_text(encoding="ascii").strip() for file in ("memory.max", "memory.current")
        )
        limits += [] if most == "max" else [int(most) - int(now)]
    except (OSError, ValueError):
        pass  # no version 2 control group
    return min(limits)


def needed_bytes(folder: Folder) -> int:
    """Peak of one float32 model with an adapter: its weights, a quarter for the work, 512 MiB."""
    weights = sum(prod(tensor.shape) * 4 for tensor in folder.tensors.values())
    return weights * 5 // 4 + 512 * _MIB


def load_model(folder: Path, kind: Any = None, **placing: Any) -> Any:
    """The class named in config.json, float32, eager attention (the plainest code there is), on CPU.

    ``kind``: another class to load it with.
    """
    found = kind or model_class(folder)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    return found.from_pretrained(folder, trust_remote_code=False, **options, **placing).eval()


def load_with_adapter(base: Path, adapter: Path) -> Any:
    """Base + adapter, computed by plain PEFT in float32; a vocabulary that grew is grown first."""
    from peft import PeftModel

    model = load_model(base)
    if (rows := vocabulary_rows(adapter)) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter).eval()


def vocabulary_rows(adapter: Path) -> int:
    """Rows that the adapter's embedding or head need, 0 where it has none."""
    listed = json.loads((adapter / ADAPTER_CONFIG).read_bytes()).get("trainable_token_indices")
    tokens = [max(ids) + 1 for ids in listed.values()] if isinstance(listed, dict) else []
    return max([*_vocabulary_rows(adapter), *tokens], default=0)


def _vocabulary_rows(adapter: Path) -> Iterator[int]:
    for name, tensor in read_header(adapter / ADAPTER_WEIGHTS).items():
        parts = name.split(".")
        if not set(parts) & set(_VOCABULARY) or len(tensor.shape) != 2:
            continue
        if "lora_embedding_A" in parts:
            yield tensor.shape[1]
        elif "lora_B" in parts or not any("lora" in part for part in parts):
            yield tensor.shape[0]


def unused_adapter_tensors(wrapped: Any, adapter: Path) -> list[str]:
    """LoRA tensors of the file that PEFT gave no place, and places that the file left untouched."""
    from peft import get_peft_model_state_dict

    placed = {n for n in get_peft_model_state_dict(wrapped, save_embedding_layers=False) if "lora_" in n}
    stored = {n for n in read_header(adapter / ADAPTER_WEIGHTS) if "lora_" in n}
    return [f"{n} has no place in the model" for n in sorted(stored - placed)] + [
        f"{n} is not in the adapter" for n in sorted(placed - stored)
    ]


def merge_and_round(wrapped: Any, folder: Folder) -> Any:
    """The reference: PEFT's own merge in float32, each matrix rounded once to the folder's stored dtype."""
    merged = wrapped.merge_and_unload()
    rounding = Rounding(folder)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(rounding.rounded(name, parameter))
    return merged


class Rounding:
    """The dtypes that a folder stores: each tensor's own, and the most frequent one for what it has not."""

    def __init__(self, folder: Folder) -> None:
        sizes: Counter[str] = Counter()
        self._stored: dict[str, str] = {}
        for name, tensor in folder.tensors.items():
            # a tensor of codes has no dtype to round to
            if tensor.dtype in FLOATS:
                sizes[tensor.dtype] += tensor.end - tensor.start
                self._stored[name] = tensor.dtype
        self._main = sizes.most_common(1)[0][0]

    def rounded(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """``values`` as the folder's tensor ``name`` can hold them, in float32."""
        return values.to(TORCH_DTYPES[self._stored.get(name, self._main)]).float()


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of a batch of prompts of one length.

    ``ids``: [B, T + new] prompt, answer, and padding after its end; ``lengths``: tokens of each answer,
    its end included; ``margins``: [B, new] lead of the best token over the next.
    """

    prompt_tokens: int
    ids: torch.Tensor
    margins: torch.Tensor
    lengths: tuple[int, ...]

    def said(self, row: int) -> torch.Tensor:
        """The answer to one prompt: [new] token ids."""
        return self.ids[row, self.prompt_tokens :][: self.lengths[row]]


def prompts(folder: Folder, tokenizer: Any) -> list[torch.Tensor]:
    """Batches [B, T] of token ids: random ones over the whole vocabulary, and a rendered chat.

    Without a chat template there is no chat. Placeholders for images and sound are left out, for they mean
    nothing without their data.
    """
    generator = torch.Generator().manual_seed(20)
    # a config that does not state it means its class's default, which has as many rows
    size = int(folder.text_config.get("vocab_size") or embedding_rows(folder))
    ids = torch.randint(0, size, (RANDOM_PROMPTS, RANDOM_TOKENS), generator=generator)
    for key, value in folder.config.items():
        if (
            key.endswith(("_token_id", "_token_index"))
            and isinstance(value, int)
            and key[:3] not in ("bos", "eos", "pad")
        ):
            ids[ids == value] = (value + 1) % size
    batches = [ids]
    if tokenizer is not None and tokenizer.chat_template:
        batches.append(torch.tensor([chat_ids(tokenizer)[:CHAT_TOKENS]]))
    return batches


def chat_ids(tokenizer: Any) -> list[int]:
    """The token ids of one rendered question.

    Raises:
        RenderError: what the template says, or that it does not finish.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template["default"]
    text = rendered(template, CHAT, tokenizer.special_tokens_map, prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_ids(model_folder: Folder, tokenizer_folder: Folder) -> list[int]:
    """Ids that end an answer: those of generation_config.json (else config.json) and the tokenizer's own."""
    stated = model_folder.json("generation_config.json").get(
        "eos_token_id", model_folder.text_config.get("eos_token_id")
    )
    ids = stated if isinstance(stated, list) else [stated]
    return sorted({i for i in (*ids, token_table(tokenizer_folder).id_of("eos_token")) if isinstance(i, int)})


@torch.no_grad()
def answer(model: Any, batch: torch.Tensor, ends: list[int], new_tokens: int = NEW_TOKENS) -> Answer:
    """Greedy generation after each prompt of ``batch`` [B, T]: ``new_tokens``, or up to one of ``ends``."""
    made = model.generate(
        input_ids=batch,
        attention_mask=torch.ones_like(batch),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=(ends or [0])[0],
        ),
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack([scores.topk(2, dim=-1).values for scores in made.scores], dim=1)
    lengths = _lengths(made.sequences[:, batch.shape[1] :], ends)
    return Answer(batch.shape[1], made.sequences, best[..., 0] - best[..., 1], lengths)


def forced_answer(truth: Answer, found: torch.Tensor, ends: list[int]) -> Answer:
    """What a model says greedily, read off its logits ``found`` [B, T + new, V] over the true answer.

    Right up to and including the first token where it parts from the truth: what came before was the same.
    """
    best = found[:, truth.prompt_tokens - 1 : -1].topk(2, dim=-1)
    new = best.indices[..., 0]
    ids = torch.cat((truth.ids[:, : truth.prompt_tokens], new), dim=1)
    return Answer(truth.prompt_tokens, ids, best.values[..., 0] - best.values[..., 1], _lengths(new, ends))


def _lengths(new: torch.Tensor, ends: list[int]) -> tuple[int, ...]:
    """Tokens of each answer [B, new] up to its first end, that included."""
    ended = torch.isin(new, torch.tensor(ends, dtype=new.dtype)).int()
    return tuple(torch.where(ended.any(1), ended.argmax(1) + 1, new.shape[1]).tolist())


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of a batch of token ids [B, T], float32."""
    found: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return found.float()


def scored(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-probability [B, T - 1] of each token of ``ids`` [B, T] after the first."""
    return logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


class Whole:
    """How the deep check loads and runs models of which one fits in memory."""

    new_tokens = NEW_TOKENS
    told = ""

    def plain(self, folder: Path) -> Any:
        """A model folder."""
        return load_model(folder)

    def with_adapter(self, base: Path, adapter: Path) -> Any:
        """Base + adapter by plain PEFT."""
        return load_with_adapter(base, adapter)

    @contextmanager
    def reference(self, wrapped: Any, folder: Folder) -> Iterator[Any]:
        """PEFT's merge, in place, rounded to the dtypes that ``folder`` stores."""
        yield merge_and_round(wrapped, folder)

    def answers(
        self, model: Any, truth: tuple[Answer, ...], _logits: tuple[torch.Tensor, ...], ends: list[int]
    ) -> list[Answer]:
        """Greedy answers to the prompts of the true ones, generated."""
        return [answer(model, each.ids[:, : each.prompt_tokens], ends) for each in truth]
