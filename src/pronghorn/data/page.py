"""The inspector's HTML page, made of the plain values of an inspection. All text from rows is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from pronghorn.data.packing import Packing

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --train: #1a7f37; --train-bg: #2da44e2e; --warn: #9a6700;
  --stop: #cf222e; --mark: #8883; }
@media (prefers-color-scheme: dark) { :root { --train: #56d364; --warn: #e3b341; --stop: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 500; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.passed { color: var(--train); } .warns { color: var(--warn); }
.stops { color: var(--stop); font-weight: 600; }
.bars td { border: 0; padding: .1rem .6rem .1rem 0; white-space: nowrap; }
.bars .wide { width: 80%; }
.bar { background: var(--train); height: .9rem; border-radius: 2px; min-width: 1px; }
.over .bar { background: var(--stop); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  padding: .8rem; font: 14px/1.6 ui-monospace, monospace; margin: .4rem 0 1.4rem; }
.t { color: var(--train); background: var(--train-bg); }
.s { border: 1px solid currentColor; border-radius: 4px; padding: 0 .2em; margin: 0 1px; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; }
.n { opacity: .45; } .legend span { padding: 0 .3em; }
"""


def page(inspection: Mapping[str, Any]) -> str:
    """A whole HTML document of ``Inspection.as_dict()``."""
    report = inspection["report"]
    parts = [
        "<h1>What would be trained</h1>",
        _table(_facts(report)),
        "<h2>Checks</h2>",
        _table([_check(check) for check in report["checks"]]),
        _bad_rows(report),
        f"<h2>Length of rows in tokens (limit {report['max_length']})</h2>",
        _bars(report["histogram"], report["max_length"]),
        "<h2>Examples</h2>",
        '<p class="legend"><span class="t">trained</span> <span>not trained</span> ',
        '<span class="s">special</span> <span class="n">↵</span> new line</p>',
        *[_example(example) for example in inspection["examples"]],
    ]
    title = escape(f"{', '.join(report['sources'])}: what would be trained")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    cut, dropped, rewritten = report["truncated"], report["dropped"], report["rewritten"]
    sources, share = ", ".join(report["sources"]), report["trained_share"]
    facts = [
        ("rows", f"{report['rows_read']} read from {sources} ({report['format']})"),
        ("used", f"{report['train_rows']} to train, {report['eval_rows']} to evaluate"),
        (
            "tokens",
            f"{report['tokens']}, of which {report['trained_tokens']} train ({share:.1%})",
        ),
        ("longest row", f"{report['longest']} tokens"),
        ("cut to the limit", f"{_rows(cut)}; {report['truncated_tokens']} tokens lost"),
        ("dropped as too long", _rows(dropped)),
        ("bad rows", str(report["bad"])),
        ("data", report["data_hash"]),
    ]
    if report["packing"]:
        facts.append(("packed", str(Packing(**report["packing"]))))
    if report["template"]:
        facts.append(("chat template", f"{report['template']}, {report['template_hash']}"))
    if rewritten["count"]:
        facts.append(
            ("rewritten by the template", f"{_rows(rewritten)}; each trained on its last answer only")
        )
    return [(name, escape(value)) for name, value in facts]


def _rows(places: Mapping[str, Any]) -> str:
    named = ", ".join(places["first"])
    more = places["count"] - len(places["first"])
    rest = f" and {more} more" if more and named else ""
    return f"{places['count']}: {named}{rest}" if named else str(places["count"])


def _check(check: Mapping[str, Any]) -> tuple[str, str]:
    outcome = "passed" if check["passed"] else "stops" if check["stops"] else "warns"
    rows = f": {_rows(check['rows'])}" if check["rows"]["count"] else ""
    detail = "" if check["passed"] else f" {escape(check['meaning'] + rows)}"
    return escape(check["name"]), f'<span class="{outcome}">{outcome}</span>{detail}'


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
    return f"<h2>Bad rows: {report['bad']}, of which the first {len(rows)}</h2>{_table(rows)}"


def _bars(histogram: Sequence[Sequence[int]], limit: int) -> str:
    most = max((count for _, count in histogram), default=1)
    lines = []
    for low, count in histogram:
        over = ' class="over"' if low >= limit else ""
        bar = f'<div class="bar" style="width:{100 * count / most:.1f}%"></div>' if count else ""
        lines.append(f'<tr{over}><th>{low}+</th><td class="wide">{bar}</td><td>{count}</td></tr>')
    return f'<table class="bars">{"".join(lines)}</table>'


def _example(example: Mapping[str, Any]) -> str:
    title = f"row {example['row']}: {example['tokens']} tokens, {example['trained']} trained"
    sides = [
        f'<div class="{answer["side"]}"><h4>{answer["side"]}: {answer["tokens"]} tokens</h4>'
        f"{_pieces(answer['pieces'])}</div>"
        for answer in example["answers"]
    ]
    answers = f'<div class="sides">{"".join(sides)}</div>' if sides else ""
    return f"<h3>{title}</h3>{_pieces(example['pieces'])}{answers}"


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
