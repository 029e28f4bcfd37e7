// The bench: a channel's images, put into groups by click, drag or key; then the channel is split.
import { addressOf, ask, attempt, el, fetched, figures, letter, listSplits, mark, name, one, pictureOf, referenceRows, several, state, tell, tone } from "/common.js";

const FIRST = 36; // images of the channel to begin with
const KEYS = 9; // groups with a key of their own; more only where a channel has more concepts
let kept = null; // the bench that is in use: it stays while one looks at something else

export async function showBench(view, { channel }) {
  if (!state.run.parts) {
    view.replaceChildren(el("p", { className: "empty" }, "There is no scan of training images, so no channel can be parted by hand."));
    return;
  }
  if (channel === null) {
    view.replaceChildren(el("p", { className: "empty" }, `Enter a channel's number in the search to see its ${several()}.`));
    return;
  }
  if (kept && kept.channel === channel && kept.split === state.split) {
    view.replaceChildren(kept.root);
    return;
  }
  const [here, laid] = await fetched(view, () => ask("bench", { split: state.split, channel, n: FIRST }));
  if (!here) return;
  if (!laid) {
    view.replaceChildren();
    return;
  }
  kept = new Bench(laid);
  view.replaceChildren(kept.root);
}

class Bench {
  constructor(laid) {
    this.channel = laid.channel;
    this.split = state.split;
    this.n = FIRST;
    this.begun = laid;
    this.active = 0;
    this.root = el("div", { className: "bench" });
    this.groups = el("ol", { className: "groups", "aria-label": "Groups" });
    this.grid = el("div", { className: "grid", role: "listbox", "aria-multiselectable": "true", "aria-label": `Images of channel ${this.channel}`, "aria-orientation": "horizontal" });
    this.status = el("p", { className: "hint", role: "status" });
    this.results = el("section", { className: "results", "aria-label": "Result" });
    this.moreButton = this.button(`More ${several()}`, () => this.more(), "plain");
    this.splitButton = this.button("Split", () => this.part(), "main");
    this.root.append(
      el("div", { className: "top" }, el("h2", {}, `Channel ${this.channel}, parted by hand`),
        el("a", { href: addressOf("channel", { channel: this.channel }) }, `Its reference ${several()}`)),
      el("p", { className: "hint" }, state.run.ofPlaces ? "What lies around these places of training images excites the channel most, of one image one. Choose a group and click places, drag places to a group, or use keys: " : "These training images excite the channel most. Choose a group and click images, drag images to a group, or use keys: ",
        keys("←", "→", "↑", "↓"), " go, ", keys("1", "…", "9"), " put into a group, ", keys("0"), " takes out, ", keys("Enter"), " splits."),
      el("div", { className: "desk" }, this.groups,
        el("div", { className: "bar" }, this.button("Clear all", () => this.clear(), "plain"),
          this.button("As divided now", () => this.restore(), "plain"), this.moreButton, this.splitButton), this.status),
      this.grid, this.results);
    // Names that a person gave stay; those made of classes are made again.
    const own = (group) => (laid.byHand && !/^group \d+( \(|$)/.test(group.name) ? group.name : "");
    this.names = laid.groups.map(own);
    this.hints = laid.groups.map((g) => g.name);
    this.most = Math.max(KEYS, laid.groups.length);
    while (this.names.length < 2) {
      this.names.push("");
      this.hints.push("");
    }
    this.tiles = [];
    this.lay(laid);
    this.grid.addEventListener("keydown", (event) => this.press(event));
    this.drawGroups();
  }

  button(words, act, className) {
    return el("button", { type: "button", className, onclick: act }, words);
  }

  // --- images ---

  lay(laid) {
    const before = new Map(this.tiles.map((tile) => [tile.image.index, tile.group]));
    this.tiles = laid.images.map((image, place) => this.tile(image, before.get(image.index) ?? image.group, place));
    this.grid.replaceChildren(...this.tiles.map((tile) => tile.element));
    this.moreButton.hidden = !laid.more;
    this.focus(0, false);
  }

  tile(image, group, place) {
    const corner = el("span", { className: "mark" });
    const element = el("div", { className: "tile", role: "option", tabIndex: -1, draggable: true, data: { index: image.index } },
      el("span", { className: "frame" }, pictureOf(image.picture, 192, image.label), corner),
      el("span", { className: "caption" }, name(image.label), " ", el("span", { className: "activation" }, image.response)));
    const tile = { image, group, element, corner, place };
    element.addEventListener("click", () => {
      this.focus(place);
      this.put(tile, tile.group === this.active ? -1 : this.active);
    });
    element.addEventListener("dragstart", (event) => {
      this.dragged = tile;
      event.dataTransfer.setData("text/plain", String(image.index));
      event.dataTransfer.effectAllowed = "move";
    });
    element.addEventListener("dragend", () => { this.dragged = null; });
    this.paint(tile);
    return tile;
  }

  paint({ element, corner, group, image }) {
    element.classList.remove(...[...element.classList].filter((c) => /^(k\d|other)$/.test(c)));
    element.classList.add(tone(group));
    element.setAttribute("aria-selected", String(group >= 0));
    element.setAttribute("aria-label", `${image.label || one()} ${image.index}, ${group < 0 ? "in no group" : `in group ${letter(group)}`}`);
    corner.textContent = group < 0 ? "" : letter(group);
    corner.hidden = group < 0;
  }

  put(tile, group) {
    if (group >= this.names.length) return;
    tile.group = group;
    this.paint(tile);
    this.count();
  }

  focus(place, really = true) {
    if (!this.tiles.length) return;
    const next = Math.max(0, Math.min(this.tiles.length - 1, place));
    this.tiles[this.at ?? 0]?.element.setAttribute("tabindex", "-1");
    this.at = next;
    this.tiles[next].element.setAttribute("tabindex", "0");
    if (really) this.tiles[next].element.focus();
  }

  columns() {
    return getComputedStyle(this.grid).gridTemplateColumns.split(" ").length;
  }

  press(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns(), ArrowDown: this.columns() };
    const tile = this.tiles[this.at];
    if (event.key in steps) this.focus(this.at + steps[event.key]);
    else if (event.key === "Home") this.focus(0);
    else if (event.key === "End") this.focus(this.tiles.length - 1);
    else if (/^[1-9]$/.test(event.key)) {
      while (this.names.length < Number(event.key) && Number(event.key) <= this.names.length + 1) this.add();
      this.put(tile, Number(event.key) - 1);
    } else if (["0", "Backspace", "Delete"].includes(event.key)) this.put(tile, -1);
    else if (event.key === " ") this.put(tile, tile.group === this.active ? -1 : this.active);
    else if (event.key === "Enter") this.part();
    else return;
    event.preventDefault();
  }

  async more() {
    this.n = Math.min(2 * this.n, 400);
    const laid = await attempt(() => ask("bench", { split: this.split, channel: this.channel, n: this.n }));
    if (laid) {
      this.begun = laid;
      this.lay(laid);
      this.count();
    }
  }

  clear() {
    for (const tile of this.tiles) this.put(tile, -1);
  }

  restore() {
    const group = new Map(this.begun.images.map((image) => [image.index, image.group]));
    for (const tile of this.tiles) this.put(tile, group.get(tile.image.index) ?? -1);
  }

  // --- groups ---

  add() {
    if (this.names.length >= this.most) return;
    this.names.push("");
    this.hints.push("");
    this.active = this.names.length - 1;
    this.drawGroups();
  }

  drawGroups() {
    this.counts = [];
    const chips = this.names.map((own, k) => {
      const n = el("span", { className: "count" });
      this.counts.push(n);
      const field = el("input", { type: "text", value: own, placeholder: this.hints[k] || `group ${letter(k)}`, maxLength: 80, "aria-label": `Name of group ${letter(k)}`, spellcheck: false });
      field.addEventListener("input", () => { this.names[k] = field.value; });
      field.addEventListener("focus", () => this.choose(k));
      field.addEventListener("keydown", (event) => event.key === "Enter" && this.part());
      const chip = el("li", { className: `group ${tone(k)}`, "aria-current": k === this.active ? "true" : null },
        el("button", { type: "button", className: "pick", title: `Put ${several()} into group ${letter(k)}${k < KEYS ? ` (key ${k + 1})` : ""}`, "aria-pressed": String(k === this.active), onclick: () => this.choose(k) },
          mark({ k, letter: letter(k) }), n), field);
      for (const kind of ["dragenter", "dragover"]) {
        chip.addEventListener(kind, (event) => {
          if (!this.dragged) return;
          event.preventDefault();
          chip.classList.add("over");
        });
      }
      chip.addEventListener("dragleave", () => chip.classList.remove("over"));
      chip.addEventListener("drop", (event) => {
        chip.classList.remove("over");
        if (!this.dragged) return;
        event.preventDefault();
        this.put(this.dragged, k);
      });
      return chip;
    });
    if (this.names.length < this.most) {
      chips.push(el("li", {}, this.button("Another group", () => this.add(), "plain")));
    }
    this.groups.replaceChildren(...chips);
    this.count();
  }

  choose(k) {
    this.active = k;
    [...this.groups.children].forEach((chip, n) => {
      if (n === k) chip.setAttribute("aria-current", "true");
      else chip.removeAttribute("aria-current");
      chip.querySelector(".pick")?.setAttribute("aria-pressed", String(n === k));
    });
  }

  members() {
    return this.names.map((_, k) => this.tiles.filter((tile) => tile.group === k).map((tile) => tile.image.index));
  }

  count() {
    const groups = this.members();
    this.counts.forEach((place, k) => { place.textContent = String(groups[k].length); });
    const filled = groups.filter((group) => group.length).length;
    this.splitButton.disabled = filled < 2;
    if (!this.busy) this.status.textContent = filled < 2 ? `Put ${several()} into two groups or more.` : `${groups.flat().length} of ${this.tiles.length} ${several()} are in ${filled} groups.`;
  }

  // --- the split ---

  async part() {
    const all = this.members();
    const groups = all.map((images, k) => ({ images, name: this.names[k].trim() })).filter((group) => group.images.length);
    if (this.busy || groups.length < 2) return;
    this.busy = true;
    this.status.textContent = "Splitting …";
    tell("");
    this.splitButton.disabled = true;
    const made = await attempt(() => ask("part", { split: this.split, channel: this.channel, groups }));
    this.busy = false;
    this.count();
    if (!made) return;
    this.status.textContent = `Split in ${made.seconds.toFixed(1)} s.`;
    this.show(made);
  }

  show(made) {
    const { channel: view } = made;
    const field = el("input", { type: "text", id: "save-name", maxLength: 80, value: `channel-${this.channel}`, spellcheck: false });
    const said = el("p", { className: "hint", role: "status" });
    const save = async () => {
      tell("");
      const done = await attempt(() => ask("save", { split: made.split, name: field.value }));
      if (!done) return;
      state.run.saved = done.saved;
      listSplits();
      said.replaceChildren("Saved as ", el("code", {}, name(done.path)), ". In Python: ",
        el("code", {}, name(`unbraid.load_split(model, ${JSON.stringify(done.path)})`)), ". ",
        el("a", { href: addressOf("channel", { channel: this.channel, split: done.split }) }, "Look at it"));
    };
    field.addEventListener("keydown", (event) => event.key === "Enter" && save());
    this.results.replaceChildren(
      el("div", { className: "top" }, el("h2", {}, `Channel ${this.channel} in ${view.concepts.length} groups`), el("span", { className: "soft" }, `${made.seconds.toFixed(1)} s`)),
      figures(view.figures),
      view.note ? el("p", { className: "hint" }, view.note) : "",
      el("div", { className: "bar save" }, el("label", { for: "save-name" }, "Save as"), field, this.button("Save", save, "main"),
        el("a", { className: "plain", href: addressOf("channel", { channel: this.channel, split: made.split }) }, "Use it without saving")),
      said,
      ...referenceRows({ ...view, concepts: view.concepts }));
    this.results.scrollIntoView({ block: "nearest", behavior: "auto" });
    for (const link of this.results.querySelectorAll(".row a.frame")) {
      link.href = addressOf("picture", { picture: decodeURIComponent(link.getAttribute("href").match(/picture=([^&]+)/)[1]), split: made.split });
    }
  }
}

const keys = (...names) => names.map((one) => el("kbd", {}, one));
