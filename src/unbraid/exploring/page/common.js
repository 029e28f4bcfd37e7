// What all views share. Whatever comes from the run is put on the page as text, never as markup.

/** Make an element: properties, attributes with a dash or "role", listeners "on...", children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(made.dataset, value);
    else if (name.includes("-") || name === "role" || name === "for") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** A name from the run, kept in its own writing direction. */
export const name = (text) => el("bdi", {}, text);
export const tone = (k) => (k === null || k < 0 ? "other" : `k${k % 8}`);
/** A to Z, AA, AB. */
export const letter = (k) => (k < 26 ? "" : letter(Math.floor(k / 26) - 1)) + String.fromCharCode(65 + (k % 26));
export const mark = (concept) => el("span", { className: `mark ${tone(concept.k)}` }, concept.letter);

/** What the page knows; where it is stands in the address, so that it can be gone back to. */
export const state = { run: null, channels: [], split: "run", turn: 0 };

/** What the run's lists are of: whole images, or places in them. */
export const one = () => (state.run.ofPlaces ? "place" : "image");
export const several = () => `${one()}s`;

/** Show that a view is being fetched; true afterwards unless one has gone elsewhere meanwhile. */
export async function fetched(view, work) {
  const turn = state.turn;
  view.setAttribute("aria-busy", "true");
  const found = await attempt(work);
  if (turn !== state.turn) return [false, undefined];
  view.removeAttribute("aria-busy");
  return [true, found];
}

let wrong = null;
export function tell(sentence) {
  wrong ??= document.getElementById("wrong");
  wrong.textContent = sentence;
  wrong.hidden = !sentence;
}

async function answer(response) {
  let content = null;
  try {
    content = await response.json();
  } catch {
    throw new Error("The answer cannot be read; start `unbraid explore` again.");
  }
  if (!response.ok) throw new Error(content.error);
  return content;
}

async function send(address, options) {
  let response;
  try {
    response = await fetch(address, { method: "POST", headers: { "x-unbraid": "1" }, ...options });
  } catch {
    throw new Error("unbraid explore does not answer; start it again and reload this page.");
  }
  return answer(response);
}

export const ask = (what, question = {}) => send(`/ask/${what}`, { body: JSON.stringify(question) });
export const drop = (file) => send(`/drop?name=${encodeURIComponent(file.name)}`, { body: file });

/** Do something that may fail; say in a sentence what failed. */
export async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    tell(error.message);
    return undefined;
  }
}

export const pictureAddress = (picture, side) => `/picture/${state.run.version}/${side}/${picture}`;

/** A picture of the run or a dropped one; where it cannot be shown, its words stand there. */
export function pictureOf(picture, side, words) {
  const image = el("img", { alt: words, loading: "lazy", draggable: false });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 48 && side > 96));
  image.addEventListener("error", () => image.replaceWith(el("span", { className: "gone" }, name(words || "not readable"))));
  image.src = pictureAddress(picture, side);
  return image;
}

/** Where to go for a view of a channel or picture. */
export function addressOf(view, { channel = null, picture = null, split = state.split } = {}) {
  const parts = new URLSearchParams();
  if (channel !== null) parts.set("channel", channel);
  if (picture !== null) parts.set("picture", picture);
  if (split !== "run") parts.set("split", split);
  return `#${view}${parts.size ? `?${parts}` : ""}`;
}

export function placeOf(hash) {
  const [view, query] = hash.replace(/^#/, "").split("?");
  const parts = new URLSearchParams(query);
  const channel = parts.get("channel");
  return {
    view: ["channel", "bench", "picture"].includes(view) ? view : "channel",
    channel: channel !== null && /^\d{1,9}$/.test(channel) ? Number(channel) : null,
    picture: parts.get("picture"),
    split: parts.get("split") ?? "run",
  };
}

/** Figures in a row: what, how much, a note. */
export const figures = (list) =>
  el("dl", { className: "figures" }, list.map((f) => el("div", {},
    el("dt", {}, f.what), el("dd", {}, el("b", {}, f.figure), " ", el("small", {}, f.note)))));

/** Rows of reference images of a channel and its concepts; a click looks at one. */
export function referenceRows(view) {
  const row = (head, shots, tally) => el("div", { className: "row" }, el("h3", {}, head), tally, strip(shots, view.concepts));
  return [
    row("The whole channel", view.shots, null),
    ...view.concepts.map((concept) =>
      row([mark(concept), " ", name(concept.name)], concept.shots, concept.figures && figures(concept.figures))),
  ];
}

function strip(shots, concepts) {
  if (!shots.length) return el("p", { className: "hint" }, `No ${several()} to show.`);
  return el("ol", { className: "shots" }, shots.map((shot) => {
    const of = shot.k >= 0 ? concepts[shot.k] : null;
    const words = `${shot.label || one()}, response${state.run.ofPlaces ? "" : " summed over positions"} ${shot.response}`;
    return el("li", { className: tone(shot.k) }, el("figure", {},
      el("a", { className: "frame", href: addressOf("picture", { picture: shot.picture }), title: state.run.ofPlaces ? "Look at the whole picture" : "Look at this picture" },
        pictureOf(shot.picture, 192, shot.label)),
      el("figcaption", { title: words }, of ? mark(of) : null, " ", name(shot.label))));
  }));
}

/** The splits to choose from: that of the run, one just made, those that were saved. */
export function listSplits() {
  const { run } = state;
  const chooser = document.getElementById("split");
  const known = [];
  if (run.hasSplit || state.split === "run") known.push(["run", run.hasSplit ? "of the run" : "none yet"]);
  if (state.split.startsWith("hand:")) known.push([state.split, "by hand, not saved"]);
  for (const saved of run.saved) known.push([`saved:${saved}`, saved]);
  if (!known.some(([id]) => id === state.split)) known.push([state.split, state.split.replace(/^saved:/, "")]);
  chooser.replaceChildren(...known.map(([id, words]) => el("option", { value: id }, words)));
  chooser.value = state.split;
}
