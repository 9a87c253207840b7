"""The style sheet of the inspector's page: light and dark, readable on a phone, and on paper."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #ffffff; --ink: #1c2128; --soft: #656d76;
  --line: #d8dee4; --train: #116329; --train-bg: #dafbe1; --other: #953800; --other-bg: #fff1e5;
  --warn: #7d4e00; --warn-bg: #fff8c5; --stop: #a40e26; --stop-bg: #ffebe9; --bar: #4493f8; --over: #d1242f;
  --code: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --paper: #0d1117; --card: #161b22; --ink: #e6edf3;
  --soft: #9198a1; --line: #30363d; --train: #7ee787; --train-bg: #12361f; --other: #ffa657;
  --other-bg: #3d2310; --warn: #e3b341; --warn-bg: #322a0e; --stop: #ff9492; --stop-bg: #3c1618;
  --bar: #388bfd; --over: #f85149; --code: #0d1117; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header { border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 { font-size: 1.6rem; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.2rem 0 .7rem; }
h3 { font-size: .95rem; margin: 0; font-weight: 600; }
p { margin: .2rem 0; } .soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin-top: 1.2rem; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: .8rem 1rem; } .tile .name { color: var(--soft); font-size: .85rem; }
.tile .value { font-size: 1.55rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .note { color: var(--soft); font-size: .85rem; }
.share { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; margin: .35rem 0 .1rem; }
.share div { height: 100%; background: var(--train); }
.card { padding: .9rem 1.1rem; margin: .8rem 0; overflow: hidden; }
.check { border-left: 4px solid; padding: .55rem .9rem; border-radius: 6px; margin: .5rem 0;
  overflow-wrap: anywhere; }
.check.stops { border-color: var(--over); background: var(--stop-bg); }
.check.warns { border-color: var(--warn); background: var(--warn-bg); }
.check.stops .name { color: var(--stop); } .check.warns .name { color: var(--warn); }
.check .name { font-weight: 600; margin-right: .5rem; }
.check .places, td.places { font: 13px/1.5 ui-monospace, monospace; }
.check .places { color: var(--soft); margin-top: .15rem; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .7rem; }
.chip { font-size: .85rem; color: var(--train); background: var(--train-bg); border-radius: 99px;
  padding: .1rem .7rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem 1rem .35rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
tr:last-child > * { border-bottom: 0; }
th { font-weight: 500; white-space: nowrap; color: var(--soft); width: 13rem; }
.bars { display: flex; gap: 3px; height: 9.5rem; padding-top: 1.2rem; margin-bottom: .5rem; }
.bars > div { flex: 1; display: flex; flex-direction: column; text-align: center; font-size: .75rem;
  color: var(--soft); min-width: 0; font-variant-numeric: tabular-nums; }
.room { flex: 1; display: flex; flex-direction: column; justify-content: flex-end; }
.bar { background: var(--bar); border-radius: 3px 3px 0 0; min-height: 2px; position: relative; }
.bar span { position: absolute; left: -1rem; right: -1rem; bottom: 100%; }
.over .bar { background: var(--over); }
.low { border-top: 1px solid var(--line); padding-top: .2rem; }
.head { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem 1rem;
  align-items: baseline; margin-bottom: .6rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; background: var(--code); border-radius: 6px;
  border: 1px solid var(--line); padding: .75rem .9rem; font: 13.5px/1.75 ui-monospace, Menlo, monospace;
  color: var(--soft); }
.t { color: var(--train); background: var(--train-bg); border-radius: 3px; padding: 1px 0;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.s { border: 1px solid currentColor; border-radius: 4px; padding: 0 .3em; margin: 0 1px; font-size: .86em; }
.n { opacity: .4; user-select: none; }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; margin-top: .8rem; }
.sides > div { min-width: 0; } .sides h4 { font-size: .85rem; margin: 0 0 .35rem; font-weight: 600; }
.sides h4 span { color: var(--soft); font-weight: 400; }
.chosen h4 { color: var(--train); } .rejected h4 { color: var(--other); }
.chosen pre { border-top: 3px solid var(--train); } .rejected pre { border-top: 3px solid var(--other); }
.rejected .t { color: var(--other); background: var(--other-bg); }
.legend { font-size: .85rem; color: var(--soft); display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; }
.legend .t, .legend .s { padding: 0 .4em; }
.other-side { color: var(--other); background: var(--other-bg); border-radius: 3px; padding: 0 .4em; }
@media (max-width: 40rem) { .sides { grid-template-columns: 1fr; } th { width: auto; white-space: normal; } }
@media print { body { background: none; } .card, .tile { break-inside: avoid; } }
"""
