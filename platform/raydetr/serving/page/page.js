// Choosing an image, and the controls.

let choice = 0;
async function choose(file, name) {
  const number = ++choice;
  const image = await readImage(file, name);
  if (number !== choice) return; // another one has been chosen in the meantime
  if (image) return useImage(image);
  hideError();
  const [title, advice] = NOT_AN_IMAGE;
  const text = `“${name}” cannot be opened by this browser. ${advice}`;
  find("message").replaceChildren(make("h2", { textContent: title }), make("p", { textContent: text }));
  find("message").hidden = false;
}

function useImage(image) {
  Object.assign(state, { image, answers: {}, active: null, pinned: null });
  state.off.clear();
  detect();
  if (find("stage").getBoundingClientRect().top > innerHeight / 2) find("result").scrollIntoView({ block: "start" });
}

function chooseFirst(files) {
  const [file] = files;
  if (file) choose(file, file.name || "pasted image");
}

find("file").addEventListener("change", (event) => {
  chooseFirst(event.target.files);
  event.target.value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dragging");
  });
}
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  chooseFirst(event.dataTransfer.files);
});
addEventListener("paste", (event) => chooseFirst(event.clipboardData.files));

for (const [name, paintExample] of EXAMPLES) {
  const canvas = make("canvas");
  canvas.setAttribute("aria-hidden", "true");
  drawExample(canvas, paintExample);
  const button = make("button", { type: "button" }, canvas, name);
  button.addEventListener("click", () => canvas.toBlob((blob) => choose(blob, `${name}.png`), "image/png"));
  find("examples").querySelector(".thumbs").append(button);
}

function setMode(mode) {
  state.mode = mode;
  document.querySelector(`#modes input[value=${mode}]`).checked = true;
  const minScore = Number(MODES[mode].minScore) || 0;
  find("threshold").min = minScore;
  setThreshold(Math.max(state.threshold, minScore), true);
  detect();
}

for (const [mode, { title, about }] of Object.entries(MODES)) {
  const radio = make("input", { type: "radio", name: "mode", value: mode, checked: mode === "boxes" });
  radio.addEventListener("change", () => setMode(mode));
  find("modes").append(make("label", {}, radio, make("span", {}, `${title} `, make("small", { textContent: about }))));
}
find("threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
find("threshold").addEventListener("change", () => MODES[state.mode].minScore === "slider" && detect());
find("threshold").value = state.threshold;
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  state.pinned = null;
  activate(null);
});

// Highlight the smallest item under the pointer.
find("canvas").addEventListener("pointermove", (event) => {
  const area = find("canvas").getBoundingClientRect();
  const [u, v] = [(event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height];
  const { width, height } = state.image.bitmap;
  const size = ({ box, mask }) => (box ? (box.xmax - box.xmin) * (box.ymax - box.ymin) : mask.area);
  const under = visible().filter(({ box, mask }) => {
    if (mask) return mask.bits[Math.floor(v * mask.height) * mask.width + Math.floor(u * mask.width)];
    return box.xmin <= u * width && u * width <= box.xmax && box.ymin <= v * height && v * height <= box.ymax;
  });
  const item = under.sort((a, b) => size(a) - size(b))[0] ?? state.pinned;
  if (item !== state.active) activate(item);
});
find("canvas").addEventListener("pointerleave", () => activate(state.pinned));

for (const button of document.querySelectorAll("[data-copy]")) {
  const text = button.textContent;
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(find(button.dataset.copy))) ? "Copied" : "Select the text and copy it";
    setTimeout(() => (button.textContent = text), 2000);
  });
}

new ResizeObserver(paint).observe(find("stage"));
loadModels();
