// What is known about the selected node, and the lines it is connected with.

class Details {
  constructor(element, { onJump }) {
    this.element = element;
    this.onJump = onJump;
  }

  hide() {
    this.element.hidden = true;
    this.element.replaceChildren();
  }

  show(pane, position, side) {
    const node = nodes[position];
    const stage = stageOf(pane, side);
    const close = el("button", { type: "button", class: "close", "aria-label": "Close" }, "\u00d7");
    close.addEventListener("click", () => this.hide());
    const facts = [
      ["dtype, shape", node.type || "none"],
      ["device", node.device],
      ["operator", node.operator],
      ["is", node.label],
      ["source", node.source && `${node.source.file}:${node.source.line}`],
      ["", node.source?.code && el("code", { class: "source" }, node.source.code)],
      ["in", node.source?.function && `${node.source.function}()`],
      ["module", node.module === "" ? "" : moduleOf(node.module)],
    ];
    const list = el("dl");
    for (const [term, text] of facts) {
      if (text) list.append(el("dt", {}, term), el("dd", {}, text));
    }
    const reads = node.inputs.map((name) => this.link(pane, stage, name, side));
    const readBy = (usersOf(stage).get(node.name) ?? []).map((name) =>
      this.link(pane, stage, name, side),
    );
    const title = el("h2", {}, node.operator === "return" ? "return" : node.name);
    this.element.replaceChildren(
      el("div", {}, title, list, ...this.across(pane, node, side)),
      this.links("\u2193 Reads", reads, "is-input"),
      this.links("\u2191 Read by", readBy, "is-user"),
      close,
    );
    this.element.hidden = false;
  }

  links(title, entries, kind) {
    const shown = entries.length > 0 ? el("ul", {}, ...entries) : el("p", {}, "nothing");
    return el("div", { class: `links ${kind}` }, el("h3", {}, `${title} (${entries.length})`), shown);
  }

  link(pane, stage, name, side) {
    const node = nodes[namesOf(stage).get(name)];
    const button = el(
      "button",
      { type: "button" },
      span("name", name),
      span("type", node.type),
      node.label === "" ? null : span("is", node.label),
    );
    button.addEventListener("click", () => this.onJump(pane, name, side));
    return el("li", {}, button);
  }

  // In the view of forward and backward: the same tensor on the other side.
  across(pane, node, side) {
    const twin = pane.twin;
    if (!twin || node.operator === "return" || !namesOf(stageOf(twin, side)).has(node.name)) return [];
    const button = el("button", { type: "button" }, `${twin.title}: ${node.name}`);
    button.addEventListener("click", () => this.onJump(twin, node.name, side));
    return [el("div", { class: "links" }, el("h3", {}, "Also in"), el("ul", {}, el("li", {}, button)))];
  }
}

function stageOf(pane, side) {
  return stages[side === "left" ? pane.view.before : pane.view.after];
}

// What an argument is, in one line.
function hintOf(pane, name, side) {
  const node = nodes[namesOf(stageOf(pane, side)).get(name)];
  return [node.type, node.label || node.operator].filter(Boolean).join("  ");
}

// Mark what a node reads and what reads it, where that is in the document.
function connect(panes, pane, cell) {
  disconnect(panes);
  if (pane === null || cell === null) return;
  const side = cell.dataset.side;
  const node = nodes[Number(cell.dataset.node)];
  const users = usersOf(stageOf(pane, side)).get(node.name) ?? [];
  const put = (which, kind, names) => {
    for (const name of names) which.cells.get(`${side} ${name}`)?.classList.add(kind);
  };
  put(pane, "is-input", node.inputs);
  put(pane, "is-user", users);
  if (pane.twin) put(pane.twin, "is-twin", [node.name]);
  cell.classList.add("is-self");
}

function disconnect(panes) {
  for (const pane of panes) {
    for (const cell of pane.element.querySelectorAll(".is-input, .is-user, .is-self, .is-twin")) {
      cell.classList.remove("is-input", "is-user", "is-self", "is-twin");
    }
  }
}
