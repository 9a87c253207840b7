"""New tokens: their rows start at a mean of existing ones, train with the adapter, and are saved with it.

Only the new rows train (PEFT's trainable token indices), in float32. The base's own rows stay as they are,
also those that a padded vocabulary has to spare, so an adapter holds a few rows and no whole embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pronghorn.adapters.origin import base_of, origin_of
from pronghorn.adapters.tied import Embeddings, embeddings
from pronghorn.errors import AdapterError, ConfigError, NotSupportedError

_ATTRIBUTE = "_pronghorn_new_tokens"
_ROWS_AT_ONCE = 16384  # of an embedding, summed in float32: 256 MB at width 4096


@dataclass(frozen=True)
class NewTokens:
    """Ids of the added tokens, and the first value of their rows [tokens, width] by module name."""

    ids: tuple[int, ...]
    rows: Mapping[str, Tensor]


def add_new_tokens(
    model: Any,
    tokenizer: Any,
    new_tokens: Sequence[str] = (),
    method: Literal["mean", "interpolation"] = "mean",
    interpolation: float = 0.5,
    *,
    say: Callable[[str], None] | None = print,
) -> None:
    """Add tokens to tokenizer and model; call it before an adapter is attached, which then trains their rows.

    Embedding and output head grow together where the vocabulary has no room left; tied ones stay tied.

    Args:
        model: a transformers model without an adapter.
        tokenizer: its tokenizer; changed in place.
        new_tokens: text of each token.
        method: "mean": rows start at the mean of all existing tokens' rows; "interpolation": between that
            and the mean of the tokens that spelt the text before.
        interpolation: weight of the latter, from 0 to 1.
        say: receives one line (None: silent).

    Raises:
        ConfigError: a token is there already, is given twice or is empty, or an unknown method.
        AdapterError: the model has an adapter already.
        NotSupportedError: an embedding or head whose rows cannot be trained alone.
    """
    tokens = _checked(tokenizer, new_tokens, method, interpolation)
    if hasattr(model, "peft_config"):
        raise AdapterError(
            "the model already has an adapter, which would not train the new tokens",
            fix="call add_new_tokens before get_peft_model",
        )
    known, before = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    rowless = tuple(range(before, known))  # tokens of the tokenizer that the base has no row for: new as well
    spelt: list[list[int]] = [[] for _ in rowless]
    spelt += [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    ends = _ends(model, embeddings(model))
    weight = interpolation if method == "interpolation" else 0.0
    rows = {name: _first_rows(module.weight, known, spelt, weight) for name, module in ends.items()}
    tokenizer.add_tokens(list(tokens))
    ids = (*rowless, *tokenizer.convert_tokens_to_ids(list(tokens)))
    if len(tokenizer) > before:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for name, module in _ends(model, embeddings(model)).items():
                for index, row in zip(ids, rows[name], strict=True):
                    if index >= before:  # a spare row of the base stays as it is in the base's files
                        module.weight[index] = row.to(module.weight)
    earlier = new_tokens_of(model)
    if earlier is not None:
        ids = earlier.ids + ids
        rows = {name: torch.cat([earlier.rows[name], value]) for name, value in rows.items()}
    setattr(model, _ATTRIBUTE, NewTokens(ids, rows))
    if say is not None:
        after = model.get_input_embeddings().weight.shape[0]
        size = f"{before} -> {after} rows" if after > before else f"in spare ones of its {before} rows"
        say(f"{len(tokens)} new tokens, embedding {size}; get_peft_model will train their rows")


def _checked(tokenizer: Any, tokens: Sequence[str], method: str, interpolation: float) -> tuple[str, ...]:
    if method not in ("mean", "interpolation"):
        raise ConfigError(f"method is {method!r}", fix='choose "mean" or "interpolation"')
    if not 0 <= interpolation <= 1:
        raise ConfigError(f"interpolation is {interpolation!r}", fix="give a number from 0 to 1")
    if isinstance(tokens, str) or not tokens or not all(isinstance(one, str) and one for one in tokens):
        raise ConfigError(
            f"new_tokens is {tokens!r}", fix='give a list of texts, such as ["<tool>", "</tool>"]'
        )
    known = tokenizer.get_vocab()
    there = [token for token in tokens if token in known]
    if there:
        raise ConfigError(
            f"{there[0]!r} is a token already (id {known[there[0]]})", fix="leave it out of new_tokens"
        )
    twice = sorted({token for token in tokens if list(tokens).count(token) > 1})
    if twice:
        raise ConfigError(f"{twice[0]!r} is in new_tokens twice", fix="name each token once")
    return tuple(tokens)


def _ends(model: Any, found: Embeddings) -> dict[str, Any]:
    """The modules whose rows belong to tokens: the embedding, and a head that is not the same matrix."""
    names = [found.inputs] + ([] if found.tied else [found.outputs])
    modules = dict(model.named_modules())
    ends = {name: modules[name] for name in names if name is not None}
    for name, module in ends.items():
        if not module.weight.is_floating_point() or module.weight.dim() != 2:
            raise NotSupportedError(
                f"{name} is quantised, and new rows cannot be added to it",
                fix="use a base whose embeddings are not",
            )
    head = modules.get(found.outputs or "")
    if getattr(head, "bias", None) is not None:
        raise NotSupportedError(
            f"{found.outputs} has a bias, which PEFT leaves out when single rows train",
            fix="train the whole head with modules_to_save, on a tokenizer that has the tokens",
        )
    return ends


def _first_rows(weight: Tensor, known: int, spelt: Sequence[Sequence[int]], share: float) -> Tensor:
    """``[len(spelt), H]`` in float32: the mean row of known tokens, moved by ``share`` to the spelling's."""
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    count = min(known, weight.shape[0])  # rows behind them are padding that was never trained
    for first in range(0, count, _ROWS_AT_ONCE):
        total += weight.detach()[first : min(count, first + _ROWS_AT_ONCE)].float().sum(0)
    mean = (total / count).float()
    rows = []
    for ids in spelt:
        own = weight.detach()[list(ids)].float().mean(0) if ids and max(ids) < count else mean
        rows.append((1 - share) * mean + share * own)
    return torch.stack(rows)


def new_tokens_of(model: Any) -> NewTokens | None:
    """The tokens added to this instance and not yet in an adapter's hands."""
    return getattr(base_of(model), _ATTRIBUTE, None)


def trainable_rows(model: Any, whole: Iterable[str]) -> dict[str, list[int]] | None:
    """What PEFT's ``trainable_token_indices`` shall be; ends that ``whole`` names train in full anyway."""
    new = new_tokens_of(model)
    if new is None:
        return None
    named = tuple(whole)
    if embeddings(model).tied and any(_is_named(end, named) for end in _both(model)):
        return None
    return {name: list(new.ids) for name in new.rows if not _is_named(name, named)} or None


def head_with_rows(model: Any, rows: Iterable[str]) -> str | None:
    """The output head, where it is among ``rows`` (modules of which single rows train) and a matrix apart."""
    found = embeddings(model)
    return found.outputs if found.outputs and not found.tied and _is_named(found.outputs, rows) else None


def _both(model: Any) -> list[str]:
    found = embeddings(model)
    return [name for name in (found.inputs, found.outputs) if name]


def _is_named(full: str, listed: Iterable[str]) -> bool:
    return any(full == name or full.endswith("." + name) for name in listed)


def start_rows(wrapped: Any, adapter_name: str) -> None:
    """Give the rows that train their first values, after PEFT has wrapped the model."""
    ready_rows(wrapped)
    new = new_tokens_of(wrapped)
    if new is not None:
        for name, layer in _layers(wrapped):
            rows = layer.trainable_tokens_delta[adapter_name]
            rows.data = new.rows[name].clone().to(rows.device)


def ready_rows(wrapped: Any) -> None:
    """Hold the rows that train in float32: PEFT makes them in the base's dtype, which loses small steps.

    The head also gets the ``bias`` that PEFT's wrapper lacks, None: TRL's trainers read it beside the weight.
    """
    for _, layer in _layers(wrapped):
        for rows in layer.trainable_tokens_delta.values():
            rows.data = rows.data.float()
    head = base_of(wrapped).get_output_embeddings()
    if getattr(head, "token_adapter", None) is not None:
        head.bias = None


def _layers(wrapped: Any) -> list[tuple[str, Any]]:
    """PEFT's layers with rows of their own, by the name of the module they wrap."""
    return [
        (name.removeprefix("base_model.model.").removesuffix(".token_adapter"), module)
        for name, module in wrapped.named_modules()
        if name.endswith(".token_adapter") and module.tied_adapter is None
    ]


def holds_new_rows(wrapped: Any, adapter_name: str) -> bool:
    """Whether an adapter's own tensors are all that embedding and head have more than the base.

    They are where each trains in full, or in every row that the base lacks.
    """
    origin = origin_of(wrapped)
    if origin is None or origin.rows is None:
        return False
    beyond = set(range(origin.rows, wrapped.get_input_embeddings().weight.shape[0]))
    for end in (wrapped.get_input_embeddings(), base_of(wrapped).get_output_embeddings()):
        if end is not None and adapter_name in getattr(end, "modules_to_save", ()):
            continue
        layer = getattr(end, "token_adapter", None)
        if end is not None and (
            layer is None or not beyond <= set(layer.token_indices.get(adapter_name, ()))
        ):
            return False
    return True
