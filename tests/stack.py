"""What the installed libraries have, asked of them, so that a test can say what an older one does instead."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import accelerate
import peft
import pytest
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests import tiny

# PEFT 0.17 has no way to adapt a tied embedding and keep it one tensor with the head
PEFT_KEEPS_TIED = "ensure_weight_tying" in {field.name for field in dataclasses.fields(LoraConfig)}
# from 0.18 PEFT multiplies the update of an embedding by the scale that Gemma's embeddings have
PEFT_SCALES_EMBEDDINGS = hasattr(lora.Embedding, "_get_embed_scale")


def experts_are_stacked() -> bool:
    """Whether a layer's experts are one parameter ``[experts, ...]``; in transformers 4 they are a list."""
    return any(parameter.dim() == 3 for parameter in tiny.model("mixtral").parameters())


def peft_trains_head_rows() -> bool:
    """Whether PEFT trains single rows of an output head; 0.17 fails to wrap it."""
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]})
    try:
        get_peft_model(tiny.model("llama"), config)
    except AttributeError:
        return False
    return True


@contextlib.contextmanager
def only_newer_peft(refusal: type[Exception], newer: bool = PEFT_KEEPS_TIED) -> Iterator[None]:
    """A block that makes an adapter which PEFT 0.17 cannot: there it must fail so, and the test ends."""
    if newer:
        yield
        return
    with pytest.raises(refusal):
        yield
    pytest.skip(f"peft {peft.__version__} makes no such adapter")


def require_models_on_disk(folder: Path) -> None:
    """Skip where a model cannot be left on the disk whole: accelerate 1.10 refuses to."""
    placing = {"device_map": {"": "disk"}, "offload_folder": folder / "offloaded"}
    try:
        AutoModelForCausalLM.from_pretrained(tiny.write_base(folder / "base"), **placing)
    except ValueError as error:
        assert "offload the whole model to the disk" in str(error)
        pytest.skip(f"accelerate {accelerate.__version__} leaves no whole model on the disk")


def require_family(model_type: str) -> None:
    """Skip the test where transformers says itself that it does not know this family."""
    if model_type not in CONFIG_MAPPING:
        with pytest.raises(ValueError, match=f"Unrecognized model identifier: {model_type}"):
            AutoConfig.for_model(model_type)
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
