// The service as the page uses it. Every failure is a Problem with a title and, where it helps, a hint.

const LARGEST_BODY = 2 * 1024 * 1024; // of the service's default settings; what is larger is made smaller here
const LARGEST_PIXELS = 4 * 1024 * 1024;
const SMALLER_SIDE = 700; // even of noise, at four bytes a pixel, the PNG is below the limit
const PASSING = [429, 502, 503, 504]; // too many, no answer, busy, too late: the next attempt may get through
const TINT = 24; // levels by which red, green and blue of a grey pixel may differ in a lossy file

const HINTS = { // where the service speaks to programs
  unauthorized: "Enter the key that the operator of this service gave you.",
  "body-too-large": "Choose a smaller file, or save the image anew without what else is in it.",
  "reconstruction-not-found": "Results are kept for a limited time. Draw or choose the image again.",
};

export class Problem extends Error {
  constructor({ type = "about:blank", title, detail = "", hint = "", instance = "", status = 0 }, retryAfter = 0) {
    super(title);
    type = type.replace(/^\/problems\//, "");
    Object.assign(this, { type, title, detail, hint: HINTS[type] ?? hint, instance, status, retryAfter });
  }

  get passing() {
    return this.type === "unreachable" || PASSING.includes(this.status);
  }

  get words() {
    const detail = this.detail && `${this.detail[0].toUpperCase()}${this.detail.slice(1)}.`;
    return [detail, this.hint].filter(Boolean).join(" ");
  }
}

let held = ""; // the key, where the browser keeps nothing for this page
export const key = {
  get: () => {
    try {
      return sessionStorage.getItem("api-key") ?? "";
    } catch {
      return held;
    }
  },
  set: (value) => {
    held = value;
    try {
      if (value) sessionStorage.setItem("api-key", value);
      else sessionStorage.removeItem("api-key");
    } catch {} // `held` has it
  },
};

// What the service sends, also when it breaks off in the middle.
async function received(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      type: "/problems/unreachable", title: "The service cannot be reached",
      hint: "Check that you are connected and that the service runs, then try again.",
    });
  }
}

export async function ask(path, { headers = {}, ...options } = {}) {
  const value = key.get();
  if (!/^[\x20-\x7e]*$/.test(value)) {
    throw new Problem({
      title: "This cannot be an API key", detail: "a key has only plain letters, digits and signs",
      type: "/problems/unauthorized", status: 401,
    });
  }
  const own = value ? { "X-API-Key": value } : {};
  const response = await received(fetch(path, { ...options, headers: { ...headers, ...own } }));
  if (response.ok) return response;
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  let document = { title: `The answer was an error (${response.status})`, hint: "Try again in a moment.", status: response.status };
  if (response.headers.get("content-type")?.startsWith("application/problem+json")) {
    document = await response.json().catch(() => document);
  }
  throw new Problem(document, retryAfter);
}

const json = async (path, options) => received((await ask(path, { ...options, headers: { accept: "application/json" } })).json());

export const models = async () => (await json("models")).models;
export const calibration = (model, version, signal) => json(`models/${model}/versions/${version}/calibration`, { signal });
export const kept = (id, signal) => json(`reconstruction/${id}`, { signal });
export const card = async (model) => received((await ask(`models/${model}`, { headers: { accept: "application/problem+json, text/html;q=0.9" } })).text());
export const blob = async (path, signal) => received((await ask(path, { signal })).blob());

// A picture of a score; with that of the errors comes the squared error that its brightest colour stands for.
export async function picture(id, view, signal, errorScale = "threshold") {
  const query = view === "error" ? `${view}&error_scale=${errorScale}` : view;
  const response = await ask(`reconstruction/${id}?view=${query}`, { signal });
  return { blob: await received(response.blob()), limit: Number(response.headers.get("x-error-limit")) };
}

export async function score(png, { model, alpha, fit, signal }) {
  const query = new URLSearchParams({ model, fit });
  if (alpha) query.set("alpha", alpha);
  const response = await ask(`score?${query}`, { method: "POST", body: png, headers: { "content-type": "image/png" }, signal });
  return received(response.json());
}

// A grey image in a lossy file has a faint tint, which is no colour; a real colour stays, and is refused.
function removeTint(context) {
  const pixels = context.getImageData(0, 0, context.canvas.width, context.canvas.height), { data } = pixels;
  for (let n = 0; n < data.length; n += 4) {
    const [red, green, blue] = data.subarray(n, n + 3);
    if (Math.max(red, green, blue) - Math.min(red, green, blue) > TINT) return;
    data.fill(Math.round((red + green + blue) / 3), n, n + 3);
  }
  context.putImageData(pixels, 0, 0);
}

// Any file to a PNG that the service takes: PNGs of a reasonable size go as they are, the rest is drawn anew.
export async function prepare(file, mode) {
  let head;
  try {
    head = new DataView(await file.slice(0, 24).arrayBuffer());
    // Sent from memory: a file that changes or goes away from now on changes nothing.
    if (file instanceof File && file.size <= LARGEST_BODY) file = new File([await file.arrayBuffer()], file.name, { type: file.type });
  } catch {
    throw new Problem({
      type: "/problems/unreadable-file", title: "The file cannot be read",
      hint: "It may have been moved, changed or deleted since it was chosen. Choose it again.",
    });
  }
  const isPng = head.byteLength >= 8 && head.getUint32(0) === 0x89504e47;
  const [width, height] = isPng && head.byteLength >= 24 ? [head.getUint32(16), head.getUint32(20)] : [0, 0];
  const fit = (width, height) => (mode !== "auto" ? mode : width === 28 && height === 28 ? "strict" : "mnist");
  if (isPng && file.size <= LARGEST_BODY && width * height <= LARGEST_PIXELS) return { png: file, fit: fit(width, height) };
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    if (isPng && file.size <= LARGEST_BODY) return { png: file, fit: fit(width, height) }; // the service says what is wrong with it
    throw new Problem({
      type: "/problems/not-an-image", title: "The file is not an image",
      detail: `your browser cannot read ${file.name ? `“${file.name}”` : "it"} as an image`, hint: "PNG, JPEG, WebP and GIF work.",
    });
  }
  const scale = Math.min(1, SMALLER_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const chosen = fit(bitmap.width, bitmap.height);
  bitmap.close();
  if (chosen === "strict") removeTint(context);
  return { png: await canvas.convertToBlob({ type: "image/png" }), fit: chosen };
}
