"use strict";
// A click on a heading sorts its table; numbers sort by data-v, first the end that needs looking at.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)], difference = Number(x) - Number(y);
      return Number.isNaN(difference) ? x.localeCompare(y, undefined, { numeric: true }) : difference;
    };
    const rows = [...body.rows].sort((a, b) => down ? order(b, a) : order(a, b));
    body.append(...rows);
  }));
}
