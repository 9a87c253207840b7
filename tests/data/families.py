"""Tokenizers built to the special tokens of real families, and each family's format, written by hand."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pronghorn.data.templates import library_template


@dataclass(frozen=True)
class Family:
    """``rendered`` is the two-turn conversation of ``CHAT``; ``trained`` what of it must train."""

    bos: str | None
    eos: str
    special: tuple[str, ...]
    rendered: str
    trained: str
    adds_bos: bool = False
    splits: bool = False  # earlier answers are rewritten: only as one row per answer


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Plus one?"},
    {"role": "assistant", "content": "Five."},
]

_CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo plus two?<|im_end|>\n"
    "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nPlus one?<|im_end|>\n"
    "<|im_start|>assistant\nFive.<|im_end|>\n"
)
_CHATML_TRAINED = "Four.<|im_end|>Five.<|im_end|>"

FAMILIES = {
    "chatml": Family(None, "<|im_end|>", ("<|im_start|>",), _CHATML, _CHATML_TRAINED),
    "qwen-2.5": Family(None, "<|im_end|>", ("<|im_start|>", "<|endoftext|>"), _CHATML, _CHATML_TRAINED),
    "qwen-3": Family(
        None,
        "<|im_end|>",
        ("<|im_start|>", "<|endoftext|>"),
        _CHATML.replace("Five.", "<think>\n\n</think>\n\nFive."),
        "<think>\n\n</think>\n\nFour.<|im_end|><think>\n\n</think>\n\nFive.<|im_end|>",
        splits=True,
    ),
    "llama-3": Family(
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo plus two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nPlus one?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFive.<|eot_id|>",
        "Four.<|eot_id|>Five.<|eot_id|>",
        adds_bos=True,
    ),
    "gemma": Family(
        "<bos>",
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nBe brief.\n\nTwo plus two?<end_of_turn>\n"
        "<start_of_turn>model\nFour.<end_of_turn>\n<start_of_turn>user\nPlus one?<end_of_turn>\n"
        "<start_of_turn>model\nFive.<end_of_turn>\n",
        "Four.<end_of_turn>Five.<end_of_turn>",
        adds_bos=True,
    ),
    "mistral": Family(
        "<s>",
        "</s>",
        ("[INST]", "[/INST]"),
        "<s>[INST] Be brief.\n\nTwo plus two?[/INST] Four.</s>[INST] Plus one?[/INST] Five.</s>",
        " Four.</s> Five.</s>",
        adds_bos=True,
    ),
    "mistral-tekken": Family(
        "<s>",
        "</s>",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Two plus two?[/INST]Four.</s>"
        "[INST]Plus one?[/INST]Five.</s>",
        "Four.</s>Five.</s>",
        adds_bos=True,
    ),
    "llama-2": Family(
        "<s>",
        "</s>",
        (),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nTwo plus two? [/INST] Four. </s>"
        "<s>[INST] Plus one? [/INST] Five. </s>",
        " Four. </s> Five. </s>",
        adds_bos=True,
    ),
    "phi-3": Family(
        None,
        "<|endoftext|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|system|>\nBe brief.<|end|>\n<|user|>\nTwo plus two?<|end|>\n<|assistant|>\nFour.<|end|>\n"
        "<|user|>\nPlus one?<|end|>\n<|assistant|>\nFive.<|end|>\n<|endoftext|>",
        "Four.<|end|>Five.<|end|>\n<|endoftext|>",
    ),
    "phi-4": Family(
        None,
        "<|im_end|>",
        ("<|im_start|>", "<|im_sep|>"),
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Two plus two?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Four.<|im_end|><|im_start|>user<|im_sep|>Plus one?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>Five.<|im_end|>",
        _CHATML_TRAINED,
    ),
    "zephyr": Family(
        "<s>",
        "</s>",
        (),
        "<|system|>\nBe brief.</s>\n<|user|>\nTwo plus two?</s>\n<|assistant|>\nFour.</s>\n"
        "<|user|>\nPlus one?</s>\n<|assistant|>\nFive.</s>\n",
        "Four.</s>Five.</s>",
    ),
    "vicuna": Family(
        "<s>",
        "</s>",
        (),
        "<s>Be brief. USER: Two plus two? ASSISTANT: Four.</s>USER: Plus one? ASSISTANT: Five.</s>",
        " Four.</s> Five.</s>",
        adds_bos=True,
    ),
    "alpaca": Family(
        "<s>",
        "</s>",
        (),
        "<s>Be brief.\n\n### Instruction:\nTwo plus two?\n\n### Response:\nFour.</s>\n\n"
        "### Instruction:\nPlus one?\n\n### Response:\nFive.</s>\n\n",
        "Four.</s>Five.</s>",
        adds_bos=True,
    ),
    "deepseek": Family(
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Two plus two?<｜Assistant｜>Four.<｜end▁of▁sentence｜>"
        "<｜User｜>Plus one?<｜Assistant｜>Five.<｜end▁of▁sentence｜>",
        "Four.<｜end▁of▁sentence｜>Five.<｜end▁of▁sentence｜>",
        adds_bos=True,
    ),
}


def tokenizer(family: Family, template: str | None) -> PreTrainedTokenizerFast:
    """One byte is one token, apart from special tokens and a few merged ones (words, two newlines)."""
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [
        ("Ċ", "Ċ"),
        ("F", "o"),
        ("u", "r"),
        ("Fo", "ur"),
        ("Ġ", "Four"),
        ("F", "i"),
        ("v", "e"),
        ("Fi", "ve"),
    ]
    vocabulary = {**letters, **{a + b: len(letters) + n for n, (a, b) in enumerate(merges)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = [token for token in (family.bos, family.eos, *family.special, "<pad>") if token]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    if family.adds_bos and family.bos:
        ids = [(family.bos, backend.token_to_id(family.bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=ids)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family with the library's template as its own."""
    return tokenizer(FAMILIES[name], library_template(name))
