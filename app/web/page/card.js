// A model's card, as the service renders it, inside the page.

import * as api from "./api.js";

const box = document.getElementById("card");
let addresses = []; // of the pictures that are shown
let newest = null;

function replace(...content) {
  box.replaceChildren(...content);
  for (const address of addresses) URL.revokeObjectURL(address);
  addresses = [];
}

// Of cards asked for one after the other only the last is shown; a picture that does not come leaves the rest.
export async function showCard(model) {
  const own = (newest = Symbol(model));
  if (model !== box.dataset.model) replace(); // another model's card must not stand under this one's name
  box.dataset.model = model;
  try {
    const page = new DOMParser().parseFromString(await api.card(model), "text/html");
    if (own !== newest) return;
    const pictures = [...page.querySelectorAll("main img")].map((image) => [image, image.getAttribute("src")]);
    for (const [image] of pictures) image.removeAttribute("src");
    replace(...page.querySelector("main").childNodes);
    await Promise.allSettled(pictures.map(async ([image, source]) => {
      const blob = await api.blob(`models/${source}`);
      if (own === newest) addresses.push((image.src = URL.createObjectURL(blob)));
    }));
  } catch (error) {
    if (own === newest) replace(`${error.title ?? "The card cannot be shown."} ${error.words ?? ""}`);
  }
}
