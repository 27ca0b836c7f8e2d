// Many files: a few at a time, the worst first, and a CSV to take along.

import * as api from "./api.js";
import { number } from "./result.js";

const $ = (id) => document.getElementById(id);
const AT_ONCE = 4, RETRIES = 6, MOST_ROWS = 500;
const isImage = (file) => file.type.startsWith("image/");
const seconds = (time) => new Promise((resolve) => setTimeout(resolve, 1000 * time));

export class Folder {
  #rows = [];
  #sort = { by: "mse", down: true };
  #run = null;
  #painting = false;

  constructor(choice) {
    this.choice = choice; // returns { model, alpha, fit } as chosen now
    const { body } = document;
    for (const id of ["folder-files", "folder-folder"]) {
      $(id).addEventListener("change", (event) => {
        this.start([...event.target.files]);
        event.target.value = "";
      });
    }
    $("folder-stop").addEventListener("click", () => this.#run?.abort());
    $("folder-csv").addEventListener("click", () => this.#download(body));
    for (const head of document.querySelectorAll("#folder-table th[data-sort]")) {
      head.firstElementChild.addEventListener("click", () => {
        const by = head.dataset.sort;
        this.#sort = { by, down: this.#sort.by === by ? !this.#sort.down : by === "mse" || by === "verdict" };
        this.#paint();
      });
    }
  }

  async start(files) {
    this.#run?.abort();
    const run = (this.#run = new AbortController());
    const images = files.filter(isImage);
    const skipped = files.length - images.length;
    this.#rows = [];
    $("folder-run").hidden = false;
    $("folder-stop").hidden = false;
    $("folder-progress").max = Math.max(1, images.length);
    const waiting = images.entries();
    const worker = async () => {
      for (const [, file] of waiting) {
        if (run.signal.aborted) return;
        const row = await this.#score(file, run.signal);
        if (row && this.#run === run) this.#rows.push(row);
        this.#later(images.length, skipped);
      }
    };
    this.#later(images.length, skipped);
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
    if (this.#run === run) {
      this.#run = null;
      $("folder-stop").hidden = true;
      this.#status(images.length, skipped, run.signal.aborted);
      this.#paint();
    }
  }

  async #score(file, signal) {
    const name = file.webkitRelativePath || file.name;
    for (let attempt = 0; ; attempt += 1) {
      try {
        const { model, alpha, fit: mode } = this.choice();
        const { png, fit } = await api.prepare(file, mode);
        const reply = await api.score(png, { model, alpha, fit, signal });
        const notes = [reply.reason && `guard: ${reply.reason.replaceAll("_", " ")}`, reply.fitted?.inverted && "inverted"];
        return { name, verdict: reply.is_anomaly ? "anomalous" : "normal", note: notes.filter(Boolean).join(", "), ...reply };
      } catch (error) {
        if (error.name === "AbortError") return null;
        if (!(error instanceof api.Problem)) {
          console.error(error);
          return { name, verdict: "refused", note: "Something went wrong in this page", problem: "page" };
        }
        if (!error.passing || attempt === RETRIES) return { name, verdict: "refused", note: error.title, problem: error.type };
        await seconds(Math.max(error.retryAfter, 0.5));
      }
    }
  }

  #later(total, skipped) {
    if (this.#painting) return;
    this.#painting = true;
    setTimeout(() => {
      this.#painting = false;
      if (this.#run) this.#status(total, skipped, false);
      this.#paint();
    }, 150);
  }

  #status(total, skipped, stopped) {
    const count = (verdict) => this.#rows.filter((row) => row.verdict === verdict).length;
    const parts = [`${this.#rows.length} of ${total} scored`, `${count("anomalous")} anomalous`];
    if (count("refused")) parts.push(`${count("refused")} refused`);
    if (skipped) parts.push(`${skipped} skipped: no images`);
    if (stopped) parts.push("stopped");
    $("folder-status").textContent = parts.join(" · ");
    $("folder-progress").value = this.#rows.length;
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
    const shown = this.#sorted().slice(0, MOST_ROWS).map((row) => {
      const line = document.createElement("tr");
      const cell = (text, name = "") => {
        const made = line.insertCell();
        made.className = name;
        made.append(text);
        return made;
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
    });
    document.querySelector("#folder-table tbody").replaceChildren(...shown);
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

// What was dropped, folders opened.
export async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = [];
  const walk = async (entry) => {
    if (entry.isFile) files.push(await new Promise((resolve, reject) => entry.file(resolve, reject)));
    else if (entry.isDirectory) {
      const reader = entry.createReader();
      for (let batch; (batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) {
        for (const child of batch) await walk(child);
      }
    }
  };
  for (const entry of entries) await walk(entry);
  return files.length ? files : [...transfer.files];
}
