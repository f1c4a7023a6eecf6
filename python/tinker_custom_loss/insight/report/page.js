"use strict";
// Numbers under the pointer. Without this the charts are the same, only silent.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
for (const [id, chart] of Object.entries(numbers)) {
  const figure = document.getElementById(id);
  const svg = figure.querySelector("svg");
  const cursor = svg.querySelector(".cursor");
  const readout = figure.querySelector(".readout");
  const [left, right, width] = chart.plot;
  const steps = chart.steps;
  const first = steps[0][0];
  const length = Math.max(1, chart.length);
  const middle = ([start, end]) => (start + end) / 2;
  const bucketAt = (step) => {
    const next = steps.findIndex(([start]) => start > step);
    const at = next < 0 ? steps.length - 1 : Math.max(0, next - 1);
    if (chart.cells || next < 0 || next === 0) return at;
    return middle(steps[next]) - step < step - middle(steps[at]) ? next : at;
  };
  const shown = (s, index) => {
    const lost = s.lost ? s.lost[index] : 0;
    if (s.mean[index] === null) return lost ? "not finite" : "-";
    const notes = [];
    if (s.low && s.low[index] !== s.high[index]) notes.push(`${s.low[index]} to ${s.high[index]}`);
    if (lost) notes.push(`and ${lost} not finite`);
    return s.mean[index] + (notes.length ? ` (${notes.join(", ")})` : "");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const index = bucketAt(first + Math.min(1, Math.max(0, (x - left) / (right - left))) * length);
    if (cursor) {
      const at = left + ((right - left) * (middle(steps[index]) - first)) / length;
      cursor.setAttribute("transform", `translate(${at})`);
      cursor.style.visibility = "visible";
    }
    const [start, end] = steps[index];
    const cells = Object.entries(chart.series).map(([name, s]) => `${name} ${shown(s, index)}`);
    readout.textContent = `${start === end ? "step " + start : "steps " + start + " to " + end}: ${cells.join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => {
    if (cursor) cursor.style.visibility = "hidden";
    readout.textContent = "";
  });
}
// The pulls at a token under the pointer, and of one term alone where its name is chosen.
const pulls = JSON.parse(document.getElementById("pulls").textContent);
document.querySelectorAll(".text").forEach((block, number) => {
  const { terms, pulls: values, directed } = pulls[number];
  const tokens = [...block.querySelectorAll(".tokens span")];
  const readout = block.querySelector(".readout");
  const marks = [...block.querySelectorAll(".legend .mark:not(.prompt)")];
  const at = (token, term) => values[token * terms.length + term];
  const arrow = (value) => (!directed || value === 0 ? "" : value > 0 ? "↓" : "↑");
  const pull = (value) => Math.abs(value) + arrow(value);
  const tell = (event) => {
    const token = tokens.indexOf(event.target);
    if (token < 0) return;
    const cells = terms.map((name, term) => [name, at(token, term)]);
    cells.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
    readout.textContent = `${JSON.stringify(event.target.textContent)}: ${cells.map(([name, value]) => `${name} ${pull(value)}`).join(" · ")}`;
  };
  block.addEventListener("pointerover", tell);
  block.addEventListener("click", tell);
  const original = tokens.map((token) => token.className);
  const color = marks.map((mark) => mark.className.match(/c\d/)[0]);
  let chosen = -1;
  marks.forEach((mark, term) => {
    const name = mark.parentElement;
    name.tabIndex = 0;
    name.title = "show this term alone, the stronger the larger of its own pulls";
    name.setAttribute("role", "button");
    const choose = () => {
      chosen = chosen === term ? -1 : term;
      marks.forEach((other, index) => other.parentElement.setAttribute("aria-pressed", index === chosen));
      const most = Math.max(...tokens.map((_, token) => Math.abs(at(token, term))));
      tokens.forEach((token, index) => {
        const size = most ? Math.abs(at(index, term)) / most : 0;
        const level = size ? 1 + Math.min(3, Math.floor(4 * Math.sqrt(size))) : 0;
        const prompt = original[index].includes("prompt") ? " prompt" : "";
        token.className = chosen < 0 ? original[index] : (level ? `${color[term]} p${level}` : "") + prompt;
      });
    };
    name.addEventListener("click", choose);
    name.addEventListener("keydown", (event) => event.key === "Enter" && choose());
  });
});
