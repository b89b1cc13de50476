// Deep models in parts: lines that belong to one repeated block of the model fold together.

const INPUTS = "inputs";
const SMALLEST_BLOCK = 8; // lines; below, a heading costs more room than it saves
const STRAY = 2; // lines without a module of their own that may stand inside a block
const CONTEXT = 3; // unchanged lines shown around a change
const SHORTEST_FOLD = 6;

const blockNames = new Map();
const parents = new Set(Object.keys(data.classes).map((path) => path.replace(/\.?[^.]*$/, "")));

// "h.3" for "h.3.attn.qkv": the outermost numbered module that has modules in it; empty for none.
function blockOf(module) {
  if (!blockNames.has(module)) {
    const parts = module.split(".");
    const outer = parts.map((_, depth) => parts.slice(0, depth + 1).join("."));
    const block = outer.find((path) => /(^|[._])\d+$/.test(path) && parents.has(path));
    blockNames.set(module, block ?? "");
  }
  return blockNames.get(module);
}

function keyOf(row) {
  const node = nodes[row.right >= 0 ? row.right : row.left];
  return node.operator === "input" ? INPUTS : blockOf(node.module);
}

// Consecutive lines of one block, as {key, rows: [indices], counts, twin}.
function segmentsOf(rows, view) {
  const runs = [];
  rows.forEach((row, index) => {
    const key = keyOf(row);
    const last = runs[runs.length - 1];
    if (last && last.key === key) last.rows.push(index);
    else runs.push({ key, rows: [index] });
  });
  const segments = joined(withoutStrays(runs));
  const first = new Map();
  for (const segment of segments) {
    segment.counts = countsOf(segment.rows.map((index) => rows[index]), view);
    segment.twin = null;
    if (segment.key === "" || segment.key === INPUTS) continue;
    const signature = segment.rows.map((index) => signatureOf(rows[index])).join("\n");
    if (first.has(signature)) segment.twin = first.get(signature);
    else first.set(signature, segment.key);
  }
  return segments;
}

// The sums of gradients between two blocks have no module: they join the block before them.
function withoutStrays(runs) {
  const kept = [];
  for (const run of runs) {
    const last = kept[kept.length - 1];
    const stray = run.key === "" && run.rows.length <= STRAY && last && isBlock(last);
    if (last && (stray || run.key === last.key)) last.rows.push(...run.rows);
    else kept.push(run);
  }
  return kept;
}

function isBlock(run) {
  return run.key !== "" && run.key !== INPUTS && run.rows.length >= SMALLEST_BLOCK;
}

// What needs no heading becomes one stretch of plain lines.
function joined(runs) {
  const segments = [];
  for (const run of runs) {
    const own = isBlock(run) || (run.key === INPUTS && run.rows.length >= SMALLEST_BLOCK);
    const last = segments[segments.length - 1];
    if (own) segments.push({ key: run.key, rows: run.rows });
    else if (last && last.key === "") last.rows.push(...run.rows);
    else segments.push({ key: "", rows: [...run.rows] });
  }
  return segments;
}

function signatureOf(row) {
  const parts = [row.change];
  for (const position of [row.left, row.right]) {
    parts.push(position < 0 ? "-" : `${nodes[position].operator} ${nodes[position].type}`);
  }
  return parts.join(" ");
}

function countsOf(rows, view) {
  const counts = { nodes: 0, same: 0, changed: 0, gone: 0, come: 0, moved: 0, empty: 0 };
  for (const row of rows) {
    if (row.right >= 0) counts.nodes += 1;
    if (row.change === "replaced") {
      counts[sideOf(row, "left", view)] += 1;
      if (sideOf(row, "right", view) === "come") counts.come += 1;
    } else {
      counts[row.change] += 1;
    }
  }
  return counts;
}

function hasChanges(counts) {
  return counts.changed + counts.gone + counts.come + counts.moved > 0;
}

// Lines in groups: {fold: true} for long unchanged stretches, which start out hidden.
function stretchesOf(indices, rows) {
  const near = new Set();
  indices.forEach((index, at) => {
    if (rows[index].change === "same") return;
    for (let k = at - CONTEXT; k <= at + CONTEXT; k++) near.add(k);
  });
  const stretches = [];
  indices.forEach((index, at) => {
    const fold = !near.has(at);
    const last = stretches[stretches.length - 1];
    if (last && last.fold === fold) last.rows.push(index);
    else stretches.push({ fold, rows: [index] });
  });
  for (const stretch of stretches) {
    if (stretch.rows.length < SHORTEST_FOLD) stretch.fold = false;
  }
  return stretches;
}
