from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pronghorn.attention import interface
from tests.ops.measure import assert_as_true_as, saved_storages

HEADS, GROUPS, TOKENS, WIDTH = 4, 2, 37, 16


class Layer(nn.Module):
    num_key_value_groups = HEADS // GROUPS
    is_causal = True


def qkv() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, TOKENS, WIDTH), (2, GROUPS, TOKENS, WIDTH), (2, GROUPS, TOKENS, WIDTH)]
    return [torch.randn(shape, generator=g).requires_grad_() for shape in shapes]


def causal(padded: bool) -> Tensor:
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, TOKENS, TOKENS).clone()
    if padded:
        mask[0, :, :, :3] = torch.eye(TOKENS, dtype=torch.bool)[:, :3]
    return mask


def plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(2, -1, TOKENS, 1)), -1)
    p = torch.softmax(scores, -1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return (p[..., :TOKENS] @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(None, False), (2.0, False), (None, True), (2.0, True)])
def test_as_true_as_plain_pytorch(
    softcap: float | None, with_sinks: bool, padded: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "BLOCK_ROWS", 10)
    sinks = [torch.randn(HEADS, generator=torch.Generator().manual_seed(1)).requires_grad_()] * with_sinks
    mask = causal(padded)

    def fast(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        given = mask if padded else None
        return interface.attention_forward(Layer(), q, k, v, given, scaling=0.3, softcap=softcap, s_aux=s)[0]

    def slow(q: Tensor, k: Tensor, v: Tensor, s: Tensor | None = None) -> Tensor:
        return plain(q, k, v, mask, softcap, s)

    assert_as_true_as(fast, slow, [*qkv(), *sinks], dtype)


def test_a_mask_does_not_repeat_keys_and_values() -> None:
    q, k, v = qkv()
    with saved_storages(ignore=[q, k, v]) as ours:
        interface.attention_forward(Layer(), q, k, v, causal(True))
    with saved_storages(ignore=[q, k, v]) as stock:
        ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(), q, k, v, causal(True))
    less = 2 * q.numel() * 4 if interface.groups_are_fused() else 0  # torch 2.8 has no kernel for groups
    assert sum(stock.values()) - sum(ours.values()) == less


def test_groups_without_a_mask_keep_no_scores() -> None:
    q, k, v = (one.detach().requires_grad_() for one in qkv())
    with saved_storages(ignore=[q, k, v]) as ours:
        interface.attention_forward(Layer(), q, k, v, None)
    with saved_storages(ignore=[q, k, v]) as stock:
        ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(), q, k, v, None)
    scores = q.shape[0] * q.shape[1] * q.shape[2] ** 2 * 4
    assert all(size < scores for size in ours.values())
    assert interface.groups_are_fused() or sum(stock.values()) > sum(ours.values())


def test_name_has_a_mask_function_and_changes_no_other() -> None:
    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys()}
    interface.register()
    assert ALL_MASK_ATTENTION_FUNCTIONS[interface.NAME] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    assert all(ALL_ATTENTION_FUNCTIONS[n] is f for n, f in before.items() if n != interface.NAME)
