"""The names notebooks already use: FastLanguageModel unfolds them into options and calls the rooms below.

Every keyword either has an effect or is refused with the reason; none is accepted and ignored.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import ALL_LINEAR, DEFAULT_TARGETS, LoraOptions
from pronghorn.adapters.origin import origin_of
from pronghorn.adapters.targets import resolve_targets
from pronghorn.errors import AdapterError, ConfigError, NotSupportedError
from pronghorn.fast.generating import bind_generating, check_rank, engine_options, keep_engine, servable
from pronghorn.fast.keywords import Refused, refuse
from pronghorn.fast.saving import bind_saving
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.memory import recompute
from pronghorn.patching.accelerate import RECOMPUTE_MODES
from pronghorn.patching.accelerate import accelerate as accelerate_model

DEFAULT_SEED = 3407
Recompute = bool | Literal["unsloth", "auto"]
_LOAD_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "fix_tokenizer": Refused((None, False), "tokenizers are used as they are, never repaired"),
        "resize_model_vocab": Refused((None,), "the vocabulary is not resized while loading",
                                       "call add_new_tokens after loading"),
        "use_exact_model_name": Refused((None, True), "names are never exchanged for others here"),
        "offload_embedding": Refused((None, False), "embeddings are not offloaded"),
        "float32_mixed_precision": Refused((None,), "adapters always train in float32"),
        "disable_log_stats": Refused((None, True), "vLLM's statistics have no place to go to here",
                                      "run `pronghorn serve`, which answers /metrics"),
        "qat_scheme": Refused((None,), "quantisation-aware training is not available"),
        "load_in_fp8": Refused((None, False), "loading in FP8 is not available", "load in 16-bit"),
        "num_labels": Refused((None,), "classification heads are not available"),
    }
)  # fmt: skip
_PEFT_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "loftq_config": Refused((None, {}), "LoftQ replaces the base by a quantised one"),
        "temporary_location": Refused((None,), "nothing is spilled to a temporary folder"),
        "qat_scheme": Refused((None,), "quantisation-aware training is not available"),
        "task_type": Refused((None, "CAUSAL_LM"), "only causal language models can be trained"),
    }
)


class FastLanguageModel:
    """Load, attach, and switch between training and inference. No instances: four static methods."""

    @staticmethod
    def from_pretrained(
        model_name: str | Path,
        max_seq_length: int | None = None,
        dtype: Any = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        load_in_16bit: bool | None = None,
        full_finetuning: bool = False,
        token: str | bool | None = None,
        device_map: str | dict[str, Any] | None = None,
        rope_scaling: Any = None,
        *,
        trust_remote_code: bool = False,
        use_gradient_checkpointing: Recompute = True,
        revision: str | None = None,
        random_state: int = DEFAULT_SEED,
        text_only: bool = True,
        base: str | Path | None = None,
        unsloth_tiled_mlp: bool = False,
        accelerate: bool = True,
        fast_inference: bool = False,
        vllm_python: str | Path | None = None,
        max_lora_rank: int | None = None,
        gpu_memory_utilization: float | None = None,
        float8_kv_cache: bool = False,
        **other: Any,
    ) -> tuple[Any, Any]:
        """Load a base, or an adapter with its base, from a folder or the hub; returns ``(model, tokenizer)``.

        Args:
            model_name: a local folder, or a hub id.
            max_seq_length: longest sequence in tokens; None is 2048, or the model's own limit if less.
            dtype: None for the config's own, else bfloat16, float16 or float32.
            load_in_4bit: hold the base in NF4 (a folder already in NF4 is loaded as it is anyway).
            load_in_16bit: insist on a base that is not quantised.
            load_in_8bit: hold the base in 8-bit (LLM.int8); its layers then run as bitsandbytes runs them.
            full_finetuning, rope_scaling: not available.
            token: access token of the hub.
            device_map: None for the accelerator (or CPU), else as in transformers.
            trust_remote_code: run Python code that comes with the model.
            use_gradient_checkpointing: True for recompute, False for none, "unsloth" for recompute with layer
                inputs in host memory, "auto" for as much of it as the free memory asks for.
            revision: branch, tag or commit of a hub model.
            random_state: seed of an adapter attached later.
            text_only: rows are text; of a model with an image tower the language model trains.
            base: for an adapter, where its base is now.
            unsloth_tiled_mlp: MLPs and experts in tiles of as many tokens as the model is wide.
            accelerate: for an adapter, replace the parts proven equal (``pronghorn.accelerate``).
            fast_inference: vLLM, which starts at the first question, answers ``model.fast_generate``.
            vllm_python: the interpreter that has vLLM, where it is not this one.
            max_lora_rank, gpu_memory_utilization, float8_kv_cache: vLLM's largest rank (None: 64), share of
                the GPU's memory (without one, of the host's; None: what is free), cache in FP8.
            **other: other names of this kind are refused with the reason.

        Raises:
            NotSupportedError, ConfigError: a keyword that cannot be honoured, or is unknown.
            SourceError, AdapterError: as for ``pronghorn.load``.
        """
        refuse("from_pretrained", other, _LOAD_REFUSED, FastLanguageModel.from_pretrained)
        quantization = _precision(load_in_4bit, load_in_8bit, load_in_16bit, dtype)
        _refuse_unavailable(full_finetuning, rope_scaling, text_only)
        recomputed = bool(_checked_recompute(use_gradient_checkpointing))
        engine = engine_options(
            fast_inference, vllm_python, max_lora_rank, gpu_memory_utilization, float8_kv_cache
        )
        options = LoadOptions(
            max_seq_length=max_seq_length, dtype=dtype, device_map=device_map, quantization=quantization,
            revision=revision, token=token, trust_remote_code=trust_remote_code, recompute=recomputed,
            seed=random_state, base=base,
        )  # fmt: skip
        model, tokenizer = load(servable(model_name, options, engine), options)
        origin = origin_of(model)
        assert origin is not None, "load() keeps the origin on the model"
        origin.recompute = use_gradient_checkpointing
        origin.mlp_tile_tokens = _tile_tokens(model) if unsloth_tiled_mlp else None
        if hasattr(model, "peft_config"):
            _prepare(model, use_gradient_checkpointing, accelerate)
        keep_engine(model, engine)
        _bind(model)
        return model, tokenizer

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int = 16,
        target_modules: str | Iterable[str] | None = None,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: str = "none",
        layers_to_transform: int | Iterable[int] | None = None,
        layers_pattern: str | Iterable[str] | None = None,
        finetune_last_n_layers: int | None = None,
        use_gradient_checkpointing: Recompute | None = None,
        random_state: int | None = None,
        max_seq_length: int | None = None,
        use_rslora: bool = False,
        modules_to_save: Iterable[str] | None = None,
        init_lora_weights: bool | str = True,
        *,
        use_dora: bool = False,
        target_parameters: Iterable[str] | None = None,
        ensure_weight_tying: bool | None = None,
        accelerate: bool = True,
        **other: Any,
    ) -> Any:
        """Attach a LoRA adapter and print what was attached; returns a PeftModel.

        Args:
            model: from ``from_pretrained``, or any transformers causal language model.
            r, lora_alpha, lora_dropout, bias: as in PEFT's LoraConfig.
            use_rslora, use_dora, init_lora_weights: as in PEFT's LoraConfig.
            target_modules: names, "all-linear", or one regex over full names; None is q_proj, k_proj,
                v_proj, o_proj, gate_proj, up_proj, down_proj, or "all-linear" where names differ.
            layers_to_transform, layers_pattern, finetune_last_n_layers: restrict the layers.
            use_gradient_checkpointing: None keeps what from_pretrained was told.
            random_state: seed of the adapter; None keeps that of from_pretrained.
            max_seq_length: may repeat the value of from_pretrained; another one is refused.
            modules_to_save: modules trained in full.
            target_parameters: parameters such as stacked experts.
            ensure_weight_tying: for tied models whose embedding or head trains: True keeps them one,
                False unties.
            accelerate: replace the parts proven equal (``pronghorn.accelerate``) and print which.
            **other: other names of this kind are refused with the reason.

        Raises:
            AdapterError, NotSupportedError, ConfigError: what cannot be attached, and why.
        """
        refuse("get_peft_model", other, _PEFT_REFUSED, FastLanguageModel.get_peft_model)
        origin = origin_of(model)
        if max_seq_length is not None and origin is not None and max_seq_length != origin.max_seq_length:
            raise ConfigError(
                f"max_seq_length is {max_seq_length} here and was {origin.max_seq_length} in from_pretrained",
                fix="set it in from_pretrained only",
            )
        seed = random_state if random_state is not None else (origin.seed if origin else DEFAULT_SEED)
        options = LoraOptions(
            r=r,
            alpha=lora_alpha,
            dropout=lora_dropout,
            targets=_names(_default_targets(model) if target_modules is None else target_modules),
            target_parameters=tuple(target_parameters or ()),
            bias=bias,
            use_rslora=use_rslora,
            use_dora=use_dora,
            modules_to_save=tuple(modules_to_save or ()),
            layers=_layers(layers_to_transform),
            last_layers=finetune_last_n_layers,
            layers_pattern=None if layers_pattern is None else _names(layers_pattern),
            init=init_lora_weights,
            tied=None if ensure_weight_tying is None else ("keep" if ensure_weight_tying else "untie"),
            seed=seed,
        )
        wanted: bool | str | None = use_gradient_checkpointing
        if wanted is None:
            wanted = origin.recompute if origin else recompute.is_on(model)
        _checked_recompute(wanted)
        check_rank(model, r)
        wrapped = attach_lora(model, options)
        _prepare(wrapped, wanted, accelerate)
        _bind(wrapped)
        return wrapped

    @staticmethod
    def for_training(model: Any, use_gradient_checkpointing: Recompute = True) -> Any:
        """Training mode: dropout on, no key-value cache, recompute as asked (True: as planned).

        Returns the model.
        """
        model.train()
        model.config.use_cache = False
        _checked_recompute(use_gradient_checkpointing)
        if isinstance(use_gradient_checkpointing, str):
            _prepare(model, use_gradient_checkpointing, True)
        else:
            _switch_recompute(model, use_gradient_checkpointing)
        return model

    @staticmethod
    def for_inference(model: Any) -> Any:
        """Inference mode: dropout off, key-value cache on, no recompute. Returns the model."""
        model.eval()
        model.config.use_cache = True
        _switch_recompute(model, False)
        return model


def _refuse_unavailable(full_finetuning: bool, rope_scaling: Any, text_only: bool) -> None:
    if full_finetuning:
        raise NotSupportedError("full_finetuning=True: only adapters are trained", fix="leave it out")
    if rope_scaling is not None:
        raise NotSupportedError("rope_scaling cannot be changed at load", fix="set it in config.json")
    if not text_only:
        raise NotSupportedError("text_only=False: images are not trained on", fix="leave it out")


def _precision(four: bool, eight: bool, sixteen: bool | None, dtype: Any) -> str | None:
    """The ``quantization`` of LoadOptions that the keywords ask for."""
    asked = [f"load_in_{bits}bit=True" for bits, on in ((4, four), (8, eight), (16, sixteen)) if on]
    if len(asked) > 1:
        raise ConfigError(f"{asked[0]} contradicts {asked[1]}", fix="keep one of them")
    if sixteen and str(dtype).removeprefix("torch.") in ("float32", "fp32"):
        raise ConfigError(f"load_in_16bit=True contradicts dtype={dtype}", fix="keep one of them")
    return "nf4" if four else "int8" if eight else "none" if sixteen else None


def _checked_recompute(asked: Any) -> Any:
    if asked not in RECOMPUTE_MODES:
        raise ConfigError(
            f"use_gradient_checkpointing is {asked!r}", fix='use True, False, "unsloth" or "auto"'
        )
    return asked


def _prepare(model: Any, asked: bool | str, accelerated: bool) -> None:
    """Make a model with an adapter ready to train: its proven replacements, and recompute as asked."""
    if isinstance(asked, str) and not accelerated:
        raise ConfigError(
            f"use_gradient_checkpointing={asked!r} needs accelerate=True",
            fix="use True or False, or accelerate",
        )
    origin = origin_of(model)
    tile = origin.mlp_tile_tokens if origin else None
    if tile is not None and not accelerated:
        raise ConfigError("unsloth_tiled_mlp=True needs accelerate=True", fix="keep one of them")
    _switch_recompute(model, bool(asked) and not accelerated)  # what is saved is measured without it
    if accelerated:
        print(accelerate_model(model, recompute=RECOMPUTE_MODES[asked], mlp_tile_tokens=tile))


def _tile_tokens(model: Any) -> int:
    """Tokens of which a gate has as many values as its weight: fewer are slow, more save little."""
    return int(model.get_input_embeddings().weight.shape[1])


def _switch_recompute(model: Any, on: bool) -> None:
    if on and not recompute.is_on(model):
        recompute.enable(model)
    elif not on and recompute.is_on(model):
        recompute.disable(model)


def _default_targets(model: Any) -> str | tuple[str, ...]:
    try:
        resolve_targets(model, LoraOptions(targets=DEFAULT_TARGETS))
    except AdapterError:
        return ALL_LINEAR
    return DEFAULT_TARGETS


def _names(given: str | Iterable[str]) -> str | tuple[str, ...]:
    return given if isinstance(given, str) else tuple(given)


def _layers(given: int | Iterable[int] | None) -> int | tuple[int, ...] | None:
    return given if given is None or isinstance(given, int) else tuple(given)


def _bind(model: Any) -> None:
    """Put the methods notebooks call on this one instance."""
    model.for_training = types.MethodType(FastLanguageModel.for_training, model)
    model.for_inference = types.MethodType(FastLanguageModel.for_inference, model)
    bind_saving(model)
    bind_generating(model)
