"""The style sheet and the script of report.html: they ask for nothing, and the page reads without them."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --shade: #eef1f4;
  --link: #0a58a8; --good: #136a33; --good-back: #e0f3e6; --bad: #a3131f; --bad-back: #fce6e7;
  --warn-back: #fff3d6; --blue: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111418; --card: #1a1f25; --ink: #e4e8ec; --soft: #a0abb6; --line: #343c45; --shade: #242b33;
    --link: #79b8ff; --good: #7fdb9b; --good-back: #153321; --bad: #ff9d9d; --bad-back: #451c20;
    --warn-back: #3b3015; --blue: #3f97d8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1, h2, h3 { line-height: 1.25; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; } h3 { font-size: 1rem; }
p { margin: 0 0 .6rem; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--link); }
code { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .92em; }
.soft, caption { color: var(--soft); }
section, nav { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; margin: 0 0 1rem; min-width: 0; }
header { margin: 0 0 1rem; }
header p { margin: 0; }
.verdict { display: inline-block; margin: .5rem 0 0; padding: .3rem .7rem; border-radius: .4rem; }
.met { background: var(--good-back); color: var(--good); }
.missed { background: var(--bad-back); color: var(--bad); }
.warning { background: var(--warn-back); padding: .4rem .7rem; border-radius: .4rem; max-width: none; }
.top { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 1rem; }
.pictures { display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.pictures > * { min-width: 0; }
@media (min-width: 62rem) {
  .top { grid-template-columns: minmax(0, 7fr) minmax(0, 5fr); }
}
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .6rem;
  margin: 0 0 .8rem; }
.figures div { background: var(--shade); border-radius: .4rem; padding: .5rem .7rem; }
.figures dt { color: var(--soft); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.figures small { display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }
.facts { display: grid;
  grid-template-columns: max-content minmax(0, 1fr); gap: .15rem .8rem; margin: 0 0 .6rem; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
nav ul { margin: 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
nav h2 { font-size: 1rem; }
.scroll { overflow: auto; max-height: 32rem; width: fit-content; max-width: 100%; margin: 0 0 .8rem;
  border: 1px solid var(--line); border-radius: .4rem; }
.whole { max-height: none; width: auto; }
.whole table { width: 100%; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .4rem .6rem; font-weight: 600; }
.hidden { position: absolute; width: 1px; height: 1px; padding: 0; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-top: 1px solid var(--line); }
td { max-width: 44ch; }
td.long, tbody th { min-width: 9rem; }
td.long { min-width: 16rem; }
td.number, .interval { white-space: nowrap; }
@media (max-width: 40rem) {
  .whole .interval { white-space: normal; }
  .whole table { font-size: .8rem; }
  .whole tbody th { min-width: 0; }
  .whole th, .whole td { padding: .3rem .35rem; }
}
thead th { position: sticky; top: 0; background: var(--shade); border-top: 0; vertical-align: bottom; }
tbody th { font-weight: 500; }
.number { text-align: right; }
tbody tr:hover { background: var(--shade); }
th button { all: unset; cursor: pointer; }
th button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort="ascending"] button::after { content: " \\2191"; color: inherit; }
th[aria-sort="descending"] button::after { content: " \\2193"; color: inherit; }
:focus-visible, th button:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
figure { margin: 0 0 .8rem; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; color: var(--ink); }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg { fill: currentColor; }
details { margin: .4rem 0 .6rem; }
summary { cursor: pointer; color: var(--link); font-size: .88rem; }
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --shade: #fff; --link: #000;
    --good: #000; --good-back: #fff; --bad: #000; --bad-back: #fff; --warn-back: #fff;
    --blue: #0072b2;
  }
  body { font-size: 10pt; max-width: none; padding: 0; }
  nav, details:not([open]), th button::after { display: none; }
  section { border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: .6rem 0; }
  .verdict, .warning { border: 1px solid; }
  .scroll { max-height: none; overflow: visible; border: 0; }
  table { font-size: 8pt; }
  thead th { position: static; }
  tr, figure, .figures { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""

SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  const key = (row, index) => {
    const cell = row.cells[index];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent.trim();
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].map(row => [key(row, index), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return down ? compare(b, a) : compare(a, b);
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
"""
