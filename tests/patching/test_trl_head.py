from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.patching import trl_head
from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.trl_head import fuse_trl_head
from tests.patching.build import adapted, batch

utils = pytest.importorskip("trl.trainer.utils")
if not hasattr(utils, "add_fused_lm_head"):
    pytest.skip("this TRL has no fused head", allow_module_level=True)


def prepared(**settings: Any) -> Any:
    model = adapted()
    utils.add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"), **settings)
    return model.train()


def results(model: Any) -> list[torch.Tensor]:
    out = model(**batch(), fused_lm_head=True)
    model.zero_grad()
    (out.loss - 0.1 * out.entropy.sum()).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [out.loss.detach(), out.log_probs.detach(), out.entropy.detach(), out.is_top1.float(), *grads]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}])
@pytest.mark.parametrize("fast", [False, True])
def test_equals_trl_with_entropy_gradients(settings: dict[str, float], fast: bool) -> None:
    model, plain = prepared(**settings), prepared(**settings)
    if fast:
        accelerate(model)
    function = utils._ChunkedLogProbFunction
    assert fuse_trl_head(model).startswith("replaced: ")
    assert utils._ChunkedLogProbFunction is function
    for ours, true in zip(results(model), results(plain), strict=True):
        assert torch.allclose(ours, true, rtol=1e-3, atol=1e-5 * float(true.abs().max()) + 1e-9)


def test_ours_is_really_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()
    fuse_trl_head(model)
    calls = 0
    real = trl_head.select.log_prob

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(trl_head.select, "log_prob", counted)
    results(model)
    assert calls == 1
    assert fuse_trl_head(model) == "left: the unit-gradient loss is there already"


def test_a_model_without_trls_head_is_left() -> None:
    assert fuse_trl_head(adapted()) == "left: TRL has not put a fused head on this model"


def test_a_result_that_differs_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = prepared(), prepared()
    real = trl_head.select.log_prob
    monkeypatch.setattr(
        trl_head.select, "log_prob", lambda *a, **k: (real(*a, **k)[0] * 1.01, *real(*a, **k)[1:])
    )
    assert fuse_trl_head(model).startswith("left: results are")
    for ours, true in zip(results(model), results(plain), strict=True):
        assert torch.equal(ours, true)
