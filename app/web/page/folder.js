// Many files: a few at a time, the worst first, and a CSV to take along.

import * as api from "./api.js";
import { number, percent } from "./result.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 4, RETRIES = 6, MOST_ROWS = 500, PAINT_MS = 150, NEWS_MS = 4000;
const isImage = (file) => file.type === "" || file.type.startsWith("image/"); // a name without an ending tells no type
const seconds = (time, signal) => new Promise((resolve) => {
  setTimeout(resolve, signal.aborted ? 0 : 1000 * time);
  signal.addEventListener("abort", resolve, { once: true });
});
const refused = (name, { title, type }) => ({ name, verdict: "refused", note: title, problem: type });

export class Folder {
  #rows = [];
  #sort = { by: "mse", down: true };
  #run = null; // { end, total, skipped, choice, trouble, done } of the one in progress or the last
  #keyless = null; // what to start anew when there is a key
  #painting = false;
  #told = 0;

  constructor(choice, askForKey) {
    Object.assign(this, { choice, askForKey }); // `choice` gives { model, alpha, mode } as chosen now
    const { body } = document;
    for (const id of ["folder-files", "folder-folder"]) {
      $(id).addEventListener("change", (event) => {
        this.start([...event.target.files]);
        event.target.value = "";
      });
    }
    $("folder-stop").addEventListener("click", () => this.#run?.end.abort());
    $("folder-csv").addEventListener("click", () => this.#download(body));
    for (const head of document.querySelectorAll("#folder-table th[data-sort]")) {
      head.firstElementChild.addEventListener("click", () => {
        const by = head.dataset.sort;
        this.#sort = { by, down: this.#sort.by === by ? !this.#sort.down : by === "mse" || by === "verdict" };
        this.#paint();
      });
    }
  }

  async start(files, unread = []) {
    this.#run?.end.abort();
    const images = files.filter(isImage);
    const run = (this.#run = {
      end: new AbortController(), total: images.length + unread.length, skipped: files.length - images.length, choice: null, trouble: "", done: false,
    });
    this.#keyless = null;
    this.#told = 0;
    this.#rows = unread.map((name) => refused(name, { title: "The file cannot be read", type: "unreadable-file" }));
    $("folder-run").hidden = false;
    $("folder-stop").hidden = false;
    $("folder-progress").max = Math.max(1, run.total);
    this.#later();
    try {
      run.choice = await this.choice(); // once: a table has one model and one rate
      await this.#scoreAll(images, run);
    } catch (error) {
      if (!(error instanceof api.Problem)) throw error;
      run.end.abort();
      run.trouble = error.title;
      if (this.#run === run && error.status === 401) {
        this.#keyless = [files, unread];
        this.askForKey();
      }
    }
    if (this.#run !== run) return;
    run.done = true;
    $("folder-stop").hidden = true;
    this.#status();
    this.#paint();
  }

  // Start anew what ended for want of a key.
  resume() {
    if (this.#keyless) this.start(...this.#keyless);
  }

  async #scoreAll(images, run) {
    const { signal } = run.end;
    const waiting = images.values();
    const worker = async () => {
      for (const file of waiting) {
        if (signal.aborted) return;
        const row = await this.#score(file, run.choice, signal);
        if (row && this.#run === run) this.#rows.push(row);
        this.#later();
      }
    };
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  }

  async #score(file, { model, alpha, mode, own }, signal) {
    const name = file.webkitRelativePath || file.name;
    for (let attempt = 0; ; attempt += 1) {
      try {
        const { png, fit } = await api.prepare(file, mode, own);
        const reply = await api.score(png, { model, alpha, fit, signal });
        const notes = [reply.reason && `guard: ${reply.reason.replaceAll("_", " ")}`, reply.fitted?.inverted && "inverted"];
        return { name, verdict: reply.is_anomaly ? "anomalous" : "normal", note: notes.filter(Boolean).join(", "), ...reply };
      } catch (error) {
        if (error.name === "AbortError") return null;
        if (!(error instanceof api.Problem)) {
          console.error(error);
          return refused(name, { title: "Something went wrong in this page", type: "page" });
        }
        if (error.status === 401) throw error; // so it is with all the others
        if (!error.passing || attempt === RETRIES) return refused(name, error);
        await seconds(Math.max(error.retryAfter, 0.5), signal);
      }
    }
  }

  #later() {
    if (this.#painting) return;
    this.#painting = true;
    setTimeout(() => {
      this.#painting = false;
      if (this.#run.done) return;
      this.#status();
      this.#paint();
    }, PAINT_MS);
  }

  #status() {
    const { total, skipped, choice, trouble, end, done } = this.#run;
    const count = (verdict) => this.#rows.filter((row) => row.verdict === verdict).length;
    const parts = [`${this.#rows.length} of ${total} scored`, `${count("anomalous")} anomalous`];
    if (count("refused")) parts.push(`${count("refused")} refused`);
    if (skipped) parts.push(`${skipped} skipped: no images`);
    if (end.signal.aborted) parts.push(trouble ? `stopped: ${trouble}` : "stopped");
    const scored = this.#rows.find((row) => row.alpha !== undefined);
    if (scored) parts.push(`model ${choice.model}, false-alarm rate ${percent(scored.alpha)}`);
    $("folder-status").textContent = parts.join(" · ");
    $("folder-progress").value = this.#rows.length;
    if (!done && Date.now() - this.#told < NEWS_MS) return; // who listens need not hear of every file
    this.#told = Date.now();
    $("folder-news").textContent = $("folder-status").textContent;
  }

  #sorted() {
    const { by, down } = this.#sort;
    const rank = { refused: 0, normal: 1, anomalous: 2 };
    const value = (row) => (by === "verdict" ? rank[row.verdict] : row[by]);
    return this.#rows.toSorted((a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === undefined || right === undefined) return (left === undefined) - (right === undefined);
      const order = typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
      return down ? -order : order;
    });
  }

  #paint() {
    for (const head of document.querySelectorAll("#folder-table th[data-sort]")) {
      if (head.dataset.sort === this.#sort.by) head.setAttribute("aria-sort", this.#sort.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    const body = document.querySelector("#folder-table tbody");
    const lines = this.#sorted().slice(0, MOST_ROWS).map((row) => (row.line ??= lineOf(row)));
    lines.forEach((line, n) => line === body.rows[n] || body.insertBefore(line, body.rows[n])); // one that stays keeps its focus
    while (body.rows.length > lines.length) body.lastElementChild.remove();
    $("folder-more").hidden = this.#rows.length <= MOST_ROWS;
    $("folder-more").textContent = `The first ${MOST_ROWS} of ${this.#rows.length}; the CSV has all.`;
  }

  #download() {
    const columns = ["name", "verdict", "mse", "threshold", "alpha", "p_value", "model", "version", "reason", "note", "problem", "id"];
    const field = (value) => {
      let text = String(value ?? "");
      if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`; // a spreadsheet must not run a file name
      return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = this.#sorted().map((row) => columns.map((column) => field(row[column])).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([[columns.join(","), ...lines, ""].join("\r\n")], { type: "text/csv" }));
    link.download = "scores.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
}

function lineOf(row) {
  const line = document.createElement("tr");
  const cell = (text, name = "") => {
    const made = line.insertCell();
    made.className = name;
    made.append(text);
  };
  let file = row.name;
  if (row.id) {
    file = document.createElement("a");
    file.href = `#id=${row.id}`;
    file.textContent = row.name;
  }
  cell(file);
  cell(row.verdict, row.verdict);
  cell(row.mse === undefined ? "" : number(row.mse), "number");
  cell(row.p_value === undefined ? "" : number(row.p_value), "number");
  cell(row.note ?? "", "note");
  return line;
}

// What was dropped, folders opened, and the names of what cannot be read.
export async function filesOf(transfer) {
  const plain = [...transfer.files]; // empty once this event is over
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = [], unread = [];
  const walk = async (entry) => {
    try {
      if (entry.isFile) files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
      else if (entry.isDirectory) {
        const reader = entry.createReader();
        for (let batch; (batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) {
          for (const child of batch) await walk(child);
        }
      }
    } catch {
      unread.push(entry.name);
    }
  };
  for (const entry of entries) await walk(entry);
  return entries.length ? { files, unread } : { files: plain, unread };
}
