"""The tokenizer inside a GGUF file; what llama.cpp cannot do is refused or told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pronghorn.errors import NotSupportedError, SourceError
from pronghorn.export import gguf_tokens
from pronghorn.export.gguf_spm import merge_scores, tokenize
from pronghorn.export.gguf_tokens import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    padded,
    plan_tokens,
)
from tests import tiny, tokenizer_forms

PRE = {"llama3": "llama-bpe", "qwen2": "qwen2", "tekken": "tekken", "gpt4o": "gpt-4o", "smollm": "smollm"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per form with all that ``plan_tokens`` reads."""
    home = tmp_path_factory.mktemp("forms")
    for form in tokenizer_forms.FORMS:
        (home / form).mkdir()
        (home / form / "config.json").write_text('{"model_type": "llama"}')
        (home / form / "generation_config.json").write_text("{}")
        tokenizer_forms.write_form(home / form, form)
    return {form: home / form for form in tokenizer_forms.FORMS}


def kinds(folder: Path) -> dict[str, int]:
    metadata = plan_tokens(folder).metadata
    return dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))


@pytest.mark.parametrize("form", PRE)
def test_the_pre_tokenizer_is_told_by_how_text_is_split(folders: dict[str, Path], form: str) -> None:
    metadata = plan_tokens(folders[form]).metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == PRE[form]
    merges = json.loads((folders[form] / "tokenizer.json").read_text())["model"]["merges"]
    assert metadata["tokenizer.ggml.merges"] == [" ".join(one) for one in merges]


def test_added_tokens_change_neither_pre_tokenizer_nor_merges(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    fast = AutoTokenizer.from_pretrained(folders["llama3"])
    fast.add_tokens(["<think>", "</think>"])
    fast.save_pretrained(tmp_path)
    before, after = plan_tokens(folders["llama3"]), plan_tokens(tmp_path)
    for key in ("tokenizer.ggml.pre", "tokenizer.ggml.merges"):
        assert after.metadata[key] == before.metadata[key]
    assert after.metadata["tokenizer.ggml.tokens"][-2:] == ["<think>", "</think>"]
    assert after.metadata["tokenizer.ggml.token_type"][-2:] == [USER_DEFINED] * 2


@pytest.mark.parametrize("form", ["gemma", "llama2", "phi3"])
def test_sentencepiece_forms(folders: dict[str, Path], form: str) -> None:
    metadata = plan_tokens(folders[form]).metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is (form != "gemma")
    found = kinds(folders[form])
    assert (found["<unk>"], found["<0x0A>"], found["e"]) == (UNKNOWN, BYTE, NORMAL)
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    assert scores["er"] > scores["<0x0A>"]


def test_types_of_added_tokens(folders: dict[str, Path]) -> None:
    gemma, qwen = kinds(folders["gemma"]), kinds(folders["qwen2"])
    assert (gemma["<bos>"], gemma["\n\n"], gemma["<table>"]) == (CONTROL, USER_DEFINED, USER_DEFINED)
    assert gemma["\u2581" * 3] == NORMAL  # searched before blanks are escaped, so never found in a text
    assert (qwen["<|im_end|>"], qwen["<tool_call>"]) == (CONTROL, USER_DEFINED)


def test_scores_reproduce_the_merges(folders: dict[str, Path]) -> None:
    fast = AutoTokenizer.from_pretrained(folders["gemma"])
    model = json.loads(fast.backend_tokenizer.to_str())["model"]
    scores = merge_scores(model, len(fast))
    text = "def tokenizers():\n    return 'every  blank counts' # Größe, 测试"
    wanted = fast(text, add_special_tokens=False)["input_ids"]
    assert tokenize(text.replace(" ", "\u2581"), model["vocab"], scores) == wanted
    wrong = [-score for score in scores]
    assert tokenize(text.replace(" ", "\u2581"), model["vocab"], wrong) != wanted


def test_special_ids_and_ends(folders: dict[str, Path]) -> None:
    fast = AutoTokenizer.from_pretrained(folders["llama3"])
    found = plan_tokens(folders["llama3"])
    said = {key.removeprefix("tokenizer.ggml."): value for key, value in found.metadata.items()}
    assert said["bos_token_id"] == fast.bos_token_id
    assert said["eos_token_id"] == fast.convert_tokens_to_ids("<|eot_id|>")
    assert (said["add_bos_token"], said["add_eos_token"]) == (True, False)
    assert found.stops == ("<|eot_id|>", "<|end_of_text|>")
    assert found.warnings == ()
    assert plan_tokens(folders["qwen2"]).metadata["tokenizer.ggml.add_bos_token"] is False


def test_ends_without_a_known_name_get_a_place_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    fast = AutoTokenizer.from_pretrained(folders["tekken"])
    fast.save_pretrained(tmp_path)
    ids = [fast.convert_tokens_to_ids(text) for text in ("</s>", "[INST]", "[/INST]", "<unk>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    found = plan_tokens(tmp_path)
    assert found.metadata["tokenizer.ggml.eos_token_id"] == ids[0]
    assert found.metadata["tokenizer.ggml.eot_token_id"] == ids[1]
    assert found.metadata["tokenizer.ggml.eom_token_id"] == ids[2]
    assert any("it does not stop at <unk>" in told for told in found.warnings)


def test_an_end_that_llama_cpp_adds_is_told(folders: dict[str, Path]) -> None:
    (told,) = plan_tokens(folders["smollm"]).warnings
    assert told == "llama.cpp also ends an answer at <|endoftext|>, where transformers would go on"


def test_blanks_behind_special_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    assert plan_tokens(folders["phi3"]).strips  # exactly llama.cpp's rule for models called phi-3
    assert not plan_tokens(folders["llama2"]).strips
    fast = tokenizer_forms.llama2()
    fast.add_tokens([AddedToken("<|user|>", special=True, rstrip=True)])
    fast.add_tokens([AddedToken("<|mark|>", special=True, lstrip=True)])
    fast.save_pretrained(tmp_path)
    found = plan_tokens(tmp_path)
    assert not found.strips
    assert "blanks after <|user|> are kept by llama.cpp, transformers drops them" in found.warnings
    assert "blanks before <|mark|> are kept by llama.cpp, transformers drops them" in found.warnings


def test_a_blank_before_the_first_text_only_is_told(folders: dict[str, Path]) -> None:
    found = plan_tokens(folders["metaspace"])
    assert found.metadata["tokenizer.ggml.add_space_prefix"] is False
    assert any("a plain text lacks the first blank" in told for told in found.warnings)
    fast = tokenizer_forms.metaspace()
    fast.chat_template = None
    without = folders["metaspace"].parent / "without"
    fast.save_pretrained(without)
    assert plan_tokens(without).metadata["tokenizer.ggml.add_space_prefix"] is True


def test_rows_without_a_token_are_filled(folders: dict[str, Path]) -> None:
    found = plan_tokens(folders["gemma"])
    metadata = padded(found, found.count + 2)
    assert metadata["tokenizer.ggml.tokens"][-2:] == [f"[PAD{found.count}]", f"[PAD{found.count + 1}]"]
    assert metadata["tokenizer.ggml.token_type"][-2:] == [UNUSED] * 2
    assert len(metadata["tokenizer.ggml.scores"]) == found.count + 2
    assert padded(found, found.count + 2) == metadata  # asking again changes nothing
    with pytest.raises(NotSupportedError, match=rf"has {found.count} tokens, the embedding 7 rows"):
        padded(found, 7)


def test_templates_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    fast = AutoTokenizer.from_pretrained(folders["llama3"])
    fast.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    fast.save_pretrained(tmp_path)
    metadata = plan_tokens(tmp_path).metadata
    assert metadata["tokenizer.chat_template"] == "{{ 1 }}"
    assert metadata["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]


def _wordpiece() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def _changed(form: str, **parts: Any) -> Tokenizer:
    backend = tokenizer_forms.FORMS[form]().backend_tokenizer
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def _cut_short() -> Tokenizer:
    spec = json.loads(tokenizer_forms.gemma().backend_tokenizer.to_str())
    del spec["model"]["merges"][60:]  # the tokens stay, and llama.cpp would join them all the same
    return Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_wordpiece, "is WordPiece; BPE and sentencepiece BPE are written"),
        (
            lambda: _changed("llama3", pre_tokenizer=pre_tokenizers.Whitespace()),
            "splits text in a way not known",
        ),
        (
            lambda: _changed("llama3", pre_tokenizer=pre_tokenizers.ByteLevel()),
            "splits text in a way not known",
        ),
        (lambda: _changed("smollm", normalizer=normalizers.Lowercase()), "normalises text by Lowercase"),
        (lambda: _changed("gemma", normalizer=normalizers.NFKC()), "changes text by NFKC"),
        (_cut_short, "its merges are not those of a sentencepiece model"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(make: Any, said: str, tmp_path: Path) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="a")
    fast.save_pretrained(tmp_path)
    with pytest.raises(NotSupportedError, match=said) as caught:
        plan_tokens(tmp_path)
    assert "merged_16bit" in caught.value.fix


def test_no_end_token_and_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer\.json"):
        plan_tokens(tmp_path)
    fast = tiny.tokenizer()
    fast.eos_token = None
    fast.save_pretrained(tmp_path)
    with pytest.raises(NotSupportedError, match="names no end token") as caught:
        plan_tokens(tmp_path)
    assert "generation_config.json" in caught.value.fix
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="cannot load the tokenizer"):
        plan_tokens(tmp_path)


def test_every_pre_type_is_a_name_that_llama_cpp_knows() -> None:
    """The names of llama-vocab.cpp; an unknown one is refused at load."""
    known = {"gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o"}
    assert set(gguf_tokens.PRE_TYPES.values()) == known
