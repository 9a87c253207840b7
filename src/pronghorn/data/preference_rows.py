"""Preference and prompt-only rows of a run: checked, counted, and handed to TRL's trainers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any

from pronghorn.data.formats import RowError
from pronghorn.data.isolated import IsolatedTemplate
from pronghorn.data.layout import find_template, usable
from pronghorn.data.options import DataOptions, Format
from pronghorn.data.preference import Compared, to_compared
from pronghorn.data.preference_tokens import EncodedAnswers, encode_answers
from pronghorn.data.prepare import held_out, report_of
from pronghorn.data.report import Answers, DataReport
from pronghorn.data.rows import Row, Source
from pronghorn.data.store import content_hash
from pronghorn.data.tally import PartTally, Tally, row_hash
from pronghorn.data.templates import Renderer
from pronghorn.data.tokens import Encoder, check_tokenizer
from pronghorn.data.work import BATCH, SERVED_ALIKE, Job
from pronghorn.errors import DataError

_Numbered = tuple[Row, Compared]


@dataclass(frozen=True)
class Examined:
    """Usable rows to train and to evaluate on, the account of all, and the encoder that shows one."""

    train: list[Compared]
    eval: list[Compared]
    report: DataReport
    encoder: Encoder

    def encoded(self, index: int) -> EncodedAnswers:
        """Training row ``index`` as ids. It has been rendered within limits before, so it is done in here."""
        (row,) = encode_answers(self.encoder, [self.train[index]])
        assert isinstance(row, EncodedAnswers)
        return row


def examine_preferences(
    layout: Format,
    train: list[Source],
    held: list[Source],
    options: DataOptions,
    tokenizer: Any,
    max_length: int,
) -> Examined:
    """Read and check all rows of ``layout`` (preference or prompt_only); nothing stops at a bad row.

    Raises:
        DataError: the rows mix formats, or an option has no effect on such rows.
    """
    _refuse_options(options, layout)
    check_tokenizer(tokenizer)
    template = find_template(layout, [*train, *held], tokenizer, options)
    job = Job(tokenizer, template, layout, options, max_length)
    work = _Work(job)
    with ExitStack() as stack:
        renderer: Renderer | None = template
        if template is not None and template.plain and options.isolate:
            renderer = stack.enter_context(IsolatedTemplate(template))
        encoder = Encoder(tokenizer, renderer, options, max_length)
        trained, evaluated = work.read(train, encoder), work.read(held, encoder)
    chosen = held_out(trained.tally.hashes, options.eval_fraction, options.seed)
    aside = set(chosen)
    rows = [row for index, row in enumerate(trained.rows) if index not in aside]
    held_rows = [trained.rows[index] for index in chosen] + evaluated.rows
    report = report_of(
        job, (work.tally, trained.tally, evaluated.tally), len(chosen), content_hash([*train, *held])
    )
    report = replace(report, answers=work.answers())
    return Examined(rows, held_rows, report, Encoder(tokenizer, template, options, max_length))


def _refuse_options(options: DataOptions, layout: Format) -> None:
    defaults = DataOptions(train=options.train)
    for name in ("loss_on", "rewritten", "packing"):
        value = getattr(options, name)
        if value != getattr(defaults, name):
            raise DataError(f"data.{name}={value} has no effect on {layout} rows", fix="leave it out")


@dataclass
class _Part:
    rows: list[Compared] = field(default_factory=list)
    tally: PartTally = field(default_factory=PartTally)


class _Work:
    """All parts through one encoder, counted in one tally."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tally = Tally()
        self._served = 0
        self._pairs = set[tuple[int, int]]()
        self._tokens = [0, 0]  # of the chosen and of the rejected answers
        self._rows = self._longer = 0

    def read(self, sources: Sequence[Source], encoder: Encoder) -> _Part:
        """The usable rows of one part."""
        part = _Part()
        for source in sources:
            self.tally.names.append(source.name)
            samples = self._samples(source)
            while batch := list(islice(samples, BATCH)):
                results = encode_answers(encoder, [row for _, row in batch])
                for (row, compared), encoded in zip(batch, results, strict=True):
                    if isinstance(encoded, RowError):
                        self.tally.add_bad(row.bad(encoded.field, encoded.reason))
                    elif self._keeps(row, encoded):
                        self._count(row, compared, encoded)
                        part.rows.append(compared)
                        part.tally.hashes.append(_hash(encoded))
                        part.tally.numbers.append(row.number)
                        part.tally.files.append(len(self.tally.names) - 1)
        return part

    def answers(self) -> Answers | None:
        """Lengths of the answers of all rows, for rows that have them."""
        rows = self._rows
        if not rows or self.job.layout != "preference":
            return None
        return Answers(self._tokens[0] / rows, self._tokens[1] / rows, self._longer / rows)

    def _samples(self, source: Source) -> Iterator[_Numbered]:
        layout, options = self.job.layout, self.job.options
        read = partial(to_compared, layout=layout, chat=self.job.template is not None, system=options.system)
        return usable(source.read(), layout, options, self.tally, read)

    def _keeps(self, row: Row, encoded: EncodedAnswers) -> bool:
        """Count lengths; False for a row that has an empty answer, or no room for one."""
        tally, place = self.tally, f"{row.file}:{row.number}"
        tally.longest = max(tally.longest, encoded.full_length)
        tally.lengths.append(encoded.full_length)
        empty = not all(encoded.answers)
        if empty and not encoded.cut:
            tally.flagged["masked"].add(place)
            return False
        no_room = not encoded.answers and encoded.full_length >= self.job.max_length
        if empty or no_room or (encoded.cut and self.job.options.too_long == "drop"):
            tally.dropped.add(place)
            return False
        if encoded.cut:
            tally.truncated.add(place)
            tally.truncated_tokens += encoded.cut
        return True

    def _count(self, row: Row, compared: Compared, encoded: EncodedAnswers) -> None:
        tally, place = self.tally, f"{row.file}:{row.number}"
        for flag in encoded.flags:
            tally.flagged[flag].add(place)
        tally.tokens += encoded.tokens
        tally.trained_tokens += encoded.trained
        if compared.is_chat and self._served < SERVED_ALIKE:
            self._served += 1
            if not self._served_alike(compared, encoded):
                tally.flagged["serving"].add(place)
        if len(encoded.answers) == 2:
            lengths = [len(answer) for answer in encoded.answers]
            self._tokens = [total + length for total, length in zip(self._tokens, lengths, strict=True)]
            self._rows += 1
            self._longer += lengths[0] > lengths[1]
            chosen, rejected = (row_hash([*encoded.prompt, *answer]) for answer in encoded.answers)
            if (rejected, chosen) in self._pairs and chosen != rejected:
                tally.flagged["contradiction"].add(place)
            self._pairs.add((chosen, rejected))

    def _served_alike(self, row: Compared, encoded: EncodedAnswers) -> bool:
        """Whether ``apply_chat_template`` gives the same ids, as a server and TRL call it."""
        template, limit = self.job.template, self.job.max_length
        assert template is not None
        asked: Any = row.prompt
        if not row.answers:
            return template.ids(asked, row.tools, prompt=True)[:limit] == encoded.prompt
        wholes: list[Any] = [asked + answer for answer in row.answers.values()]
        return all(
            template.ids(whole, row.tools)[:limit] == encoded.prompt + ids
            for whole, ids in zip(wholes, encoded.answers, strict=True)
        )


def _hash(encoded: EncodedAnswers) -> int:
    """Of the whole row; the ids of its parts are kept apart by -1."""
    return row_hash(chain(encoded.prompt, *([-1, *answer] for answer in encoded.answers)))
