"""The deep promises: the folder computes what base + adapter computes. Only ever run in a fresh process.

The truth is base + adapter by plain PEFT in float32, unmerged. The tolerance is not chosen: it is 1.5 x the
error that PEFT's own float32 merge makes once rounded to the stored dtype, on the very same token ids. Models
are loaded one after the other, so the memory needed is that of one float32 model; where not even that is
there, weights are read at each call of their module, and answers are shorter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from pronghorn.export import verify_model, verify_quant
from pronghorn.export.verify_class import class_agrees
from pronghorn.export.verify_codes import foreign, settings
from pronghorn.export.verify_decode import QUALITY, load_decoded, quality, sizes
from pronghorn.export.verify_folder import ADAPTER_CONFIG, Folder, Row, base_of, verdict
from pronghorn.export.verify_loss import LOSS, Losses, Rows, loss_row, read_rows, token_losses
from pronghorn.export.verify_model import Answer, Whole
from pronghorn.export.verify_stream import Comparison, compare_weights
from pronghorn.export.verify_streamed import Streamed, streamed_bytes

# The rounded reference's own error may be exceeded by half: other orders of summation, not other weights.
REFERENCE_FACTOR = 1.5
# The adapter must move the logits by this many tolerances, or equality proves little.
CLEAR_SIGNAL = 10.0
CLEAR_REFERENCE = 100.0

WEIGHTS = "weights equal base + adapter, rounded once"
LOGITS = "logits equal base + adapter"
MOVES = "logits differ from the base"
GREEDY = "greedy answers equal base + adapter, stop included"
TOKENIZER = "tokenizer opens and renders a chat as in training"
ADAPTER_KEYS = "PEFT finds a place for every adapter tensor"
RUNS = "it computes finite logits and generates"
_NOT_LOADED = (LOGITS, MOVES, GREEDY)

Loader = Whole | Streamed

# What loading or running an unsuitable model raises; anything else is a fault of ours and ends the process.
_FAILURES = (RuntimeError, ValueError, OSError, KeyError, TypeError, AttributeError, ImportError, IndexError)


@dataclass(frozen=True)
class Gap:
    """Distance between two sets of logits: the largest and the root mean square."""

    largest: float
    rms: float


@dataclass(frozen=True)
class Truth:
    """What base + adapter computes: greedy answers, and logits over prompts and answers.

    ``rounded``: logits of the reference, PEFT's merge rounded to the stored dtype. ``signal``: distance of
    the truth to the base's logits; ``kept``: of the reference to them; ``reference``: of both to each other.
    ``losses``: on rows, where some were given. ``adapter`` false: of a whole model, its own reference.
    """

    answers: tuple[Answer, ...]
    logits: tuple[torch.Tensor, ...]
    rounded: tuple[torch.Tensor, ...]
    signal: Gap
    kept: Gap
    reference: Gap
    losses: Losses | None = None
    adapter: bool = True

    @property
    def noise(self) -> float:
        """What float32 arithmetic alone may differ by: 2^-18 of the largest logit."""
        return 2.0**-18 * max(float(values.abs().max()) for values in self.logits)

    @property
    def tolerance(self) -> Gap:
        """The largest distance to the truth that rounding explains."""
        by_size = REFERENCE_FACTOR * self.reference.largest + self.noise
        return Gap(by_size, REFERENCE_FACTOR * self.reference.rms + self.noise)


@dataclass(frozen=True)
class Questions:
    """``home``: where the tokenizer of training is; ``rows``: those whose loss is compared, if any."""

    home: Folder
    rows: Rows | None = None


def compute_promises(
    folder: Path, adapter: Path | None, base: Path | None, *, decode: bool = True, rows: Path | None = None
) -> tuple[Row, ...]:
    """Every row of the deep part for a model or adapter folder whose files are in order.

    ``adapter`` may be a whole model: the folder was made of that, with no adapter.
    ``rows``: tokenised rows (``verify_loss.read_rows``), whose loss is compared as well.
    A base that was in 4-bit at training is first written out as it decodes, beside the temporary files of
    this machine; with ``decode`` false its 16-bit values are taken.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    view = Folder(folder)
    adapter = adapter or (folder if view.is_adapter else None)
    if adapter is None:
        return tuple(_alone(view))
    if unknown := foreign(view):
        return (Row(WEIGHTS, None, f"{unknown} is not known here"),)
    if not (adapter / ADAPTER_CONFIG).is_file():
        return tuple(map(_without_adapter, _of_a_whole(view, Folder(adapter))))
    if base is None:
        return (Row(LOGITS, None, f"the base of {adapter} is not on this machine; give --base"),)
    given = read_rows(rows) if rows is not None else None
    trained, dtype = verify_quant.trained_in_4bit(adapter)
    stored = verify_quant.is_quantised(Folder(base))
    if not (decode and (trained or stored)):
        return tuple(_against(view, adapter, Folder(base), given))
    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        quantised = frozenset() if stored else trained
        decoded = verify_quant.write_decoded(Folder(base), quantised, dtype, Path(scratch))
        return tuple(_against(view, adapter, decoded, given))


def _alone(view: Folder) -> Iterator[Row]:
    """A model folder with nothing to compare with: it loads completely and runs."""
    if settings(view) and find_spec("compressed_tensors") is None:
        reason = "compressed-tensors is not installed here; give the adapter with --against"
        yield Row(RUNS, None, reason)
        return
    yield class_agrees(view.path)
    yield _attempt(TOKENIZER, lambda: _tokenizer_row(view.path, view.path))
    with _loader(view, None) as ways:
        if isinstance(ways, str):
            yield Row(RUNS, None, ways)
        else:
            yield _attempt(RUNS, lambda: _runs(view, ways))


def _of_a_whole(view: Folder, whole: Folder) -> Iterator[Row]:
    """A folder against the whole model that was quantised, or whose language model it is."""
    if not settings(view):
        yield class_agrees(view.path)
    yield _weights_row(compare_weights(view, base_of(view, whole.path), None))
    yield _attempt(TOKENIZER, lambda: _tokenizer_row(view.path, whole.path))
    with _loader(whole, None) as ways:
        if isinstance(ways, str):
            yield Row(QUALITY if settings(view) else LOGITS, None, ways)
            return
        try:
            truth = _whole_truth(whole, ways)
        except _FAILURES as error:
            yield Row(LOGITS, None, f"{whole.path} cannot be computed: {_short(error)}")
            return
        if settings(view):
            yield _attempt(QUALITY, lambda: _quality(view, whole, truth, None, ways))
        else:
            yield from _judge(view, whole, Questions(whole), truth, ways)


def _whole_truth(whole: Folder, ways: Loader) -> Truth:
    """What a whole model computes."""
    model = ways.plain(whole.path)
    ends = verify_model.end_ids(whole, whole)
    batches = verify_model.prompts(whole, _tokenizer(whole.path))
    answers = tuple(verify_model.answer(model, batch, ends, ways.new_tokens) for batch in batches)
    values, _ = _computed(model, answers, None)
    if not all(bool(torch.isfinite(each).all()) for each in values):
        raise ValueError("its logits are not finite")
    same = Gap(0.0, 0.0)
    return Truth(answers, values, values, same, same, same, adapter=False)


def _without_adapter(row: Row) -> Row:
    """The row in the words for a folder that no adapter was merged into."""
    name, detail = (text.replace("base + adapter", "the base") for text in (row.name, row.detail))
    return replace(row, name=name, detail=detail)


def _runs(view: Folder, ways: Loader) -> Row:
    model = ways.plain(view.path)
    ends = verify_model.end_ids(view, view)
    batches = verify_model.prompts(view, _tokenizer(view.path))
    answers = [verify_model.answer(model, batch, ends, ways.new_tokens) for batch in batches]
    finite = all(bool(torch.isfinite(verify_model.logits(model, a.ids)).all()) for a in answers)
    problems = [] if finite else ["logits are not finite"]
    return Row(RUNS, *verdict(problems, f"compared with nothing: no --against was given{ways.told}"))


def _against(view: Folder, adapter: Path, base: Folder, rows: Rows | None) -> Iterator[Row]:
    """A merged folder (or an adapter) against base + adapter."""
    if not view.is_adapter:
        if not settings(view):
            yield class_agrees(view.path)
        yield _weights_row(compare_weights(view, base_of(view, base.path), adapter))
    home = _tokenizer_home(adapter, base.path)
    if "tokenizer_config.json" in view.names or not view.is_adapter:
        yield _attempt(TOKENIZER, lambda: _tokenizer_row(view.path, home))
    wanted = (*_NOT_LOADED, LOSS) if rows is not None else _NOT_LOADED
    with _loader(base, adapter) as ways:
        if isinstance(ways, str):
            yield from (Row(name, None, ways) for name in wanted)
            return
        try:
            keys, truth = _truth(view, adapter, base, Questions(Folder(home), rows), ways)
        except _FAILURES as error:
            reason = f"base + adapter cannot be computed: {_short(error)}"
            yield from (Row(name, None, reason) for name in wanted)
            return
        yield keys
        if not settings(view):
            yield from _judge(view, base, Questions(Folder(home), rows), truth, ways)
        else:
            yield _attempt(QUALITY, lambda: _quality(view, base, truth, rows, ways))


@contextmanager
def _loader(base: Folder, adapter: Path | None) -> Iterator[Loader | str]:
    """How models of this size are loaded here, or why they cannot be."""
    have = verify_model.available_bytes()
    if verify_model.needed_bytes(base) <= have:
        yield Whole()
    elif (least := streamed_bytes(base, adapter)) > have:
        yield f"{_need(base)}; reading it module by module needs {least / 1e9:.1f} GB: not loaded"
    else:
        with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
            yield Streamed(Path(scratch))


def _need(base: Folder) -> str:
    need, have = verify_model.needed_bytes(base), verify_model.available_bytes()
    return f"one float32 model needs {need / 1e9:.1f} GB and {have / 1e9:.1f} GB are free"


def _truth(view: Folder, adapter: Path, base: Folder, asked: Questions, ways: Loader) -> tuple[Row, Truth]:
    """Load base + adapter once: answers, logits, the base's logits, then the merged reference's."""
    home, rows = asked.home, asked.rows
    wrapped = ways.with_adapter(base.path, adapter)
    problems = verify_model.unused_adapter_tensors(wrapped, adapter)
    keys = Row(ADAPTER_KEYS, *verdict(problems, "all"))
    ends = verify_model.end_ids(base, home)
    batches = verify_model.prompts(base, _tokenizer(home.path))
    answers = tuple(verify_model.answer(wrapped, batch, ends, ways.new_tokens) for batch in batches)
    truth, own = _computed(wrapped, answers, rows)
    with wrapped.disable_adapter():
        plain, before = _computed(wrapped, answers, rows)
    with ways.reference(wrapped, base if view.is_adapter else view) as merged:
        rounded, after = _computed(merged, answers, rows)
    if not all(bool(torch.isfinite(values).all()) for values in (*truth, *plain, *rounded)):
        raise ValueError("its logits are not finite")
    gaps = (distance(truth, plain), distance(rounded, plain), distance(truth, rounded))
    losses = None if own is None or before is None or after is None else Losses(own, before, after)
    return keys, Truth(answers, truth, rounded, *gaps, losses)


def _computed(
    model: Any, answers: tuple[Answer, ...], rows: Rows | None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Logits over the true answers, and the losses of the rows."""
    losses = token_losses(model, rows) if rows is not None else None
    return tuple(verify_model.logits(model, a.ids) for a in answers), losses


def _judge(view: Folder, base: Folder, asked: Questions, truth: Truth, ways: Loader) -> Iterator[Row]:
    """Load the folder and hold it against the truth; the truth's model is gone by now."""
    home, rows = asked.home, asked.rows
    try:
        if view.is_adapter:
            model = ways.with_adapter(base.path, view.path)
            ends = verify_model.end_ids(base, home)
        else:
            model = ways.plain(view.path)
            ends = verify_model.end_ids(view, view)
        found, losses = _computed(model, truth.answers, rows)
        answers = ways.answers(model, truth.answers, found, ends)
    except _FAILURES as error:
        yield Row(LOGITS, False, f"the folder cannot be run: {_short(error)}")
        return
    row = logits_row(distance(truth.logits, found), truth)
    yield Row(row.name, row.ok, row.detail + ways.told)
    if truth.adapter:
        yield moves_row(truth, distance(truth.rounded, found))
    yield greedy_row(truth, answers, ways.new_tokens)
    if truth.losses is not None and losses is not None and rows is not None:
        yield loss_row(truth.losses, losses, rows, REFERENCE_FACTOR)


def _quality(view: Folder, base: Folder, truth: Truth, rows: Rows | None, ways: Loader) -> Row:
    """The decoded weights beside base + adapter; the adapter's own effect says what the loss is worth."""
    model = ways.decoded(view, base.path) if isinstance(ways, Streamed) else load_decoded(view, base.path)
    ids = tuple(answer.ids for answer in truth.answers)
    found = tuple(verify_model.logits(model, each) for each in ids)
    lost = distance(truth.logits, found).rms
    told = f"quantising moves the logits by {lost:.3g}"
    told += f", the adapter by {truth.signal.rms:.3g} (rms)" if truth.adapter else " (rms)"
    told += ": more than the adapter did" if truth.adapter and lost > truth.signal.rms else ""
    figures = [sizes(view, base)]
    if truth.losses is not None and rows is not None:
        losses = truth.losses.truth, token_losses(model, rows)
        before, after = (f"{float(each.mean()):.6g}" for each in losses)
        figures.append(("loss of the rows", before, after))
        told += f"; loss of the rows {before} -> {after} nats per token"
    row = quality(truth.logits, found, ids, f"{told}{ways.told}")
    return replace(row, figures=(*row.figures, *figures)) if row.figures else row


def logits_row(gap: Gap, truth: Truth) -> Row:
    """The folder's distance to the truth is one that rounding explains."""
    limit = truth.tolerance
    told = f"max error {gap.largest:.3g} (tolerance {limit.largest:.3g}), "
    told += f"rms {gap.rms:.3g} (tolerance {limit.rms:.3g})"
    right = gap.largest <= limit.largest and gap.rms <= limit.rms
    pairs = ((gap.largest, truth.signal.largest), (gap.rms, truth.signal.rms))
    if not right and all(abs(ours - base) <= 1e-3 * base for ours, base in pairs):
        told += f": it is as far from base + adapter as the base itself ({truth.signal.rms:.3g})"
    return Row(LOGITS, right, told)


def moves_row(truth: Truth, apart: Gap) -> Row:
    """The adapter moves the logits by much more than the tolerance, so that equality says something.

    A weaker adapter is told from the base by the rounded reference: ``apart``, the folder's distance to it,
    must be a hundredth of the base's.
    """
    ratio, apart_at_most = truth.signal.largest / truth.tolerance.largest, apart.largest + truth.noise
    told = f"the adapter moves them by {truth.signal.largest:.3g}, {ratio:,.3g} x the tolerance"
    if truth.signal.largest == 0.0:
        return Row(MOVES, False, "the adapter changes nothing: its logits are the base's, bit for bit")
    if truth.kept.largest == 0.0:
        return Row(MOVES, False, f"{told}, and rounding to the stored dtype loses all of it")
    if ratio >= CLEAR_SIGNAL:
        return Row(MOVES, True, told)
    closer = truth.kept.largest / apart_at_most
    if closer >= CLEAR_REFERENCE:
        return Row(
            MOVES, True, f"{told}: weak, but {closer:,.0f} x closer to PEFT's rounded merge than the base is"
        )
    return Row(MOVES, None, f"{told}: too little to tell them from the base's")


def greedy_row(truth: Truth, answers: list[Answer], new_tokens: int = Whole.new_tokens) -> Row:
    """Same tokens and same end, of at most ``new_tokens``.

    Answers may part where the best two tokens are closer than rounding.
    """
    problems, ties, tokens, stops = [], 0, 0, 0
    for number, (right, ours) in enumerate(zip(truth.answers, answers, strict=True)):
        for row in range(right.ids.shape[0]):
            want, have = right.said(row), ours.said(row)
            shared = min(len(want), len(have))
            parted = (want[:shared] != have[:shared]).nonzero()
            tokens += len(want)
            stops += int(len(want) < new_tokens)
            if not len(parted) and len(want) == len(have):
                continue
            at = int(parted[0]) if len(parted) else shared
            margin = float(right.margins[row, at]) if at < len(right.margins[row]) else float("inf")
            if len(parted) and margin <= 2 * truth.tolerance.largest:
                ties += 1
                continue
            what = (
                f"{int(want[at])}, not {int(have[at])}"
                if len(parted)
                else f"an end after {len(want)}, not {len(have)}"
            )
            problems.append(
                f"prompt {number}.{row}, token {at}: base + adapter says {what} (margin {margin:.3g})"
            )
    said = f"{tokens} tokens; answers that ended early: {stops}"
    said += f"; that part at a near tie (closer than twice the tolerance): {ties}" if ties else ""
    return Row(GREEDY, *verdict(problems, said))


def distance(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> Gap:
    """Distance of two models' logits on the same ids (the vocabulary both have); NaN is infinitely far."""
    largest = squares = count = 0.0
    for left, right in zip(one, other, strict=True):
        width = min(left.shape[-1], right.shape[-1])
        error = (left[..., :width] - right[..., :width]).double().nan_to_num(torch.inf, torch.inf, torch.inf)
        largest = max(largest, float(error.abs().max()))
        squares, count = squares + float(error.square().sum()), count + error.numel()
    return Gap(largest, (squares / count) ** 0.5)


def _weights_row(weights: Comparison) -> Row:
    if weights.problems:
        return Row(WEIGHTS, *verdict(weights.problems, ""))
    return Row(WEIGHTS, True, weights.told)


def _tokenizer_home(adapter: Path, base: Path) -> Path:
    """Where training's tokenizer is: with the adapter, one up where PEFT made a subfolder, or in the base."""
    places = [adapter] if (adapter.parent / "config.json").is_file() else [adapter, adapter.parent]
    return next((place for place in places if (place / "tokenizer_config.json").is_file()), base)


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokenizer_row(folder: Path, trained_with: Path) -> Row:
    """The folder's tokenizer opens, and renders a question to the ids that training used."""
    ours, theirs = _tokenizer(folder), _tokenizer(trained_with)
    if ours is None:
        return Row(TOKENIZER, False, "no tokenizer_config.json")
    if theirs is None or not theirs.chat_template:
        return Row(TOKENIZER, True, f"{len(ours)} tokens, no chat template")
    if not ours.chat_template:
        return Row(TOKENIZER, False, f"{trained_with} has a chat template, the folder has none")
    same = verify_model.chat_ids(ours) == verify_model.chat_ids(theirs)
    problems = [] if same else ["a chat becomes other token ids than in training"]
    return Row(TOKENIZER, *verdict(problems, f"{len(ours)} tokens"))


def _attempt(name: str, check: Callable[[], Row]) -> Row:
    try:
        return check()
    except _FAILURES as error:
        return Row(name, False, _short(error))


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
