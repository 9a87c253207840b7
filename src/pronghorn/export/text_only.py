"""The language model of a multimodal base as a base of its own: names, config and files of its text class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pronghorn.adapters.tokenizer_files import CONFIG, SETTINGS, TEMPLATE, FolderEdits, dump, templates
from pronghorn.errors import ExportError, NotSupportedError
from pronghorn.export.job import Job
from pronghorn.export.onto import BaseWeights, base_weights
from pronghorn.sources.resolve import read_json
from pronghorn.sources.source import Source
from pronghorn.weights.shards import Shard

# model type of the language model -> its class without the towers; those that tests hold against the whole
TEXT_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "gemma3_text": "Gemma3ForCausalLM",
        "mistral": "MistralForCausalLM",
    }
)

# (start of a name in a multimodal folder, in the text class)
_NAMES = (("language_model.", ""), ("model.language_model.", "model."), ("lm_head.", "lm_head."))
_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
# what the whole model says for its language model
_SHARED = ("dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id")
_OLD_TEMPLATE = "chat_template.json"
_PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", _OLD_TEMPLATE,
)  # fmt: skip


def check_text_class(base: Source) -> None:
    """Refuse a base without a language model of a known class inside.

    Raises:
        NotSupportedError: it is not multimodal, or its language model has no class of its own.
    """
    text = base.config.get("text_config")
    if not isinstance(text, Mapping):
        raise NotSupportedError(
            f"text_only: {base.name} is no multimodal model ({base.config.get('model_type')})",
            fix="leave text_only out",
        )
    if text.get("model_type") not in TEXT_CLASSES:
        raise NotSupportedError(
            f"text_only: the language model of {base.name} ({text.get('model_type')}) has no class without "
            f"the image tower that is proven here; known are {', '.join(TEXT_CLASSES)}",
            fix="leave text_only out: vLLM serves text alone with --limit-mm-per-prompt '{\"image\": 0}'",
        )


def weights_of(job: Job) -> BaseWeights:
    """What an export merges onto: the base, or with ``text_only`` its language model. Reads headers only.

    Raises:
        SourceError, ExportError: as ``base_weights``; or a tensor that belongs neither to the language model
            nor to a tower.
    """
    base = base_weights(job.base, job.read_adapter().record, job.onto)
    return _text_weights(base) if job.text_only else base


def _text_weights(base: BaseWeights) -> BaseWeights:
    """The tensors of the language model under the names of its text class."""
    names = {name: _text_name(name) for name in base.weights.tensors}
    shards = tuple(_text_shard(shard, names) for shard in base.weights.shards)
    tensors = {name: (shard, entry) for shard in shards for name, entry in shard.tensors.items()}
    weights = replace(base.weights, shards=shards, tensors=MappingProxyType(tensors))
    kept = {new: rows for name, rows in base.quantised.items() if (new := names[name]) is not None}
    return replace(base, weights=weights, quantised=kept)


def _text_name(name: str) -> str | None:
    """None for a tensor of a tower."""
    if name.startswith(_TOWERS):
        return None
    for whole, text in _NAMES:
        if name.startswith(whole):
            return text + name.removeprefix(whole)
    raise ExportError(
        f"text_only: {name} of the base is neither of the language model nor of a tower",
        fix="leave text_only out, or check that config.json belongs to these weights",
    )


def _text_shard(shard: Shard, names: Mapping[str, str | None]) -> Shard:
    entries = {
        new: replace(entry, name=new)
        for name, entry in shard.tensors.items()
        if (new := names[name]) is not None
    }
    return replace(shard, prefix=b"", tensors=MappingProxyType(entries))


def keep_text_files(edits: FolderEdits, base: Path, *, tied: bool) -> None:
    """Make the edits of a multimodal folder those of its language model: config, tokenizer, no processor.

    Args:
        edits: what changes in the base's files; completed in place.
        base: the base's folder.
        tied: whether the folder stores no head of its own.
    """
    config = _text_config(edits.document(base, CONFIG), tied)
    edits.files[CONFIG] = dump(config)
    edits.listed.append(f"{CONFIG}: of the language model alone, {config['architectures'][0]}")
    settings = edits.document(base, SETTINGS)
    if settings.pop("processor_class", None) is not None:
        edits.files[SETTINGS] = dump(settings)
        edits.listed.append(f"{SETTINGS}: processor_class removed")
    template = _processor_template(base)
    if template and TEMPLATE not in edits.files and not any(templates(base)):
        edits.files[TEMPLATE] = template.encode()
        edits.listed.append(f"{TEMPLATE}: the processor's")
    for name in _PROCESSOR:
        if (base / name).is_file():
            edits.files[name] = None
            edits.listed.append(f"{name}: left out")


def _text_config(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    text = dict(config["text_config"])
    shared = {key: config[key] for key in _SHARED if config.get(key) is not None}
    named = {"architectures": [TEXT_CLASSES[text["model_type"]]], "tie_word_embeddings": tied}
    return {**text, **shared, **named}


def _processor_template(base: Path) -> str:
    """The chat template that only the processor's files hold."""
    for name in (_OLD_TEMPLATE, "processor_config.json"):
        if (base / name).is_file():
            template = read_json(base / name).get("chat_template")
            if isinstance(template, str):
                return template
    return ""
