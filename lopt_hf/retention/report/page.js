"use strict";
// The tables sort by a click on a header, or Enter on it; a third one brings the first order back.
// An interval goes by its lower end.
const NUMBER = /^[[<\u00b1]?\s*([+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|inf\b))/i;

function keyOf(cell) {
  const text = cell.textContent.trim();
  const number = cell.classList.contains("number") && NUMBER.exec(text);
  if (!number) return text;
  return Number(number[1].replace(/inf/i, "Infinity"));
}

function compare(one, other) {
  const empty = (key) => key === "" || key === "-";
  if (empty(one) || empty(other)) return empty(one) - empty(other) || 0;
  if (one === other) return 0;  // of two infinite ones there is no difference
  return typeof one === "number" && typeof other === "number"
    ? one - other : String(one).localeCompare(String(other), undefined, { numeric: true });
}

function sort(table, column, direction) {
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((one, other) => one.dataset.row - other.dataset.row);
  if (direction !== "none") {
    const sign = direction === "ascending" ? 1 : -1;
    const keys = new Map(rows.map((row) => [row, keyOf(row.cells[column])]));
    const last = (key) => key === "" || key === "-";
    rows.sort((a, b) => {
      const [one, other] = [keys.get(a), keys.get(b)];
      return (last(one) || last(other) ? 1 : sign) * compare(one, other);
    });
  }
  for (const row of rows) {
    // A task's name stands in its first row only, as lm-eval prints it; out of order each row needs it
    if (row.dataset.task !== undefined) row.cells[0].textContent = direction === "none" ? "" : row.dataset.task;
    body.append(row);
  }
}

for (const table of document.querySelectorAll("table")) {
  let task = "";
  [...table.tBodies[0].rows].forEach((row, number) => {
    row.dataset.row = number;
    const text = row.cells[0].textContent.trim();
    if (text === "") row.dataset.task = task; else task = text;
  });
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    if (header.textContent.trim() === "") return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: "none" }[header.getAttribute("aria-sort")] ?? "ascending";
      for (const each of headers) each.removeAttribute("aria-sort");
      if (next !== "none") header.setAttribute("aria-sort", next);
      sort(table, column, next);
    });
  });
}

// What is said of a point stands below the plot, where touch and keyboard find it too.
const told = document.getElementById("point");
for (const point of document.querySelectorAll(".point")) {
  for (const event of ["mouseenter", "focus", "click"]) {
    point.addEventListener(event, () => { told.textContent = point.getAttribute("aria-label"); });
  }
}

// Folded tables are printed too.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const each of folded) each.open = true;
});
addEventListener("afterprint", () => { for (const each of folded) each.open = false; });
