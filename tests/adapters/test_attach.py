"""Attaching LoRA: what is wrapped, what trains, what is refused, and that PEFT alone reads what was saved."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pronghorn.adapters.attach import attach_lora, report
from pronghorn.adapters.options import DEFAULT_TARGETS, LoraOptions
from pronghorn.adapters.save import save_adapter
from pronghorn.errors import AdapterError, NotSupportedError
from pronghorn.loading.load import load
from tests import tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def shake(model: Any, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}


def test_only_the_adapter_trains_and_it_is_said() -> None:
    said: list[str] = []
    model = attach_lora(tiny.model("llama"), LoraOptions(r=4), say=said.append)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28 and all("lora_" in name for name in trainable)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert said == [str(report(model))]
    assert said[0].startswith("LoRA rank 4 on 14 modules (q_proj x2, ") and f"{count:,} of " in said[0]


def test_the_line_goes_to_stdout_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    attach_lora(tiny.model("llama"))
    assert "LoRA rank 16 on 14 modules" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_every_module_that_holds_the_adapter_is_counted(family: str) -> None:
    model = attach_lora(tiny.model(family), LoraOptions(r=4), say=None)

    def held(adapter: str) -> int:
        return sum(f".lora_A.{adapter}." in name for name in model.state_dict())

    assert sum(report(model).modules.values()) == held("default") > 0
    model.add_adapter("second", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    assert sum(report(model).modules.values()) == held("default")
    model.set_adapter("second")
    assert report(model).modules == {"o_proj": 2} and held("second") == 2


def test_same_seed_same_adapter_and_untouched_random_stream() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    base = tiny.model("llama")
    torch.manual_seed(11)
    first = adapter_state(attach_lora(base, LoraOptions(seed=5), say=None))
    assert torch.equal(torch.rand(3), expected)
    second = adapter_state(attach_lora(tiny.model("llama"), LoraOptions(seed=5), say=None))
    third = adapter_state(attach_lora(tiny.model("llama"), LoraOptions(seed=6), say=None))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_a_new_adapter_changes_nothing(init: Any) -> None:
    base = tiny.model("qwen3")
    before = logits(base)
    assert torch.equal(logits(attach_lora(base, LoraOptions(init=init), say=None)), before)


def test_a_second_wrap_is_refused() -> None:
    model = attach_lora(tiny.model("llama"), say=None)
    with pytest.raises(AdapterError, match="already has an adapter"):
        attach_lora(model, say=None)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "PISSA"])
def test_initialisations_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(NotSupportedError, match="would no longer belong to the base on disk"):
        LoraOptions(init=init)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"r": 0}, "the rank r is 0"),
        ({"r": True}, "the rank r is True"),
        ({"r": 2.5}, "the rank r is 2.5"),
        ({"alpha": 0}, "lora_alpha is 0"),
        ({"alpha": "16"}, "lora_alpha is '16'"),
        ({"dropout": 1.0}, "lora_dropout is 1.0"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"tied": "both"}, "tied is 'both'"),
        ({"targets": ()}, "no target is named"),
        ({"layers": [0], "last_layers": 1}, "layers and last_layers are both set"),
        ({"last_layers": 0}, "last_layers is 0"),
        ({"layers_pattern": "layers"}, "layers_pattern is set without layers"),
        ({"init": "orthogonal", "r": 3}, "needs an even rank"),
    ],
)
def test_options_that_cannot_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(AdapterError, match=said) as caught:
        LoraOptions(**given)
    assert caught.value.fix


def test_unknown_init_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="'eva' is not known here"):
        LoraOptions(init="eva")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "r": 8},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"targets": list(DEFAULT_TARGETS), "layers": [1]},
        {"targets": ["embed_tokens", "q_proj"]},
        {"init": False},
        {"alpha": 7.5},
    ],
    ids=str,
)
def test_saved_by_us_read_by_peft_and_by_us(options: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    model = attach_lora(load(base)[0], LoraOptions(**options), say=None)
    shake(model)
    want = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    assert not torch.equal(want, logits(stock))
    assert torch.equal(want, logits(PeftModel.from_pretrained(stock, tmp_path / "adapter")))
    again, _ = load(tmp_path / "adapter", say=None)
    assert torch.equal(want, logits(again))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in again.named_parameters() if parameter.requires_grad}


def test_plain_route_in_a_process_without_pronghorn(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    model, tokenizer = load(base)
    model = attach_lora(model, LoraOptions(r=4), say=None)
    shake(model)
    ids = tokenizer("def open(file):", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save(model.eval()(ids).logits, tmp_path / "logits.pt")
    text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    model.save_pretrained(tmp_path / "adapter")
    script = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "adapter")!r})
model = AutoModelForCausalLM.from_pretrained({str(base)!r}, dtype="auto")
model = PeftModel.from_pretrained(model, {str(tmp_path / "adapter")!r}, is_trainable=True)
ids = tokenizer("def open(file):", return_tensors="pt").input_ids
assert torch.equal(model.eval()(ids).logits, torch.load({str(tmp_path / "logits.pt")!r}))
assert tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0]) == {text!r}
model.train()(ids, labels=ids).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
assert "pronghorn" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folder_has_tokenizer_record_and_modes_of_the_umask(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    model = attach_lora(load(base)[0], say=None)
    before = os.umask(0o027)
    try:
        model.save_pretrained(tmp_path / "new")
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "optimizer.txt").write_text("stays")
        model.save_pretrained(tmp_path / "old")
    finally:
        os.umask(before)
    for folder in (tmp_path / "new", tmp_path / "old"):
        names = {path.name for path in folder.iterdir()} - {"optimizer.txt"}
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "pronghorn.json",
            "tokenizer.json",
        } <= names
        assert not any(name.startswith(".") for name in names)
        modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in names}
        assert modes == {0o640}
    assert (tmp_path / "old" / "optimizer.txt").read_text() == "stays"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "new" / name).read_bytes() == (base / name).read_bytes()


def test_a_changed_tokenizer_is_saved_as_it_is_now(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    model, tokenizer = load(base)
    tokenizer.chat_template = "{{ messages }}"
    attach_lora(model, say=None).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == "{{ messages }}"
    now = json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text())
    then = json.loads((base / "tokenizer_config.json").read_text())
    assert now["tokenizer_class"] == then["tokenizer_class"]
    assert now.get("model_max_length") == then.get("model_max_length")
    assert tokenizer.model_max_length == 256


def test_failed_save_leaves_nothing(tmp_path: Path) -> None:
    model = attach_lora(tiny.model("llama"), say=None)

    class Broken:
        model_max_length = 1

        def save_pretrained(self, folder: Path) -> None:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, tmp_path / "adapter", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"safe_serialization": False}, "pickled"),
        ({"selected_adapters": ["other"]}, "there is no adapter 'other'"),
        ({"selected_adapters": ["a", "b"]}, "name exactly one"),
        ({"push_to_hub": True}, "nothing is uploaded"),
        ({"colour": "red"}, "knows no colour"),
    ],
)
def test_save_pretrained_refuses(arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = attach_lora(tiny.model("llama"), say=None)
    with pytest.raises((AdapterError, NotSupportedError), match=said):
        model.save_pretrained(tmp_path / "adapter", **arguments)
    assert not (tmp_path / "adapter").exists()


def test_one_of_several_adapters_is_saved_by_choice(tmp_path: Path) -> None:
    model = attach_lora(tiny.model("llama"), LoraOptions(r=4), say=None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="no adapter was chosen; the model has default, second"):
        model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["second"])
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 4
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2


def test_trainer_state_dict_is_what_is_written(tmp_path: Path) -> None:
    model = attach_lora(tiny.model("llama"), LoraOptions(r=4), say=None)
    gathered = {name: torch.full_like(value, 2.0) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "adapter", state_dict=gathered)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert all((file.get_tensor(name) == 2).all() for name in file.keys())  # noqa: SIM118
