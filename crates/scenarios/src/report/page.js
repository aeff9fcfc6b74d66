"use strict";
const boxes = [...document.querySelectorAll(".filter input")];
const rows = [...document.querySelectorAll("tbody tr")];
function filter() {
  const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.dataset.results.split(" ").some((result) => wanted.has(result));
    shown += row.hidden ? 0 : 1;
  }
  document.querySelector(".filter output").value = `${shown} of ${rows.length} scenarios`;
}
for (const box of boxes) box.addEventListener("change", filter);
document.querySelector(".filter").hidden = false;
filter();
