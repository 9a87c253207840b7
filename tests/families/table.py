"""Tiny configurations of decoder families, one line each, and what acceleration does to them.

python -m tests.families.table            # prints the table of docs/families.md
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from pronghorn.patching.accelerate import accelerate
from pronghorn.patching.report import PatchReport

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
GEMMA3 = {**HEAD, **SLIDING, "query_pre_attn_scalar": 16}
PER_LAYER = {**HEAD, **SLIDING, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 256}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}

# family (transformers' model_type) -> what differs from COMMON
TEXT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": HEAD,
    "ministral": HEAD,
    "ministral3": HEAD,
    "qwen2": {},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": {**HEAD, "query_pre_attn_scalar": 16},
    "gemma3_text": GEMMA3,
    "gemma3n_text": {
        **PER_LAYER,
        "intermediate_size": [96, 96],
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
        "laurel_rank": 8,
    },
    "gemma4_text": PER_LAYER,
    "phi": {},
    "phi3": {},
    "cohere": {},
    "cohere2": SLIDING,
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
    },
    "glm": HEAD,
    "glm4": HEAD,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
    "nemotron": {},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "exaone4": SLIDING,
    "ernie4_5": HEAD,
    "hunyuan_v1_dense": HEAD,
    "seed_oss": HEAD,
    "arcee": {},
    "apertus": {},
    "helium": HEAD,
    "internlm3": HEAD,
    "minicpm3": LATENT,
    "bitnet": {},
    "gpt_oss": {**HEAD, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**HEAD, **EXPERTS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "llama4_text": {
        **HEAD,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 64,
        "no_rope_layers": [1, 0],
    },
    "deepseek_v2": {**ROUTED, **LATENT, "topk_method": "greedy"},
    "deepseek_v3": {**ROUTED, **LATENT, "n_group": 2},
    "kimi_linear": LATENT,
    "glm4_moe": {**ROUTED, **HEAD},
    "dots1": {**ROUTED, **HEAD},
    "qwen3_next": {
        **LINEAR,
        **HEAD,
        **EXPERTS,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "qwen3_5_text": {**LINEAR, **HEAD},
    "qwen3_5_moe_text": {**LINEAR, **HEAD, **EXPERTS, "shared_expert_intermediate_size": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
}
# family -> (its text part, the rest of its configuration)
IMAGE_TEXT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        GEMMA3,
        {
            "vision_config": {**VISION, "image_size": 16, "patch_size": 8, "num_channels": 3},
            "mm_tokens_per_image": 4,
            "image_token_index": 255,
            "boi_token_index": 254,
            "eoi_token_index": 253,
        },
    ),
    "gemma4": (PER_LAYER, {}),
    "mistral3": (
        {**HEAD, "model_type": "ministral3"},
        {
            "vision_config": {
                **VISION,
                "model_type": "pixtral",
                "image_size": 16,
                "patch_size": 8,
                "num_channels": 3,
                "head_dim": 16,
            },
            "image_token_index": 255,
        },
    ),
    "qwen2_5_vl": (
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}},
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 8,
                "out_hidden_size": 64,
                "fullatt_block_indexes": [0],
            }
        },
    ),
    "qwen3_vl": (
        {
            **HEAD,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "mrope_interleaved": True},
        },
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "patch_size": 8,
                "out_hidden_size": 64,
                "deepstack_visual_indexes": [0],
            }
        },
    ),
}
FAMILIES = (*TEXT, *IMAGE_TEXT)
KINDS = ("norm", "attention", "qkv", "o", "linear", "mlp", "experts", "loss")
MLP_OR_EXPERTS = ("mlp", "experts")


def build(family: str) -> Any:
    """A tiny model of generic weights with LoRA on every linear PEFT can wrap."""
    torch.manual_seed(0)
    if family in IMAGE_TEXT:
        text, rest = IMAGE_TEXT[family]
        config = AutoConfig.for_model(family, text_config={**COMMON, **text}, **rest)
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **TEXT[family]}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p + 0.2 * noise if p.dim() < 2 else noise / p.shape[-1] ** 0.5)
    targets = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
        and not name.endswith("mamba.out_proj")
        and module is not model.get_output_embeddings()
    ]
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    return get_peft_model(model.float(), lora)


@dataclass(frozen=True)
class Row:
    """One family: the report, or why transformers here cannot build it."""

    family: str
    report: PatchReport | None
    problem: str = ""

    def replaced(self, *kinds: str) -> bool:
        """Whether every part of these kinds that a text input reaches is replaced, and there is one."""
        parts = [part for kind in kinds for part in (self.report.layers(kind) if self.report else [])]
        reached = [part.replaced for part in parts if part.reason != "not reached by a text input"]
        return bool(reached) and all(reached)

    def __str__(self) -> str:
        if self.report is None:
            return f"| {self.family} | {self.problem} |" + " |" * (len(KINDS) + 1)
        cells = [f"{done}/{found}" if found else "-" for found, done in map(self.report.count, KINDS)]
        left = {f"{kind}: {reason}" for kind in KINDS for reason in self.report.left(kind)}
        return f"| {self.family} | {' | '.join(cells)} | {'; '.join(sorted(left))} |"


def examine(family: str) -> Row:
    """Build a family and accelerate it."""
    try:
        model = build(family)
    except (ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        return Row(
            family, None, f"not built by transformers {transformers.__version__} ({type(error).__name__})"
        )
    return Row(family, accelerate(model))


def main() -> None:
    """Print the table as Markdown."""
    names = sys.argv[1:] or FAMILIES
    print("# Families\n")
    print("What `pronghorn.accelerate` replaces (replaced/found) on a tiny model of each family with LoRA on")
    print(f"every linear, transformers {transformers.__version__}, peft {peft.__version__}. Made by")
    print("`python -m tests.families.table > docs/families.md`.\n")
    print("| family | " + " | ".join(KINDS) + " | left, and why |")
    print("|---" * (len(KINDS) + 2) + "|")
    rows = []
    for name in names:
        rows.append(examine(name))
        print(rows[-1], flush=True)
    for kinds in (*((kind,) for kind in KINDS), MLP_OR_EXPERTS):
        complete = sum(row.replaced(*kinds) for row in rows)
        named = " and ".join(kinds)
        print(f"\n{named}: everything a text input reaches was replaced in {complete} of {len(rows)}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
