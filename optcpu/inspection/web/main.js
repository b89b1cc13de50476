// The open view, the list of views, and the keyboard.

const content = document.getElementById("content");
const navigation = document.getElementById("stages");
const query = document.getElementById("query");
const hits = document.getElementById("hits");
const help = document.getElementById("help");
const search = new Search();
const details = new Details(document.getElementById("details"), { onJump: jump });
const links = new Map(); // of the navigation, by the view's id
const order = ["summary", ...data.views.map((view) => view.id)];

let panes = [];
let selected = null; // {pane, cell}

function open() {
  const started = performance.now();
  const id = decodeURIComponent(location.hash.slice(1)) || "summary";
  const view = views.get(id);
  details.hide();
  selected = null;
  panes = [];
  content.replaceChildren(...(view ? pageOf(view) : [summaryOf()]));
  content.scrollTop = 0;
  window.scrollTo(0, 0);
  showCurrent(view ? id : "summary");
  find();
  content.querySelector(".cell[data-node]")?.setAttribute("tabindex", "0");
  performance.measure("open", { start: started, end: performance.now(), detail: id });
}

function pageOf(view) {
  if (view.kind === "code") return [headerOf(view), el("pre", { class: "output" }, view.code)];
  const shown = view.kind === "pair" ? [view.left, view.right] : [view];
  panes = shown.map((part) => new Pane(part, part.title));
  if (panes.length === 2) [panes[0].twin, panes[1].twin] = [panes[1], panes[0]];
  const columns = panes.length === 2 ? "panes double" : "panes";
  return [headerOf(view), titlesOf(view), el("div", { class: columns }, ...panes.map((p) => p.element))];
}

// What stands on which side, where there are two.
function titlesOf(view) {
  if (view.kind === "one") return "";
  const [before, after] = view.stages ?? [];
  const titles =
    view.kind === "diff" ? [`before: ${before}`, `after: ${after}`] : panes.map((pane) => pane.title);
  return el("div", { class: "titles double" }, ...titles.map((title) => el("h3", {}, title)));
}

function headerOf(view) {
  const unchangedGraph = view.kind === "diff" && !panes[0].rows.some((row) => row.change !== "same");
  const remarks = [...view.remarks, ...(unchangedGraph ? ["changed nothing"] : [])];
  const buttons =
    view.kind === "code"
      ? []
      : [
          button("Open all", "open-all", () => panes.forEach((pane) => pane.toggleAll(true))),
          button("Close all", "close-all", () => panes.forEach((pane) => pane.toggleAll(false))),
        ];
  if (view.kind === "diff" && !unchangedGraph) {
    buttons.unshift(
      button("Previous change", "previous-change", () => stepChange(-1)),
      button("Next change", "next-change", () => stepChange(1)),
    );
  }
  return el(
    "header",
    { class: "view" },
    el("h2", {}, view.title),
    el("p", {}, ...remarks.map((remark) => span("remark", remark)),
      view.error ? span("remark error", view.error) : null),
    el("div", { class: "buttons" }, ...buttons),
  );
}

function button(text, id, action) {
  return el("button", { type: "button", id, onclick: action }, text);
}

function buildNavigation() {
  const outer = el("ul", {}, entryOf("summary", "Summary", null));
  let [list, region, heading] = [outer, null, null];
  for (const view of data.views) {
    if (view.region !== region) {
      [list, region, heading] = [el("ul"), view.region, null];
      outer.append(el("li", {}, el("details", {}, el("summary", {}, region), list)));
    }
    if (view.section !== heading) {
      heading = view.section;
      list.append(el("li", { class: "graph" }, heading));
    }
    list.append(entryOf(view.id, view.entry, view));
  }
  navigation.append(outer);
}

// Mark the open view, in an open region.
function showCurrent(id) {
  for (const [name, link] of links) {
    if (name === id) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  links.get(id).closest("details")?.setAttribute("open", "");
  links.get(id).scrollIntoView({ block: "nearest" });
}

function entryOf(id, text, view) {
  const link = el(
    "a",
    { href: `#${id}`, class: view?.idle ? "idle" : view?.error ? "failed" : "" },
    span("entry", text),
    view?.fired !== undefined && view?.fired !== null ? span("fired", String(view.fired)) : null,
    span("nav-hits", ""),
  );
  links.set(id, link);
  return el("li", {}, link);
}

// Search

function find() {
  const started = performance.now();
  search.run(panes);
  hits.textContent = panes.length > 0 ? search.summary : "";
  for (const view of data.views) {
    const counted = view.kind === "pair" ? [view.left, view.right] : [view];
    const number = counted.reduce((sum, part) => sum + search.countIn(part), 0);
    links.get(view.id).querySelector(".nav-hits").textContent = number === 0 ? "" : String(number);
  }
  performance.measure("search", { start: started, end: performance.now() });
}

function stepHit(by) {
  const hit = search.step(by);
  hits.textContent = panes.length > 0 ? search.summary : "";
  document.querySelector(".line.current")?.classList.remove("current");
  if (hit === null) return;
  const line = hit.pane.reveal(hit.index);
  line.classList.add("current");
  line.scrollIntoView({ block: "center" });
}

function stepChange(by) {
  const changed = panes.flatMap((pane) => pane.changedLines().map((index) => ({ pane, index })));
  if (changed.length === 0) return;
  const here = document.querySelector(".at-change");
  const at = changed.findIndex(({ pane, index }) => here !== null && pane.lines.get(index) === here);
  const first = by > 0 ? 0 : changed.length - 1;
  const next = changed[at < 0 ? first : (at + by + changed.length) % changed.length];
  here?.classList.remove("at-change");
  const line = next.pane.reveal(next.index);
  line.classList.add("at-change");
  line.scrollIntoView({ block: "center" });
  line.querySelector("[data-node]").focus({ preventScroll: true });
}

// Selecting nodes

function jump(pane, name, side) {
  const index = pane.lineOf(side, name);
  if (index < 0) return;
  pane.reveal(index);
  const cell = pane.cells.get(`${side} ${name}`);
  cell.scrollIntoView({ block: "center" });
  cell.focus({ preventScroll: true });
  select(cell);
}

function paneAt(element) {
  return panes.find((pane) => pane.element.contains(element)) ?? null;
}

function select(cell) {
  const pane = paneAt(cell);
  if (pane === null) return;
  selected = { pane, cell };
  document.querySelector(".cell.selected")?.classList.remove("selected");
  cell.classList.add("selected");
  connect(panes, pane, cell);
  details.show(pane, Number(cell.dataset.node), cell.dataset.side);
  // The details open over the lower part of the window.
  cell.closest(".line").scrollIntoView({ block: "nearest" });
}

function unselect() {
  document.querySelector(".cell.selected")?.classList.remove("selected");
  selected = null;
  details.hide();
  disconnect(panes);
}

function moveFocus(by) {
  const cells = [...content.querySelectorAll(".cell[data-node], .block-button, .fold")].filter(
    (element) => element.offsetParent !== null,
  );
  const at = cells.indexOf(document.activeElement);
  const here = cells[at];
  const sameSide = (element) =>
    !here?.dataset.side || !element.dataset.side || element.dataset.side === here.dataset.side;
  for (let k = at < 0 ? 0 : at + by; k >= 0 && k < cells.length; k += by) {
    if (!sameSide(cells[k])) continue;
    cells[k].focus();
    return;
  }
}

function neighbour(by) {
  const id = decodeURIComponent(location.hash.slice(1)) || "summary";
  const next = order[order.indexOf(id) + by];
  if (next !== undefined) location.hash = next;
}

const KEYS = [
  ["/", "search", () => query.focus()],
  ["n", "next change", () => stepChange(1)],
  ["p", "previous change", () => stepChange(-1)],
  ["j", "next node (also \u2193)", () => moveFocus(1)],
  ["k", "previous node (also \u2191)", () => moveFocus(-1)],
  ["]", "next stage", () => neighbour(1)],
  ["[", "previous stage", () => neighbour(-1)],
  ["o", "open all blocks", () => panes.forEach((pane) => pane.toggleAll(true))],
  ["c", "close all blocks", () => panes.forEach((pane) => pane.toggleAll(false))],
  ["?", "this list", () => help.showModal()],
];

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target === query) {
    if (event.key === "Escape") query.blur();
    return;
  }
  const arrows = { ArrowDown: "j", ArrowUp: "k" };
  const inGraph = event.target.closest?.(".pane") !== null;
  const key = inGraph ? (arrows[event.key] ?? event.key) : event.key;
  if (event.key === "Escape") unselect();
  else if (event.key === "Enter" && event.target.matches?.(".cell[data-node]")) select(event.target);
  else {
    const known = KEYS.find(([name]) => name === key);
    if (known === undefined) return;
    known[2]();
  }
  event.preventDefault();
}

function buildHelp() {
  const rows = [
    ["Enter", "in the search: next hit; on a node: its details"],
    ["Shift+Enter", "in the search: previous hit"],
    ["Esc", "close the details"],
    ...KEYS.map(([key, text]) => [key, text]),
  ];
  const close = button("Close", "close-help", () => help.close());
  help.append(
    el("h2", { id: "help-title" }, "Keys"),
    el("table", {}, el("tbody", {}, ...rows.map(([key, text]) =>
      el("tr", {}, el("th", { scope: "row" }, el("kbd", {}, key)), el("td", {}, text))))),
    close,
  );
}

content.addEventListener("click", (event) => {
  const reference = event.target.closest("span.input");
  const cell = event.target.closest(".cell[data-node]");
  if (cell === null) return;
  if (reference !== null) jump(paneAt(cell), reference.dataset.name, cell.dataset.side);
  else select(cell);
});
content.addEventListener("mouseover", (event) => {
  const cell = event.target.closest(".cell[data-node]");
  if (cell === null) return;
  const pane = paneAt(cell);
  const reference = event.target.closest("span.input");
  if (reference !== null) reference.title = hintOf(pane, reference.dataset.name, cell.dataset.side);
  connect(panes, pane, cell);
});
content.addEventListener("mouseleave", () => {
  if (selected === null) disconnect(panes);
  else connect(panes, selected.pane, selected.cell);
});
content.addEventListener("focusin", (event) => {
  const cell = event.target.closest(".cell[data-node]");
  if (cell === null) return;
  // One node at a time is in the tab order; the keys j and k go on from there.
  content.querySelector(".cell[tabindex='0']")?.setAttribute("tabindex", "-1");
  cell.setAttribute("tabindex", "0");
  connect(panes, paneAt(cell), cell);
});
query.addEventListener("input", () => {
  search.set(query.value);
  find();
});
document.getElementById("search").addEventListener("submit", (event) => event.preventDefault());
query.addEventListener("keydown", (event) => {
  if (event.key === "Enter") stepHit(event.shiftKey ? -1 : 1);
});
document.getElementById("next-hit").addEventListener("click", () => stepHit(1));
document.getElementById("previous-hit").addEventListener("click", () => stepHit(-1));
document.getElementById("help-button").addEventListener("click", () => help.showModal());
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", open);

buildNavigation();
buildHelp();
open();
