"""The look of a report: light and dark, narrow and wide, and on paper."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1c1d; --quiet: #5b6167; --paper: #fff; --soft: #f3f4f5; --line: #d5d8db;
  --mark: #0b62b0; --warn: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --quiet: #9aa1a8; --paper: #15171a; --soft: #1f2226;
  --line: #3a3f45; --mark: #6cb2f5; --warn: #3d3115; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; padding-top: .6rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
p { margin: .3rem 0; max-width: 52rem; }
.headline { font-size: 1.1rem; font-weight: 600; }
.quiet, figcaption { color: var(--quiet); font-size: .87rem; }
.absent, .unfinished { background: var(--warn); padding: .4rem .7rem; border-radius: .3rem; margin: .4rem 0; }
nav a { margin-right: .9rem; white-space: nowrap; } a { color: var(--mark); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .6rem 1.2rem; }
.panels.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.panels figure { margin: 0; } svg { width: 100%; height: auto; display: block; }
svg * { stroke-linejoin: round; stroke-linecap: butt; } svg text { font-kerning: none; }
.scroll { overflow-x: auto; max-width: 100%; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .87rem; margin: .3rem 0; }
th, td { padding: .18rem .55rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; } thead th { background: var(--soft); vertical-align: bottom; }
th[scope=row], th:first-child { text-align: left; } thead th { white-space: normal; }
.text thead th { text-align: left; } .text td { text-align: left; white-space: normal; min-width: 8rem; }
tr.deployed th, tr.deployed td { font-weight: 700; } tr.differs { background: var(--soft); }
tr.differs th::after { content: " \\2260"; color: var(--mark); }
td i { font-style: normal; color: var(--quiet); }
details > summary { cursor: pointer; color: var(--mark); margin: .3rem 0; }
.tall { max-height: 26rem; overflow: auto; } .tall thead th { position: sticky; top: 0; }
.gallery { display: flex; flex-wrap: wrap; column-gap: 2.5rem; }
.attention { display: flex; flex-wrap: wrap; gap: .5rem; margin: .3rem 0 1rem; }
.attention figure { margin: 0; width: 84px; }
.attention img { width: 84px; height: auto; display: block; image-rendering: pixelated; border: 1px solid var(--line); }
.attention figcaption { line-height: 1.25; font-size: .75rem; padding-top: .15rem; } .wrong { color: #d62728; }
footer { margin-top: 2rem; }
@media (max-width: 40rem) { th, td { padding: .18rem .3rem; } th[scope=row] { white-space: normal; min-width: 5rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; } .tall { max-height: none; }
  figure, tr { break-inside: avoid; } .panels { grid-template-columns: 1fr 1fr; } }
""".strip()
