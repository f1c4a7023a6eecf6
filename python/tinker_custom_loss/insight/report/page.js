"use strict";
// Numbers under the pointer. Without this the charts are the same, only silent.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const show = (value) => (value === null ? "not finite" : String(value));
for (const [id, chart] of Object.entries(numbers)) {
  const figure = document.getElementById(id);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const [left, right, width] = chart.plot;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const last = chart.steps.length - 1;
    const at = Math.min(1, Math.max(0, (x - left) / (right - left)));
    const index = cursor ? Math.round(at * last) : Math.min(last, Math.floor(at * (last + 1)));
    if (cursor) {
      cursor.setAttribute("transform", `translate(${left + ((right - left) * index) / Math.max(1, last)})`);
      cursor.style.visibility = "visible";
    }
    const [first, end] = chart.steps[index];
    const cells = Object.entries(chart.series).map(([name, s]) => {
      const range = s.low && s.low[index] !== s.high[index] ? ` (${show(s.low[index])} to ${show(s.high[index])})` : "";
      return `${name} ${show(s.mean[index])}${range}`;
    });
    readout.textContent = `${first === end ? "step " + first : "steps " + first + " to " + end}: ${cells.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    if (cursor) cursor.style.visibility = "hidden";
    readout.textContent = "";
  });
}
