"use strict";
// What every page does: a click on the header of a table sorts it, and a printed page shows its folded sections.

function compareCells(one, other, column, numeric) {
  // missing values come last, whatever the direction
  const [a, b] = [one, other].map((row) => row.cells[column]);
  if (!numeric) return a.textContent.trim().localeCompare(b.textContent.trim(), undefined, { numeric: true });
  return Number(a.dataset.value) - Number(b.dataset.value);
}

function sortTable(head) {
  const table = head.closest("table");
  const body = table.tBodies[0];
  const column = head.cellIndex;
  const numeric = head.classList.contains("number");
  const first = numeric ? "descending" : "ascending"; // the highest number is what is looked for
  const other = numeric ? "ascending" : "descending";
  const order = head.getAttribute("aria-sort") === first ? other : first;
  const sign = order === "ascending" ? 1 : -1;
  const isMissing = (row) => numeric && !("value" in row.cells[column].dataset);
  const rows = [...body.rows];
  const known = rows.filter((row) => !isMissing(row));
  known.sort((one, next) => sign * compareCells(one, next, column, numeric));
  body.append(...known, ...rows.filter(isMissing));
  for (const cell of table.tHead.rows[0].cells) {
    if (cell.hasAttribute("aria-sort")) cell.setAttribute("aria-sort", cell === head ? order : "none");
  }
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortTable(button.closest("th")));
}

let unfolded = [];
addEventListener("beforeprint", () => {
  unfolded = [...document.querySelectorAll("details:not([open])")];
  for (const section of unfolded) section.open = true;
});
addEventListener("afterprint", () => {
  for (const section of unfolded) section.open = false;
});
