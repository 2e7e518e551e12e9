"use strict";
(() => {
  document.documentElement.classList.add("scripted");

  // Sort tables by a click on their headers. Cells without a value (data-v empty) stay at the end.
  const value = (row, column) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = header.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const first = header.dataset.first || "descending";
        const other = first === "descending" ? "ascending" : "descending";
        const order = header.getAttribute("aria-sort") === first ? other : first;
        headers.forEach((each) => each.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows];
        rows.sort((a, b) => {
          const [x, y] = [value(a, column), value(b, column)];
          if (x === "" || y === "") return (x === "") - (y === "");
          return sign * compare(x, y);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // Hide the rows whose first cell does not contain the search text.
  for (const input of document.querySelectorAll("input[data-filter]")) {
    const table = document.getElementById(input.dataset.filter);
    input.addEventListener("input", () => {
      const text = input.value.trim().toLowerCase();
      for (const row of table.tBodies[0].rows) {
        row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
      }
    });
  }

  // Show the curve of the selected class.
  const choice = document.getElementById("curve-class");
  if (choice) {
    const data = JSON.parse(document.getElementById("curve-data").textContent);
    const path = document.querySelector(".curve.one");
    const legend = document.getElementById("curve-legend");
    const show = () => {
      const line = data.lines[choice.value];
      path.setAttribute("d", line || "");
      legend.hidden = !line;
      legend.lastElementChild.textContent = line ? choice.selectedOptions[0].textContent : "";
    };
    choice.addEventListener("change", show);
    show();
  }

  for (const button of document.querySelectorAll("button[data-enlarge]")) {
    button.addEventListener("click", () => {
      const large = button.closest("figure").classList.toggle("large");
      button.textContent = large ? "smaller" : "larger";
      button.setAttribute("aria-pressed", large);
      button.closest("figure").scrollIntoView({ block: "nearest" });
    });
  }

  // Open all folded sections for printing.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((each) => (each.open = true));
  });
  addEventListener("afterprint", () => closed.forEach((each) => (each.open = false)));
})();
