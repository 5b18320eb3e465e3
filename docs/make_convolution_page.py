"""Make docs/convolution.html, on which a kernel moves over a digit: python docs/make_convolution_page.py"""

from __future__ import annotations

import json
from pathlib import Path

from sklearn.datasets import load_digits

FOLDER = Path(__file__).parent
KERNEL = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]  # Sobel's: the difference of left and right

PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Convolution, forward and backward</title>
<style>
:root { color-scheme: light dark; --ink: #1b2430; --ground: #ffffff; --cell: #e8eef6; --lit: #f6b98f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf2; --ground: #14181f; --cell: #263040; --lit: #9a4a1c; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  margin: 0 auto; padding: 12px; max-width: 1240px; box-sizing: border-box; }
main { display: flex; flex-wrap: wrap; gap: 12px 28px; align-items: flex-start; }
h2 { font-size: 16px; margin: 8px 0 4px; }
.grid { display: grid; gap: 2px; width: max-content; touch-action: manipulation; user-select: none; }
.grid span { width: 36px; height: 36px; background: var(--cell); font-size: 14px;
  display: flex; align-items: center; justify-content: center; }
#patches span { width: 34px; height: 20px; font-size: 13px; }
.grid .lit { background: var(--lit); font-weight: 700; }
#image span, #y span { cursor: pointer; }
button { font: inherit; min-height: 44px; padding: 0 16px; margin: 0 4px 0 0; }
button[aria-pressed="true"] { background: var(--lit); color: var(--ink); }
#sum { min-height: 4.5em; overflow-wrap: anywhere; }
[data-mode="forward"] .back { display: none; }
</style>
<body data-mode="forward">
<h1>Convolution</h1>
<p>A 3x3 kernel over a digit of 8x8, stride 1, no padding. Click or touch the image or the output,
or use the arrow keys. In backward, click an output pixel, or press Enter, to change its gradient:
0, 1, 2.</p>
<p><button id="forward" aria-pressed="true">Forward</button>
<button id="backward" aria-pressed="false">Backward</button></p>
<p id="sum" aria-live="polite"></p>
<main>
<section><h2>image x</h2><div class="grid" id="image"></div></section>
<section><h2>kernel w</h2><div class="grid" id="kernel"></div></section>
<section><h2>output y</h2><div class="grid" id="y"></div></section>
<section class="back"><h2>gradient dy</h2><div class="grid" id="dy"></div></section>
<section class="back"><h2>dx, summed where patches overlap</h2><div class="grid" id="dx"></div></section>
<section class="back"><h2>dw</h2><div class="grid" id="dw"></div></section>
<section><h2 id="title">patches (im2col)</h2><div class="grid" id="patches"></div></section>
</main>
<script>
const DATA = __DATA__, x = DATA.image, w = DATA.kernel, N = 6, K = 3;
const zeros = (rows, cols) => Array.from({length: rows}, () => Array(cols).fill(0));
const dy = zeros(N, N);
let p = 2, q = 2, backward = false;
const grids = {};
for (const [id, rows, cols] of [["image", 8, 8], ["kernel", K, K], ["y", N, N], ["dy", N, N], ["dx", 8, 8],
                                ["dw", K, K], ["patches", N * N, K * K]]) {
  const grid = document.getElementById(id);
  grid.style.gridTemplateColumns = `repeat(${cols}, max-content)`;
  const cell = () => grid.appendChild(document.createElement("span"));
  grids[id] = {cols, cells: Array.from({length: rows * cols}, cell)};
}
function fill(id, values, lit) {
  const {cols, cells} = grids[id];
  cells.forEach((cell, n) => {
    const i = Math.floor(n / cols), j = n % cols;
    cell.textContent = values[i][j];
    cell.classList.toggle("lit", lit(i, j));
  });
}
function* taps() { for (let i = 0; i < K; i++) for (let j = 0; j < K; j++) yield [i, j]; }
function draw() {
  const y = zeros(N, N), dx = zeros(8, 8), dw = zeros(K, K), patches = [], dpatches = [];
  for (let a = 0; a < N; a++) for (let b = 0; b < N; b++) {
    const row = [], drow = [];
    for (const [i, j] of taps()) {
      row.push(x[a + i][b + j]);
      drow.push(dy[a][b] * w[i][j]);
      y[a][b] += x[a + i][b + j] * w[i][j];
      dx[a + i][b + j] += dy[a][b] * w[i][j];
      dw[i][j] += dy[a][b] * x[a + i][b + j];
    }
    patches.push(row);
    dpatches.push(drow);
  }
  const window = (i, j) => i >= p && i < p + K && j >= q && j < q + K, here = (i, j) => i === p && j === q;
  fill("image", x, window); fill("dx", dx, window);
  fill("kernel", w, () => true); fill("dw", dw, () => dy[p][q] !== 0);
  fill("y", y, here); fill("dy", dy, here);
  fill("patches", backward ? dpatches : patches, i => i === p * N + q);
  document.getElementById("title").textContent = backward ? "dpatches = dy @ matrix.T" : "patches (im2col)";
  const products = [...taps()].map(([i, j]) => `${x[p + i][q + j]}*${w[i][j]}`.replace("*-", "*\\u2212"));
  document.getElementById("sum").textContent = backward
    ? `dy[${p},${q}] = ${dy[p][q]}: row ${p * N + q} of dpatches is ${dy[p][q]} times the kernel, ` +
      `and is added to the lit window of dx. dw gets ${dy[p][q]} times the lit window of x.`
    : `y[${p},${q}] = ${products.join(" + ")} = ${y[p][q]}`;
  document.body.dataset.mode = backward ? "backward" : "forward";
  for (const id of ["forward", "backward"])
    document.getElementById(id).setAttribute("aria-pressed", String((id === "backward") === backward));
}
const clamp = v => Math.max(0, Math.min(N - 1, v));
const bump = () => { if (backward) dy[p][q] = (dy[p][q] + 1) % 3; };
function listen(id, shift, change) {
  const {cols, cells} = grids[id];
  const place = n => { p = clamp(Math.floor(n / cols) - shift); q = clamp(n % cols - shift); };
  cells.forEach((cell, n) => {
    cell.addEventListener("click", () => { place(n); if (change) bump(); draw(); });
    cell.addEventListener("pointerenter", event => {
      if (event.pointerType === "mouse" && !backward) { place(n); draw(); }
    });
  });
}
listen("image", 1, false); listen("y", 0, true); listen("dy", 0, true);
for (const id of ["forward", "backward"])
  document.getElementById(id).addEventListener("click", () => {
    backward = id === "backward";
    if (backward && !dy.flat().some(v => v)) dy[p][q] = 1;
    draw();
  });
document.addEventListener("keydown", event => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (step) { p = clamp(p + step[0]); q = clamp(q + step[1]); }
  else if (event.key === "Enter" && event.target.tagName !== "BUTTON") bump();
  else return;
  event.preventDefault();
  draw();
});
draw();
</script>
</body>
</html>
"""


def page() -> str:
    """Return the page, with a digit 3 of scikit-learn's."""
    image = load_digits().images[3].astype(int).tolist()
    return PAGE.replace("__DATA__", json.dumps({"image": image, "kernel": KERNEL}))


if __name__ == "__main__":
    (FOLDER / "convolution.html").write_text(page(), encoding="utf-8")
