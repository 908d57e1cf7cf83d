"""Style and script of the page of a sweep: no fonts, libraries or requests."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """\
:root { color-scheme: light dark; --fore: #1c2430; --back: #ffffff; --soft: #5c6773;
  --rule: #d8dee6; --mark: #fff1cf; --head: #f4f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --fore: #e3e8ef; --back: #14181e; --soft: #98a3b0; --rule: #333c47; --mark: #4a3d17;
    --head: #1d232b; }
}
body { margin: 0 auto; max-width: 1120px; padding: 1rem 1.25rem 3rem; color: var(--fore);
  background: var(--back); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 0.2rem; }
.note { color: var(--soft); margin: 0 0 0.4rem; font-size: 0.85rem; }
.summary { display: flex; flex-wrap: wrap; gap: 0.4rem 2rem; margin: 0.5rem 0; }
.summary dt { color: var(--soft); font-size: 0.8rem; }
.summary dd { margin: 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); }
svg .tick { paint-order: stroke; stroke: var(--back); stroke-width: 3px; fill: var(--fore); }
svg .name { fill: var(--fore); font-weight: 600; }
svg .end { text-anchor: end; }
svg .mid { text-anchor: middle; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 1.2; stroke-linecap: round; opacity: 0.55; cursor: pointer; }
.line.off { display: none; }
.lines.marked .line { opacity: 0.12; }
.lines .line.on { opacity: 1; stroke-width: 3; }
.tools { display: flex; flex-wrap: wrap; gap: 0.5rem 1.5rem; align-items: center;
  margin: 0.4rem 0; }
input, select { font: inherit; padding: 0.2rem 0.4rem; }
input { width: 16rem; max-width: 60vw; }
.scroll { overflow: auto; max-height: 75vh; border: 1px solid var(--rule); }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--head); text-align: left; padding: 0; }
th button { all: unset; cursor: pointer; padding: 0.35rem 0.6rem; display: block;
  white-space: nowrap; }
th button:focus-visible, tr:focus-visible { outline: 2px solid #6fa8dc; outline-offset: -2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
td { padding: 0.2rem 0.6rem; border-top: 1px solid var(--rule); white-space: nowrap; }
td:last-child { white-space: normal; min-width: 8rem; }
td i { display: inline-block; width: 0.7em; height: 0.7em; border-radius: 2px;
  margin-right: 0.5em; }
tbody tr { cursor: pointer; }
tbody tr.on td { background: var(--mark); }
tbody tr[hidden] { display: none; }
.failed, .diverged { color: #d1495b; }
.pruned, .stopped { color: var(--soft); }
"""

SCRIPT = """\
"use strict";
(() => {
  const table = document.getElementById("trials");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const names = heads.map((head) => head.textContent);
  const rows = [...body.rows];
  const filter = document.getElementById("filter");
  const status = document.getElementById("status");
  const count = document.getElementById("count");
  const groups = [...document.querySelectorAll(".lines")];
  const lines = new Map();
  for (const line of document.querySelectorAll(".line")) {
    const trial = line.dataset.trial;
    if (!lines.has(trial)) lines.set(trial, []);
    lines.get(trial).push(line);
  }
  const text = (row, column) => row.cells[column].textContent;
  const number = (word) => (word.trim() === "" ? NaN : Number(word));

  // ---- sorting: numbers by size, words by alphabet, nothing at the end
  function order(column, sign) {
    const keyed = rows.map((row) => ({ row, word: text(row, column) }));
    for (const item of keyed) item.value = number(item.word);
    keyed.sort((a, b) => {
      if ((a.word === "") !== (b.word === "")) return a.word === "" ? 1 : -1;
      const numeric = !Number.isNaN(a.value) && !Number.isNaN(b.value);
      return sign * (numeric ? a.value - b.value : a.word.localeCompare(b.word));
    });
    body.append(...keyed.map((item) => item.row));
  }
  heads.forEach((head, column) => {
    head.firstChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      order(column, up ? 1 : -1);
    });
  });

  // ---- filtering
  const compare = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b,
    ">=": (a, b) => a >= b, "=": (a, b) => a === b, "!=": (a, b) => a !== b,
  };
  function test(word) {
    const parts = word.match(/^(.+?)(<=|>=|!=|<|>|=)(.+)$/);
    const column = parts ? names.indexOf(parts[1]) : -1;
    if (column < 0) {
      const wanted = word.toLowerCase();
      return (row) => row.textContent.toLowerCase().includes(wanted);
    }
    const limit = number(parts[3]);
    return (row) => {
      const own = text(row, column);
      const value = number(own);
      const numeric = !Number.isNaN(limit) && !Number.isNaN(value);
      if (own === "") return false;
      return numeric ? compare[parts[2]](value, limit) : compare[parts[2]](own, parts[3]);
    };
  }
  function apply() {
    const tests = filter.value.split(/\\s+/).filter(Boolean).map(test);
    let shown = 0;
    for (const row of rows) {
      const fits = (!status.value || text(row, 1) === status.value) &&
        tests.every((own) => own(row));
      row.hidden = !fits;
      shown += fits;
      for (const line of lines.get(row.dataset.trial) || []) line.classList.toggle("off", !fits);
    }
    count.textContent = shown === rows.length ? `${shown} trials` : `${shown} of ${rows.length}`;
  }
  filter.addEventListener("input", apply);
  status.addEventListener("change", apply);

  // ---- marking a trial
  let kept = null;
  let shownTrial = null;
  const rowOf = new Map(rows.map((row) => [row.dataset.trial, row]));
  function show(trial) {
    if (trial === shownTrial) return;
    for (const [own, on] of [[shownTrial, false], [trial, true]]) {
      if (own === null) continue;
      rowOf.get(own).classList.toggle("on", on);
      for (const line of lines.get(own) || []) line.classList.toggle("on", on);
    }
    for (const group of groups) group.classList.toggle("marked", trial !== null);
    shownTrial = trial;
  }
  function keep(trial, scroll) {
    kept = kept === trial ? null : trial;
    show(kept);
    if (kept !== null && scroll) rowOf.get(kept).scrollIntoView({ block: "nearest" });
  }
  for (const row of rows) {
    const trial = row.dataset.trial;
    row.addEventListener("mouseenter", () => show(trial));
    row.addEventListener("mouseleave", () => show(kept));
    row.addEventListener("click", () => keep(trial, false));
    row.addEventListener("keydown", (event) => {
      if (event.key === "Enter") keep(trial, false);
    });
  }
  for (const [trial, own] of lines) {
    for (const line of own) {
      line.addEventListener("mouseenter", () => show(trial));
      line.addEventListener("mouseleave", () => show(kept));
      line.addEventListener("click", () => keep(trial, true));
    }
  }
})();
"""
