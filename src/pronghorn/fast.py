"""The names notebooks already use: FastLanguageModel unfolds them into options and calls the rooms below.

Every keyword either has an effect or is refused with the reason; none is accepted and ignored.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.options import ALL_LINEAR, DEFAULT_TARGETS, LoraOptions
from pronghorn.adapters.origin import changed_weights, origin_of
from pronghorn.adapters.save import save_adapter
from pronghorn.adapters.targets import resolve_targets
from pronghorn.errors import AdapterError, ConfigError, NotSupportedError
from pronghorn.export.formats import format_of_method
from pronghorn.export.onto import MergeFormat, Onto
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.memory import recompute
from pronghorn.patching.accelerate import RECOMPUTE_MODES
from pronghorn.patching.accelerate import accelerate as accelerate_model

if TYPE_CHECKING:
    from pronghorn.serving.hub import Push

DEFAULT_SEED = 3407
Recompute = bool | Literal["unsloth", "auto"]


@dataclass(frozen=True)
class _Refused:
    """A known keyword without effect here: the values that ask for nothing, and why any other is refused."""

    neutral: tuple[Any, ...]
    reason: str
    fix: str = "leave it out"


_NO_VLLM = "belongs to fast_inference, which is not available: serve the merged folder with vLLM instead"
_LOAD_REFUSED: Mapping[str, _Refused] = MappingProxyType(
    {
        "fix_tokenizer": _Refused((None, False), "tokenizers are used as they are, never repaired"),
        "resize_model_vocab": _Refused((None,), "the vocabulary is not resized while loading",
                                       "call add_new_tokens after loading"),
        "use_exact_model_name": _Refused((None, True), "names are never exchanged for others here"),
        "offload_embedding": _Refused((None, False), "embeddings are not offloaded"),
        "float32_mixed_precision": _Refused((None,), "adapters always train in float32"),
        "fast_inference": _Refused((None, False), "no vLLM engine is started inside training",
                                   "serve the merged folder with vLLM"),
        "gpu_memory_utilization": _Refused((None,), _NO_VLLM),
        "float8_kv_cache": _Refused((None, False), _NO_VLLM),
        "max_lora_rank": _Refused((None,), _NO_VLLM),
        "disable_log_stats": _Refused((None, True), _NO_VLLM),
        "qat_scheme": _Refused((None,), "quantisation-aware training is not available"),
        "load_in_fp8": _Refused((None, False), "loading in FP8 is not available", "load in 16-bit"),
        "num_labels": _Refused((None,), "classification heads are not available"),
    }
)  # fmt: skip
_PEFT_REFUSED: Mapping[str, _Refused] = MappingProxyType(
    {
        "loftq_config": _Refused((None, {}), "LoftQ replaces the base by a quantised one"),
        "temporary_location": _Refused((None,), "nothing is spilled to a temporary folder"),
        "qat_scheme": _Refused((None,), "quantisation-aware training is not available"),
        "task_type": _Refused((None, "CAUSAL_LM"), "only causal language models can be trained"),
    }
)
_SAVE_REFUSED: Mapping[str, _Refused] = MappingProxyType(
    {
        "push_to_hub": _Refused((None, False), "nothing is uploaded by this call", "call push_to_hub_merged"),
        "token": _Refused((None,), "nothing is uploaded by this call", "call push_to_hub_merged"),
        "max_shard_size": _Refused((None,), "the base's own shard layout is kept"),
        "maximum_memory_usage": _Refused((None,), "the merge streams and needs little memory"),
        "temporary_location": _Refused((None,), "nothing is spilled to a temporary folder"),
        "safe_serialization": _Refused((None, True), "only safetensors files are written"),
        "state_dict": _Refused((None,), "the merge reads the model's own adapter"),
        "variant": _Refused((None,), "the base's own file names are kept"),
    }
)
_NO_ROWS = "drift from the trained model was not measured: give rows=FILE, rows as for training"
_GGUF_REFUSED: Mapping[str, _Refused] = MappingProxyType(
    {
        **{name: rule for name, rule in _SAVE_REFUSED.items() if name not in ("state_dict", "variant")},
        "first_conversion": _Refused((None,), "the quantiser starts from the merged weights as they are"),
        "imatrix_file": _Refused((None,), "no importance matrix is used"),
        "push_to_hub": _Refused((None, False), "nothing is uploaded by this call", "run `pronghorn push`"),
        "token": _Refused((None,), "nothing is uploaded by this call", "run `pronghorn push`"),
        "private": _Refused((None,), "nothing is uploaded by this call", "run `pronghorn push`"),
        "merge_is_disposable": _Refused((None, True), "the merge is always removed",
                                        "call save_pretrained_merged to keep one"),
    }
)  # fmt: skip
_PUSH_REFUSED: Mapping[str, _Refused] = MappingProxyType(
    {
        **{name: rule for name, rule in _SAVE_REFUSED.items() if name not in ("push_to_hub", "token")},
        "create_pr": _Refused((None, False), "one commit to the main branch is made"),
        "revision": _Refused((None, "main"), "one commit to the main branch is made"),
        "use_temp_dir": _Refused((None,), "save_directory says whether the folder stays"),
        "commit_description": _Refused((None, ""), "the model card describes it", "use commit_message"),
        "tags": _Refused((None,), "tags belong in the model card", "edit the card on the hub: it is kept"),
    }
)
# names of Unsloth's that say a purpose instead of a kind; None is 16 bit in the model's own type
_GGUF_PURPOSES: Mapping[str, str | None] = MappingProxyType(
    {
        "not_quantized": None,
        "fast_quantized": "q8_0",
        "quantized": "q4_k_m",
        "q4_k": "q4_k_m",
        "q5_k": "q5_k_m",
    }
)
# names notebooks call on a model, and what to do instead
_REFUSED_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "push_to_hub_gguf": "save_pretrained_gguf(DIR), then `pronghorn push DIR REPO`",
        "save_pretrained_torchao": "save_pretrained_merged(DIR), then torchao on that folder",
        "fast_generate": "generate(...) here; for vLLM save_lora(DIR), then `pronghorn serve DIR`",
        "load_lora": "pronghorn.load(DIR); for vLLM `pronghorn serve DIR`",
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
            unsloth_tiled_mlp: for long rows, MLPs and experts in tiles of as many tokens as the model is wide
            accelerate: for an adapter, replace the parts proven equal (``pronghorn.accelerate``).
            **other: other names of this kind are refused with the reason.

        Raises:
            NotSupportedError, ConfigError: a keyword that cannot be honoured, or is unknown.
            SourceError, AdapterError: as for ``pronghorn.load``.
        """
        _refuse("from_pretrained", other, _LOAD_REFUSED, FastLanguageModel.from_pretrained)
        quantization = _precision(load_in_4bit, load_in_8bit, load_in_16bit, dtype)
        if full_finetuning:
            raise NotSupportedError("full_finetuning=True: only adapters are trained", fix="leave it out")
        if rope_scaling is not None:
            raise NotSupportedError(
                "rope_scaling cannot be changed at load", fix="set it in the model's config.json"
            )
        if not text_only:
            raise NotSupportedError(
                "text_only=False: rows with images are not trained on", fix="leave it out"
            )
        options = LoadOptions(
            max_seq_length=max_seq_length,
            dtype=dtype,
            device_map=device_map,
            quantization=quantization,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            recompute=bool(_checked_recompute(use_gradient_checkpointing)),
            seed=random_state,
            base=base,
        )
        model, tokenizer = load(model_name, options)
        origin = origin_of(model)
        assert origin is not None, "load() keeps the origin on the model"
        origin.recompute = use_gradient_checkpointing
        origin.mlp_tile_tokens = _tile_tokens(model) if unsloth_tiled_mlp else None
        if hasattr(model, "peft_config"):
            _prepare(model, use_gradient_checkpointing, accelerate)
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
        _refuse("get_peft_model", other, _PEFT_REFUSED, FastLanguageModel.get_peft_model)
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


def _refuse(call: str, given: Mapping[str, Any], known: Mapping[str, _Refused], function: Any) -> None:
    for name, value in given.items():
        rule = known.get(name)
        if rule is None:
            code = function.__code__
            names = [*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount], *known]
            close = get_close_matches(name, names, n=1)
            raise ConfigError(
                f"{call} has no keyword {name!r}",
                fix=f"did you mean {close[0]}?" if close else "leave it out",
            )
        if not any(value is one or value == one for one in rule.neutral):
            raise NotSupportedError(f"{name}={value!r}: {rule.reason}", fix=rule.fix)


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
    model.save_pretrained_merged = types.MethodType(_save_pretrained_merged, model)
    model.save_pretrained_gguf = types.MethodType(_save_pretrained_gguf, model)
    model.save_lora = types.MethodType(_save_lora, model)
    model.push_to_hub = types.MethodType(_push_to_hub, model)
    model.push_to_hub_merged = types.MethodType(_push_to_hub_merged, model)
    for name, instead in _REFUSED_METHODS.items():
        setattr(model, name, types.MethodType(_refusing(name, instead), model))


def _refusing(name: str, instead: str) -> Any:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        """Not available; the error names the way out."""
        del self
        raise NotSupportedError(f"{name} is not available", fix=instead)

    return refuse


def _save_pretrained_merged(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    overwrite: bool = False,
    onto: Onto = "decoded",
    text_only: bool = False,
    rows: str | Path | None = None,
    calibrate: str | Path | None = None,
    calibrate_python: str | Path | None = None,
    **other: Any,
) -> Any:
    """Write the base files with the adapter merged in ("merged_16bit"; quantised: "w4a16", "w8a8", "fp8",
    "nvfp4a16"), or the adapter: as it is ("lora"), or so that vLLM, llama.cpp and PEFT read it alike
    ("adapter").

    The merge goes from files to files and is verified in a fresh process; what was done, and what was lost in
    rounding, is printed and returned. ``overwrite`` replaces a folder. Of a base in 4-bit: ``onto`` says onto
    which values, and ``rows``, a file as for training, on what the drift from the trained model is measured.
    ``calibrate``, such a file too, has GPTQ choose the codes of w4a16, by the llm-compressor of this
    interpreter or of ``calibrate_python``.
    ``text_only`` writes of a multimodal base its language model alone.

    Raises:
        ConfigError, NotSupportedError: an unknown save_method or keyword.
        AdapterError: the model has no adapter, or its base was changed in memory.
        ExportError: the export failed or did not verify; nothing was written.
    """
    _refuse("save_pretrained_merged", other, _SAVE_REFUSED, _save_pretrained_merged)
    format_ = format_of_method(save_method)
    if format_ == "lora" and hasattr(self, "peft_config") and calibrate is None:
        return save_adapter(self, save_directory, tokenizer=tokenizer)
    wanted = MergeFormat(
        format_,
        onto,
        text_only=text_only,
        calibrate=Path(calibrate) if calibrate is not None else None,
        calibrate_python=Path(calibrate_python) if calibrate_python is not None else None,
    )
    return _export(self, save_directory, tokenizer, wanted, overwrite, rows)


def _export(
    self: Any,
    target: str | Path | None,
    tokenizer: Any,
    format_: str | MergeFormat,
    overwrite: bool,
    rows: str | Path | None = None,
    push: Push | None = None,
) -> Any:
    """Save the model's adapter for a moment, export it, and push it where asked; prints what was done.

    Returns the export's report, or what was pushed; without a ``target`` the folder is gone afterwards.
    """
    if not hasattr(self, "peft_config"):
        raise AdapterError(
            "the model has no adapter, so there is nothing to merge", fix="call get_peft_model first"
        )
    origin = origin_of(self)
    if origin is None:
        raise AdapterError(
            "the model was not loaded by pronghorn, so the files of its base are not known",
            fix="save the adapter with save_pretrained, then run `pronghorn export ADAPTER DIR --base BASE`",
        )
    changed = changed_weights(self, origin)
    if changed:
        raise AdapterError(
            f"{len(changed)} weights of the base were changed in memory after loading (first: {changed[0]}); "
            "a merge is made from the files, where they are unchanged",
            fix="undo the change (unmerge_adapter() after merge_adapter()), or save the adapter alone",
        )
    from pronghorn.export.run import export
    from pronghorn.serving.compare import drift_line
    from pronghorn.serving.push import push_export

    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        adapter = save_adapter(self, Path(scratch) / "adapter", tokenizer=tokenizer)
        folder = target if target is not None else Path(scratch) / "exported"

        def write(watch: Any = None) -> Any:
            return export(adapter, folder, format=format_, overwrite=overwrite, progress=watch)

        report, done = push_export(push, write, stays=target is not None) if push else (write(), None)
        print(report)
        if report.onto is not None:
            onto = format_.onto if isinstance(format_, MergeFormat) else "decoded"
            print(_NO_ROWS if rows is None else drift_line(report, onto, rows))
    if done is not None:
        print(done)
    return done or report


def _save_pretrained_gguf(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Iterable[str] = "fast_quantized",
    *,
    save_method: str | None = None,
    llama_python: str | Path | None = None,
    overwrite: bool = False,
    **other: Any,
) -> Any:
    """Write GGUF files for llama.cpp and Ollama, and a Modelfile, into ``save_directory``.

    Args:
        save_directory: the folder; files in it are called model-Q8_0.gguf and so on.
        tokenizer: the one of training, which goes into the files.
        quantization_method: one name or several: "f16", "bf16", "f32", "q8_0" (also "fast_quantized") are
            written here; "q4_k_m" (also "quantized") and the like need llama-cpp-python. "not_quantized" is
            16 bit in the model's own type.
        save_method: "lora" writes the adapter alone, for llama.cpp's --lora.
        llama_python: the interpreter that has llama_cpp, where it is not this one.
        overwrite: replace the folder.
        **other: other names of this kind are refused with the reason.

    Raises:
        NotSupportedError, MissingDependencyError, SourceError: what cannot be written, and why.
        AdapterError, ExportError: as ``save_pretrained_merged``.
    """
    _refuse("save_pretrained_gguf", other, _GGUF_REFUSED, _save_pretrained_gguf)
    if save_method not in (None, "lora"):
        raise ConfigError(
            f"save_method is {save_method!r}", fix='leave it out, or say "lora" for the adapter'
        )
    given = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    kinds = ["lora"] if save_method else [_gguf_kind(self, one) for one in given]
    from pronghorn.export.onto import MergeFormat

    python = Path(llama_python) if llama_python is not None else None
    wanted = MergeFormat(f"gguf-{','.join(kinds)}", llama_python=python)
    return _export(self, save_directory, tokenizer, wanted, overwrite)


def _gguf_kind(model: Any, name: str) -> str:
    kind = _GGUF_PURPOSES.get(name.lower(), name.lower())
    return kind or ("f16" if str(model.config.dtype) == "torch.float16" else "bf16")


def _save_lora(
    self: Any, save_directory: str | Path, tokenizer: Any = None, *, overwrite: bool = False
) -> Any:
    """Write the adapter in the portable form, for vLLM's LoRARequest; as save_method="adapter"."""
    return _save_pretrained_merged(self, save_directory, tokenizer, "adapter", overwrite=overwrite)


def _push_to_hub(self: Any, repo_id: str, tokenizer: Any = None, **asked: Any) -> Any:
    """Upload the adapter as it is, with its tokenizer and a model card, in one commit; prints and returns it.

    Args:
        repo_id: OWNER/NAME, or NAME alone for the token's account; made if it is not there.
        tokenizer: by default the one the model was loaded with.
        **asked: ``token`` (by default that of ``hf auth login`` or HF_TOKEN), ``private`` (of a new
            repository), ``overwrite`` (replace what it holds), ``commit_message``; others are refused.

    Raises:
        ExportError: the hub refuses, or holds something else; nothing became visible.
    """
    push = _push("push_to_hub", repo_id, asked, _push_to_hub)
    from pronghorn.serving.push import push_folder

    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        done = push_folder(save_adapter(self, Path(scratch) / "adapter", tokenizer=tokenizer), push)
    print(done)
    return done


def _push_to_hub_merged(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    onto: Onto = "decoded",
    save_directory: str | Path | None = None,
    **asked: Any,
) -> Any:
    """As ``save_pretrained_merged``, each shard uploaded while the next is written; visible once verified.

    ``save_directory`` keeps the folder there; else it lies in the system's temporary folder meanwhile. Other
    arguments are those of ``push_to_hub``, and errors those of both.
    """
    push = _push("push_to_hub_merged", repo_id, asked, _push_to_hub_merged)
    wanted = MergeFormat(format_of_method(save_method), onto)
    return _export(self, save_directory, tokenizer, wanted, push.overwrite, push=push)


def _push(call: str, repo: str, asked: dict[str, Any], function: Any) -> Push:
    from pronghorn.serving.hub import Push

    said = {name: asked.pop(name) for name in ("token", "private", "overwrite") if name in asked}
    message = asked.pop("commit_message", None)
    _refuse(call, asked, _PUSH_REFUSED, function)
    return Push(repo, **said, **({} if message is None else {"message": message}))
