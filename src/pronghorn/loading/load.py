"""Load a base, or an adapter with its base, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pronghorn.adapters.attach import report
from pronghorn.adapters.origin import Origin, remember, sample_weights
from pronghorn.adapters.record import AdapterRecord, differences, read_record
from pronghorn.adapters.save import bind_save, record_of, tokenizer_print
from pronghorn.errors import ConfigError
from pronghorn.hardware import accelerator
from pronghorn.loading.adapter import load_adapter
from pronghorn.loading.options import DEFAULT_MAX_SEQ_LENGTH, LoadOptions
from pronghorn.loading.strict import load_base
from pronghorn.loading.tokenizer import check_rows, has_tokenizer, load_tokenizer
from pronghorn.memory import recompute
from pronghorn.quant.library import linears_4bit
from pronghorn.sources.resolve import resolve, resolve_base
from pronghorn.sources.source import Source, SourceKind
from pronghorn.versions import warn_untested
from pronghorn.weights.folder import fingerprint, open_weights


def load(
    source: str | Path | Source,
    options: LoadOptions | None = None,
    *,
    say: Callable[[str], None] | None = print,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer; an adapter folder gives its base and the adapter, trainable again.

    The model is an ordinary transformers model (or PeftModel) in evaluation mode. ``say`` receives a line per
    thing worth knowing: what the adapter is, and where it differs from its record (None: silent).

    Raises:
        SourceError: files are missing, damaged or do not fit each other; nothing is made up.
        AdapterError: the adapter does not fit, or its base is another one than at training.
        ConfigError, NotSupportedError: an option cannot be honoured.
    """
    warn_untested()
    options = options or LoadOptions()
    if not isinstance(source, Source):
        source = resolve(
            source,
            revision=options.revision,
            token=options.token,
            trust_remote_code=options.trust_remote_code,
        )
    if source.kind is SourceKind.ADAPTER:
        return _load_with_adapter(source, options, say or _silent)
    if options.base is not None:
        raise ConfigError(f"base is set, but {source.name} is no adapter", fix="leave base out")
    return _load_base(source, source.path, options, None, say or _silent)


def _silent(line: str) -> None:
    del line


def _load_with_adapter(source: Source, options: LoadOptions, say: Callable[[str], None]) -> tuple[Any, Any]:
    base = resolve_base(
        source, base=options.base, token=options.token, trust_remote_code=options.trust_remote_code
    )
    record = read_record(source.path)
    folder = source.path if has_tokenizer(source.path) else base.path
    recorded = record.max_seq_length if record else None
    options = as_recorded(options, record)
    model, tokenizer = _load_base(base, folder, options, recorded, say)
    wrapped = load_adapter(model, source)
    check_rows(folder, tokenizer, wrapped.get_input_embeddings().weight.shape[0])
    kept = "keep" if source.config.get("ensure_weight_tying") else None
    bind_save(wrapped, tied=record.tied if record else kept)
    say(f"adapter {source.name} on {base.name}: {report(wrapped)}")
    if record is not None:
        for line in differences(record, record_of(wrapped)):
            say(f"differs from training: {line}")
    return wrapped.eval(), tokenizer


def as_recorded(options: LoadOptions, record: AdapterRecord | None) -> LoadOptions:
    """The options for the base of an adapter: held as it was at training, where nothing else is asked for."""
    if record is None or not record.quantization or options.quantization is not None:
        return options
    held = record.quantised_dtype if options.torch_dtype() == "auto" else options.dtype
    return replace(options, quantization=record.quantization, dtype=held)


def _load_base(
    base: Source,
    tokenizer_folder: Path,
    options: LoadOptions,
    recorded_length: int | None,
    say: Callable[[str], None],
) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=options.trust_remote_code)
    loaded = load_base(
        base,
        dtype=options.torch_dtype(),
        device_map=_placement(options),
        trust_remote_code=options.trust_remote_code,
        quantization=options.quantization,
    )
    model = loaded.model
    say(f"{base.name}: {loaded.report}")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer_folder == base.path:
        check_rows(tokenizer_folder, tokenizer, rows)
    as_loaded = tokenizer_print(tokenizer)
    length = sequence_length(model, options.max_seq_length, recorded_length)
    own_limit = tokenizer.model_max_length
    tokenizer.model_max_length = length
    origin = Origin(
        name=base.name,
        path=base.path,
        revision=base.revision,
        fingerprint=fingerprint(open_weights(base.path)),
        max_seq_length=length,
        tokenizer=tokenizer,
        tokenizer_print=as_loaded,
        tokenizer_folder=tokenizer_folder,
        tokenizer_limit=own_limit,
        samples=sample_weights(model),
        seed=options.seed,
        rows=rows,
        quantised=tuple(loaded.files.values()),
        quantised_dtype=_decoded_dtype(model) if loaded.files else None,
        report=loaded.report,
    )
    remember(model, origin)
    if options.recompute:
        recompute.enable(model)
    return model, tokenizer


def _decoded_dtype(model: Any) -> str:
    """What the 4-bit weights decode to (one dtype: transformers makes them so)."""
    _, module = next(linears_4bit(model))
    return str(module.weight.quant_state.dtype).removeprefix("torch.")


def _placement(options: LoadOptions) -> Any:
    device = accelerator()
    if options.device_map is None:
        return {"": device} if device else None
    if device is None and options.device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return None  # one device only, nothing to place
    return options.device_map


def sequence_length(model: Any, asked: int | None, recorded: int | None) -> int:
    """Tokens of the longest row: as asked, as recorded, or 2048, and no more than the model has positions.

    Raises:
        ConfigError: more are asked for than the model has positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        asked = recorded or min(DEFAULT_MAX_SEQ_LENGTH, limit or DEFAULT_MAX_SEQ_LENGTH)
    if limit is not None and asked > limit:
        raise ConfigError(
            f"max_seq_length is {asked}, the model was made for {limit} positions", fix=f"use at most {limit}"
        )
    return asked
