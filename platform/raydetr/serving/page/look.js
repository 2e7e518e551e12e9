// What was chosen, and the requests for it.

const find = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// What can be shown, and the least score that the server is asked for, so that the slider acts here. Masks of guesses
// below 0.1 cost the server more than anybody looks at. In a panoptic map the threshold decides whose each pixel is:
// the server is asked again when the slider is let go. A semantic map has no scores.
const MODES = {
  boxes: { title: "Boxes", about: "around each object", ask: 0 },
  instance: { title: "Outlines", about: "of each object", ask: 0.1 },
  panoptic: { title: "Whole scene", about: "objects and background", ask: "slider" },
  semantic: { title: "Class map", about: "what each spot belongs to", ask: null },
};
const REPEATS = 5;

const state = { picture: null, mode: "boxes", answers: {}, threshold: 0.5, off: new Set(), active: null, pinned: null };
let models = null;
let asksForToken = false;
let pending = new AbortController();

function leastScore() {
  const { ask: least } = MODES[state.mode];
  return least === "slider" ? state.threshold : least;
}

async function askModels() {
  try {
    models = (await ask("v1/models")).models;
    tokenWorks();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    find("model").textContent = "Drop a picture and see what the model finds in it.";
    if (error.status === 401) askForToken(error);
    else if (error.status) setTimeout(askModels, 5000);
    else complain(error, () => (quiet(), askModels()));
    return;
  }
  const [model] = models;
  const version = model.version === null ? "" : `, version ${model.version},`;
  const some = model.labels.slice(0, 4).join(", ");
  const kinds = model.labels.length > 4 ? `${model.labels.length} kinds of objects, such as ${some}` : some;
  find("model").textContent = `The model ${model.name}${version} knows ${kinds}.`;
  find("modes").hidden = !model.tasks.includes("segment");
}

async function look(repeat = 0) {
  pending.abort();
  pending = new AbortController();
  const { signal } = pending;
  const { picture, mode } = state;
  if (!picture) return;
  quiet();
  show();
  const least = leastScore();
  if (state.answers[mode]?.least === least) return;
  find("busy").hidden = false;
  find("result").setAttribute("aria-busy", "true");
  find("status").textContent = "Looking …";
  const query = { ...(least === null ? {} : { threshold: least }), orientation: "apply" };
  const started = performance.now();
  try {
    const answer = mode === "boxes"
      ? await ask("v1/detect", { query, body: picture.blob, signal })
      : await ask("v1/segment", { query: { ...query, kind: mode, format: "rle" }, body: picture.blob, signal });
    if (!isSeenAlike(picture, answer.image) && picture.note !== "sent upright") {
      const turned = await upright(picture);
      if (!signal.aborted) take(turned);
      return;
    }
    state.answers[mode] = { ...answer, least, items: read(answer), took: performance.now() - started };
    tokenWorks();
    if (!models) askModels();
  } catch (error) {
    if (signal.aborted) return;
    find("status").textContent = "";
    if (!(error instanceof Refused)) throw error;
    complain(error, look, repeat);
    return;
  } finally {
    if (!signal.aborted) {
      find("busy").hidden = true;
      find("result").removeAttribute("aria-busy");
    }
  }
  show();
}

// Detections and segments alike, the surest first.
function read(answer) {
  const items = (answer.detections || answer.segments).map((each) => {
    const item = { label: each.label, labelId: each.label_id, score: each.score };
    if (each.box) {
      const [w, h] = [each.box.xmax - each.box.xmin, each.box.ymax - each.box.ymin];
      return { ...item, box: each.box, detail: `${Math.round(w)} × ${Math.round(h)} pixels` };
    }
    return { ...item, rle: each.mask };
  });
  items.forEach((item) => (item.title = item.score === null ? item.label : `${item.label} ${item.score.toFixed(2)}`));
  return items.sort((a, b) => (b.score ?? 0) - (a.score ?? 0));
}

function decode(item) {
  if (!item.rle || item.mask) return;
  item.mask = readMask(item.rle);
  item.place = anchor(item.mask);
  const share = 100 * item.mask.area;
  item.detail = `${share < 1 ? "under 1" : Math.round(share)} % of the picture`;
}
