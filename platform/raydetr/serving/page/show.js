// What is shown of an answer: the picture, the classes, the list.

function show() {
  const { picture, mode, threshold } = state;
  if (!picture) return;
  document.body.classList.add("chosen");
  find("result").hidden = find("commands").hidden = false;
  const answer = state.answers[mode];
  const all = answer ? answer.items : [];
  const scored = !all.length || all.some((item) => item.score !== null);
  find("slider").hidden = !scored;
  const sure = all.filter((item) => item.score === null || item.score >= threshold);
  const shown = sure.filter((item) => !state.off.has(item.label));
  shown.forEach(decode);
  if (!shown.includes(state.pinned)) state.pinned = null;
  if (!shown.includes(state.active)) state.active = state.pinned;
  showChips(sure);
  showList(shown);
  showStatus(answer, all, sure, shown);
  showCommands();
  paint();
  const parts = [picture.name, picture.note, `${picture.bitmap.width} × ${picture.bitmap.height} pixels`];
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
  if (!state.picture) return;
  const room = { width: find("stage").clientWidth, height: Math.max(260, innerHeight * 0.78) };
  draw(find("canvas"), state.picture, visible(), state.active, room);
}

function counts(items) {
  const found = new Map();
  items.forEach(({ label, labelId }) => found.set(label, { labelId, count: (found.get(label)?.count ?? 0) + 1 }));
  return found;
}

function showStatus(answer, all, sure, shown) {
  const lower = find("lower");
  lower.hidden = true;
  if (!answer) return;
  const thing = state.mode === "boxes" || state.mode === "instance" ? "object" : "region";
  let text = shown.length ? plural(shown.length, thing) : `No ${thing} here`;
  if (!all.length) text = `The model found no ${thing}s.`;
  else if (!sure.length) {
    const [best] = all;
    text = `The model is not that sure of any ${thing}.`;
    lower.hidden = false;
    lower.textContent = `Show its best guess: ${best.title}`;
    lower.onclick = () => setThreshold(Math.max(Number(find("threshold").min), Math.floor(best.score * 100) / 100), true);
  } else if (shown.length < sure.length) text += `, ${sure.length - shown.length} hidden by class`;
  if (find("status").textContent !== text) find("status").textContent = text;
  const list = [...counts(shown)].map(([label, { count }]) => (count > 1 ? `${label} (${count})` : label)).join(", ");
  find("canvas").setAttribute("aria-label", `${state.picture.name}: ${text}${list ? `: ${list}` : ""}`);
}

function swatch(labelId) {
  const element = make("span", { className: "swatch" });
  element.style.background = css(labelId);
  return element;
}

// Kept while the classes are the same, so that a box that was just ticked keeps the focus.
function showChips(sure) {
  const found = [...counts(sure)].sort(([a], [b]) => a.localeCompare(b));
  const area = find("classes").querySelector(".chips");
  const key = JSON.stringify(found);
  find("classes").hidden = found.length < 2 && !found.some(([label]) => state.off.has(label));
  if (area.dataset.key !== key) {
    area.dataset.key = key;
    area.replaceChildren(
      ...found.map(([label, { labelId, count }]) => {
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
  const { picture, mode, threshold } = state;
  const query = { ...(leastScore() === null ? {} : { threshold }), orientation: "apply" };
  const [path, all] = mode === "boxes" ? ["v1/detect", query] : ["v1/segment", { kind: mode, ...query }];
  find("curl").textContent = curlCommand(picture, path, all, asksForToken);
  find("python").textContent = pythonCode(picture, mode, query, asksForToken);
}

function setThreshold(value, move = false) {
  state.threshold = value;
  if (move) find("threshold").value = value;
  find("threshold-text").textContent = value.toFixed(2);
  show();
}
