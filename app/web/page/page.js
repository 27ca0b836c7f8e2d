// The page: what is chosen, what is asked, what is shown.

import * as api from "./api.js";
import { showCard } from "./card.js";
import { Folder, filesOf } from "./folder.js";
import { Pad } from "./pad.js";
import { clearResult, drawHistogram, percent, showPictures, showProblem, showReply, showVerdict } from "./result.js";

const $ = (id) => document.getElementById(id);
const EXAMPLES = { "0a": "a zero", "0b": "another zero", 1: "a one", 2: "a two", 3: "a three", 4: "a four", 6: "a six", 8: "an eight" };
const VIEWS = { one: "One image", folder: "A folder", model: "The model" };
const WAIT_MS = 120, SLOW_MS = 300;

const state = {
  models: [],
  model: "",
  calibration: null, // of the version that `reply` names, else of the model's current one
  alpha: null, // what the visitor chose; null: the model's own
  lent: null, // the rate of the link whose result is shown, until the visitor chooses one
  source: null, // { drawn, give: (signal) => { png, fit } } of the image that is being judged
  judged: null, // the source that `reply` is about
  reply: null,
};
let asking = null; // ends the question in flight
let asked = null; // the source that it is about
let timer = null;
let slow = null;
let aside = null; // strokes of a drawing that a link's result covers

const settled = () => state.reply !== null && state.judged === state.source;
const wanted = () => state.lent ?? state.alpha;
const point = () => {
  const { calibration, reply } = state;
  const alpha = wanted() ?? calibration.alpha;
  if (reply?.alpha === alpha) return { alpha, threshold: reply.threshold }; // a link may have a rate between two steps
  return calibration.operating_points.find((each) => each.alpha === alpha) ?? { alpha: calibration.alpha, threshold: calibration.threshold };
};

const nearest = (points, alpha) => {
  const distances = points.map((each) => Math.abs(each.alpha - alpha));
  return distances.indexOf(Math.min(...distances));
};

function paint() {
  const { calibration, reply } = state;
  $("alpha").disabled = !calibration;
  if (!calibration) {
    $("alpha-reset").hidden = true;
    return $("histogram").replaceChildren();
  }
  const chosen = point(), points = calibration.operating_points;
  $("intro").textContent = `A small neural network was trained to reconstruct ${calibration.normal_class} only. An image that it reconstructs badly is probably something else.`;
  $("alpha").max = points.length - 1;
  $("alpha").value = nearest(points, chosen.alpha);
  $("alpha").setAttribute("aria-valuetext", percent(chosen.alpha));
  $("alpha-text").textContent = percent(chosen.alpha);
  $("alpha-why").textContent = `Of 1,000 normal images, at most about ${Math.round(1000 * chosen.alpha)} would be called anomalous.`;
  $("alpha-reset").hidden = chosen.alpha === calibration.alpha;
  drawHistogram($("histogram"), calibration, chosen.threshold, reply);
  if (reply && $("answer").ariaBusy !== "true") showReply(reply, calibration, chosen);
}

// While a verdict is not of the image that was given last it is dimmed; one that is slow to change says so.
function waiting(on) {
  clearTimeout(slow);
  $("answer").ariaBusy = on;
  if (on) slow = setTimeout(() => showVerdict("judging", "Judging…", ""), SLOW_MS);
}

function failed(error, again) {
  if (error.name === "AbortError") return;
  const problem = error instanceof api.Problem ? error : new api.Problem({ title: "Something went wrong in this page", hint: "Load it again." });
  waiting(false);
  if (settled()) state.reply = { ...state.reply, id: null, unlinked: problem.title }; // its verdict is right at any rate
  else state.reply = null;
  paint();
  if (!state.reply) showProblem(problem, again);
  if (!(error instanceof api.Problem)) console.error(error);
  if (problem.status === 401) askForKey();
}

// One question at a time: a newer one ends an older one, which then changes nothing more.
async function question(work) {
  clearTimeout(timer);
  timer = null;
  asking?.abort();
  const own = (asking = new AbortController());
  asked = state.source;
  $("answer").classList.add("stale");
  waiting(state.source !== null && !settled());
  try {
    await work(own.signal);
  } catch (error) {
    if (own === asking) failed(error, () => question(work));
  } finally {
    if (own === asking) {
      const late = asked?.drawn && asked !== state.source;
      asking = asked = null;
      $("answer").classList.toggle("stale", timer !== null);
      if (late) judgeSoon();
    }
  }
}

const judge = () => question(async (signal) => {
  if (!state.calibration) await loadModels();
  signal.throwIfAborted();
  const { source } = state;
  if (!source) return nothing();
  const { png, fit } = await source.give(signal);
  signal.throwIfAborted();
  await show(await api.score(png, { model: state.model, alpha: wanted(), fit, signal }), source, signal);
});

// A drawing changes faster than a slow line answers: what is in flight about it is awaited, and its end asks again.
function judgeSoon() {
  $("answer").classList.add("stale");
  waiting(true);
  if (asked?.drawn) return;
  asking?.abort();
  asking = asked = null;
  timer ??= setTimeout(judge, WAIT_MS);
}

async function show(reply, source, signal) {
  const calibration = await calibrationOf(reply.model, reply.version, signal);
  signal.throwIfAborted();
  Object.assign(state, { reply, calibration, judged: source });
  waiting(false);
  paint();
  if (source !== state.source) waiting(true); // something newer was drawn meanwhile
  await showPictures(reply.id, signal);
}

function nothing() {
  clearTimeout(timer);
  timer = null;
  asking?.abort();
  asking = asked = null;
  Object.assign(state, { lent: null, source: null, judged: null, reply: null });
  $("answer").classList.remove("stale");
  waiting(false);
  showVerdict("", "Nothing to judge yet", "Draw a digit, and the answer appears here while you draw.");
  clearResult();
  paint();
}

async function calibrationOf(model, version, signal) {
  const { calibration } = state;
  return calibration?.model === model && calibration.version === version ? calibration : api.calibration(model, version, signal);
}

async function loadModels() {
  state.models = await api.models();
  const usable = state.models.filter((model) => model.current !== null);
  $("model").replaceChildren(...usable.map(({ name }) => new Option(name)));
  const chosen = usable.find(({ name }) => name === state.model) ?? usable.find((model) => model.is_default) ?? usable[0];
  $("model").disabled = !chosen;
  if (!chosen) throw new api.Problem({ title: "No model is ready", hint: "The operator can see why at /readyz." });
  state.model = $("model").value = chosen.name;
  $("trouble").hidden = true;
  const calibration = await calibrationOf(chosen.name, chosen.current);
  if (state.model !== chosen.name || state.reply) return; // another was chosen, or what is shown has its own
  state.calibration = calibration;
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
    again.addEventListener("click", () => (problem.status === 401 ? askForKey() : startAgain()));
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
  if (pad.empty && [$("undo"), $("clear")].includes(document.activeElement)) $("pad").focus(); // a disabled button has no focus
  for (const id of ["undo", "clear"]) $(id).disabled = pad.empty;
  $("pad").parentElement.classList.toggle("used", !pad.empty);
  aside = null;
  leaveShared();
  if (pad.empty) return nothing();
  state.source = { drawn: true, give: async () => ({ png: pad.png(), fit: "mnist" }) };
  judgeSoon();
});
$("undo").addEventListener("click", () => pad.undo());
$("clear").addEventListener("click", () => pad.clear());

// Files.
function take(open) {
  if (!pad.empty) pad.clear();
  aside = null;
  leaveShared();
  state.source = { drawn: false, give: async (signal) => api.prepare(await open(signal), $("fit").value) };
  judge();
}
const takeFile = (file) => take(() => file);
$("file").addEventListener("change", () => {
  if ($("file").files.length) takeFile($("file").files[0]);
  $("file").value = "";
});
$("error-scale").addEventListener("change", () => {
  const { reply } = state;
  if (reply) showPictures(reply.id, new AbortController().signal, () => state.reply?.id === reply.id);
});
$("fit").addEventListener("change", () => {
  if (!state.source) return;
  leaveShared({ keepRate: true });
  state.judged = null;
  judge();
});
function receive(files, unread = []) {
  if (!files.length && !unread.length) return;
  if ($("view-folder").hidden && files.length === 1 && !unread.length) {
    location.hash = "#one";
    takeFile(files[0]);
  } else {
    location.hash = "#folder";
    folder.start(files, unread);
  }
}
document.addEventListener("paste", (event) => {
  receive([...(event.clipboardData?.files ?? [])]);
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => event.relatedTarget ?? document.body.classList.remove("over"));
document.addEventListener("drop", async (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  const { files, unread } = await filesOf(event.dataTransfer);
  receive(files, unread);
});
$("examples").append(...Object.entries(EXAMPLES).map(([name, words]) => {
  const item = document.createElement("li"), button = document.createElement("button"), image = document.createElement("img");
  Object.assign(button, { type: "button", title: words });
  Object.assign(image, { src: `page/examples/${name}.png`, alt: words, width: 28, height: 28 });
  button.append(image);
  button.addEventListener("click", () => take((signal) => api.blob(`page/examples/${name}.png`, signal)));
  item.append(button);
  return item;
}).sort((a, b) => a.firstChild.firstChild.src.localeCompare(b.firstChild.firstChild.src)));

// Model, threshold, key.
$("model").addEventListener("change", () => {
  leaveShared();
  Object.assign(state, { model: $("model").value, alpha: null, reply: null, calibration: null });
  paint();
  if (!$("view-model").hidden) showCard(state.model);
  judge();
});
function choose(alpha) {
  leaveShared();
  state.alpha = alpha === state.calibration.alpha ? null : alpha;
  paint();
}
$("alpha").addEventListener("input", () => state.calibration && choose(state.calibration.operating_points[Number($("alpha").value)].alpha));
$("alpha").addEventListener("change", () => state.source && judge()); // the link shared from now on has this threshold
$("alpha-reset").addEventListener("click", () => {
  choose(state.calibration.alpha);
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
  const unanswered = asking !== null || !settled() || state.reply.unlinked; // refused without the key, or asked with another
  asking?.abort();
  startAgain(unanswered);
});
async function startAgain(unanswered = false) {
  const ready = await start();
  if (ready) folder.resume();
  if (ready && state.source && (unanswered || !settled())) return judge();
  if (ready || asking) return;
  waiting(false);
  if (state.reply) paint();
  else showVerdict("", "Nothing judged yet", "");
}
$("copy").addEventListener("click", async () => {
  if (!state.reply?.id) return; // while another model is asked
  const link = new URL(location.href);
  link.hash = `id=${state.reply.id}`;
  try {
    await navigator.clipboard.writeText(link.href);
    $("copy").textContent = "Copied";
  } catch {
    history.replaceState(null, "", link.hash); // where the clipboard is closed to us, the address bar has the link
    $("copy").textContent = "The link is in the address bar";
  }
  setTimeout(() => ($("copy").textContent = "Copy link"), 2500);
});

// Views.
const folder = new Folder(async () => {
  if (!state.model) await loadModels();
  return { model: state.model, alpha: state.alpha, mode: $("fit").value };
}, askForKey);

const showShared = (id) => {
  nothing();
  return question(async (signal) => {
    waiting(true);
    const reply = await api.kept(id, signal);
    signal.throwIfAborted();
    if (reply.model !== state.model && [...$("model").options].some((option) => option.value === reply.model)) {
      Object.assign(state, { model: ($("model").value = reply.model), alpha: null });
    }
    state.lent = reply.alpha;
    const give = async (signal) => ({ png: (await api.picture(id, "input", signal)).blob, fit: "strict" });
    await show(reply, (state.source = { drawn: false, give }), signal);
  });
};

// The result of a link takes the place of a drawing, which comes back when one returns to it.
function putAside() {
  if (pad.empty) return;
  const { strokes } = pad;
  pad.clear();
  aside = strokes;
}

function takeBack() {
  pad.draw(aside);
}

// What is shown is no longer what the link has.
function leaveShared({ keepRate = false } = {}) {
  if (!keepRate) state.lent = null;
  if (location.hash.startsWith("#id=")) history.replaceState(null, "", "#one");
}

const chosenView = () => /^#(one|folder|model)$/.exec(location.hash)?.[1] ?? "one";

function showView() {
  const view = chosenView();
  document.title = `${VIEWS[view]} · Reconstruction anomaly`;
  for (const name of Object.keys(VIEWS)) $(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function route() {
  showView();
  const shared = /^#id=([0-9a-f]{16,64})$/.exec(location.hash);
  if (shared) {
    putAside(); // which, as every change of the pad, leaves the link
    history.replaceState(null, "", `#id=${shared[1]}`);
    await showShared(shared[1]);
  } else if (chosenView() === "model") {
    if (state.model) await showCard(state.model);
  } else if (chosenView() === "one" && aside) takeBack();
  else paint();
}

async function start() {
  showView();
  const ready = await begin();
  if (ready) await route();
  return ready;
}

addEventListener("hashchange", route);
new ResizeObserver(paint).observe($("histogram"));
start();
