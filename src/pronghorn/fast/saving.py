"""What notebooks call on a model to save, export and upload it."""

from __future__ import annotations

import tempfile
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pronghorn.adapters.origin import changed_weights, origin_of
from pronghorn.adapters.save import save_adapter
from pronghorn.errors import AdapterError, ConfigError, NotSupportedError
from pronghorn.export.formats import format_of_method
from pronghorn.export.onto import MergeFormat, Onto
from pronghorn.fast.keywords import Refused, refuse

if TYPE_CHECKING:
    from pronghorn.serving.hub import Push

_SAVE_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        "push_to_hub": Refused((None, False), "nothing is uploaded by this call", "call push_to_hub_merged"),
        "token": Refused((None,), "nothing is uploaded by this call", "call push_to_hub_merged"),
        "max_shard_size": Refused((None,), "the base's own shard layout is kept"),
        "maximum_memory_usage": Refused((None,), "the merge streams and needs little memory"),
        "temporary_location": Refused((None,), "nothing is spilled to a temporary folder"),
        "safe_serialization": Refused((None, True), "only safetensors files are written"),
        "state_dict": Refused((None,), "the merge reads the model's own adapter"),
        "variant": Refused((None,), "the base's own file names are kept"),
    }
)
_NO_ROWS = "drift from the trained model was not measured: give rows=FILE, rows as for training"
_GGUF_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        **{name: rule for name, rule in _SAVE_REFUSED.items() if name not in ("state_dict", "variant")},
        "first_conversion": Refused((None,), "the quantiser starts from the merged weights as they are"),
        "imatrix_file": Refused((None,), "no importance matrix is used"),
        "push_to_hub": Refused((None, False), "nothing is uploaded by this call", "run `pronghorn push`"),
        "token": Refused((None,), "nothing is uploaded by this call", "run `pronghorn push`"),
        "private": Refused((None,), "nothing is uploaded by this call", "run `pronghorn push`"),
        "merge_is_disposable": Refused((None, True), "the merge is always removed",
                                        "call save_pretrained_merged to keep one"),
    }
)  # fmt: skip
_PUSH_REFUSED: Mapping[str, Refused] = MappingProxyType(
    {
        **{name: rule for name, rule in _SAVE_REFUSED.items() if name not in ("push_to_hub", "token")},
        "create_pr": Refused((None, False), "one commit to the main branch is made"),
        "revision": Refused((None, "main"), "one commit to the main branch is made"),
        "use_temp_dir": Refused((None,), "save_directory says whether the folder stays"),
        "commit_description": Refused((None, ""), "the model card describes it", "use commit_message"),
        "tags": Refused((None,), "tags belong in the model card", "edit the card on the hub: it is kept"),
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
        "fast_generate_batches": "fast_generate with all prompts in one list: vLLM makes the batches",
    }
)


def bind_saving(model: Any) -> None:
    """Put the methods that save and upload on this one instance."""
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
    refuse("save_pretrained_merged", other, _SAVE_REFUSED, _save_pretrained_merged)
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
            "the model has no adapter, so there is nothing to merge",
            fix="call get_peft_model first, or quantise the folder: pronghorn.export(BASE, DIR, format=...)",
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
    refuse("save_pretrained_gguf", other, _GGUF_REFUSED, _save_pretrained_gguf)
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
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    rows: str | Path | None = None,
) -> Any:
    """Write the adapter in the portable form, for vLLM's LoRARequest; as save_method="adapter"."""
    return _save_pretrained_merged(self, save_directory, tokenizer, "adapter", overwrite=overwrite, rows=rows)


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
    refuse(call, asked, _PUSH_REFUSED, function)
    return Push(repo, **said, **({} if message is None else {"message": message}))
