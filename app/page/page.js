// The page: what is chosen, what is asked, what is shown.

import * as api from "./api.js";
import { Folder, filesOf } from "./folder.js";
import { Pad } from "./pad.js";
import { clearPictures, drawHistogram, percent, showPictures, showProblem, showReply, showVerdict } from "./result.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = { "0a": "a zero", "0b": "another zero", 1: "a one", 2: "a two", 3: "a three", 4: "a four", 6: "a six", 8: "an eight" };
const WAIT_MS = 120;

const state = {
  models: [],
  model: "",
  calibration: null, // of the version that `reply` names, else of the model's current one
  alpha: null, // null: the model's own
  source: null, // () => { png, fit } of the image that is being judged
  reply: null,
};
let asking = null;
let timer = null;

const point = () => {
  const { calibration, alpha } = state;
  const points = calibration.operating_points;
  return points.find((each) => each.alpha === (alpha ?? calibration.alpha)) ?? { alpha: calibration.alpha, threshold: calibration.threshold };
};

function paint() {
  if (!state.calibration) return;
  const chosen = point(), { calibration, reply } = state;
  const index = calibration.operating_points.indexOf(chosen);
  $("alpha").disabled = index < 0;
  $("alpha").max = calibration.operating_points.length - 1;
  $("alpha").value = index;
  $("alpha").setAttribute("aria-valuetext", percent(chosen.alpha));
  $("alpha-text").textContent = percent(chosen.alpha);
  $("alpha-why").textContent = `Of 1,000 normal images, at most about ${Math.round(1000 * chosen.alpha)} would be called anomalous.`;
  $("alpha-reset").hidden = chosen.alpha === calibration.alpha;
  drawHistogram($("histogram"), calibration, chosen.threshold, reply);
  if (reply) showReply(reply, calibration, chosen);
}

function failed(error) {
  if (error.name === "AbortError") return;
  const problem = error instanceof api.Problem ? error : new api.Problem({ title: "Something went wrong in this page", hint: "Load it again." });
  state.reply = null;
  paint();
  showProblem(problem);
  if (!(error instanceof api.Problem)) console.error(error);
  if (problem.status === 401) askForKey();
}

// Judge what `state.source` gives; a newer question ends an older one.
async function judge() {
  clearTimeout(timer);
  timer = null;
  asking?.abort();
  const own = (asking = new AbortController());
  $("answer").classList.add("stale");
  try {
    if (!state.model) await loadModels();
    const { png, fit } = await state.source();
    const reply = await api.score(png, { model: state.model, alpha: state.alpha, fit, signal: own.signal });
    await useCalibration(reply.model, reply.version);
    if (own !== asking) return;
    state.reply = reply;
    paint();
    await showPictures(reply.id, own.signal);
  } catch (error) {
    if (own === asking) failed(error);
  } finally {
    if (own === asking) {
      asking = null;
      $("answer").classList.toggle("stale", timer !== null);
    }
  }
}

function nothing() {
  clearTimeout(timer);
  timer = null;
  asking?.abort();
  asking = null;
  Object.assign(state, { source: null, reply: null });
  $("answer").classList.remove("stale");
  showVerdict("", "Nothing to judge yet", "Draw a digit, and the answer appears here while you draw.");
  clearPictures();
  for (const part of ["facts", "share", "fitted"]) $(part).hidden = true;
  paint();
}

async function useCalibration(model, version) {
  if (state.calibration?.model === model && state.calibration.version === version) return;
  state.calibration = await api.calibration(model, version);
}

async function loadModels() {
  state.models = await api.models();
  const usable = state.models.filter((model) => model.current !== null);
  $("model").replaceChildren(...usable.map(({ name }) => new Option(name)));
  const chosen = usable.find(({ name }) => name === state.model) ?? usable.find((model) => model.is_default) ?? usable[0];
  $("model").disabled = !chosen;
  if (!chosen) throw new api.Problem({ title: "No model is ready", hint: "The operator can see why at /readyz." });
  state.model = $("model").value = chosen.name;
  $("intro").textContent = `A small neural network has learned to redraw ${chosen.normal_class}, and nothing else. What it redraws badly is probably something else.`;
  await useCalibration(chosen.name, chosen.current);
  paint();
}

async function begin() {
  $("trouble").hidden = true;
  try {
    await loadModels();
  } catch (error) {
    const problem = error instanceof api.Problem ? error : new api.Problem({ title: "Something went wrong in this page" });
    const again = document.createElement("button");
    again.type = "button";
    again.textContent = problem.status === 401 ? "Enter a key" : "Try again";
    again.addEventListener("click", () => (problem.status === 401 ? askForKey() : start()));
    const title = document.createElement("strong");
    title.textContent = problem.title;
    $("trouble").replaceChildren(title, " ", problem.words, again);
    $("trouble").hidden = false;
    return false;
  }
  return true;
}

// The pad.
const pad = new Pad($("pad"), () => {
  for (const id of ["undo", "clear"]) $(id).disabled = pad.empty;
  $("pad").parentElement.classList.toggle("used", !pad.empty);
  leaveShared();
  if (pad.empty) return nothing();
  state.source = async () => ({ png: pad.png(), fit: "mnist" });
  $("answer").classList.add("stale");
  timer ??= setTimeout(judge, WAIT_MS);
});
$("undo").addEventListener("click", () => pad.undo());
$("clear").addEventListener("click", () => pad.clear());

// Files.
function take(file) {
  if (!pad.empty) pad.clear();
  leaveShared();
  state.source = () => api.prepare(file, $("fit").value);
  judge();
}
$("file").addEventListener("change", () => {
  if ($("file").files.length) take($("file").files[0]);
  $("file").value = "";
});
$("fit").addEventListener("change", () => state.source && judge());
document.addEventListener("paste", (event) => {
  const file = [...(event.clipboardData?.files ?? [])][0];
  if (file && !$("view-one").hidden) take(file);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("over"));
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const files = await filesOf(event.dataTransfer);
  if (!files.length) return;
  if ($("view-folder").hidden && files.length === 1) {
    location.hash = "#one";
    take(files[0]);
  } else {
    location.hash = "#folder";
    folder.start(files);
  }
});
$("examples").append(...Object.entries(EXAMPLES).map(([name, words]) => {
  const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
  Object.assign(button, { type: "button", title: words });
  Object.assign(image, { src: `page/examples/${name}.png`, alt: words, width: 28, height: 28 });
  button.append(image);
  button.addEventListener("click", async () => {
    try {
      const blob = await api.blob(`page/examples/${name}.png`);
      take(new File([blob], `${name}.png`, { type: "image/png" }));
    } catch (error) {
      failed(error);
    }
  });
  item.append(button);
  return item;
}).sort((a, b) => a.firstChild.firstChild.src.localeCompare(b.firstChild.firstChild.src)));

// Model, threshold, key.
$("model").addEventListener("change", async () => {
  Object.assign(state, { model: $("model").value, alpha: null, reply: null });
  try {
    await loadModels();
    if (!$("view-model").hidden) await showCard();
    if (state.source) await judge();
    else nothing();
  } catch (error) {
    failed(error);
  }
});
$("alpha").addEventListener("input", () => {
  const { alpha } = state.calibration.operating_points[Number($("alpha").value)];
  state.alpha = alpha === state.calibration.alpha ? null : alpha;
  paint();
});
$("alpha").addEventListener("change", () => state.source && judge()); // the link shared from now on has this threshold
$("alpha-reset").addEventListener("click", () => {
  state.alpha = null;
  paint();
  $("alpha").focus();
  if (state.source) judge();
});
function askForKey() {
  if ($("key-dialog").open) return; // what is being typed stays, whatever else is refused meanwhile
  $("key").value = api.key.get();
  $("key-dialog").showModal();
}
$("key-open").addEventListener("click", askForKey);
$("key-dialog").addEventListener("close", async () => {
  if ($("key-dialog").returnValue !== "save") return;
  api.key.set($("key").value.trim());
  const unanswered = asking !== null || !state.reply; // refused without the key, or asked with another
  asking?.abort();
  if ((await start()) && state.source && unanswered) judge();
});
$("copy").addEventListener("click", async () => {
  const link = new URL(location.href);
  link.hash = `id=${state.reply.id}`;
  try {
    await navigator.clipboard.writeText(link.href);
    $("copy").textContent = "Copied";
  } catch {
    location.hash = link.hash; // where the clipboard is closed to us, the address bar has the link
    $("copy").textContent = "The link is in the address bar";
  }
  setTimeout(() => ($("copy").textContent = "Copy link"), 2500);
});

// Views.
const folder = new Folder(() => ({ model: state.model, alpha: state.alpha, fit: $("fit").value }));

async function showCard() {
  const page = new DOMParser().parseFromString(await api.card(state.model), "text/html");
  const pictures = [...page.querySelectorAll("main img")].map((image) => [image, image.getAttribute("src")]);
  for (const [image] of pictures) image.removeAttribute("src");
  $("card").replaceChildren(...page.querySelector("main").childNodes);
  await Promise.all(pictures.map(async ([image, source]) => (image.src = URL.createObjectURL(await api.blob(`models/${source}`)))));
}

async function showShared(id) {
  nothing();
  try {
    const reply = await api.kept(id);
    await useCalibration(reply.model, reply.version);
    if ([...$("model").options].some((option) => option.value === reply.model)) state.model = $("model").value = reply.model;
    state.reply = reply;
    state.alpha = reply.alpha === state.calibration.alpha ? null : reply.alpha;
    paint();
    await showPictures(id);
    state.source = async () => ({ png: (await api.picture(id, "input")).blob, fit: "strict" });
  } catch (error) {
    failed(error);
  }
}

function leaveShared() {
  if (location.hash.startsWith("#id=")) history.replaceState(null, "", "#one");
}

async function route() {
  const [, view = "one"] = /^#(one|folder|model)$/.exec(location.hash) ?? [];
  for (const name of ["one", "folder", "model"]) $(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const shared = /^#id=([0-9a-f]{16,64})$/.exec(location.hash);
  if (shared) {
    if (!pad.empty) pad.clear();
    history.replaceState(null, "", `#id=${shared[1]}`);
    await showShared(shared[1]);
  } else if (view === "one") paint();
  else if (view === "model") await showCard().catch((error) => ($("card").textContent = `${error.title ?? "The card cannot be shown."} ${error.words ?? ""}`));
}

async function start() {
  const ready = await begin();
  if (ready) await route();
  return ready;
}

addEventListener("hashchange", route);
new ResizeObserver(paint).observe($("histogram"));
start();
