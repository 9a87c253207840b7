"""Deep verify of models of which not even one fits: the same verdicts, one module in memory at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pronghorn.export import verify_deep, verify_model, verify_streamed
from pronghorn.export.run import export
from pronghorn.export.verify_decode import QUALITY
from pronghorn.export.verify_deep import GREEDY, LOGITS, MOVES, RUNS, compute_promises
from pronghorn.export.verify_folder import Row
from tests import tiny
from tests.export.test_verify_deep import DTYPES, Case, edit_weights, merge
from tests.stack import require_models_on_disk

COMPUTED = (LOGITS, MOVES, GREEDY)


@pytest.fixture(autouse=True, scope="module")
def _models_on_disk(tmp_path_factory: pytest.TempPathFactory) -> None:
    require_models_on_disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which one module at a time fits, and no model."""
    monkeypatch.setattr(verify_model, "needed_bytes", lambda _: 1 << 60)


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_right_folder_passes_and_a_lost_tensor_fails(family: str, tmp_path: Path) -> None:
    case = Case(tmp_path, family)
    rows = case.rows()
    assert all(row.ok for row in rows.values()), rows
    assert rows[LOGITS].detail.endswith("weights read module by module")
    less = shutil.copytree(case.adapter, tmp_path / "less")
    lost = sorted(n for n in load_file(less / "adapter_model.safetensors") if "lora_B" in n)[0]
    edit_weights(less, lambda tensors: tensors.update({lost: torch.zeros_like(tensors[lost])}))
    wrong = merge(case.base, less, tmp_path / "wrong", DTYPES.get(family, torch.float16))
    assert case.rows(wrong)[LOGITS].ok is False


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
        {"modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    ],
)
def test_it_finds_the_figures_of_models_in_memory(
    lora: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, "llama", **lora)
    monkeypatch.setattr(verify_model.Whole, "new_tokens", verify_streamed.NEW_TOKENS)
    whole = case.rows()
    monkeypatch.setattr(verify_model, "needed_bytes", lambda _: 1 << 60)
    streamed = case.rows()
    assert all(row.ok for row in streamed.values()), streamed
    assert _numbers(streamed[LOGITS]) == pytest.approx(_numbers(whole[LOGITS]), rel=0.02)
    assert _numbers(streamed[MOVES]) == pytest.approx(_numbers(whole[MOVES]), rel=0.02)


def _numbers(row: Row) -> list[float]:
    words = row.detail.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return [float(word) for word in words if word[0].isdigit()]


def test_one_module_is_in_memory_at_a_time(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    ways = verify_streamed.Streamed(tmp_path / "scratch")
    wrapped = ways.with_adapter(case.base, case.adapter)
    base = [p for name, p in wrapped.named_parameters() if "lora_" not in name]
    assert {p.untyped_storage().nbytes() for p in base} == {4}
    found = verify_model.logits(wrapped, torch.tensor([[5, 6, 7]]))
    truth = verify_model.load_with_adapter(case.base, case.adapter)
    assert torch.equal(found, verify_model.logits(truth, torch.tensor([[5, 6, 7]])))
    largest = max(p.nbytes for name, p in truth.named_parameters() if "lora_" not in name)
    assert ways.largest == largest
    assert {p.untyped_storage().nbytes() for p in base} == {4}


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"trainable_token_indices": [5]}])
def test_what_is_more_than_a_sum_is_not_verified(lora: dict[str, object], tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", **lora)
    rows = case.rows()
    assert all(rows[name].ok is None for name in COMPUTED)
    assert "needs the whole model in memory" in rows[LOGITS].detail


@pytest.mark.usefixtures("tight")
def test_a_grown_vocabulary_is_not_verified(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "llama", dtype=torch.float16)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens", "lm_head"])

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "embed_tokens" in n or "lm_head" in n]:
            tensors[name] = torch.cat((tensors[name], tensors[name][:2]))

    edit_weights(adapter, grow)
    row = {r.name: r for r in compute_promises(base, adapter, base)}[LOGITS]
    assert (row.ok, "grows the vocabulary" in row.detail) == (None, True)


@pytest.mark.usefixtures("tight")
def test_a_folder_alone_runs(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base", "qwen2")
    rows = {row.name: row for row in compute_promises(base, None, None)}
    assert rows[RUNS].ok and "module by module" in rows[RUNS].detail


def test_a_weight_read_past_its_module_is_never_taken_for_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a state space layer does with the kernel of its convolution."""
    case = Case(tmp_path, "llama")
    ways = verify_streamed.Streamed(tmp_path / "scratch")
    wrapped = ways.with_adapter(case.base, case.adapter)
    norm = wrapped.get_base_model().model.norm
    head = wrapped.get_base_model().lm_head
    assert verify_model.logits(wrapped, torch.tensor([[5, 6, 7]])).isfinite().all()
    norm.register_forward_hook(lambda module, args, out: out + head.weight.mean())
    monkeypatch.setattr(ways, "with_adapter", lambda *_: wrapped)
    view = verify_deep.Folder(case.merged)
    base = verify_deep.Folder(case.base)
    with pytest.raises(ValueError, match="its logits are not finite"):
        verify_deep._truth(view, case.adapter, base, verify_deep.Questions(base), ways)


def test_least_memory_is_that_of_the_largest_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = verify_deep.Folder(tiny.write_base(tmp_path / "base", "mixtral"))
    experts = 4 * (3 * 64 * 96) * 4  # experts x matrices x float32
    assert verify_streamed.streamed_bytes(base, None) == 2 * experts + (1 << 30)
    monkeypatch.setattr(verify_model, "available_bytes", lambda: 1000)
    rows = {row.name: row for row in compute_promises(base.path, None, None)}
    assert rows[RUNS].ok is None and "module by module needs 1.1 GB" in rows[RUNS].detail


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "w4a16"), ("llama", "nvfp4")])
def test_the_price_of_quantising_is_measured_where_no_model_fits(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(tmp_path, family)
    export(case.adapter, tmp_path / "coded", format=name, verify=False)
    monkeypatch.setattr(verify_model.Whole, "new_tokens", verify_streamed.NEW_TOKENS)
    whole = case.rows(tmp_path / "coded")[QUALITY]
    monkeypatch.setattr(verify_model, "needed_bytes", lambda _: 1 << 60)
    streamed = case.rows(tmp_path / "coded")[QUALITY]
    assert streamed.ok and streamed.detail.endswith("weights read module by module")
    assert [what for what, _, _ in streamed.figures][:2] == ["perplexity", "KL, nats a token"]
    (_, _, ours), (_, _, theirs) = streamed.figures[1], whole.figures[1]
    assert float(ours) == pytest.approx(float(theirs), rel=0.02)
    assert streamed.figures[3] == whole.figures[3]
