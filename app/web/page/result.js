// A reply in words and pictures.

import * as api from "./api.js";

const $ = (id) => document.getElementById(id);
const MARKS = { normal: "m7.5 12.5 3 3 6-7", anomalous: "M12 7v6m0 3.6v.1", problem: "M8 12h8" };

export const number = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? Number(value.toPrecision(4)).toString() : value.toExponential(2));
// With two significant digits, for the ends of scales.
const rounded = (value) => number(Number(value.toPrecision(2)));
export const percent = (rate) => `${Number((100 * rate).toPrecision(3))} %`;

// The p-value is (1 + k) / (n + 1), where k calibration images score at least as high.
export function inWords(pValue, n) {
  const worse = Math.round(pValue * (n + 1)) - 1;
  const all = n.toLocaleString("en");
  if (worse <= 0) return `None of ${all} normal images looks worse.`;
  if (worse >= n) return `All ${all} normal images look worse.`;
  return `${worse.toLocaleString("en")} of ${all} normal images ${worse === 1 ? "looks" : "look"} worse.`;
}

export function showVerdict(kind, word, why, small = "") {
  $("verdict").className = `verdict ${kind}`;
  $("mark").setAttribute("d", MARKS[kind] ?? "");
  $("verdict-word").textContent = word;
  const line = document.createElement("span");
  line.className = "id";
  line.textContent = small;
  $("verdict-why").replaceChildren(why, ...(small ? [document.createElement("br"), line] : []));
  if (document.activeElement === $("again")) $("verdict").focus();
  $("again").hidden = true;
}

export function showReply(reply, calibration, point) {
  const anomalous = reply.reason !== null || reply.mse > point.threshold;
  const learned = calibration.normal_class;
  const words = inWords(reply.p_value, calibration.n);
  const why = reply.reason !== null
    ? `A guard decided: ${reply.reason.replaceAll("_", " ")}.`
    : anomalous ? `The model reconstructs it worse than ${learned}.` : `The model reconstructs it as well as ${learned}.`;
  showVerdict(anomalous ? "anomalous" : "normal", anomalous ? "Anomalous" : "Normal", `${why}\n${words}`);
  $("facts").hidden = false;
  $("fact-mse").textContent = number(reply.mse);
  $("fact-threshold").textContent = number(point.threshold);
  $("fact-p").textContent = number(reply.p_value);
  $("fact-model").textContent = `${reply.model} ${reply.version}`;
  $("share").hidden = reply.id === null;
  $("fact-id").textContent = reply.id ?? "";
  $("copy").disabled = point.alpha !== reply.alpha; // the link has the rate that was asked for
  $("unlinked").hidden = !reply.unlinked;
  $("unlinked").textContent = `The verdict is right, but there is no link to it: ${reply.unlinked}.`;
  $("fitted").hidden = !reply.fitted;
  if (reply.fitted) {
    const [left, top, right, bottom] = reply.fitted.crop;
    const turned = reply.fitted.inverted ? " It was dark on bright, and was inverted." : "";
    $("fitted").textContent = `Fitted as MNIST's digits were: cropped to ${right - left}×${bottom - top}, scaled, centred.${turned}`;
  }
}

// `again` asks once more, where that may help.
export function showProblem(problem, again) {
  const id = problem.instance ? `Request ${problem.instance.replace("urn:request:", "")}` : "";
  showVerdict("problem", problem.title, problem.words, id);
  $("again").hidden = !problem.passing;
  $("again").onclick = again;
  clearResult();
}

export function clearResult() {
  clearPictures();
  for (const part of ["facts", "share", "unlinked", "fitted"]) $(part).hidden = true;
}

const VIEWS = { input: "Input of the model", reconstruction: "Reconstruction by the model", error: "Error map: brighter pixels have a larger error" };

function clearPictures() {
  for (const view of Object.keys(VIEWS)) {
    URL.revokeObjectURL($(`picture-${view}`).src);
    $(`picture-${view}`).removeAttribute("src");
    $(`picture-${view}`).hidden = true;
  }
  $("unkept").hidden = true;
  $("error-most").textContent = "most";
}

// Shows the three pictures, or that there are none; the verdict stands either way. `wanted` is false for an old reply.
export async function showPictures(id, signal, wanted = () => true) {
  let pictures;
  try {
    if (id !== null) pictures = await Promise.all(Object.keys(VIEWS).map((view) => api.picture(id, view, signal, $("error-scale").checked ? "image" : "threshold")));
  } catch (error) {
    if (!(error instanceof api.Problem)) throw error;
  }
  if (!wanted()) return;
  clearPictures();
  $("unkept").hidden = pictures !== undefined;
  if (!pictures) return;
  for (const [n, [view, words]] of Object.entries(VIEWS).entries()) {
    const image = $(`picture-${view}`);
    image.src = URL.createObjectURL(pictures[n].blob);
    image.alt = words;
    image.hidden = false;
  }
  $("error-most").textContent = rounded(pictures[2].limit);
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Round values from 0 to below `last`: multiples of 1, 2 or 5 and a power of ten, four to ten of them.
function ticks(last) {
  const power = 10 ** Math.floor(Math.log10(last / 4));
  const step = [5, 2, 1].map((each) => each * power).find((each) => each * 4 <= last);
  const found = [];
  for (let n = 0; n * step < last * 0.97; n += 1) found.push(Number((n * step).toPrecision(6)));
  return found;
}

// Calibration scores as bars, the threshold, and this image's score; a score far to the right is pinned to the edge.
export function drawHistogram(box, calibration, threshold, reply) {
  const { edges, counts } = calibration.histogram;
  const [width, height, top, foot] = [Math.max(box.clientWidth, 200), 176, 40, 22];
  const low = edges[0], range = edges.at(-1) - low;
  const first = Math.min(0, low - 0.06 * range), last = edges.at(-1) + 0.75 * range;
  const x = (value) => Math.min(width - 9, Math.max(9, (width * (value - first)) / (last - first)));
  const most = Math.max(...counts), base = height - foot;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const bars = element("g", { class: "bars" });
  counts.forEach((count, n) => {
    const tall = (count / most) * (base - top);
    bars.append(element("rect", { x: x(edges[n]), y: base - tall, width: Math.max(1, x(edges[n + 1]) - x(edges[n]) - 1), height: tall, rx: 1 }));
  });
  const at = x(threshold);
  svg.append(
    element("rect", { class: "beyond", x: at, y: top - 8, width: Math.max(0, width - at), height: base - top + 8 }),
    bars,
    element("line", { class: "axis", x1: 0, x2: width, y1: base, y2: base }),
    element("line", { class: "threshold", x1: at, x2: at, y1: top - 8, y2: base }),
    element("text", { class: "threshold-label", x: at + 5, y: top + 4 }, "threshold"),
    ...ticks(last).flatMap((value) => [
      element("line", { class: "axis", x1: x(value), x2: x(value), y1: base, y2: base + 4 }),
      element("text", { x: x(value), y: height - 5, "text-anchor": x(value) < 20 ? "start" : "middle" }, number(value)),
    ]),
  );
  let words = `Scores of ${calibration.n} normal images lie between ${number(low)} and ${number(edges.at(-1))}; the threshold is ${number(threshold)}.`;
  if (reply) {
    const spot = x(reply.mse), far = reply.mse > last, right = spot > width / 2;
    const mark = element("g", { class: reply.mse > threshold ? "anomalous" : "normal" });
    mark.append(
      element("line", { class: "score", x1: spot, x2: spot, y1: 22, y2: base }),
      element("circle", { class: "dot", cx: spot, cy: 22, r: 5 }),
      element("text", { class: "score-label", x: right ? spot - 10 : spot + 10, y: 17, "text-anchor": right ? "end" : "start" },
        `this image ${number(reply.mse)}${far ? " →" : ""}`),
    );
    svg.append(mark);
    words += ` This image scores ${number(reply.mse)}.`;
  }
  svg.setAttribute("aria-label", words);
  box.replaceChildren(svg);
}
