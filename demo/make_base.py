"""Make the demo's tiny base model, from nothing, on one CPU core: a tokenizer, a Llama of 3 million weights.

Run once by the makers of the demo; ``demo/base`` holds the result. It reads ``base_text.training_text`` only.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from base_text import training_text
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, TURN, EOS = "<pad>", "<s>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
VOCABULARY = 2048
LENGTH = 256  # tokens of one training sequence
BATCH = 8  # sequences
# How often each kind of text is read: English is what the rows need, and code is four times as long.
PROSE_READS, CODE_READS, CHAT_READS = 3, 0.25, 3


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML turns, trained on the texts."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [PAD, BOS, TURN, EOS]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model() -> LlamaForCausalLM:
    """A small Llama with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    return LlamaForCausalLM(config)


def documents(seed: int) -> list[str]:
    """All training documents in a random order, each as often as its kind is read."""
    chooser = random.Random(seed)
    prose, code, chats = training_text()
    turns = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    kinds = [
        (prose, PROSE_READS),
        (code, CODE_READS),
        ([turns.format(question, answer) for question, answer in chats], CHAT_READS),
    ]
    texts = []
    for kind, reads in kinds:
        texts += kind * int(reads) + chooser.sample(kind, int(len(kind) * (reads % 1)))
    chooser.shuffle(texts)
    return texts


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[torch.Tensor]:
    """Yield [BATCH, LENGTH] token ids: the texts one after another, each begun by BOS."""
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in [tokenizer.bos_token_id, *ids]]
    size = BATCH * LENGTH
    for start in range(0, len(stream) - size + 1, size):
        yield torch.tensor(stream[start : start + size]).view(BATCH, LENGTH)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (about half the steps of AdamW at this size), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.03, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The share of the full learning rate: 20 steps up, and the last 60 % of the run down to zero."""
    return min(1.0, (step + 1) / 20, (steps - step) / (0.6 * steps))


def train(model: LlamaForCausalLM, data: list[torch.Tensor]) -> None:
    """One pass over the batches."""
    tools = optimizers(model)
    full = [[group["lr"] for group in tool.param_groups] for tool in tools]
    started = time.monotonic()
    recent = 0.0
    for step, ids in enumerate(data):
        for tool, rates in zip(tools, full, strict=True):
            for group, lr in zip(tool.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, len(data))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad()
        recent = loss.item() if step == 0 else 0.9 * recent + 0.1 * loss.item()
        if step % 25 == 0:
            print(f"step {step}/{len(data)} loss {recent:.3f} {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Make the base and write it into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "base")
    parser.add_argument("--steps", type=int, help="train on this many batches only (default: all text)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = documents(seed=0)
    tokenizer = make_tokenizer(texts)
    model = make_model()
    train(model, list(batches(tokenizer, texts))[: arguments.steps])
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=3, max_new_tokens=64
    )
    model.to(torch.bfloat16).save_pretrained(arguments.folder)
    tokenizer.save_pretrained(arguments.folder)


if __name__ == "__main__":
    main()
