"""New tokens: both ends grow, only their rows train and are saved; merged, and loaded by others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pronghorn import FastLanguageModel, add_new_tokens
from pronghorn.adapters.attach import attach_lora, report
from pronghorn.adapters.options import LoraOptions
from pronghorn.errors import AdapterError, ConfigError, NotSupportedError
from pronghorn.export.run import export
from pronghorn.loading.load import load
from pronghorn.sources.record import read_record
from pronghorn.training.trainer import add_fused_head
from tests import tiny
from tests.stack import PEFT_KEEPS_TIED, only_newer_peft, peft_trains_head_rows

NEW = ["<tool>", "</tool>", "zebra crossing"]
DTYPE = torch.float32


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "tied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return tiny.write_base(folder, dtype=DTYPE, tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embedding has 32 rows more than the tokenizer has tokens, as Qwen's has."""
    return tiny.write_base(tmp_path_factory.mktemp("padded"), dtype=DTYPE, vocab_size=544)


def attach(model: Any, **options: Any) -> Any:
    """An adapter for a model with new tokens; PEFT 0.17 cannot where the head is a matrix of its own."""
    apart = model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    with only_newer_peft(NotSupportedError, newer=not apart or peft_trains_head_rows()):
        return attach_lora(model, LoraOptions(r=4, **options), say=None)


def trained(folder: Path, **options: Any) -> tuple[Any, Any]:
    """An adapter with new tokens, three steps on a text that uses them."""
    model, tokenizer = load(folder, say=None)
    add_new_tokens(model, tokenizer, NEW, say=None)
    model = attach(model, **options)
    ids = tokenizer("call <tool>add</tool> at the zebra crossing", return_tensors="pt")["input_ids"]
    assert {512, 513, 514} <= set(ids[0].tolist())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    ids = tokenizer("<tool> the zebra crossing</tool>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[..., :515].float()


def tensors(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_rows_start_at_the_mean_and_the_old_ones_stay(base: Path) -> None:
    model, tokenizer = load(base, say=None)
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    tied = first.weight is last.weight
    before = [first.weight.detach().clone(), last.weight.detach().clone()]
    add_new_tokens(model, tokenizer, NEW, say=None)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) == tied == bool(model.config.tie_word_embeddings)
    assert model.config.vocab_size == len(tokenizer) == 515
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:512], old)
        assert torch.allclose(new[512:], old.double().mean(0).float().expand(3, -1), atol=1e-7)


def test_interpolation_moves_rows_to_their_spelling(base: Path) -> None:
    model, tokenizer = load(base, say=None)
    weight = model.get_input_embeddings().weight.detach().clone()
    spelt = tokenizer("zebra crossing", add_special_tokens=False)["input_ids"]
    add_new_tokens(model, tokenizer, NEW, method="interpolation", interpolation=0.25, say=None)
    expected = 0.75 * weight.mean(0) + 0.25 * weight[spelt].mean(0)
    assert torch.allclose(model.get_input_embeddings().weight[514], expected, atol=1e-6)


def test_only_the_new_rows_train_and_are_saved(base: Path, tmp_path: Path) -> None:
    model, _ = trained(base)
    tied = bool(model.config.tie_word_embeddings)
    names = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(names) == (1 if tied else 2) and all("trainable_tokens_delta" in name for name in names)
    start = load(base, say=None)[0].get_input_embeddings().weight.mean(0)
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert rows.dtype is torch.float32 and (rows - start).abs().min(1).values.max() > 1e-3
    assert report(model).tokens == 3 and "rows of 3 tokens" in str(report(model))
    model.save_pretrained(tmp_path / "adapter")
    saved = {name: shape for name, shape in tensors(tmp_path / "adapter").items() if "lora_" not in name}
    assert list(saved.values()) == [[3, 64]] * (1 if tied else 2)
    record = read_record(tmp_path / "adapter")
    assert record is not None and record.vocab_rows == 515


def test_saved_rows_load_with_peft_alone_and_here(base: Path, tmp_path: Path) -> None:
    model, tokenizer = trained(base)
    want = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    again, tokens = load(tmp_path / "adapter", say=None)
    assert torch.equal(logits(again, tokens), want)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPE)
    plain.resize_token_embeddings(515, mean_resizing=False)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokens.convert_tokens_to_ids(NEW) == [512, 513, 514]
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert (logits(loaded, tokens) - want).abs().max() < 1e-5
    merged = loaded.merge_and_unload()
    assert (logits(merged, tokens) - want).abs().max() < 1e-4
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=DTYPE)
    assert (logits(automatic, tokens) - want).abs().max() < 1e-5


def test_merged_folder_is_what_was_trained(base: Path, tmp_path: Path) -> None:
    model, tokenizer = trained(base)
    want = logits(model, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    tied = bool(model.config.tie_word_embeddings)  # one of the two is also compared in a fresh process
    done = export(tmp_path / "adapter", tmp_path / "merged", verify=tied)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=DTYPE)
    tokens = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 515
    assert (logits(merged, tokens) - want).abs().max() < 1e-4
    assert "config.json: vocab_size 512 -> 515" in done.changes


def test_spare_rows_are_used_before_the_embedding_grows(padded: Path, tmp_path: Path) -> None:
    model, tokenizer = load(padded, say=None)
    before = model.get_input_embeddings().weight.detach().clone()
    add_new_tokens(model, tokenizer, NEW, say=None)
    assert torch.equal(
        model.get_input_embeddings().weight, before
    )  # still the base's, which export relies on
    wrapped = attach(model)
    rows = wrapped.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert torch.allclose(rows[0], before[:512].mean(0), atol=1e-6)  # the padding counts for nothing
    model, tokenizer = trained(padded)
    model.save_pretrained(tmp_path / "adapter")
    record = read_record(tmp_path / "adapter")
    assert record is not None and record.vocab_rows is None
    export(tmp_path / "adapter", tmp_path / "merged", verify=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=DTYPE)
    assert merged.config.vocab_size == 544
    assert (logits(merged, tokenizer) - logits(model, tokenizer)).abs().max() < 1e-4


def test_tokens_that_the_base_has_no_row_for_get_one(tmp_path: Path) -> None:
    """transformers 5 gives this tokenizer one token more than the embedding has rows."""
    model, tokenizer = load(tiny.write_base(tmp_path / "base", "qwen2", dtype=DTYPE), say=None)
    if len(tokenizer) == 512:  # transformers 4 does not
        tokenizer.add_tokens(["<unk>"])
    assert (len(tokenizer), model.get_input_embeddings().weight.shape[0]) == (513, 512)
    add_new_tokens(model, tokenizer, NEW, say=None)
    wrapped = attach(model)
    layer = wrapped.get_input_embeddings().token_adapter
    assert layer.token_indices["default"] == [512, 513, 514, 515]
    assert torch.equal(layer.trainable_tokens_delta["default"][0], layer.trainable_tokens_delta["default"][1])
    wrapped.save_pretrained(tmp_path / "adapter")
    assert max(shape[0] for name, shape in tensors(tmp_path / "adapter").items() if "lora_" not in name) == 4


def test_tokenizer_files_are_the_base_s_but_for_listed_changes(base: Path, tmp_path: Path) -> None:
    model, tokenizer = trained(base)
    model.save_pretrained(tmp_path / "adapter")
    record = read_record(tmp_path / "adapter")
    assert record is not None
    assert "tokenizer.json: taken from the adapter (3 new tokens)" in record.tokenizer_changes
    named = {line.partition(":")[0] for line in record.tokenizer_changes}
    for path in base.iterdir():
        if path.suffix == ".safetensors" or path.name in ("config.json", "generation_config.json"):
            continue
        there = tmp_path / "adapter" / path.name
        if path.name.endswith(".index.json"):
            continue
        assert (there.read_bytes() == path.read_bytes()) == (path.name not in named), path.name
    ours, theirs = (json.loads((f / "tokenizer.json").read_text()) for f in (base, tmp_path / "adapter"))
    added = theirs.pop("added_tokens")
    assert [token["content"] for token in added[len(ours.pop("added_tokens")) :]] == NEW
    assert theirs == ours
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    text = "a<tool>b zebra crossing</tool>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_run_without_changes_keeps_every_tokenizer_file(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base, say=None)
    tokenizer("a", truncation=True, max_length=4)  # leaves its setting behind in the tokenizer
    attach_lora(model, LoraOptions(r=4), say=None).save_pretrained(tmp_path / "adapter")
    record = read_record(tmp_path / "adapter")
    assert record is not None and record.tokenizer_changes == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "adapter" / name).read_bytes() == (base / name).read_bytes()


def test_added_in_two_calls(base: Path) -> None:
    model, tokenizer = load(base, say=None)
    add_new_tokens(model, tokenizer, NEW[:1], say=None)
    add_new_tokens(model, tokenizer, NEW[1:], say=None)
    wrapped = attach(model)
    assert wrapped.get_input_embeddings().token_adapter.token_indices["default"] == [512, 513, 514]


def test_whole_embeddings_train_instead_where_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base, say=None)
    add_new_tokens(model, tokenizer, NEW, say=None)
    options = LoraOptions(r=4, modules_to_save=("embed_tokens", "lm_head"), tied="keep")
    tied = bool(model.config.tie_word_embeddings)
    with only_newer_peft(NotSupportedError, newer=PEFT_KEEPS_TIED or not tied):
        wrapped = attach_lora(model, options, say=None)
    assert report(wrapped).tokens == 0
    wrapped.save_pretrained(tmp_path / "adapter")
    assert [515, 64] in tensors(tmp_path / "adapter").values()
    again, tokens = load(tmp_path / "adapter", say=None)
    assert torch.equal(logits(again, tokens), logits(wrapped, tokenizer))


def test_accelerated_rows_train_alike(base: Path) -> None:
    gradients = []
    for accelerated in (False, True):
        model, tokenizer = FastLanguageModel.from_pretrained(str(base), use_gradient_checkpointing=False)
        add_new_tokens(model, tokenizer, NEW)
        apart = not model.config.tie_word_embeddings
        with only_newer_peft(NotSupportedError, newer=not apart or peft_trains_head_rows()):
            model = FastLanguageModel.get_peft_model(model, r=4, accelerate=accelerated)
        ids = tokenizer("call <tool>add</tool> at the zebra crossing", return_tensors="pt")["input_ids"]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "tokens_delta" in n])
    for plain, fast in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert (plain - fast).abs().max() <= 1e-5 * plain.abs().max()


def test_rows_train_alike_through_trl_s_fused_head(base: Path) -> None:
    """TRL's trainers read weight and bias of the head themselves, and PEFT's wrapper has no bias."""
    gradients = []
    for fused in (False, True):
        model, tokenizer = load(base, say=None)
        add_new_tokens(model, tokenizer, NEW, say=None)
        model = attach(model)
        ids = tokenizer("call <tool>add</tool> at the zebra crossing", return_tensors="pt")["input_ids"]
        if fused and not add_fused_head(model.get_base_model()):
            pytest.skip("this TRL has no fused head")
        options = {"fused_lm_head": True} if fused else {}
        model.train()(input_ids=ids, labels=ids, **options).loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "tokens_delta" in n])
    for plain, fast in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert (plain - fast).abs().max() <= 1e-4 * plain.abs().max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"new_tokens": []}, r"new_tokens is \[\]"),
        ({"new_tokens": "<tool>"}, "new_tokens is '<tool>'"),
        ({"new_tokens": [""]}, r"new_tokens is \[''\]"),
        ({"new_tokens": ["<a>", "<a>"]}, "'<a>' is in new_tokens twice"),
        ({"new_tokens": ["<|im_start|>"]}, r"'<\|im_start\|>' is a token already \(id 2\)"),
        ({"new_tokens": NEW, "method": "zero"}, "method is 'zero'"),
        ({"new_tokens": NEW, "interpolation": 2}, "interpolation is 2"),
    ],
)
def test_wrong_arguments(base: Path, arguments: dict[str, Any], message: str) -> None:
    model, tokenizer = load(base, say=None)
    with pytest.raises(ConfigError, match=message):
        add_new_tokens(model, tokenizer, **arguments)
    assert len(tokenizer) == 512


def test_models_that_cannot_take_them(base: Path) -> None:
    model, tokenizer = load(base, say=None)
    wrapped = attach_lora(model, LoraOptions(r=4), say=None)
    with pytest.raises(AdapterError, match="already has an adapter"):
        add_new_tokens(wrapped, tokenizer, NEW)
    model, tokenizer = load(base, say=None)
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(512))
    with pytest.raises(NotSupportedError, match="lm_head has a bias"):
        add_new_tokens(model, tokenizer, NEW)
