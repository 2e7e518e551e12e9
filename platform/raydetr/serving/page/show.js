// Show an answer: the image, the classes and the list.

function show() {
  const { image, mode, threshold } = state;
  if (!image) return;
  document.body.classList.add("chosen");
  find("result").hidden = find("commands").hidden = false;
  const answer = state.answers[mode];
  const all = answer ? answer.items : [];
  const scored = !all.length || all.some((item) => item.score !== null);
  find("slider").hidden = !scored;
  const confident = all.filter((item) => item.score === null || item.score >= threshold);
  const shown = confident.filter((item) => !state.off.has(item.label));
  shown.forEach(decodeMask);
  if (!shown.includes(state.pinned)) state.pinned = null;
  if (!shown.includes(state.active)) state.active = state.pinned;
  showChips(confident);
  showList(shown);
  showStatus(answer, all, confident, shown);
  showCommands();
  paint();
  const parts = [image.name, image.note, `${image.bitmap.width} × ${image.bitmap.height} pixels`];
  if (answer) {
    parts.push(`answered in ${Math.round(answer.took)} ms`);
    if (answer.times) parts.push(`${Math.round(answer.times.model_ms)} ms of it in the model`);
  }
  find("caption").textContent = parts.filter(Boolean).join(" · ");
}

function visible() {
  const items = state.answers[state.mode]?.items ?? [];
  return items.filter((item) => (item.score === null || item.score >= state.threshold) && !state.off.has(item.label));
}

function paint() {
  if (!state.image) return;
  const room = { width: find("stage").clientWidth, height: Math.max(260, innerHeight * 0.78) };
  draw(find("canvas"), state.image, visible(), state.active, room);
}

function countByLabel(items) {
  const counts = new Map();
  items.forEach(({ label, labelId }) => counts.set(label, { labelId, count: (counts.get(label)?.count ?? 0) + 1 }));
  return counts;
}

function showStatus(answer, all, confident, shown) {
  const lower = find("lower");
  lower.hidden = true;
  if (!answer) return;
  const noun = state.mode === "boxes" || state.mode === "instance" ? "object" : "region";
  let text = shown.length ? plural(shown.length, noun) : `No ${noun} shown`;
  if (!all.length) text = `The model detected no ${noun}s.`;
  else if (!confident.length) {
    const [best] = all;
    text = `No ${noun} reaches this score.`;
    lower.hidden = false;
    lower.textContent = `Show the best one: ${best.title}`;
    lower.onclick = () => setThreshold(Math.max(Number(find("threshold").min), Math.floor(best.score * 100) / 100), true);
  } else if (shown.length < confident.length) text += `, ${confident.length - shown.length} hidden by class`;
  if (find("status").textContent !== text) find("status").textContent = text;
  const list = [...countByLabel(shown)].map(([label, { count }]) => (count > 1 ? `${label} (${count})` : label)).join(", ");
  find("canvas").setAttribute("aria-label", `${state.image.name}: ${text}${list ? `: ${list}` : ""}`);
}

function swatch(labelId) {
  const element = make("span", { className: "swatch" });
  element.style.background = css(labelId);
  return element;
}

// The elements are reused while the classes are the same, so that a checkbox keeps the focus when it is clicked.
function showChips(confident) {
  const classes = [...countByLabel(confident)].sort(([a], [b]) => a.localeCompare(b));
  const area = find("classes").querySelector(".chips");
  const key = JSON.stringify(classes);
  find("classes").hidden = classes.length < 2 && !classes.some(([label]) => state.off.has(label));
  if (area.dataset.key !== key) {
    area.dataset.key = key;
    area.replaceChildren(
      ...classes.map(([label, { labelId, count }]) => {
        const box = make("input", { type: "checkbox", name: label });
        box.addEventListener("change", () => {
          if (box.checked) state.off.delete(label);
          else state.off.add(label);
          show();
        });
        return make("label", {}, box, swatch(labelId), count > 1 ? `${label} (${count})` : label);
      }),
    );
  }
  area.querySelectorAll("input").forEach((box) => (box.checked = !state.off.has(box.name)));
}

function showList(shown) {
  find("list").replaceChildren(
    ...shown.map((item) => {
      const button = make("button", { type: "button" }, swatch(item.labelId), make("span", { textContent: item.label }));
      button.append(make("span", { className: "score", textContent: item.score === null ? "" : item.score.toFixed(2) }));
      button.append(make("small", { textContent: item.detail ?? "" }));
      button.setAttribute("aria-pressed", item === state.pinned);
      button.addEventListener("click", () => {
        state.pinned = state.pinned === item ? null : item;
        activate(state.pinned);
      });
      button.addEventListener("pointerenter", () => activate(item));
      button.addEventListener("pointerleave", () => activate(state.pinned));
      button.addEventListener("focus", () => button.matches(":focus-visible") && activate(item));
      button.addEventListener("blur", () => activate(state.pinned));
      item.button = button;
      return make("li", {}, button);
    }),
  );
}

function activate(item) {
  state.active = item;
  visible().forEach((each) => each.button?.setAttribute("aria-pressed", each === state.pinned));
  paint();
}

function showCommands() {
  const { image, mode, threshold } = state;
  const query = { ...(requestedMinScore() === null ? {} : { threshold }), orientation: "apply" };
  const [path, all] = mode === "boxes" ? ["v1/detect", query] : ["v1/segment", { kind: mode, ...query }];
  find("curl").textContent = curlCommand(image, path, all, needsToken);
  find("python").textContent = pythonCode(image, mode, query, needsToken);
}

function setThreshold(value, move = false) {
  state.threshold = value;
  if (move) find("threshold").value = value;
  find("threshold-text").textContent = value.toFixed(2);
  show();
}
