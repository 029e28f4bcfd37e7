// One picture: which concept channels it uses and where, and what becomes of the logits without.
import { addressOf, ask, attempt, el, fetched, letter, mark, name, one, pictureOf, state, tell } from "/common.js";

const MOST = 2; // of a gate
let gates = {}; // by concept channel, of this page alone
let of = ""; // the picture and split that they are for
let latest = 0;

export async function showPicture(view, { picture, channel }) {
  if (!picture) {
    invite(view);
    return;
  }
  const key = `${state.split} ${picture}`;
  if (key !== of) gates = {};
  of = key;
  const [here, found] = await fetched(view, () => ask("explain", { split: state.split, picture, channel }));
  if (!here) return;
  if (!found) {
    invite(view);
    return;
  }
  const { ofClass } = found.logits;
  const head = ofClass ? "Logits" : "Target";
  const chart = el("div", { className: "logits", role: "group", "aria-label": head });
  const reset = el("button", { type: "button", className: "plain", onclick: () => {
    gates = {};
    for (const input of view.querySelectorAll(".gate input")) setGate(input, 1);
    moved();
  } }, "All gates back to 1");
  const moved = () => {
    reset.disabled = !Object.keys(gates).length;
    move(chart, picture);
  };
  reset.disabled = !Object.keys(gates).length;
  const rows = found.rows.map((row) => conceptRow(row, moved));
  view.replaceChildren(
    el("div", { className: "seen" },
      el("figure", {}, el("span", { className: "frame plainly" }, pictureOf(found.picture, 480, found.name)), el("figcaption", {}, name(found.name))),
      el("div", { className: "said" },
        el("h2", {}, head),
        el("p", { className: "hint" }, `○ before, ● with the gates below.${ofClass ? " The first choice is bold." : ""}`),
        chart)),
    el("div", { className: "bar" },
      el("div", { className: "choice", role: "group", "aria-label": "Which concept channels" },
        el("a", { href: addressOf("picture", { picture }), "aria-current": channel === null ? "true" : null }, "Strongest"),
        channel === null ? el("span", { className: "soft" }, "or a channel of the list")
          : el("a", { href: addressOf("picture", { picture, channel }), "aria-current": "true" }, `Channel ${channel}`)),
      reset, anotherButton()),
    el("ul", { className: "concepts" }, rows),
    el("p", { className: "hint below" },
      `Share: part of all positive relevance in the layer for the ${ofClass ? "first choice" : "target"}. ${state.run.ofPlaces ? "" : "Percentile: part of the run's images that excite the channel less. "}A gate multiplies a concept channel: 0 switches it off, 1 leaves it.`),
  );
  draw(chart, found.logits);
  if (Object.keys(gates).length) move(chart, picture);
}

function invite(view) {
  const thumbs = [...document.querySelectorAll("#channels .thumb img")];
  const pictures = thumbs.map((image) => image.getAttribute("src").split("/").slice(4).join("/"));
  const examples = [...new Set(pictures)].slice(0, 8);
  view.replaceChildren(
    el("div", { className: "invite" },
      el("h2", {}, "Which concept channels does a picture use?"),
      el("p", {}, state.run.explains ? "Drop a picture anywhere on this page, paste one, or choose a file. It stays on this machine." : "No picture can be explained; why stands at the top of the page."),
      state.run.explains ? anotherButton("Choose a file") : ""),
    state.run.explains && examples.length
      ? el("div", {}, el("p", { className: "hint" }, "Or take one of the run's own:"),
        el("ol", { className: "shots" }, examples.map((picture) => el("li", { className: "other" },
          el("a", { className: "frame", href: addressOf("picture", { picture }), title: "Look at this picture" }, pictureOf(picture, 192, `${one()} of the run`))))))
      : "",
  );
}

const anotherButton = (words = "Another picture") =>
  el("button", { type: "button", className: "plain", onclick: () => document.getElementById("file").click() }, words);

// --- concept channels ---

function conceptRow(row, moved) {
  const words = `${row.gate}, ${row.name}`;
  const input = el("input", { type: "range", min: 0, max: MOST, step: 0.05, value: gates[row.gate] ?? 1, "aria-label": `Gate of ${words}`, data: { gate: row.gate } });
  const output = el("output", {}, Number(input.value).toFixed(2));
  input.addEventListener("input", () => {
    setGate(input, Number(input.value));
    moved();
  });
  const back = el("button", { type: "button", className: "plain", title: "Back to 1", "aria-label": `Gate of ${words} back to 1`, onclick: () => {
    setGate(input, 1);
    moved();
  } }, "1");
  return el("li", { className: row.k === null ? "other" : `k${row.k % 8}` },
    where(row.map, `Where ${words} answers`, row.gate),
    where(row.whole.map, `Where the whole channel ${row.whole.name} answers`, "whole channel"),
    el("div", { className: "what" },
      el("p", {}, row.k === null ? "" : mark({ k: row.k, letter: letter(row.k) }), " ", el("b", {}, row.gate), " ", name(row.name)),
      el("table", {}, el("thead", {}, el("tr", {}, el("td", {}), ["response", "percentile", "share"].map((w) => el("th", { scope: "col" }, w)))),
        el("tbody", {}, line("concept", row.figures), line("whole", row.whole.figures)))),
    el("div", { className: "gate" }, el("span", { className: "soft" }, "gate"), input, output, back));
}

const line = (head, own) => el("tr", {}, el("th", { scope: "row" }, head), [own.response, own.percentile, own.share].map((f) => el("td", {}, f)));

function where(map, words, below) {
  return el("figure", { className: "where" },
    map ? el("img", { src: map, alt: words }) : el("span", { className: "gone" }, "no map"),
    el("figcaption", {}, below));
}

function setGate(input, value) {
  input.value = value;
  input.parentElement.querySelector("output").textContent = value.toFixed(2);
  if (value === 1) delete gates[input.dataset.gate];
  else gates[input.dataset.gate] = value;
}

// --- logits ---

let busy = false;

/** Ask for logits; while an answer is on its way, only the newest question waits. */
async function move(chart, picture) {
  latest += 1;
  if (busy) return;
  busy = true;
  try {
    for (let asked = -1; asked !== latest;) {
      asked = latest;
      const found = await attempt(() => ask("gate", { split: state.split, picture, gates }));
      if (found) tell("");
      if (found && chart.isConnected) draw(chart, found);
    }
  } finally {
    busy = false;
  }
}

function draw(chart, { classes, predicted, low, high }) {
  const span = high - low || 1;
  const place = (value) => `${(100 * (value - low)) / span}%`;
  const dot = (kind, value) => {
    const made = el("i", { className: kind });
    made.style.insetInlineStart = place(value);
    return made;
  };
  chart.replaceChildren(...classes.map((one, n) => {
    const between = el("i", { className: "between" });
    between.style.insetInlineStart = place(Math.min(one.before, one.now));
    between.style.width = `${(100 * Math.abs(one.now - one.before)) / span}%`;
    const same = one.words[0] === one.words[1];
    return el("div", { className: n === predicted ? "chosen" : "", data: { logit: String(one.now) } },
      name(one.name),
      el("span", { className: "track", "aria-hidden": "true" }, between, dot("before", one.before), dot("now", one.now)),
      el("span", { className: "numbers" }, same ? one.words[0] : `${one.words[0]} → ${one.words[1]}`));
  }));
}
