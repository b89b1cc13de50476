// Finding nodes by words in their name, operator, arguments, dtype, shape, module or source line.

class Search {
  constructor() {
    this.words = [];
    this.panes = [];
    this.found = []; // of the open view: {pane, index}, in its order
    this.current = -1;
    this.known = new Map(); // whether a node matches, by its position
  }

  set(query) {
    this.words = query.toLowerCase().split(/\s+/).filter(Boolean);
    this.known.clear();
    this.current = -1;
  }

  get active() {
    return this.words.length > 0;
  }

  matches(position) {
    if (position < 0 || !this.active) return false;
    let known = this.known.get(position);
    if (known === undefined) {
      const text = textOf(nodes[position]);
      known = this.words.every((word) => text.includes(word));
      this.known.set(position, known);
    }
    return known;
  }

  // Mark the hits in the open view.
  run(panes) {
    this.panes = panes;
    this.found = [];
    this.current = -1;
    for (const pane of panes) {
      const hits = new Set();
      pane.rows.forEach((row, index) => {
        if (this.matches(row.right) || (pane.twoSided && this.matches(row.left))) hits.add(index);
      });
      pane.mark(hits);
      for (const index of hits) this.found.push({ pane, index });
    }
  }

  // Hits in the final stage of any view.
  countIn(view) {
    if (!this.active || view.after === undefined) return 0;
    return stages[view.after].positions.reduce((sum, p) => sum + (this.matches(p) ? 1 : 0), 0);
  }

  step(by) {
    if (this.found.length === 0) return null;
    const from = this.current < 0 && by < 0 ? 0 : this.current;
    this.current = (from + by + this.found.length) % this.found.length;
    return this.found[this.current];
  }

  get summary() {
    if (!this.active) return "";
    if (this.found.length === 0) return "no hits";
    return `${this.current + 1} of ${this.found.length}`;
  }
}
