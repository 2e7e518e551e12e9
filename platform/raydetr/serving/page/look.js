// The page's state, and the requests for the chosen image.

const find = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

// The display modes, with the minimum score of their requests. The slider then filters on the page. Masks with scores
// below 0.1 are rarely looked at and costly for the server. In a panoptic map the threshold decides to which segment a
// pixel belongs, so a new request is sent when the slider is released. A semantic map has no scores.
const MODES = {
  boxes: { title: "Boxes", about: "around each object", minScore: 0 },
  instance: { title: "Masks", about: "of each object", minScore: 0.1 },
  panoptic: { title: "Panoptic", about: "objects and background", minScore: "slider" },
  semantic: { title: "Semantic", about: "the class of each pixel", minScore: null },
};
const MAX_RETRIES = 5;

const state = { image: null, mode: "boxes", answers: {}, threshold: 0.5, off: new Set(), active: null, pinned: null };
let models = null;
let needsToken = false;
let pending = new AbortController();

function requestedMinScore() {
  const { minScore } = MODES[state.mode];
  return minScore === "slider" ? state.threshold : minScore;
}

async function loadModels() {
  try {
    models = (await send("v1/models")).models;
    hideTokenForm();
  } catch (error) {
    if (!(error instanceof RequestFailed)) throw error;
    find("model").textContent = "Drop an image to see its detections.";
    if (error.status === 401) showTokenForm(error);
    else if (error.status) setTimeout(loadModels, 5000);
    else showError(error, () => (hideError(), loadModels()));
    return;
  }
  const [model] = models;
  const version = model.version === null ? "" : `, version ${model.version},`;
  const some = model.labels.slice(0, 4).join(", ");
  const classes = model.labels.length > 4 ? `${model.labels.length} classes, such as ${some}` : some;
  find("model").textContent = `The model ${model.name}${version} detects ${classes}.`;
  find("modes").hidden = !model.tasks.includes("segment");
}

async function detect(retry = 0) {
  pending.abort();
  pending = new AbortController();
  const { signal } = pending;
  const { image, mode } = state;
  if (!image) return;
  hideError();
  show();
  const minScore = requestedMinScore();
  if (state.answers[mode]?.minScore === minScore) return;
  find("busy").hidden = false;
  find("result").setAttribute("aria-busy", "true");
  find("status").textContent = "Detecting …";
  const query = { ...(minScore === null ? {} : { threshold: minScore }), orientation: "apply" };
  const started = performance.now();
  try {
    const answer = mode === "boxes"
      ? await send("v1/detect", { query, body: image.blob, signal })
      : await send("v1/segment", { query: { ...query, kind: mode, format: "rle" }, body: image.blob, signal });
    if (!hasSameSize(image, answer.image) && image.note !== "sent upright") {
      const upright = await encodeUpright(image);
      if (!signal.aborted) useImage(upright);
      return;
    }
    state.answers[mode] = { ...answer, minScore, items: itemsOf(answer), took: performance.now() - started };
    hideTokenForm();
    if (!models) loadModels();
  } catch (error) {
    if (signal.aborted) return;
    find("status").textContent = "";
    if (!(error instanceof RequestFailed)) throw error;
    showError(error, detect, retry);
    return;
  } finally {
    if (!signal.aborted) {
      find("busy").hidden = true;
      find("result").removeAttribute("aria-busy");
    }
  }
  show();
}

// The detections or segments of an answer, by descending score.
function itemsOf(answer) {
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

function decodeMask(item) {
  if (!item.rle || item.mask) return;
  item.mask = readMask(item.rle);
  item.anchor = findAnchor(item.mask);
  const share = 100 * item.mask.area;
  item.detail = `${share < 1 ? "under 1" : Math.round(share)} % of the image`;
}
