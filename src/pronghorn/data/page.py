"""The inspector's HTML page, made of the plain values of an inspection. All text from rows is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pronghorn.data.packing import Packing
from pronghorn.data.page_style import STYLE
from pronghorn.data.report import Answers


def page(inspection: Mapping[str, Any]) -> str:
    """A whole HTML document of ``Inspection.as_dict()``."""
    report = inspection["report"]
    sources = escape(", ".join(report["sources"]))
    parts = [
        "<header><h1>What would be trained</h1>",
        f'<p class="soft">{sources}, read as {report["format"]}</p></header>',
        _tiles(report),
        "<h2>Checks</h2>",
        _checks(report["checks"]),
        _bad_rows(report),
        *_examples(inspection),
        "<h2>Length of rows</h2>",
        _bars(report["histogram"], report["max_length"]),
        "<h2>What became of the rows</h2>",
        f'<div class="card">{_table(_facts(report))}</div>',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{sources}: what would be trained</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _tiles(report: Mapping[str, Any]) -> str:
    """The figures that are looked at first."""
    checks = report["checks"]
    passed, share = sum(check["passed"] for check in checks), report["trained_share"]
    trained = f'<div class="share"><div style="width:{share:.1%}"></div></div>'
    tiles = [
        ("rows to train", f"{report['train_rows']:,}", f"{report['rows_read']:,} read"),
        ("tokens", f"{report['tokens']:,}", f"longest row {report['longest']:,}"),
        ("of which train", f"{share:.1%}", f"{trained}{report['trained_tokens']:,} tokens"),
        ("checks passed", f"{passed} of {len(checks)}", _failures(checks)),
    ]
    if report["format"] == "prompt_only":
        tiles[2] = ("of which train", "none", "answers are written in training")
    if report["answers"]:
        answers = report["answers"]
        lengths = f"{answers['chosen']:.0f} : {answers['rejected']:.0f}"
        tiles.insert(3, ("chosen : rejected", lengths, "tokens of an answer"))
    cells = "".join(
        f'<div class="tile"><div class="name">{name}</div><div class="value">{value}</div>'
        f'<div class="note">{note}</div></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _failures(checks: Sequence[Mapping[str, Any]]) -> str:
    stops = sum(not check["passed"] and check["stops"] for check in checks)
    warns = sum(not check["passed"] and not check["stops"] for check in checks)
    said = [f"{stops} stop a run"] * bool(stops) + [f"{warns} warn"] * bool(warns)
    return ", ".join(said) or "nothing to look at"


def _checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """Failed checks one by one, those that passed by name."""
    failed = "".join(_failed(check) for check in checks if not check["passed"])
    chips = "".join(f'<span class="chip">{escape(c["name"])}</span>' for c in checks if c["passed"])
    return f'{failed}<div class="chips"><span class="soft">passed</span>{chips}</div>'


def _failed(check: Mapping[str, Any]) -> str:
    kind = "stops" if check["stops"] else "warns"
    places = f'<div class="places">{escape(_rows(check["rows"]))}</div>' if check["rows"]["count"] else ""
    return (
        f'<div class="check {kind}"><span class="name">{escape(check["name"])} {kind}</span>'
        f"{escape(check['meaning'])}{places}</div>"
    )


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    cut, dropped, rewritten = report["truncated"], report["dropped"], report["rewritten"]
    facts = [
        ("used", f"{report['train_rows']:,} to train, {report['eval_rows']:,} to evaluate"),
        ("bad", f"{report['bad']:,}"),
        (
            "cut to the limit",
            _rows(cut) + (f"; {report['truncated_tokens']:,} tokens lost" * bool(cut["count"])),
        ),
        ("dropped as too long", _rows(dropped)),
    ]
    if rewritten["count"]:
        facts.append(("rewritten by the template", f"{_rows(rewritten)}; each answer trains as it is served"))
    if report["answers"]:
        facts.append(("answers", str(Answers(**report["answers"]))))
    if report["packing"]:
        facts.append(("packed", str(Packing(**report["packing"]))))
    if report["template"]:
        facts.append(("chat template", f"{report['template']}, {report['template_hash']}"))
    facts.append(("content of the files", report["data_hash"]))
    return [(name, escape(value)) for name, value in facts]


def _rows(places: Mapping[str, Any]) -> str:
    named = ", ".join(places["first"])
    more = places["count"] - len(places["first"])
    rest = f" and {more:,} more" if more and named else ""
    return f"{places['count']:,}: {named}{rest}" if named else f"{places['count']:,}"


def _bad_rows(report: Mapping[str, Any]) -> str:
    if not report["bad"]:
        return ""
    rows = [
        (
            escape(f"{row['file']}:{row['number']}"),
            escape(f"{row['field']}: {row['reason']}".removeprefix(": ")),
        )
        for row in report["bad_rows"]
    ]
    shown = f", of which the first {len(rows)}" if len(rows) < report["bad"] else ""
    return f'<h2>Bad rows: {report["bad"]:,}{shown}</h2><div class="card">{_table(rows)}</div>'


def _bars(histogram: Sequence[Sequence[int]], limit: int) -> str:
    """Upright bars over the shortest length of each, in tokens; those beyond the limit are red."""
    most = max((count for _, count in histogram), default=1)
    columns = []
    for low, count in histogram:
        over = ' class="over"' if low >= limit else ""
        height = f"height:{100 * count / most:.1f}%"
        bar = f'<div class="bar" style="{height}"><span>{count:,}</span></div>' if count else ""
        columns.append(f'<div{over}><div class="room">{bar}</div><div class="low">{low}</div></div>')
    note = f'<p class="soft">tokens before cutting; the limit is {limit:,}, what lies behind it is red</p>'
    return f'<div class="card"><div class="bars">{"".join(columns)}</div>{note}</div>'


def _examples(inspection: Mapping[str, Any]) -> list[str]:
    if not inspection["examples"]:
        return []
    shown = [_example(example) for example in inspection["examples"]]
    return ["<h2>Examples</h2>", _legend(inspection["report"]["format"]), *shown]


def _legend(layout: str) -> str:
    rejected = '<span><span class="other-side">rejected</span></span>' * (layout == "preference")
    trained = "chosen" if layout == "preference" else "trained"
    return (
        f'<p class="legend"><span><span class="t">{trained}</span></span>{rejected}<span>not trained</span>'
        '<span><span class="s">special</span> one special token</span>'
        '<span><span class="n">↵</span> new line</span></p>'
    )


def _example(example: Mapping[str, Any]) -> str:
    share = example["trained"] / example["tokens"] if example["tokens"] else 0.0
    head = (
        f'<div class="head"><h3>row {example["row"]}: {example["tokens"]:,} tokens, '
        f'{example["trained"]:,} trained</h3><span class="soft">{share:.0%}</span></div>'
    )
    sides = [
        f'<div class="{answer["side"]}"><h4>{answer["side"]} <span>{answer["tokens"]:,} tokens</span></h4>'
        f"{_pieces(answer['pieces'])}</div>"
        for answer in example["answers"]
    ]
    answers = f'<div class="sides">{"".join(sides)}</div>' if sides else ""
    return f'<div class="card">{head}{_pieces(example["pieces"])}{answers}</div>'


def _pieces(pieces: Sequence[Mapping[str, Any]]) -> str:
    spans = []
    for piece in pieces:
        classes = " ".join(name for name, on in (("t", piece["trained"]), ("s", piece["special"])) if on)
        text = escape(piece["text"]).replace("\n", '<span class="n">↵</span>\n')
        spans.append(f'<span class="{classes}">{text}</span>' if classes else text)
    return f"<pre>{''.join(spans)}</pre>"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
    return f"<table>{body}</table>"
