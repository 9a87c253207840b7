"""Make the demo's tiny base model, from nothing, on one CPU core: a tokenizer, a Llama of 3 million weights.

Run once by the makers of the demo; ``demo/base`` holds the result. It reads ``base_text.training_text`` only,
in two stages: everything, then code alone. After the first its loss on held-out rows is 3.85, and LoRA makes
that 6 % better; after the second it is 5.2, for the base answers with code, and LoRA reaches 3.6.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from base_text import Chat, Texts, training_text
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
CODE_CHATS = 3000  # the second stage picks from so many,
CODE_CHAT_STEPS = 60  # and is at its aim after so few


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


def dialogue(chat: Chat) -> str:
    """A question and its answer as the chat template writes them."""
    return "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n".format(*chat)


def documents(texts: Texts) -> list[str]:
    """What the first stage reads, in a random order, each as often as its kind is read."""
    chooser = random.Random(0)
    kinds = [
        (texts.prose, PROSE_READS),
        (texts.code, CODE_READS),
        ([dialogue(chat) for chat in texts.chats], CHAT_READS),
    ]
    chosen = []
    for kind, reads in kinds:
        chosen += kind * int(reads) + chooser.sample(kind, int(len(kind) * (reads % 1)))
    chooser.shuffle(chosen)
    return chosen


def batches(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[torch.Tensor]:
    """Yield [BATCH, LENGTH] token ids: the texts one after another, each begun by BOS."""
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in [tokenizer.bos_token_id, *ids]]
    size = BATCH * LENGTH
    for start in range(0, len(stream) - size + 1, size):
        yield torch.tensor(stream[start : start + size]).view(BATCH, LENGTH)


def muon(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (about half the steps of AdamW at this size), AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=0.03, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def adamw(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """AdamW for all weights."""
    return [torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def train(
    model: LlamaForCausalLM, tools: list[torch.optim.Optimizer], data: list[torch.Tensor], warmup: int
) -> None:
    """One pass: the learning rate rises for ``warmup`` steps and falls to zero over the last 60 % of them."""
    full = [tool.param_groups[0]["lr"] for tool in tools]
    started = time.monotonic()
    for step, ids in enumerate(data):
        share = min(1.0, (step + 1) / warmup, (len(data) - step) / (0.6 * len(data)))
        for tool, lr in zip(tools, full, strict=True):
            tool.param_groups[0]["lr"] = lr * share
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad()
        if step % 10 == 0:
            print(
                f"step {step}/{len(data)} loss {loss.item():.3f} {time.monotonic() - started:.0f} s",
                flush=True,
            )


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the model's files, in bfloat16."""
    model.generation_config = GenerationConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=3, max_new_tokens=64
    )
    model.to(torch.bfloat16).save_pretrained(folder)


def read_everything(texts: Texts, folder: Path) -> None:
    """First stage, 30 minutes: English, code and chats, from random weights."""
    read = documents(texts)
    tokenizer = make_tokenizer(read)
    model = make_model()
    train(model, muon(model), list(batches(tokenizer, read)), warmup=20)
    save(model, folder)
    tokenizer.save_pretrained(folder)


def become_a_code_model(texts: Texts, folder: Path) -> None:
    """Second stage, 2 minutes: asked for a function it writes code, a habit for fine-tuning to change."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    chats = random.Random(1).sample(texts.code_chats, CODE_CHATS)
    data = list(batches(tokenizer, [dialogue(chat) for chat in chats]))[:CODE_CHAT_STEPS]
    train(model, adamw(model), data, warmup=5)
    save(model, folder)


def main() -> None:
    """Make the base and write it into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "base")
    parser.add_argument(
        "--second-stage", action="store_true", help="the first stage is in the folder already"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    texts = training_text()
    if not arguments.second_stage:
        read_everything(texts, arguments.folder)
    become_a_code_model(texts, arguments.folder)


if __name__ == "__main__":
    main()
