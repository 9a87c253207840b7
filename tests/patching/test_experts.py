"""Stacked experts, frozen and with adapters on their parameters: equal, counted, undone, never dense."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from pronghorn.memory.counter import saved_bytes
from pronghorn.ops import select
from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.experts import PROOF_EXPERTS
from pronghorn.patching.forwards import InstanceForward
from tests import tiny
from tests.families import table
from tests.patching.build import adapted, assert_same, batch, make_generic, step

if not hasattr(transformers.integrations, "use_experts_implementation"):
    pytest.skip("this transformers has no ExpertsInterface", allow_module_level=True)

STACKED = ["experts.gate_up_proj", "experts.down_proj"]


def with_experts(family: str = "qwen3_moe", **options: Any) -> Any:
    """A tiny mixture with adapters on attention and on both parameters of its experts."""
    model = tiny.model(family, **options)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKED))
    make_generic(model)
    return model


def calls(report: Any) -> int:
    return sum(forward.calls for forward in report.forwards["experts"])


def held_forwards(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), InstanceForward)]


@pytest.mark.parametrize("make", [adapted, with_experts])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_stack_is_replaced_and_equal(family: str, dtype: torch.dtype, make: Any) -> None:
    model = make(family, dtype=dtype)
    report = accelerate(model, strict=["experts"])
    assert report.count("experts") == (2, 2), str(report)
    assert "own weights" in report.layers("experts")[0].reason
    ours = step(model)
    assert calls(report) == 2
    assert report.fallbacks() == {}
    if dtype == torch.float32:
        assert_same(ours, step(make(family, dtype=dtype)))


@pytest.mark.parametrize("targets", [[], STACKED])
def test_biases_transposed_weights_and_a_gate_of_its_own(targets: list[str]) -> None:
    models = []
    for _ in range(2):
        base = table.build("gpt_oss").unload()
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
        models.append(get_peft_model(base, config))
        make_generic(models[-1])
    report = accelerate(models[0], strict=["experts"])
    inputs = {name: ids % 256 for name, ids in batch().items() if name == "input_ids"}
    inputs["labels"] = inputs["input_ids"]
    assert_same(step(models[0], **inputs), step(models[1], **inputs))
    assert calls(report) == 2


def test_a_stack_of_many_experts_is_proven_on_a_few() -> None:
    many = 3 * PROOF_EXPERTS
    model, plain = (with_experts(num_experts=many) for _ in range(2))
    report = accelerate(model, strict=["experts"])
    assert_same(step(model), step(plain))
    assert calls(report) == 2


def test_no_product_for_all_experts_is_made() -> None:
    """PEFT adds a dense product to the stacked weights in every forward; ours multiplies the factors."""
    count, width, inner = 16, 64, 32
    dense = count * 2 * inner * width

    class Made(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: set[int] = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    self.sizes.add(t.numel())
            return out

    found = []
    for fast in (False, True):
        model = with_experts(num_experts=count, moe_intermediate_size=inner)
        if fast:
            accelerate(model)
        with Made() as made:
            step(model)
        found.append(dense in made.sizes)
    assert found == [True, False]


def test_saved_bytes_of_a_mixture_layer() -> None:
    """The original keeps more than once more what gate and up of each choice take."""
    tokens, kept = 64, []
    for fast in (False, True):
        model = with_experts()
        if fast:
            accelerate(model)
        model.train()
        kept.append(saved_bytes(model, lambda m=model: m(**batch(1, tokens), use_cache=False).loss))
    pairs_of_a_layer = tokens * 2 * (2 * 32) * 4
    assert kept[1] < kept[0] - 2 * pairs_of_a_layer


def test_tiles_keep_no_gate_and_up() -> None:
    kept = []
    for tile in (None, 16):
        model = with_experts()
        report = accelerate(model, mlp_tile_tokens=tile)
        kept.append(saved_bytes(model.train(), lambda m=model: m(**batch(1, 64), use_cache=False).loss))
        assert_same(step(model), step(with_experts()))
        assert report.count("experts") == (2, 2)
    # x of [64, 64] is kept instead, where its norm does not rebuild it
    assert kept[0] - kept[1] >= 2 * 64 * 2 * (2 * 32) * 4 - 2 * 64 * 64 * 4


def test_copies_pickles_undo() -> None:
    model = with_experts()
    report = accelerate(model)
    plain = step(with_experts())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name.endswith("down_proj"):
                p.zero_()
    assert not torch.allclose(step(twin)[0], plain[0])
    assert_same(step(model), plain)
    assert_same(step(pickle.loads(pickle.dumps(model))), plain)
    report.undo()
    assert not held_forwards(model)
    assert torch.equal(step(model)[0], plain[0])


def test_adapter_states() -> None:
    model, plain = with_experts(), with_experts()
    for m in (model, plain):
        torch.manual_seed(0)
        m.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"], target_parameters=STACKED))
        make_generic(m)
    report = accelerate(model)
    for m in (model, plain):
        m.set_adapter("other")
    assert_same(step(model), step(plain))
    assert "experts" not in report.fallbacks()
    for m in (model, plain):
        m.set_adapter("default")
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        assert torch.allclose(model(**batch()).logits, plain(**batch()).logits, atol=1e-4)
    for m in (model, plain):
        m.merge_adapter()
    assert torch.allclose(model(**batch()).loss, plain(**batch()).loss, rtol=1e-5)
    assert report.fallbacks()["experts"] == {"the adapter is merged": 2}
    for m in (model, plain):
        m.unmerge_adapter()
    assert_same(step(model), step(plain))


def test_adapters_of_experts_that_come_later_are_found() -> None:
    base = tiny.model("qwen3_moe")
    report = accelerate(base)
    assert report.count("experts") == (2, 0)  # a bare model trains everything, its experts too
    assert report.left("experts") == {"the weights of the experts train": 2}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKED))
    make_generic(model)
    ours = step(model)
    assert report.count("experts") == (2, 2)
    assert_same(ours, step(with_experts()))


def test_an_adapter_saved_from_an_accelerated_mixture_loads_with_peft(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "qwen3_moe", dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKED)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    make_generic(model)
    accelerate(model)
    trained = step(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=True
    )
    assert_same(step(again), trained)


def test_a_replacement_that_lies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = select.experts
    monkeypatch.setattr(select, "experts", lambda x, *a, **k: real(x, *a, **k) * 1.001)
    report = accelerate(with_experts())
    assert report.count("experts") == (2, 0)
    assert "randomised weights, float32" in next(iter(report.left("experts")))


def test_experts_outside_the_interface_are_left_with_the_reason() -> None:
    report = accelerate(table.build("llama4_text"))
    assert report.left("experts") == {"not behind transformers' ExpertsInterface": 1}


def test_hooks_inside_and_generate() -> None:
    model, plain = with_experts(), with_experts()
    report = accelerate(model)
    stack = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    seen: list[int] = []
    handle = stack.register_forward_hook(lambda *_: seen.append(1))
    assert_same(step(model), step(plain))
    assert seen == [1]
    assert report.fallbacks()["experts"] == {"a hook is registered inside": 1}
    handle.remove()
    for m in (model, plain):
        m.eval()
    ids = batch()["input_ids"]
    made = [m.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for m in (model, plain)]
    assert torch.equal(*made)


@pytest.mark.parametrize("recompute", ["full", "unsloth", "auto"])
def test_recompute_gives_the_same_bits(recompute: str) -> None:
    found = []
    for mode in (None, recompute):
        model = with_experts()
        model.enable_input_require_grads()
        report = accelerate(model, recompute=mode, activation_bytes=0)
        found.append(step(model))
        assert report.model_check.startswith("equal")
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_autocast_takes_bfloat16_experts_and_leaves_float32_ones() -> None:
    for dtype, declined in ((torch.bfloat16, 0), (torch.float32, 2)):
        truth = torch.cat([g.flatten() for g in step(with_experts(dtype=dtype).float())[1]])
        off = []
        for fast in (False, True):
            model = with_experts(dtype=dtype)
            report = accelerate(model, kinds=["experts"]) if fast else None
            with torch.autocast("cpu", torch.bfloat16):
                grads = torch.cat([g.flatten() for g in step(model)[1]])
            off.append(float((grads - truth).norm() / truth.norm()))
        assert report is not None
        assert sum(report.fallbacks().get("experts", {}).values()) == declined
        assert off[1] <= 1.5 * off[0]
