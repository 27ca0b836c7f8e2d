// A pad to draw on: white strokes on black, with mouse, finger or pen.

const BRUSH = 1 / 12.5; // of the side: about a tenth of a digit's height, as in MNIST

export class Pad {
  constructor(canvas, changed) {
    this.canvas = canvas;
    this.changed = changed;
    this.strokes = [];
    this.pen = null;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) canvas.addEventListener(end, (event) => this.#up(event));
    this.#redraw();
  }

  get empty() {
    return this.strokes.length === 0;
  }

  undo() {
    this.draw(this.strokes.slice(0, -1));
  }

  clear() {
    this.draw([]);
  }

  draw(strokes) {
    this.strokes = strokes;
    this.pen = null; // a finger that is still down draws nothing more
    this.#redraw();
    this.changed();
  }

  png() {
    // At once: `toBlob` waits until the browser is idle, a second or several where the machine is busy.
    const bytes = atob(this.canvas.toDataURL("image/png").split(",")[1]);
    return new Blob([Uint8Array.from(bytes, (byte) => byte.charCodeAt(0))], { type: "image/png" });
  }

  #at(event) {
    const box = this.canvas.getBoundingClientRect();
    const factor = this.canvas.width / box.width;
    return [(event.clientX - box.left) * factor, (event.clientY - box.top) * factor];
  }

  #down(event) {
    if (event.button !== 0 || this.pen !== null) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.pen = event.pointerId;
    this.strokes.push([this.#at(event)]);
    this.#redraw();
    this.changed();
  }

  #move(event) {
    if (event.pointerId !== this.pen) return;
    const steps = event.getCoalescedEvents?.() ?? [];
    this.strokes.at(-1).push(...(steps.length ? steps : [event]).map((step) => this.#at(step)));
    this.#redraw();
    this.changed();
  }

  #up(event) {
    if (event.pointerId !== this.pen) return; // a second finger, or the palm of the hand
    this.pen = null;
    this.changed();
  }

  #redraw() {
    const context = this.canvas.getContext("2d");
    const { width, height } = this.canvas;
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    Object.assign(context, { strokeStyle: "#fff", lineWidth: width * BRUSH, lineCap: "round", lineJoin: "round" });
    for (const [first, ...others] of this.strokes) {
      context.beginPath();
      context.moveTo(...first);
      // A line without length has no caps in every browser; one of a thousandth of a pixel is a dot in all.
      for (const point of others.length ? others : [[first[0] + 0.001, first[1]]]) context.lineTo(...point);
      context.stroke();
    }
  }
}
