// One channel: what excites it and each of its concept channels, and how well they keep apart.
import { addressOf, ask, el, fetched, figures, referenceRows, several, state } from "/common.js";

export async function showChannel(view, { channel }) {
  if (channel === null) {
    view.replaceChildren(el("p", { className: "empty" },
      `Nothing was divided in this run. Enter a channel's number in the search to see its ${several()} and part it by hand.`));
    return;
  }
  const [here, found] = await fetched(view, () => ask("channel", { split: state.split, channel }));
  if (!here) return;
  if (!found) {
    view.replaceChildren(state.run.parts
      ? el("p", { className: "empty" }, el("a", { href: addressOf("bench", { channel }) }, `Part channel ${channel} by hand`))
      : "");
    return;
  }
  view.replaceChildren(
    el("div", { className: "top" }, el("h2", {}, `Channel ${channel}`),
      state.run.parts ? el("a", { href: addressOf("bench", { channel }) }, "Part it by hand") : ""),
    figures(found.figures),
    found.note ? el("p", { className: "hint" }, found.note) : "",
    ...referenceRows(found),
  );
}
