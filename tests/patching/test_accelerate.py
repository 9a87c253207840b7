from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from pronghorn.errors import ConfigError, NotSupportedError
from pronghorn.patching.accelerate import REPLACEABLE, accelerate
from pronghorn.patching.forwards import InstanceForward
from pronghorn.patching.report import PatchReport
from tests import tiny
from tests.patching.build import adapted, assert_same, batch, make_generic, step


def own_forwards(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m.__dict__.get("forward"), InstanceForward)]


def fast_calls(report: PatchReport, kind: str) -> int:
    return sum(forward.calls for forward in report.forwards.get(kind, []))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_part_is_found_and_replaced(family: str, dtype: torch.dtype) -> None:
    model = adapted(family, dtype=dtype)
    kinds = [
        "norm",
        "attention",
        "qkv",
        "o",
        "loss",
        *([] if family in ("mixtral", "qwen3_moe") else ["mlp"]),
    ]
    if family == "gemma2" and model.config._attn_implementation == "sdpa":
        kinds.remove("attention")  # see test_attention_that_leaves_a_soft_cap_out_is_left
    report = accelerate(model, strict=kinds)
    for kind in kinds:
        found, replaced = report.count(kind)
        assert found == replaced > 0, str(report)
    assert report.model_check.startswith("equal"), report.model_check
    step(model)
    assert report.fallbacks() == {}
    assert all(fast_calls(report, kind) for kind in report.forwards)


def test_attention_that_leaves_a_soft_cap_out_is_left() -> None:
    """Up to 5.17 transformers runs Gemma 2 in ``sdpa``, which ignores its cap; later it chooses ``eager``."""
    model = adapted("gemma2")
    report = accelerate(model)
    ignored = model.get_base_model().config._attn_implementation == "sdpa"
    assert report.count("attention") == ((1, 0) if ignored else (2, 2))
    assert ("leaves the soft cap of 50 out: load with pronghorn.load" in str(report)) is ignored
    report.undo()
    model.get_base_model().set_attn_implementation("eager")
    assert accelerate(model).count("attention") == (2, 2)


def test_loss_and_gradients_equal_the_unpatched_model() -> None:
    model = adapted()
    plain = step(model)
    accelerate(model)
    assert_same(step(model), plain)


def test_undo_restores_every_object() -> None:
    model = adapted()
    before = {id(m): dict(m.__dict__) for m in model.modules()}
    implementation = model.config._attn_implementation
    plain = step(model)
    report = accelerate(model)
    assert own_forwards(model)
    report.undo()
    assert not own_forwards(model)
    assert model.config._attn_implementation == implementation
    for m in model.modules():
        assert m.__dict__.keys() == before[id(m)].keys()
        assert not m._forward_pre_hooks and not m._forward_hooks
    ours = step(model)
    assert torch.equal(ours[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], plain[1], strict=True))


def test_classes_and_library_functions_are_untouched() -> None:
    model = adapted()
    forwards = {type(m): type(m).forward for m in model.modules()}
    functional = dict(vars(torch.nn.functional))
    accelerate(model)
    assert all(kind.forward is forward for kind, forward in forwards.items())
    assert all(vars(torch.nn.functional)[name] is value for name, value in functional.items())


def test_another_instance_of_the_same_class_is_untouched() -> None:
    one, two = adapted(), adapted()
    accelerate(one)
    assert not own_forwards(two)
    assert two.config._attn_implementation != one.config._attn_implementation


def test_model_is_unchanged_by_the_proof() -> None:
    model = adapted()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.zero_()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.random.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_deepcopy_computes_with_its_own_weights() -> None:
    model = adapted()
    accelerate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if "down_proj" in name or "norm" in name or "q_proj" in name:
                p.mul_(0.5)
    assert own_forwards(twin)
    mine = set(map(id, twin.modules()))
    assert all(id(m.__dict__["forward"].module) in mine for m in own_forwards(twin))
    reference = adapted()
    reference.load_state_dict(twin.state_dict())
    assert_same(step(twin), step(reference))
    assert_same(step(model), step(adapted()))


def test_pickle_round_trip_keeps_results() -> None:
    model = adapted()
    accelerate(model)
    twin = pickle.loads(pickle.dumps(model))
    assert_same(step(twin), step(adapted()))


def test_save_pretrained_gives_a_folder_peft_reads(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    make_generic(model)
    accelerate(model)
    trained = step(model)
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().config.save_pretrained(tmp_path / "config")
    assert "pronghorn" not in (tmp_path / "config" / "config.json").read_text()
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", is_trainable=True
    )
    assert_same(step(again), trained)


def test_adapter_switching_disabling_merging() -> None:
    model, plain = adapted(), adapted()
    for m in (model, plain):
        torch.manual_seed(0)
        m.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        make_generic(m)
    report = accelerate(model)
    assert_same(step(model), step(plain))
    for m in (model, plain):
        m.set_adapter("other")
    assert_same(step(model), step(plain))
    assert report.fallbacks() == {}
    for m in (model, plain):
        m.base_model.set_adapter(["default", "other"])
    assert_same(step(model), step(plain))
    assert report.fallbacks()["qkv"] == {"2 adapters are active": 2}  # q, in each layer
    for m in (model, plain):
        m.set_adapter("default")
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        assert torch.allclose(model(**batch()).logits, plain(**batch()).logits, atol=1e-4)
    for m in (model, plain):
        m.merge_adapter()
    assert torch.allclose(model(**batch()).loss, plain(**batch()).loss, rtol=1e-5)
    for m in (model, plain):
        m.unmerge_adapter()
    assert_same(step(model), step(plain))


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.1}, "adapter dropout is in effect"),
        ({"use_dora": True}, "a LoRA variant (DoRA or another) is active"),
        ({"lora_bias": True}, "the adapter has a bias"),
    ],
)
def test_states_the_fast_path_cannot_take_are_left_with_the_reason(lora: dict[str, Any], reason: str) -> None:
    model, plain = adapted(**lora), adapted(**lora)
    report = accelerate(model)
    assert report.left("mlp") == {reason: 2}
    assert report.left("qkv") == {reason: 2}
    assert report.count("norm") == (5, 5)
    torch.manual_seed(0)
    ours = step(model)
    torch.manual_seed(0)
    assert_same(ours, step(plain))


def test_dropout_that_begins_later_runs_the_original_and_is_counted() -> None:
    model, plain = adapted(), adapted()
    report = accelerate(model)
    for m in (model, plain):
        for layer in m.modules():
            if hasattr(layer, "lora_dropout"):
                layer.lora_dropout["default"] = nn.Dropout(0.5).train()
    torch.manual_seed(0)
    ours = step(model)
    torch.manual_seed(0)
    assert_same(ours, step(plain))
    assert report.fallbacks()["mlp"] == {"adapter dropout is in effect": 2}


def test_hooks_on_inner_linears_still_run() -> None:
    model = adapted()
    accelerate(model)
    seen: list[tuple[int, ...]] = []
    layer = model.model.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    ours = step(model)
    assert seen == [(2, 19, 64)]
    handle.remove()
    assert_same(ours, step(model))


def test_adapters_attached_after_acceleration_are_found_at_the_next_step() -> None:
    base = tiny.model("llama")
    report = accelerate(base)
    assert report.count("mlp") == (2, 0)
    assert report.count("norm") == (5, 5)
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    make_generic(model)
    ours = step(model)
    assert report.count("mlp") == (2, 2)
    assert report.count("qkv") == (2, 2)
    assert fast_calls(report, "mlp") == 2
    assert_same(ours, step(adapted()))
    report.undo()
    assert not own_forwards(model)


def test_accelerating_twice_is_accelerating_once() -> None:
    model = adapted()
    accelerate(model)
    report = accelerate(model)
    assert_same(step(model), step(adapted()))
    report.undo()
    assert not own_forwards(model)


def test_generate_is_unchanged() -> None:
    model, plain = adapted(), adapted()
    accelerate(model)
    ids = batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for m in (model, plain):
        m.eval()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_what_the_original_gives(dtype: torch.dtype) -> None:
    model, plain = adapted(dtype=dtype), adapted(dtype=dtype)
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(model), step(plain)
    assert torch.allclose(ours[0], theirs[0], rtol=5e-3)
    for mine, true in zip(ours[1], theirs[1], strict=True):
        assert (mine - true).norm() <= 0.1 * true.norm()


def test_torch_compile_compiles_the_original() -> None:
    model, plain = adapted(), adapted()
    accelerate(model)
    compiled = torch.compile(model.model.model.layers[0].mlp, backend="eager")
    x = torch.randn(2, 5, 64)
    assert torch.allclose(compiled(x), plain.model.model.layers[0].mlp(x), atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_stock_checkpointing(reentrant: bool) -> None:
    model = adapted()
    accelerate(model)
    model.enable_input_require_grads()
    plain = step(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours = step(model)
    assert_same(ours, plain)
    if not reentrant:  # whose first forward runs without gradients, and so the original
        assert torch.equal(ours[0], plain[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1], plain[1], strict=True))


def test_tiled_mlp_gives_the_same_result() -> None:
    model = adapted()
    report = accelerate(model, mlp_tile_tokens=7)
    assert report.count("mlp") == (2, 2)
    assert "replaced MLPs and experts: at most 7 tokens at a time" in str(report)
    assert report.as_dict()["mlp_tile_tokens"] == 7
    assert_same(step(model), step(adapted()))
    with pytest.raises(ConfigError, match="mlp_tile_tokens=0"):
        accelerate(model, mlp_tile_tokens=0)


def test_report_is_data_and_a_table() -> None:
    report = accelerate(adapted(lora_dropout=0.1))
    data = json.loads(report.as_json())
    assert data["kinds"]["mlp"] == {"found": 2, "replaced": 0, "left": {"adapter dropout is in effect": 2}}
    assert "mlp            2        0  2: adapter dropout is in effect" in str(report)
    assert [part.replaced for part in report.layers("norm")] == [True] * 5
    assert "bound" in report.layers("norm")[0].reason


def test_strict_names_what_is_missing_and_leaves_nothing_replaced() -> None:
    model = adapted(lora_dropout=0.1)
    with pytest.raises(
        NotSupportedError, match=r"strict: 0 of 2 parts of kind 'mlp' can be replaced \(2: adapter"
    ):
        accelerate(model, strict=["mlp"])
    assert not own_forwards(model)


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match=r"kinds=\['mpl'\]: unknown") as error:
        accelerate(adapted(), kinds=["mpl"])
    assert "mlp" in error.value.fix


def test_only_the_kinds_asked_for() -> None:
    report = accelerate(adapted(), kinds=["norm"])
    assert list(report.forwards) == ["norm"]
    assert set(REPLACEABLE) > {"norm"}


def test_a_replacement_that_lies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from pronghorn.ops import select

    real = select.mlp
    monkeypatch.setattr(select, "mlp", lambda x, *a, **k: real(x, *a, **k) * 1.001)
    report = accelerate(adapted())
    assert report.count("mlp") == (2, 0)
    assert "randomised weights, float32" in next(iter(report.left("mlp")))


def test_a_lie_that_only_the_whole_model_shows_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from pronghorn.attention import interface

    real = interface.attention_forward
    monkeypatch.setattr(interface, "attention_forward", lambda m, q, *a, **k: real(m, q * 1.01, *a, **k))
    interface.register()
    try:
        model = adapted()
        report = accelerate(model)
        assert report.count("attention") == (2, 0)
        assert report.count("norm") == (5, 5)
        assert "spoils the whole model" in next(iter(report.left("attention")))
        assert model.config._attn_implementation != interface.NAME
    finally:
        monkeypatch.undo()
        interface.register()


def test_forward_set_by_another_library_is_left_alone() -> None:
    model = adapted()
    norm = model.model.model.norm
    norm.forward = type(norm).forward.__get__(norm)
    report = accelerate(model)
    assert report.count("norm") == (5, 4)
    assert "another library has set its forward" in next(iter(report.left("norm")))
