// A list of lines under their blocks' headings. What is folded is not in the document.

class Pane {
  constructor(view, title) {
    this.view = view;
    this.title = title;
    this.twin = null; // the pane beside it
    this.rows = rowsOf(view);
    this.twoSided = view.kind === "diff";
    this.segments = segmentsOf(this.rows, view);
    this.lines = new Map(); // of what is in the document: elements by the index of the line
    this.cells = new Map(); // and cells by side and name, as in "right relu"
    this.hits = new Set();
    this.element = el("section", { class: `pane ${this.twoSided ? "two" : "one"}-sided` });
    this.element.setAttribute("aria-label", title);
    this.parts = this.segments.map((segment) => this.part(segment));
    this.element.append(...this.parts.map((part) => part.element));
    this.openFirst();
  }

  part(segment) {
    const body = el("div", { class: "lines" });
    const part = { segment, body, open: false, filled: false, stretches: null, button: null };
    if (segment.key === "") {
      part.element = el("div", { class: "part plain" }, body);
    } else {
      part.button = this.blockButton(part);
      part.element = el("div", { class: "part block" }, el("h3", {}, part.button), body);
    }
    body.hidden = true;
    return part;
  }

  blockButton(part) {
    const { key, counts, twin } = part.segment;
    const kind = data.classes[key];
    const button = el(
      "button",
      { type: "button", class: "block-button", "aria-expanded": "false" },
      span("path", key),
      kind ? span("class", kind) : null,
      span("size", plural(counts.nodes, "node")),
      ...this.changesOf(counts),
      twin === null ? null : span("twin", `same as ${twin}`),
      span("block-hits", ""),
    );
    button.addEventListener("click", () => this.toggle(part, !part.open));
    return button;
  }

  changesOf(counts) {
    if (!this.twoSided) return [];
    if (!hasChanges(counts)) return [span("size", "unchanged")];
    return ["gone", "come", "changed", "moved"]
      .filter((change) => counts[change] > 0)
      .map((change) => span(`count ${change}`, `${MARKS[change]}${counts[change]} ${change}`));
  }

  // Plain lines, and the first block of each kind in which something happens.
  openFirst() {
    const opened = new Set();
    for (const part of this.parts) {
      const { key, counts, twin } = part.segment;
      const worthwhile = this.twoSided ? hasChanges(counts) : true;
      const family = key.replace(/\d+$/, "");
      const first = key !== INPUTS && twin === null && worthwhile && !opened.has(family);
      if (key !== "" && first) opened.add(family);
      if (key === "" || first) this.toggle(part, true);
    }
  }

  toggle(part, open) {
    if (open && !part.filled) this.fill(part);
    part.open = open;
    part.body.hidden = !open;
    part.button?.setAttribute("aria-expanded", String(open));
  }

  toggleAll(open) {
    for (const part of this.parts) if (part.button !== null) this.toggle(part, open);
  }

  fill(part) {
    part.filled = true;
    part.stretches = this.twoSided
      ? stretchesOf(part.segment.rows, this.rows)
      : [{ fold: false, rows: part.segment.rows }];
    for (const stretch of part.stretches) {
      stretch.element = stretch.fold ? this.foldButton(stretch) : this.linesOf(stretch.rows);
      part.body.append(stretch.element);
    }
  }

  foldButton(stretch) {
    const text = `Show ${plural(stretch.rows.length, "unchanged node")}`;
    const button = el("button", { type: "button", class: "fold" }, text);
    button.addEventListener("click", () => {
      this.unfold(stretch);
      this.lines.get(stretch.rows[0])?.querySelector("[data-node]")?.focus();
    });
    return button;
  }

  unfold(stretch) {
    stretch.fold = false;
    const lines = this.linesOf(stretch.rows);
    stretch.element.replaceWith(lines);
    stretch.element = lines;
  }

  linesOf(indices) {
    const list = el("div", { class: "stretch" });
    let above = null;
    for (const index of indices) {
      const row = this.rows[index];
      const node = nodes[row.right >= 0 ? row.right : row.left];
      const elsewhere = node.sourceIndex !== above?.sourceIndex || node.module !== above.module;
      const heading = elsewhere ? headingOf(node, above) : null;
      if (heading?.hasChildNodes()) list.append(heading);
      above = node;
      list.append(this.line(index));
    }
    return list;
  }

  line(index) {
    const row = this.rows[index];
    const line = el("div", { class: `line ${row.change}`, "data-line": index });
    const sides = this.twoSided ? ["left", "right"] : ["right"];
    for (const side of sides) {
      const position = row[side];
      const other = row[side === "left" ? "right" : "left"];
      const change = this.twoSided ? sideOf(row, side, this.view) : "same";
      const cell = cellOf(position, change, side, other < 0 ? null : nodes[other]);
      if (position >= 0) this.cells.set(`${side} ${nodes[position].name}`, cell);
      line.append(cell);
    }
    this.lines.set(index, line);
    if (this.hits.has(index)) line.classList.add("hit");
    return line;
  }

  // Bring a line into the document, whatever it is folded into.
  reveal(index) {
    const part = this.parts.find((candidate) => candidate.segment.rows.includes(index));
    this.toggle(part, true);
    const stretch = part.stretches.find((candidate) => candidate.rows.includes(index));
    if (stretch.fold) this.unfold(stretch);
    return this.lines.get(index);
  }

  lineOf(side, name) {
    return this.rows.findIndex((row) => row[side] >= 0 && nodes[row[side]].name === name);
  }

  changedLines() {
    const changed = [];
    this.rows.forEach((row, index) => {
      const before = index > 0 ? this.rows[index - 1].change : "same";
      if (row.change !== "same" && before === "same") changed.push(index);
    });
    return changed;
  }

  mark(hits) {
    this.hits = hits;
    for (const [index, line] of this.lines) line.classList.toggle("hit", hits.has(index));
    for (const part of this.parts) {
      if (part.button === null) continue;
      const number = part.segment.rows.filter((index) => hits.has(index)).length;
      part.button.querySelector(".block-hits").textContent =
        number === 0 ? "" : plural(number, "hit");
    }
  }
}
