"""What a run is made of: the model with its adapter, the tokenised rows, the manifest that names both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pronghorn.adapters.attach import attach_lora
from pronghorn.adapters.new_tokens import add_new_tokens
from pronghorn.adapters.origin import Origin, origin_of
from pronghorn.adapters.save import save_adapter
from pronghorn.data.examples import Shown
from pronghorn.data.inspect import EXAMPLES, Inspection
from pronghorn.data.prepare import prepare
from pronghorn.data.templates import choose_template
from pronghorn.errors import MissingDependencyError, NotSupportedError
from pronghorn.loading.load import load
from pronghorn.loading.options import LoadOptions
from pronghorn.loading.strict import no_bars
from pronghorn.patching.accelerate import RECOMPUTE_MODES, accelerate
from pronghorn.patching.report import PatchReport
from pronghorn.sources.resolve import resolve
from pronghorn.sources.source import SourceKind
from pronghorn.training import ranks
from pronghorn.training.config import RunConfig, with_lora_defaults
from pronghorn.training.isolation import require_isolation
from pronghorn.training.manifest import run_versions, trainable_tensors
from pronghorn.training.progress import Narrator

# of the data report, what a manifest keeps
_DATA_FACTS = (
    "data_hash",
    "template_hash",
    "format",
    "sources",
    "train_rows",
    "eval_rows",
    "bad",
    "dropped",
    "truncated",
    "tokens",
    "trained_tokens",
    "packing",
)


@dataclass(frozen=True)
class Material:
    """A PeftModel, its tokenizer, and ``datasets`` with input_ids and labels; ``rows`` may be packed bins."""

    model: Any
    tokenizer: Any
    rows: Any
    eval_rows: Any
    manifest: dict[str, Any]
    inspection: Inspection
    acceleration: PatchReport | None = None

    def save(self, folder: Path) -> None:
        """Write the adapter folder; it appears complete or not at all."""
        save_adapter(self.model, folder, tokenizer=self.tokenizer)


def gather(config: RunConfig, narrator: Narrator) -> Material:
    """Load the model, attach the adapter, prepare the rows.

    Raises:
        SourceError, AdapterError, DataError, NotSupportedError: what cannot be used, and why.
    """
    wanted = config.model
    source = resolve(wanted.name, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
    is_adapter = source.kind is SourceKind.ADAPTER
    config = with_lora_defaults(config, adapter=is_adapter)
    options = LoadOptions(
        max_seq_length=wanted.max_seq_length,
        dtype=wanted.dtype,
        quantization=wanted.quantization,
        trust_remote_code=wanted.trust_remote_code,
        base=wanted.base,
    )
    narrator.say(f"loading {source.name}")
    with no_bars():
        model, tokenizer = load(source, options, say=narrator.say)
    if wanted.new_tokens is not None:
        add_new_tokens(model, tokenizer, wanted.new_tokens, say=narrator.say)
    if config.data.template is not None:
        tokenizer.chat_template = choose_template(tokenizer, config.data.template, {}).text
    with ranks.first_alone():  # load() set the tokenizer's limit to what was asked
        prepared = prepare(config.data, tokenizer, tokenizer.model_max_length, say=narrator.say)
    narrator.show(prepared.report)
    if not is_adapter:
        model = attach_lora(model, config.lora, say=narrator.say)
    use_attention(model, config.training.attention)
    manifest = _manifest(config, model, prepared.report)
    if ranks.count() > 1:
        manifest["processes"] = ranks.count()
    acceleration = None
    if config.training.accelerate:
        acceleration = accelerate(model, recompute=RECOMPUTE_MODES[config.training.recompute])
        narrator.say(str(acceleration))
        manifest["acceleration"] = acceleration.as_dict()
    if prepared.bins is not None:
        narrator.say(f"packing: {require_isolation(model)}")
    train = prepared.train if prepared.bins is None else prepared.bins
    inspection = Inspection(prepared.report, Shown(tokenizer, EXAMPLES).rows(prepared.train))
    return Material(model, tokenizer, train, prepared.eval, manifest, inspection, acceleration)


def use_attention(model: Any, name: str) -> None:
    """Have transformers compute attention in another way.

    Raises:
        MissingDependencyError: its library is not installed.
        NotSupportedError: the model does not have it.
    """
    if name == "auto":
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    off = "set training.attention=auto"
    try:
        base.set_attn_implementation(name)
    except ImportError as error:
        raise MissingDependencyError(f"training.attention is {name}: {error}", fix=off) from error
    except ValueError as error:
        raise NotSupportedError(f"training.attention is {name}: {error}", fix=off) from error
    if base.config.get_text_config()._attn_implementation != name:
        raise NotSupportedError(
            f"training.attention is {name}, which {type(base).__name__} does not take", fix=off
        )


def _manifest(config: RunConfig, model: Any, report: Any) -> dict[str, Any]:
    origin = _origin(model)
    trainable = trainable_tensors(model)
    return {
        "schema_version": 1,
        "base": {
            "name": origin.name,
            "revision": origin.revision,
            "path": str(origin.path),
            "fingerprint": origin.fingerprint,
        },
        "max_seq_length": origin.max_seq_length,
        "data": {name: value for name, value in report.as_dict().items() if name in _DATA_FACTS},
        "seeds": {
            "run": config.seed,
            "data": config.data.seed,
            "lora": config.lora.seed if config.lora else None,
        },
        "device": str(model.device),
        "versions": run_versions(),
        "trainable_parameters": sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad),
        "trainable": trainable,
    }


def _origin(model: Any) -> Origin:
    origin = origin_of(model)
    assert origin is not None, "load() keeps the origin on the model"
    return origin
