"""Bases of every family load strictly; adapters come back trainable, equal, and only onto their own base."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import LoraOptions
from pronghorn.adapters.record import read_record
from pronghorn.errors import AdapterError, ConfigError, NotSupportedError, SourceError
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.patching.accelerate import accelerate
from tests import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter saved here, with noise in every tensor."""
    model = attach_lora(load(base)[0], LoraOptions(r=4), say=None)
    shake(model)
    model.save_pretrained(folder := tmp_path_factory.mktemp("saved") / "adapter")
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def shake(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_loads_with_the_weights_of_the_files(family: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / family, family)
    model, tokenizer = load(base)
    assert not model.training
    assert model.dtype is torch.bfloat16
    assert tokenizer.model_max_length == 256
    written = tiny.model(family, dtype=torch.bfloat16).state_dict()
    assert model.state_dict().keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in model.state_dict().items())


def test_a_soft_cap_is_computed_whatever_transformers_chooses(tmp_path: Path) -> None:
    """Up to 5.17 it runs Gemma 2 in ``sdpa``, which ignores the cap; later it chooses ``eager`` itself."""
    base = tiny.write_base(tmp_path / "base", "gemma2", attn_logit_softcapping=1.0)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    ignored = stock.config._attn_implementation == "sdpa"
    chosen = logits(stock)
    stock.set_attn_implementation("eager")
    said: list[str] = []
    model, _ = load(base, say=said.append)
    assert torch.equal(logits(model), logits(stock))
    assert torch.equal(logits(model), chosen) is not ignored
    assert (
        said[0].endswith("attention in eager: sdpa of this transformers leaves the soft cap of 1 out")
        is ignored
    )
    report = accelerate(attach_lora(model, LoraOptions(r=4), say=None), strict=["attention"])
    assert report.count("attention") == (2, 2)


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("auto", torch.bfloat16),
        (None, torch.bfloat16),
        ("fp32", torch.float32),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
    ],
)
def test_dtype(base: Path, asked: Any, got: torch.dtype) -> None:
    model, _ = load(base, LoadOptions(dtype=asked))
    assert {parameter.dtype for parameter in model.parameters()} == {got}


def drop(folder: Path, name: str) -> None:
    """Remove a tensor from its shard and from the index, so that the files agree with each other."""
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    shard = folder / parsed["weight_map"].pop(name)
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(parsed))


def add(folder: Path, name: str, tensor: torch.Tensor) -> None:
    index = folder / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    shard = folder / "model-00001-of-00003.safetensors"
    parsed["weight_map"][name] = shard.name
    save_file({**load_file(shard), name: tensor}, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(parsed))


def test_missing_tensor_is_never_filled(copy: Path) -> None:
    drop(copy, "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(
        SourceError, match=r"1 missing from the files: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load(copy)


def test_extra_tensor_is_an_error(copy: Path) -> None:
    add(copy, "model.layers.0.mlp.side_proj.weight", torch.zeros(2, 2))
    with pytest.raises(
        SourceError, match=r"1 in the files, not in the model: model\.layers\.0\.mlp\.side_proj"
    ):
        load(copy)


def test_other_shapes_are_an_error_before_the_weights_are_read(copy: Path) -> None:
    edit(copy / "config.json", intermediate_size=80)
    start = time.perf_counter()
    with pytest.raises(SourceError, match=r"6 of another shape: .*\(files \[64, 96\], model \[64, 80\]\)"):
        load(copy)
    assert time.perf_counter() - start < 5


def test_tied_head_is_not_missing(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "tied", "qwen2")
    assert "lm_head.weight" not in (base / "model.safetensors.index.json").read_text()
    model, _ = load(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("model_type", ["no_such_model", "clip"])
def test_models_that_are_no_language_model(copy: Path, model_type: str) -> None:
    edit(copy / "config.json", model_type=model_type)
    with pytest.raises((SourceError, NotSupportedError)):
        load(copy)


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        load(copy)


def test_empty_tokenizer(copy: Path) -> None:
    path = copy / "tokenizer.json"
    parsed = json.loads(path.read_text())
    parsed["model"].update(vocab={}, merges=[])
    parsed["added_tokens"] = []
    path.write_text(json.dumps(parsed))
    with pytest.raises(SourceError, match=r"tokenizer in .* is empty"):
        load(copy)


def test_broken_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(SourceError, match="tokenizer"):
        load(copy)


def test_tokenizer_of_another_model(copy: Path) -> None:
    path = copy / "tokenizer.json"
    parsed = json.loads(path.read_text())
    parsed["model"]["vocab"]["far-away"] = 5000
    path.write_text(json.dumps(parsed))
    with pytest.raises(SourceError, match="token ids up to 5000, the model's embedding has 512 rows"):
        load(copy)


def test_length_beyond_the_model(base: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_length is 257, the model was made for 256"):
        load(base, LoadOptions(max_seq_length=257))
    assert load(base, LoadOptions(max_seq_length=100))[1].model_max_length == 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_seq_length": 0}, "max_seq_length is 0"),
        ({"max_seq_length": True}, "max_seq_length is True"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"device_map": "gpu"}, "device_map is 'gpu'"),
        ({"device_map": "cuda:x"}, "device_map is 'cuda:x'"),
    ],
)
def test_options_that_cannot_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoadOptions(**given)


def test_base_option_needs_an_adapter(base: Path) -> None:
    with pytest.raises(ConfigError, match="is no adapter"):
        load(base, LoadOptions(base=base))


def test_recompute_gives_the_same_gradients(base: Path) -> None:
    plain = attach_lora(load(base, LoadOptions(dtype="fp32"))[0], say=None)
    saving = attach_lora(load(base, LoadOptions(dtype="fp32", recompute=True))[0], say=None)
    assert any(getattr(module, "gradient_checkpointing", False) for module in saving.modules())
    for model in (plain, saving):
        shake(model)
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    pairs = zip(plain.named_parameters(), saving.named_parameters(), strict=True)
    graded = [(one.grad, two.grad) for (_, one), (_, two) in pairs if one.requires_grad]
    assert graded and all(torch.equal(one, two) for one, two in graded)


def test_adapter_comes_back_equal_and_trainable(base: Path, saved: Path) -> None:
    lines: list[str] = []
    model, tokenizer = load(saved, say=lines.append)
    first = attach_lora(load(base)[0], LoraOptions(r=4), say=None)
    shake(first)
    assert torch.equal(logits(model), logits(first))
    assert not torch.equal(logits(model), logits(load(base)[0]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in first.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28
    assert len(lines) == 2 and "nothing quantised" in lines[0]
    assert "LoRA rank 4 on 14 modules" in lines[1]
    assert tokenizer.chat_template == tiny.CHATML


def test_adapter_saved_by_peft_alone_loads(base: Path, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "plain", base)
    model, _ = load(adapter, LoadOptions(dtype="fp32"), say=None)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    assert torch.equal(logits(model), logits(stock))


def test_differences_from_training_are_said(adapter: Path) -> None:
    record = json.loads((adapter / "pronghorn.json").read_text())
    record["versions"]["peft"] = "0.1.0"
    record["rank"] = 8
    record["trainable"] = record["trainable"][2:]
    (adapter / "pronghorn.json").write_text(json.dumps(record))
    lines: list[str] = []
    load(adapter, LoadOptions(max_seq_length=64), say=lines.append)
    said = "\n".join(lines)
    assert "max_seq_length: 256 at training, 64 now" in said
    assert "rank: 8 at training, 4 now" in said
    assert "trainable tensors: 2 new" in said
    assert "peft: 0.1.0 at training" in said


def test_recorded_length_is_the_default(base: Path, tmp_path: Path) -> None:
    model = attach_lora(load(base, LoadOptions(max_seq_length=48))[0], say=None)
    model.save_pretrained(tmp_path / "adapter")
    assert load(tmp_path / "adapter", say=None)[1].model_max_length == 48


def change(adapter: Path, edit_tensors: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit_tensors(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


A_UP = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop(A_UP), f"1 missing: {A_UP}"),
        (lambda t: t.update({"base_model.model.model.layers.9.lora_A.weight": t[A_UP].clone()}), "1 extra: "),
        (
            lambda t: t.update({A_UP: t[A_UP][:2].clone()}),
            r"1 of another shape: .*file \[2, 64\], model \[4, 64\]",
        ),
        (lambda t: t.update({A_UP.replace("base_model", "other"): t.pop(A_UP)}), "1 missing: .*1 extra: "),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(64)}), r"1 extra: .*norm"),
        (lambda t: t[A_UP].fill_(float("nan")), "NaN or infinite"),
    ],
)
def test_adapter_tensors_must_be_exactly_right(adapter: Path, spoil: Any, said: str) -> None:
    change(adapter, spoil)
    with pytest.raises(AdapterError, match=said):
        load(adapter, say=None)


def test_half_an_adapter_is_an_error(adapter: Path) -> None:
    def half(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    change(adapter, half)
    with pytest.raises(AdapterError, match=r"14 missing: .* and 6 more"):
        load(adapter, say=None)


def test_an_adapter_that_changed_its_base_is_refused(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", init_lora_weights="pissa_niter_4")
    with pytest.raises(NotSupportedError, match="moves the base's largest singular values"):
        load(adapter, say=None)


def test_loading_leaves_the_random_stream_alone(adapter: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(adapter, say=None)
    assert torch.equal(torch.rand(2), expected)


def test_the_wrong_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tiny.write_base(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match=r"is not the base the adapter .* was trained on"):
        load(adapter, LoadOptions(base=other), say=None)


def test_a_base_that_moved_is_found_by_hand(base: Path, adapter: Path, tmp_path: Path) -> None:
    edit(adapter / "pronghorn.json", base_path="/gone")
    with pytest.raises(AdapterError, match="is not here: '/gone'"):
        load(adapter, say=None)
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    assert load(adapter, LoadOptions(base=moved), say=None)[0].peft_config


def test_a_base_that_changed_in_place_is_refused(copy: Path, tmp_path: Path) -> None:
    attach_lora(load(copy)[0], say=None).save_pretrained(tmp_path / "adapter")
    shutil.rmtree(copy)
    tiny.write_base(copy, seed=2)
    with pytest.raises(AdapterError, match="is not the base"):
        load(tmp_path / "adapter", say=None)


def test_broken_record_is_an_error(adapter: Path) -> None:
    (adapter / "pronghorn.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"pronghorn\.json cannot be used"):
        load(adapter, say=None)


def test_resized_vocabulary_survives(base: Path, tmp_path: Path) -> None:
    model, tokenizer = load(base)
    tokenizer.add_tokens(["<|tool|>", "<|think|>", "<|note|>"])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    model = attach_lora(model, LoraOptions(r=4), say=None)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    record = read_record(tmp_path / "adapter")
    assert record is not None and record.vocab_rows == 515
    again, tokens = load(tmp_path / "adapter", say=None)
    assert again.get_input_embeddings().weight.shape[0] == 515
    assert tokens.convert_tokens_to_ids("<|note|>") == 514
    assert torch.equal(logits(again), logits(model))


def test_nothing_global_changes(base: Path, saved: Path) -> None:
    import peft
    import transformers

    watched = (transformers.LlamaForCausalLM, transformers.PreTrainedModel, peft.PeftModel, peft.LoraConfig)
    before = [dict(vars(one)) for one in watched]
    level = transformers.utils.logging.get_verbosity()
    shown = transformers.utils.logging.is_progress_bar_enabled()
    load(saved, say=None)
    attach_lora(load(base)[0], say=None)
    assert [dict(vars(one)) for one in watched] == before
    assert transformers.utils.logging.get_verbosity() == level
    assert transformers.utils.logging.is_progress_bar_enabled() == shown
