"""Save an adapter as a plain PEFT folder, with its tokenizer and the record of its base beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from pronghorn.adapters.new_tokens import holds_new_rows
from pronghorn.adapters.origin import Origin, base_of, origin_of
from pronghorn.adapters.record import AdapterRecord, library_versions, write_record
from pronghorn.adapters.tokenizer_files import TOKENIZER_FILES, FolderEdits, tokenizer_files
from pronghorn.errors import AdapterError, NotSupportedError
from pronghorn.weights.writer import StagedFolder, apply_umask, sync_path, sync_tree

_TIED_ATTRIBUTE = "_pronghorn_tied"


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    adapter_name: str | None = None,
    state_dict: dict[str, Any] | None = None,
) -> Path:
    """Write an adapter that PEFT alone can load, its tokenizer and pronghorn.json; returns the folder.

    A new folder appears complete or not at all; in an existing one each file is replaced in one step and
    other files stay. ``tokenizer`` defaults to the one the model was loaded with, ``adapter_name`` to the
    only adapter; ``state_dict`` are the weights to write where a trainer gathered them (default: the
    model's).

    Raises:
        AdapterError: several adapters and no choice, or an unknown name.
        ExportError, OSError: the folder cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    name = _choose(model, adapter_name)
    if target.is_dir() and any(target.iterdir()):
        _replace_files(model, target, tokenizer, name, state_dict)
    else:
        with StagedFolder(target) as staging:
            _write(model, staging, tokenizer, name, state_dict)
    return target


def record_of(model: PeftModel, adapter_name: str | None = None) -> AdapterRecord:
    """The record of the adapter as it is now."""
    name = _choose(model, adapter_name)
    config, origin = model.peft_config[name], origin_of(model)
    trainable = tuple(key for key, parameter in model.named_parameters() if parameter.requires_grad)
    rows = model.get_input_embeddings().weight.shape[0]
    return AdapterRecord(
        base_name=origin.name if origin else str(config.base_model_name_or_path or ""),
        base_revision=origin.revision if origin else config.revision,
        base_path=str(origin.path) if origin else None,
        base_fingerprint=origin.fingerprint if origin else None,
        max_seq_length=origin.max_seq_length if origin else None,
        tied=getattr(base_of(model), _TIED_ATTRIBUTE, None),
        versions=library_versions(),
        trainable=trainable,
        rank=config.r,
        vocab_rows=rows if origin and origin.rows and rows != origin.rows else None,
        quantization=origin.quantization if origin else None,
        quantised_dtype=origin.quantised_dtype if origin else None,
        quantised=origin.quantised if origin else (),
    )


def bind_save(model: PeftModel, *, tied: str | None) -> None:
    """Make ``model.save_pretrained`` write the whole adapter folder; only this instance changes."""
    setattr(base_of(model), _TIED_ATTRIBUTE, tied)
    model.save_pretrained = types.MethodType(_save_pretrained, model)


def tokenizer_print(tokenizer: Any) -> str:
    """A hash of everything a tokenizer says: vocabulary, special tokens, template."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if hasattr(backend, "to_str") else sorted(tokenizer.get_vocab().items())
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    said = [core, special, tokenizer.chat_template, tokenizer.padding_side, type(tokenizer).__name__]
    return hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode()).hexdigest()


def _save_pretrained(
    self: PeftModel,
    save_directory: str | Path,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> None:
    """What is bound as ``save_pretrained``: PEFT's signature, as trainers call it."""
    if not safe_serialization:
        raise AdapterError("safe_serialization=False writes pickled weights", fix="leave it out")
    if kwargs.pop("push_to_hub", False):
        raise NotSupportedError(
            "push_to_hub=True: nothing is uploaded by save_pretrained", fix="run `pronghorn push DIR REPO`"
        )
    kwargs.pop("max_shard_size", None)  # model.push_to_hub passes it; an adapter is one file
    if kwargs:
        raise AdapterError(f"save_pretrained knows no {', '.join(sorted(kwargs))}", fix="leave it out")
    if not is_main_process:
        return
    if selected_adapters is not None and len(selected_adapters) != 1:
        raise AdapterError(f"selected_adapters is {selected_adapters}", fix="name exactly one adapter")
    name = selected_adapters[0] if selected_adapters else None
    save_adapter(self, save_directory, tokenizer=tokenizer, adapter_name=name, state_dict=state_dict)


def _choose(model: PeftModel, name: str | None) -> str:
    names = list(model.peft_config)
    if name is None and len(names) == 1:
        return str(names[0])
    if name is None or name not in names:
        asked = "no adapter was chosen" if name is None else f"there is no adapter {name!r}"
        raise AdapterError(
            f"{asked}; the model has {', '.join(names)}", fix="name one of them (selected_adapters=[NAME])"
        )
    return name


def _replace_files(
    model: PeftModel, target: Path, tokenizer: Any, name: str, state_dict: dict[str, Any] | None
) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        staging.chmod(target.stat().st_mode & 0o777)  # mkdtemp gives 0700, which would become the files' mode
        _write(model, staging, tokenizer, name, state_dict)
        apply_umask(staging)
        sync_tree(staging)
        for path in sorted(staging.iterdir()):
            path.replace(target / path.name)
        sync_path(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(
    model: PeftModel, folder: Path, tokenizer: Any, name: str, state_dict: dict[str, Any] | None
) -> None:
    origin = origin_of(model)
    rows = model.get_input_embeddings().weight.shape[0]
    resized = origin is not None and origin.rows is not None and rows != origin.rows
    # told explicitly: PEFT's "auto" asks the hub whether the vocabulary changed
    whole = resized and not holds_new_rows(model, name)
    PeftModel.save_pretrained(
        model, str(folder), selected_adapters=[name], save_embedding_layers=whole, state_dict=state_dict
    )
    if (
        name != "default"
    ):  # PEFT puts other names into a subfolder; one folder per adapter is what loaders expect
        for path in (folder / name).iterdir():
            path.replace(folder / path.name)
        (folder / name).rmdir()
    changes = _write_tokenizer(folder, tokenizer, origin)
    write_record(folder, replace(record_of(model, name), tokenizer_changes=changes))


def _write_tokenizer(folder: Path, tokenizer: Any, origin: Origin | None) -> tuple[str, ...]:
    """The files of the base's tokenizer, edited where this one says something else; returns the edits."""
    chosen = tokenizer if tokenizer is not None else (origin.tokenizer if origin else None)
    if chosen is None:
        return ()
    base = origin.tokenizer_folder if origin else None
    edits = FolderEdits()
    if origin is None or tokenizer_print(chosen) != origin.tokenizer_print:
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=folder) as scratch:
            _save_tokenizer(chosen, Path(scratch), origin)
            if base is None:
                for path in Path(scratch).iterdir():
                    path.replace(folder / path.name)
                return ()
            edits = tokenizer_files(base, Path(scratch))
    for name in TOKENIZER_FILES:
        content = edits.files.get(name)
        if content is not None:
            (folder / name).write_bytes(content)
        elif base is not None and name not in edits.files and (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    return tuple(edits.listed)


def _save_tokenizer(tokenizer: Any, folder: Path, origin: Origin | None) -> None:
    limit = tokenizer.model_max_length
    if origin and tokenizer is origin.tokenizer and origin.tokenizer_limit is not None:
        tokenizer.model_max_length = origin.tokenizer_limit  # ours is a setting of the run
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.model_max_length = limit
