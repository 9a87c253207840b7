"""Small tokenizers in the forms of the families: how text is split, merged and marked, with their templates.

``write_form(folder, form)`` puts one beside a tiny model. Vocabularies are trained on a fixed text; merges of
the sentencepiece forms are all pairs that join to a token, as converted tokenizers have them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests import tiny

SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+#"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*#"
    r"|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the patterns of the tokenizer.json files of Llama 3, Qwen 2 to 3, Mistral Nemo and Phi-4-mini
LLAMA3 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = _WORDS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = _CASED.replace("#", "").replace("@", "")
GPT4O = _CASED.replace("#", _WORDS + "?").replace("@", "{1,3}")

LLAMA3_CHAT = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI3_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN_CHAT = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}" + tiny.CHATML
)


@lru_cache
def _text() -> str:
    return Path(torch.__file__).read_text(encoding="utf-8") + "Größe naïve δοκιμή проверка 测试 テスト " * 3


def _byte_level(
    pre: pre_tokenizers.PreTokenizer, added: list[str | AddedToken], *, ignore_merges: bool = False
) -> Tokenizer:
    made = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    made.pre_tokenizer, made.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB_SIZE - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_text().splitlines(), trainer)
    for token in added:
        if isinstance(token, str):
            made.add_special_tokens([token])
        else:
            made.add_tokens([token])
    return made


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@lru_cache
def _pieces(specials: tuple[str, ...], count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A sentencepiece-like vocabulary: specials, 256 bytes, single characters, pieces; and all its merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=count - len(specials) - 256, show_progress=False)
    trained.train_from_iterator(_text().splitlines(), trainer)
    texts = [text for text, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    ordered = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *texts]
    vocabulary = {text: number for number, text in enumerate(ordered)}
    merges = [
        (text[:cut], text[cut:])
        for text in texts
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    return vocabulary, merges


def _sentencepiece(specials: tuple[str, ...], count: int = tiny.VOCAB_SIZE) -> Tokenizer:
    vocabulary, merges = _pieces(specials, count)
    return Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def _wrap(backend: Tokenizer, template: str | None, **named: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    fast.chat_template = template
    return fast


def _starts_with(backend: Tokenizer, token: str) -> None:
    number = backend.token_to_id(token)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, number)]
    )


def llama3() -> PreTrainedTokenizerFast:
    """Llama 3: digits in threes, merges ignored for whole words, a start token added."""
    specials = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]
    made = _byte_level(_split(LLAMA3), specials, ignore_merges=True)
    _starts_with(made, "<|begin_of_text|>")
    return _wrap(made, LLAMA3_CHAT, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def qwen2() -> PreTrainedTokenizerFast:
    """Qwen 2, 2.5 and 3: single digits, NFC, no start token, a default system message."""
    called = AddedToken("<tool_call>", special=False, normalized=False)
    made = _byte_level(_split(QWEN2), ["<|endoftext|>", "<|im_start|>", "<|im_end|>", called])
    made.normalizer = normalizers.NFC()
    return _wrap(
        made, QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def tekken() -> PreTrainedTokenizerFast:
    """Mistral Nemo."""
    made = _byte_level(_split(TEKKEN), ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], ignore_merges=True)
    _starts_with(made, "<s>")
    return _wrap(made, MISTRAL_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gpt4o() -> PreTrainedTokenizerFast:
    """Phi-4-mini."""
    made = _byte_level(_split(GPT4O), ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    return _wrap(made, PHI3_CHAT, bos_token="<|endoftext|>", eos_token="<|end|>")


def smollm() -> PreTrainedTokenizerFast:
    """SmolLM 2: GPT-2's words, digits one by one."""
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made = _byte_level(pre, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return _wrap(made, tiny.CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>")


def gemma() -> PreTrainedTokenizerFast:
    """Gemma 2 and 3: sentencepiece without a first blank, blanks of several widths as tokens of their own."""
    specials = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    made = _sentencepiece(specials, tiny.VOCAB_SIZE - 3)
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(list(specials))
    made.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", SPACE * 3, "<table>")])
    _starts_with(made, "<bos>")
    return _wrap(made, GEMMA_CHAT, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


def _llama2(specials: tuple[str, ...], added: list[AddedToken | str]) -> Tokenizer:
    made = _sentencepiece(specials, tiny.VOCAB_SIZE - len(added))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([*specials, *added])
    return made


def llama2() -> PreTrainedTokenizerFast:
    """Llama 2, TinyLlama, Mistral before Nemo: sentencepiece with a first blank in every text."""
    made = _llama2(("<unk>", "<s>", "</s>"), ["<|im_start|>", "<|im_end|>"])
    _starts_with(made, "<s>")
    return _wrap(made, MISTRAL_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def phi3() -> PreTrainedTokenizerFast:
    """Phi-3: Llama 2's, and blanks behind special tokens are dropped."""
    added = ["<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    made = _llama2(
        ("<unk>", "<s>", "</s>"), ["<|endoftext|>", *(AddedToken(text, rstrip=True) for text in added)]
    )
    made.add_special_tokens([AddedToken("</s>", rstrip=True)])
    return _wrap(
        made,
        PHI3_CHAT,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        unk_token="<unk>",
        pad_token="<|endoftext|>",
    )


def metaspace() -> PreTrainedTokenizerFast:
    """Llama 2's vocabulary in the newer form: a blank before the first text only."""
    made = _sentencepiece(("<unk>", "<s>", "</s>"), tiny.VOCAB_SIZE - 2)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    _starts_with(made, "<s>")
    return _wrap(made, MISTRAL_CHAT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


FORMS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    form.__name__: form for form in (llama3, qwen2, tekken, gpt4o, smollm, gemma, llama2, phi3, metaspace)
}
STOPS = {"llama3": ("<|eot_id|>", "<|end_of_text|>"), "qwen2": ("<|im_end|>", "<|endoftext|>"),
         "gemma": ("<eos>", "<end_of_turn>"), "phi3": ("<|endoftext|>", "<|end|>")}  # fmt: skip


def write_form(folder: Path, form: str) -> PreTrainedTokenizerFast:
    """Replace the tokenizer of a model folder; config.json and generation_config.json get its special ids."""
    import json

    fast = FORMS[form]()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    fast.save_pretrained(folder)
    stops = [fast.convert_tokens_to_ids(text) for text in STOPS.get(form, (fast.eos_token,))]
    ids = {"bos_token_id": fast.bos_token_id, "eos_token_id": stops[0], "pad_token_id": fast.pad_token_id}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        values = {**json.loads(path.read_text()), **ids}
        values["eos_token_id"] = stops if name != "config.json" else fast.eos_token_id
        path.write_text(json.dumps(values))
    return fast
