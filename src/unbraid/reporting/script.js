"use strict";
// Sorting, searching and the keyboard. The page is complete without: what needs this is hidden.
(() => {
  const tools = document.getElementById("tools");
  if (!tools) return; // nothing was found
  const search = document.getElementById("search");
  const count = document.getElementById("count");
  const heading = document.getElementById("channels");
  const details = document.getElementById("details"); // absent without a split
  const table = document.querySelector("table.overview");
  const rows = [...table.tBodies[0].rows];
  // The bar has more lines on a narrow screen; what is scrolled to comes to lie below it.
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--bar", `${tools.offsetHeight + 12}px`);
  }).observe(tools);
  const sectionOf = (channel) => document.getElementById(`channel-${channel}`);
  const sections = () => (details ? [...details.children] : []).filter((s) => !s.hidden);

  // --- search ---
  // "Channel 7" and "#7" are as good as "7".
  const words = () => search.value.toLowerCase().replaceAll(/#|\bchannels?\b/g, " ").split(/\s+/).filter(Boolean);
  const filter = () => {
    const terms = words();
    const found = new Set(rows.map((r) => r.dataset)
      .filter(({ channel, names }) => terms.every((t) => channel.startsWith(t) || names.toLowerCase().includes(t)))
      .map(({ channel }) => channel));
    for (const row of document.querySelectorAll("tr[data-channel]")) row.hidden = !found.has(row.dataset.channel);
    for (const row of rows) sectionOf(row.dataset.channel)?.toggleAttribute("hidden", row.hidden);
    count.textContent = found.size ? `${found.size} of ${rows.length}` : "No channel matches; Esc clears";
  };
  const clear = () => {
    search.value = "";
    filter();
  };
  search.addEventListener("input", () => {
    filter();
    const { top, bottom } = table.parentElement.getBoundingClientRect(); // which may scroll itself
    if (bottom < tools.getBoundingClientRect().bottom + 24 || top > innerHeight) heading.scrollIntoView();
  });

  // --- sort ---
  const figureOf = (cell) => parseFloat(cell.textContent.replace("−", "-").match(/-?\d[\d.e+-]*/)?.[0]);
  const compare = (a, b, sign) => {
    if (!a.matches(".number, .figure")) {
      return sign * a.textContent.trim().localeCompare(b.textContent.trim(), undefined, { numeric: true });
    }
    const [x, y] = [figureOf(a), figureOf(b)];
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y); // what is not known comes last, always
    return sign * (x - y);
  };
  const sort = (head, column) => {
    const owner = head.closest("table");
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = owner.tBodies[0];
    const sorted = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], down ? -1 : 1));
    body.append(...sorted);
    if (owner === table && details) {
      details.append(...sorted.map((r) => sectionOf(r.dataset.channel)).filter(Boolean));
    }
  };
  for (const head of document.querySelectorAll("table.sortable thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, head.cellIndex));
    head.append(button);
  }

  // --- from channel to channel ---
  const show = (target) => {
    if (!target) return;
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
    target.scrollIntoView();
  };
  const open = () => {
    const channel = /^#channel-(\d+)$/.exec(location.hash)?.[1];
    const row = rows.find((r) => r.dataset.channel === channel);
    if (row?.hidden) clear();
    show(channel && (sectionOf(channel) ?? row)); // one that is only listed has no section
  };
  const go = (section) => {
    if (location.hash === `#${section.id}`) open(); // no change of the address tells of it
    else location.replace(`#${section.id}`);
  };
  const step = (by) => {
    const edge = tools.getBoundingClientRect().bottom + 24;
    const shown = sections();
    const here = shown.findLastIndex((s) => s.getBoundingClientRect().top <= edge);
    const next = shown[Math.max(0, Math.min(shown.length - 1, here + by))];
    if (next) go(next);
  };
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));

  // --- keyboard ---
  const keys = {
    "/": () => search.focus(),
    j: () => step(1),
    k: () => step(-1),
    Escape: () => (search.value ? clear() : show(heading)),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === search) {
      // A number's own channel comes before those that begin with it.
      if (event.key === "Enter" && sections().length) go(sectionOf(words().join(" ")) ?? sections()[0]);
      if (event.key !== "Escape") return;
    }
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  addEventListener("hashchange", open);
  for (const part of tools.querySelectorAll(".scripted")) part.hidden = false;
  filter();
  open();
})();
