// The page's frame: where one is, the list of channels, the split that is looked at.
import { addressOf, ask, attempt, drop, el, listSplits, mark, name, pictureOf, placeOf, several, state, tell, tone } from "/common.js";
import { showBench } from "/bench.js";
import { showChannel } from "/channel.js";
import { showPicture } from "/picture.js";

const byId = (id) => document.getElementById(id);
const views = { channel: showChannel, bench: showBench, picture: showPicture };
let shown = null; // the split whose channels are listed
let thumbsOf = null; // and the one whose pictures stand there, or are asked for

// --- where one is ---

const go = (address) => {
  if (location.hash === address) arrive();
  else location.hash = address;
};

async function arrive() {
  state.turn += 1;
  const { turn } = state;
  let place = placeOf(location.hash);
  tell("");
  byId("view").removeAttribute("aria-busy");
  if (place.split !== shown && !(await attempt(() => listChannels(place.split)))) {
    if (place.split === "run" || turn !== state.turn) return;
    // What went wrong is told; the run's own split is shown.
    history.replaceState(null, "", addressOf(place.view, { ...place, split: "run" }));
    place = placeOf(location.hash);
    if (!(await attempt(() => listChannels("run")))) return;
  }
  if (turn !== state.turn) return;
  await show(place);
  // What one looks at comes first.
  const { split } = state;
  if (thumbsOf === split) return;
  thumbsOf = split;
  const thumbs = await attempt(() => ask("thumbs", { split }));
  if (!thumbs || thumbsOf !== split) return;
  addThumbs(thumbs);
  if (turn === state.turn && place.view === "picture" && !place.picture) show(place); // examples
}

function show(place) {
  const first = state.channels.length ? state.channels[0].channel : null;
  const channel = place.channel ?? (place.view === "picture" ? null : first);
  const list = byId("channels");
  for (const item of list.children) {
    const own = item.firstChild;
    if (Number(own.dataset.channel) === channel) {
      own.setAttribute("aria-current", "true");
      scrollTo(list, item);
    } else own.removeAttribute("aria-current");
    const view = place.view === "picture" && !place.picture ? "channel" : place.view;
    own.href = addressOf(view, { channel: own.dataset.channel, picture: view === "picture" ? place.picture : null });
  }
  const kept = { picture: place.picture };
  for (const view of Object.keys(views)) {
    const tab = byId(`tab-${view}`);
    tab.setAttribute("aria-selected", String(view === place.view));
    tab.href = addressOf(view, view === "picture" ? { ...kept, picture: place.picture ?? state.lastPicture ?? null } : { channel: channel ?? state.lastChannel ?? first });
  }
  if (channel !== null) state.lastChannel = channel;
  if (place.picture) state.lastPicture = place.picture;
  byId("split").value = state.split;
  return views[place.view](byId("view"), { ...place, channel });
}

/** Bring an item of a list into its sight, and leave the page where it is. */
function scrollTo(list, item) {
  const [box, own] = [list, item].map((one) => one.getBoundingClientRect());
  list.scrollLeft += Math.min(0, own.left - box.left) + Math.max(0, own.right - box.right);
  list.scrollTop += Math.min(0, own.top - box.top) + Math.max(0, own.bottom - box.bottom);
}

// --- the list of channels ---

async function listChannels(split) {
  const channels = await ask("channels", { split });
  state.channels = channels;
  state.split = split;
  shown = split;
  listSplits();
  byId("channels").replaceChildren(...channels.map(entry));
  filter();
  thumbsOf = null;
  return true;
}

function entry({ channel, concepts, byHand }) {
  const rows = concepts.slice(0, 4).map((concept) =>
    el("span", { className: `chip ${tone(concept.k)}` },
      el("span", { className: "thumb", data: { k: concept.k } }), mark(concept), " ", name(concept.name)));
  if (concepts.length > 4) rows.push(el("span", { className: "soft" }, `and ${concepts.length - 4} more`));
  return el("li", {}, el("a", { data: { channel }, href: addressOf("channel", { channel }) },
    el("b", {}, `Channel ${channel}`), byHand ? el("small", {}, " by hand") : null, rows));
}

function addThumbs(thumbs) {
  for (const item of byId("channels").children) {
    const own = thumbs[item.firstChild.dataset.channel] ?? [];
    for (const place of item.querySelectorAll(".thumb")) {
      const picture = own[Number(place.dataset.k)];
      if (picture) place.replaceChildren(pictureOf(picture, 96, ""));
    }
  }
}

function filter() {
  const terms = byId("search").value.toLowerCase().split(/\s+/).filter((t) => t && !/^(#|channels?)$/.test(t));
  const matches = ({ channel, concepts }) => {
    const names = concepts.map((c) => c.name.toLowerCase()).join("\n");
    return terms.every((t) => String(channel).startsWith(t.replace(/^#/, "")) || names.includes(t));
  };
  let n = 0;
  state.channels.forEach((channel, place) => {
    const fits = matches(channel);
    byId("channels").children[place].hidden = !fits;
    n += fits;
  });
  const number = terms.length === 1 && /^#?\d{1,9}$/.test(terms[0]) ? Number(terms[0].replace("#", "")) : null;
  const other = number !== null && number < state.run.nChannels && state.run.parts && !state.channels.some((c) => c.channel === number);
  byId("none").hidden = n > 0 && !other;
  byId("none").replaceChildren(...(other
    ? [`Channel ${number} is not divided. `, el("a", { href: addressOf("bench", { channel: number }) }, "Part it by hand")]
    : [state.channels.length ? "No channel matches." : `No channel is divided. A channel's number, entered above, leads to its ${several()}.`]));
}

// --- pictures from outside ---

async function take(file) {
  if (!file) return;
  tell("");
  const dropped = await attempt(() => drop(file));
  if (dropped) go(addressOf("picture", { picture: dropped.picture }));
}

function listenForPictures() {
  const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0;
  const curtain = (open) => {
    depth = open ? depth : 0;
    byId("curtain").hidden = !open;
  };
  addEventListener("dragenter", (event) => isFile(event) && ((depth += 1), curtain(true)));
  addEventListener("dragleave", (event) => isFile(event) && (depth -= 1) <= 0 && curtain(false));
  addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault();
    curtain(false);
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const file = event.clipboardData?.files[0];
    if (file) take(file);
  });
  byId("file").addEventListener("change", () => {
    take(byId("file").files[0]);
    byId("file").value = "";
  });
}

// --- begin ---

async function begin() {
  const run = await attempt(() => ask("overview"));
  if (!run) return;
  state.run = run;
  byId("title").textContent = run.title;
  document.title = `${run.title} · unbraid explore`;
  byId("about").replaceChildren("Layer ", el("code", {}, name(run.layer)), `, ${run.nChannels.toLocaleString("en")} channels`);
  byId("missing").hidden = !run.missing.length;
  byId("missing").firstElementChild.replaceChildren(...run.missing.map((words) => el("li", {}, name(words))));
  byId("search").addEventListener("input", filter);
  byId("split").addEventListener("change", () => {
    const place = placeOf(location.hash);
    go(addressOf(place.view, { ...place, split: byId("split").value }));
  });
  addEventListener("hashchange", arrive);
  listenForPictures();
  arrive();
}

begin();
