"use strict";
// Commands to copy, sorting, searching and the keyboard. The page is complete without script: what
// needs it is hidden or made here.
(() => {
  // --- commands to copy ---
  const quoted = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
  const folder = () => {
    const path = decodeURIComponent(new URL(".", location.href).pathname).replace(/(.)\/$/, "$1");
    return path.replace(/^\/(?=[A-Za-z]:)/, ""); // of a drive
  };
  const choose = (code) => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  const copy = async (code, words) => {
    try {
      await navigator.clipboard.writeText(words);
      return "Copied";
    } catch { // no permission, or a browser that has no clipboard for files
      const shown = code.textContent;
      code.textContent = words;
      choose(code);
      let done = false;
      try { done = document.execCommand("copy"); } catch { /* refused as well */ }
      if (!done) return "Chosen; press Ctrl+C";
      code.textContent = shown;
      return "Copied";
    }
  };
  for (const code of document.querySelectorAll("code.command")) {
    if (code.dataset.here && location.protocol === "file:") {
      code.textContent = `${code.dataset.here} ${quoted(folder())}`;
      code.parentElement.querySelector(".where")?.remove();
    }
    const words = code.dataset.command ?? code.textContent;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-label", `Copy: ${words}`);
    const told = document.createElement("span");
    told.className = "told";
    told.setAttribute("role", "status");
    button.addEventListener("click", async () => {
      told.textContent = await copy(code, words);
    });
    code.after(button, told);
  }

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
  const matches = (row, terms) => {
    const { channel, names } = row.dataset;
    return terms.every((t) => channel.startsWith(t.replace(/^#/, "")) || names.toLowerCase().includes(t));
  };
  // A number's own channel stands above those that begin with it; the order comes back after.
  let order = null;
  const put = (sorted) => {
    table.tBodies[0].append(...sorted);
    if (details) details.append(...sorted.map((r) => sectionOf(r.dataset.channel)).filter(Boolean));
  };
  const exactFirst = (terms) => {
    if (order) put(order);
    order = null;
    const number = terms.length === 1 && terms[0].replace(/^#/, "");
    const exact = rows.find((r) => r.dataset.channel === number);
    if (!exact) return;
    order = [...table.tBodies[0].rows];
    put([exact, ...order.filter((r) => r !== exact)]);
  };
  const toList = () => {
    const { top, bottom } = table.parentElement.getBoundingClientRect(); // which may scroll itself
    const edge = tools.getBoundingClientRect().bottom;
    if (bottom < edge + 24 || top > innerHeight) heading.scrollIntoView();
  };
  const filter = () => {
    // "Channel 7" and "#7" are as good as "7".
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const terms = words.filter((t) => !/^(#|channels?)$/.test(t));
    const found = new Set(rows.filter((r) => matches(r, terms)).map((r) => r.dataset.channel));
    for (const row of document.querySelectorAll("tr[data-channel]")) {
      row.hidden = !found.has(row.dataset.channel);
    }
    for (const row of rows) {
      const section = sectionOf(row.dataset.channel);
      if (section) section.hidden = row.hidden;
    }
    exactFirst(terms);
    count.textContent = terms.length && !found.size
      ? "No channel matches; Esc clears"
      : terms.length ? `${found.size} of ${rows.length}`
      : `${rows.length} channel${rows.length === 1 ? "" : "s"}`;
  };
  const clear = () => {
    search.value = "";
    filter();
  };

  // --- sort ---
  const figureOf = (cell) => (cell.dataset.value === "" ? NaN : Number(cell.dataset.value));
  const compare = (a, b, sign) => {
    if (!("value" in a.dataset)) {
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
    if (owner !== table) return body.append(...sorted);
    order = null; // the new one counts from now on
    put(sorted);
  };
  for (const head of document.querySelectorAll("table.sortable thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(head, head.cellIndex));
    head.append(button);
  }

  // --- from channel to channel ---
  const open = () => {
    const channel = /^#channel-(\d+)$/.exec(location.hash)?.[1];
    if (channel === undefined) return;
    const row = rows.find((r) => r.dataset.channel === channel);
    if (row?.hidden) clear();
    const target = sectionOf(channel) ?? row; // one that is only listed has no section
    if (!target) return;
    const folded = target.querySelector("details.whole-channel");
    if (folded) folded.open = true;
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
    target.scrollIntoView();
  };
  const here = (shown) => {
    const focused = shown.findIndex((s) => s.contains(document.activeElement));
    if (focused >= 0) {
      const box = shown[focused].getBoundingClientRect();
      if (box.bottom > 0 && box.top < innerHeight) return focused;
    }
    const edge = tools.getBoundingClientRect().bottom + 24;
    return shown.findLastIndex((s) => s.getBoundingClientRect().top <= edge);
  };
  const go = (section) => {
    if (location.hash === `#${section.id}`) open(); // no change of the address tells of it
    else location.replace(`#${section.id}`);
  };
  const step = (by) => {
    const shown = sections();
    const next = shown[Math.max(0, Math.min(shown.length - 1, here(shown) + by))];
    if (next) go(next);
  };
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));

  // --- keyboard ---
  const escape = () => {
    if (search.value) return clear();
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
    heading.scrollIntoView();
  };
  const keys = {
    "/": () => search.focus(),
    j: () => step(1),
    k: () => step(-1),
    ArrowRight: () => step(1),
    ArrowLeft: () => step(-1),
    Escape: escape,
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || large.open) return;
    const arrow = event.key.startsWith("Arrow");
    if (arrow && event.shiftKey) return; // it selects text
    if (event.target === search) {
      if (event.key === "Enter" && sections().length) go(sections()[0]);
      if (event.key !== "Escape") return;
    } else if (arrow && event.target.closest(".scroll, input")) {
      return; // they scroll a wide table, or choose
    }
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  // --- a picture, larger ---
  const large = document.createElement("dialog");
  large.className = "large";
  document.body.append(large);
  const enlarge = (frame) => {
    const close = document.createElement("button");
    close.type = "button";
    close.textContent = "Close";
    const words = document.createElement("p");
    words.append(close, frame.title);
    words.className = frame.closest("[class^=k]")?.className ?? "";
    large.replaceChildren(frame.cloneNode(true), words);
    large.firstChild.removeAttribute("tabindex");
    large.showModal();
  };
  large.addEventListener("click", () => large.close());
  for (const frame of details?.querySelectorAll(".frame") ?? []) {
    frame.tabIndex = 0;
    frame.setAttribute("role", "button");
  }
  details?.classList.add("zooms");
  details?.addEventListener("click", (event) => {
    const frame = event.target.closest(".frame");
    if (frame) enlarge(frame);
  });
  details?.addEventListener("keydown", (event) => {
    const frame = event.target.closest(".frame");
    if (!frame || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    enlarge(frame);
  });

  // --- print: nothing folded but what only says the same once more, or in more detail ---
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open], .aside)")];
    for (const part of folded) part.open = true;
  });
  addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
  });

  search.addEventListener("input", () => {
    filter();
    toList();
  });
  addEventListener("hashchange", open);
  for (const part of tools.querySelectorAll(".scripted")) part.hidden = false;
  filter();
  open();
})();
