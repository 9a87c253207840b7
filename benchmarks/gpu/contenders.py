"""How each contender gets its model: one base of random weights, one set of adapters, and its own means."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import nf4
from benchmarks.gpu.shapes import BATCHES, SHAPES, Batch, Shape

RANK = 16


def base(shape: Shape, device: str, dtype: torch.dtype, tokens: int) -> Any:
    """A model of random weights, made on the device; the same for every contender."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.type, max_position_embeddings=max(tokens, 8192), use_cache=False, **dict(shape.config)
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def attach(model: Any) -> Any:
    """LoRA on every linear as PEFT's defaults have it."""
    import peft

    options = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, options)


def fill(model: Any) -> None:
    """The same adapters for everybody; B is not zero, which would hide half of the gradients."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda pair: _plain(pair[0])):
            if "lora_A" in name or "lora_B" in name:
                width = parameter.shape[-1]
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * (width**-0.5 if "lora_A" in name else 0.02))


def _plain(name: str) -> str:
    return name.replace("base_model.model.", "")


def batch(shape: Shape, cut: Batch, device: str, *, metadata: bool) -> dict[str, Any]:
    """Random tokens; the first of a document is predicted from nothing. All metadata is made on the host."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, shape.get("vocab_size"), (cut.documents, cut.length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100
    if not cut.packed:
        return _to(device, {"input_ids": ids, "labels": labels})
    positions = torch.arange(cut.length).repeat(cut.documents)[None]
    made: dict[str, Any] = {
        "input_ids": ids.view(1, -1),
        "labels": labels.view(1, -1),
        "position_ids": positions,
    }
    if metadata:
        starts = torch.arange(cut.documents + 1, dtype=torch.int32) * cut.length
        made |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        made |= {"max_length_q": cut.length, "max_length_k": cut.length}
    return _to(device, made)


def _to(device: str, made: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()}


def _peft(model: Any) -> Any:
    model = attach(model)
    fill(model)
    return model


def _recompute(model: Any) -> Any:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _pronghorn(model: Any) -> Any:
    from pronghorn.patching.accelerate import accelerate

    model = _peft(model).train()
    report = accelerate(model)
    print(report)
    return model


def _by_bitsandbytes(model: Any) -> Any:
    model = nf4.convert(model, nf4.by_bitsandbytes)
    model.is_loaded_in_4bit = True  # what PEFT chooses its layers by
    return model


def _liger(model: Any) -> Any:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)
    return _peft(model)


BUILD: dict[str, Callable[[Any], Any]] = {
    "pronghorn": _pronghorn,
    "pronghorn-recompute": lambda model: _recompute(_pronghorn(model)),
    "peft": _peft,
    "peft-recompute": lambda model: _recompute(_peft(model)),
    "trl": lambda model: _recompute(_peft(model)),
    "liger": lambda model: _recompute(_liger(model)),
    "pronghorn-nf4": lambda model: _pronghorn(nf4.convert(model, nf4.PackedLinear)),
    "pronghorn-nf4-recompute": lambda model: _recompute(_pronghorn(nf4.convert(model, nf4.PackedLinear))),
    "peft-decoded-recompute": lambda model: _recompute(_peft(nf4.convert(model, nf4.round_to_nf4))),
    "peft-nf4-recompute": lambda model: _recompute(_peft(_by_bitsandbytes(model))),
}


def build(contender: str, shape_name: str, batch_name: str, device: str, dtype: torch.dtype) -> Any:
    """The contender's model in train mode."""
    shape, cut = SHAPES[shape_name], BATCHES[batch_name]
    if contender.startswith("unsloth"):
        return _unsloth(shape, cut, device, dtype, four_bit=contender.endswith("nf4"))
    return BUILD[contender](base(shape, device, dtype, cut.length)).train()


def _unsloth(shape: Shape, cut: Batch, device: str, dtype: torch.dtype, *, four_bit: bool) -> Any:
    """Unsloth loads folders only, and must be imported before transformers."""
    from unsloth import FastLanguageModel  # isort: skip

    with tempfile.TemporaryDirectory() as folder:
        base(shape, device, dtype, cut.length).save_pretrained(folder)
        tokenizer(shape).save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=cut.length, dtype=dtype, load_in_4bit=four_bit
        )
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=RANK, lora_alpha=2 * RANK, target_modules=linears, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    fill(model)
    return model.train()


def tokenizer(shape: Shape) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"<{i}>": i for i in range(shape.get("vocab_size"))}
    made = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>", eos_token="<1>", unk_token="<0>")
