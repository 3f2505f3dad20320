"use strict";
document.documentElement.classList.add("scripted");

// A heading sorts the methods: numbers the largest first, names from A; what was not measured stays last.
for (const table of document.querySelectorAll("table.numbers")) {
  const body = table.tBodies[1];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const first = column && button.textContent !== "place" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = before === first ? other : first;
      headings.forEach((h) => h.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const value = (row) => column ? row.cells[column].dataset.value : row.cells[0].textContent.trim();
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (column ? x - y : x.localeCompare(y));
      });
      body.append(...rows);
    });
  });
}

// A method that is pointed at stands out in every chart and table of its forget set.
for (const section of document.querySelectorAll(".scenario")) {
  const point = (event) => {
    const place = event.target.closest(".key li, .plot g, .row, .numbers tr");
    const model = place && place.dataset.model;
    section.classList.toggle("pointed", Boolean(model));
    for (const own of section.querySelectorAll("[data-model]")) own.classList.toggle("on", own.dataset.model === model);
  };
  section.addEventListener("pointerover", point);
  section.addEventListener("focusin", point);
  section.addEventListener("pointerleave", point);

  // One method under the other: all answers scroll together.
  const boxes = [...section.querySelectorAll(".answers")];
  for (const box of boxes) {
    box.addEventListener("scroll", () => boxes.forEach((other) => { other.scrollLeft = box.scrollLeft; }));
  }

  const chosen = section.querySelector("select.chosen");
  chosen?.addEventListener("change", () => {
    for (const answer of section.querySelectorAll(".answers > [data-model]")) {
      const method = answer.hasAttribute("style");
      answer.hidden = Boolean(chosen.value) && method && answer.dataset.model !== chosen.value;
    }
  });
}
