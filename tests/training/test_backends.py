"""Rows of a bin stay apart with flex attention and with what flash attention is handed, as with sdpa and
eager."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pronghorn.errors import MissingDependencyError, NotSupportedError
from pronghorn.training.collate import PackCollator, RowCollator, wants_varlen
from pronghorn.training.isolation import measure_isolation, require_isolation
from pronghorn.training.material import use_attention
from tests import tiny

TWIN = "flash_attention_twin"
ROWS = [{"input_ids": [*range(1, 10)], "labels": [*range(1, 10)], "lengths": [4, 3, 2]}]
ROWS += [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "lengths": [1, 2]}]


def varlen(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: Any = None,
    dropout: float = 0.0,
    **handed: Any,
) -> tuple[torch.Tensor, None]:
    """What flash_attn_varlen_func computes, from what transformers hands to it, document by document."""
    assert mask is None or handed.get("cu_seq_lens_q") is None
    flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value)]  # [B * T, heads, D]
    ends = handed.get("cu_seq_lens_q")
    if ends is None:
        ends = torch.arange(query.shape[0] + 1) * query.shape[2]
    else:
        assert int(ends.diff().max()) == handed["max_length_q"] == handed["max_length_k"]
        assert torch.equal(ends, handed["cu_seq_lens_k"]) and ends.dtype == torch.int32
    done = []
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in flat)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
        done.append(out[0].transpose(0, 1))
    return torch.cat(done).unflatten(0, (query.shape[0], query.shape[2])), None


@pytest.fixture
def twin() -> Iterator[None]:
    AttentionInterface.register(TWIN, varlen)
    AttentionMaskInterface.register(TWIN, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    yield
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(table)._global_mapping.pop(TWIN)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_flex_attention_keeps_rows_apart(family: str) -> None:
    """On the CPU it has no backward pass, so only without gradients."""
    model = tiny.model(family)
    use_attention(model, "flex_attention")
    with torch.no_grad():
        found = measure_isolation(model)
    assert 0 < found.difference <= found.bound / 10


def test_flex_attention_on_the_cpu_is_refused_for_training() -> None:
    model = tiny.model("llama")
    use_attention(model, "flex_attention")
    # torch 2.8 fails in its compiler, later ones say "does not support backward on CPU"
    with pytest.raises(NotSupportedError, match="LlamaForCausalLM cannot compute packed rows: "):
        require_isolation(model)


def test_borders_are_those_of_the_rows() -> None:
    batch = PackCollator(0, varlen=True)(ROWS)
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7, 9, 10, 12, 18]  # the last six are padding
    assert batch["max_length_q"] == batch["max_length_k"] == 6
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert ends.tolist() == batch["cu_seq_lens_q"].tolist() and int(longest) == 6
    assert "cu_seq_lens_q" not in RowCollator(0)(ROWS)
    assert "cu_seq_lens_q" in RowCollator(0, varlen=True)(ROWS)


def test_flash_attention_is_handed_all_it_needs(twin: None) -> None:
    """Two bins in a batch, where transformers would not look for borders by itself."""
    model = tiny.model("llama")
    plain = model(**without(PackCollator(0)(ROWS))).logits
    model.config._attn_implementation = TWIN  # set_attn_implementation would look for it on the hub
    assert wants_varlen(model)
    found = require_isolation(model)
    assert found.difference <= found.bound / 10
    batch = without(PackCollator(0, varlen=True)(ROWS))
    assert torch.allclose(model(**batch).logits, plain, atol=1e-5)
    leaking = without(PackCollator(0)(ROWS))
    assert not torch.allclose(model(**leaking).logits, plain, atol=1e-2)


def without(batch: dict[str, Any]) -> dict[str, Any]:
    """As in training: with a cache, transformers does not look for the rows' borders."""
    kept = {name: value for name, value in batch.items() if name not in ("labels", "tokens")}
    return {**kept, "use_cache": False}


def test_attention_that_is_not_installed_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"training\.attention is flash_attention_2"):
        use_attention(tiny.model("llama"), "flash_attention_2")


def test_attention_without_the_models_soft_cap_is_refused() -> None:
    """By transformers from 5.23 on; before, its ``sdpa`` takes the cap and leaves it out."""
    with pytest.raises(
        NotSupportedError, match=r"training\.attention is sdpa, which leaves|does not support"
    ):
        use_attention(tiny.model("gemma2"), "sdpa")


@pytest.mark.parametrize("name", ["sdpa", "eager", "auto"])
def test_attention_of_transformers(name: str) -> None:
    model = tiny.model("llama")
    before = model.config._attn_implementation
    use_attention(model, name)
    assert model.config._attn_implementation == (before if name == "auto" else name)
    assert not wants_varlen(model)
