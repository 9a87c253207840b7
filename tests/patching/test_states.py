"""What else is done to an accelerated model: strict demands, removal of adapters, compiling, sampling."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pronghorn.errors import ConfigError, NotSupportedError
from pronghorn.memory.layers import layers_of
from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.forwards import InstanceForward
from tests import tiny
from tests.patching.build import adapted, assert_same, batch, make_generic, step


def own_forwards(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), InstanceForward)]


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.as_tensor(model(**batch()).logits)


def test_strict_accepts_a_model_whose_every_part_is_replaced() -> None:
    report = accelerate(adapted(), strict=True)
    assert report.count("mlp") == (2, 2)
    assert report.count("experts") == (0, 0)  # none there: nothing was left


def test_strict_refuses_any_part_that_is_left() -> None:
    model = adapted(target_modules=["q_proj", "lm_head"])
    with pytest.raises(NotSupportedError, match=r"strict: 0 of 2 parts of kind 'o'.*has no adapter") as error:
        accelerate(model, strict=True)
    assert "leave 'o' out of strict" in error.value.fix
    assert not own_forwards(model)


def test_a_strict_kind_that_is_not_there_is_refused() -> None:
    model = adapted()
    with pytest.raises(NotSupportedError, match=r"0 of 0 parts of kind 'experts'.*the model has none"):
        accelerate(model, strict=["mlp", "experts"])
    assert not own_forwards(model)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"strict": ["mpl"]}, "mpl"), ({"strict": ["mlp"], "kinds": ["norm"]}, "mlp"), ({"strict": "mlp"}, "m")],
)
def test_a_strict_kind_that_is_not_considered(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"strict=\['{named}'.*not among the kinds considered") as error:
        accelerate(adapted(), **options)
    assert "norm" in error.value.fix


@pytest.mark.parametrize("recompute", ["full", "unsloth", "auto"])
def test_undo_of_recompute_restores_every_object(recompute: str) -> None:
    model = adapted()
    before = [(m, set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    accelerate(model, recompute=recompute).undo()
    for m, names, hooks, pre_hooks in before:
        assert set(m.__dict__) == names
        assert (len(m._forward_hooks), len(m._forward_pre_hooks)) == (hooks, pre_hooks)


def test_undo_gives_back_the_recompute_that_was_on() -> None:
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = [layer._gradient_checkpointing_func for layer in layers_of(model)]
    report = accelerate(model, recompute="unsloth")
    assert all(layer._gradient_checkpointing_func not in before for layer in layers_of(model))
    report.undo()
    assert [layer._gradient_checkpointing_func for layer in layers_of(model)] == before
    assert all(layer.gradient_checkpointing for layer in layers_of(model))


@pytest.mark.parametrize("recompute", ["full", "unsloth", "auto"])
def test_copies_recompute_for_themselves(recompute: str) -> None:
    model = adapted()
    accelerate(model, recompute=recompute, activation_bytes=0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert all(layer._gradient_checkpointing_func.plan.layers == 2 for layer in layers_of(twin))
    assert_same(step(twin), step(adapted()))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_merge_and_unload_leaves_an_ordinary_model(family: str) -> None:
    model, plain = adapted(family), adapted(family)
    accelerate(model)
    step(model)
    merged, expected = model.merge_and_unload(), plain.merge_and_unload()
    assert torch.allclose(logits(merged), logits(expected), atol=1e-4)
    assert merged.state_dict().keys() == expected.state_dict().keys()


def test_unload_and_a_second_adapter() -> None:
    model = adapted()
    report = accelerate(model)
    base = model.unload()
    assert torch.equal(logits(base), logits(tiny.model("llama")))
    again = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    make_generic(again)
    assert_same(step(again), step(adapted()))
    report.undo()
    assert not own_forwards(again)


def test_deleting_the_active_adapter_leaves_the_other() -> None:
    model, plain = adapted(), adapted()
    accelerate(model)
    for m in (model, plain):
        torch.manual_seed(0)
        m.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        make_generic(m)
        m.set_adapter("other")
        m.delete_adapter("default")
    assert_same(step(model), step(plain))


def test_a_step_on_the_base_alone_has_the_gradients_of_the_inputs() -> None:
    """DPO's reference, with gradients on: the adapters are disabled, the graph is there."""
    grads = []
    for fast in (False, True):
        model = adapted().train()
        if fast:
            accelerate(model)
        embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
        with model.disable_adapter():
            loss = model(inputs_embeds=embeds, labels=batch()["labels"], use_cache=False).loss
        grads.append(torch.autograd.grad(loss, embeds)[0])
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_trains_on_the_originals(backend: str) -> None:
    torch._dynamo.reset()
    model, plain = adapted().train(), adapted()
    report = accelerate(model)
    loss = torch.compile(model, backend=backend)(**batch(), use_cache=False).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert_same((loss.detach(), grads), step(plain))
    assert not any(forward.calls for forwards in report.forwards.values() for forward in forwards)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_beams_and_samples_are_unchanged(options: dict[str, Any]) -> None:
    made = []
    for fast in (False, True):
        model = adapted().eval()
        if fast:
            accelerate(model)
        torch.manual_seed(3)
        made.append(model.generate(input_ids=batch()["input_ids"], max_new_tokens=6, **options))
    assert torch.equal(*made)


def test_evaluation_between_steps_changes_nothing() -> None:
    model, plain = adapted(), adapted()
    accelerate(model)
    before = step(model)
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)
    assert_same(step(model), before)
