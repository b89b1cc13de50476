// The graphs: unpacking what the page carries, and questions about it.

const data = JSON.parse(document.getElementById("data").textContent);

const nodes = data.nodes.map(([name, operator, args, type, source, module, label, inputs]) => ({
  name,
  operator: data.operators[operator],
  args,
  type: data.types[type][0],
  device: data.types[type][1],
  source: source < 0 ? null : data.sources[source],
  sourceIndex: source,
  module: data.modules[module],
  label,
  inputs,
  text: null,
}));

const stages = data.stages.map((positions) => ({ positions, names: null, users: null }));
const views = new Map(data.views.map((view) => [view.id, view]));

// Position of each node of a stage by its name.
function namesOf(stage) {
  stage.names ??= new Map(stage.positions.map((position) => [nodes[position].name, position]));
  return stage.names;
}

// Names of the nodes that read each node of a stage.
function usersOf(stage) {
  if (stage.users === null) {
    stage.users = new Map(stage.positions.map((position) => [nodes[position].name, []]));
    for (const position of stage.positions) {
      for (const input of nodes[position].inputs) stage.users.get(input)?.push(nodes[position].name);
    }
  }
  return stage.users;
}

// What a search looks at, in lower case.
function textOf(node) {
  if (node.text === null) {
    const source = node.source ? `${node.source.file}:${node.source.line} ${node.source.code}` : "";
    const parts = [node.name, `${node.operator}(${node.args})`, node.type, node.label, node.module];
    node.text = [...parts, source].join("\n").toLowerCase();
  }
  return node.text;
}

// The lines of a view. A line has a node on its left side, on its right side, or on both; views of
// a single stage have them on the right only.
function rowsOf(view) {
  if (view.kind === "one") return stages[view.after].positions.map(unchanged);
  const before = stages[view.before];
  const after = stages[view.after];
  const rows = [];
  let i = 0;
  let j = 0;
  for (let k = 0; k < view.runs.length; k += 3) {
    const [both, gone, come] = view.runs.slice(k, k + 3);
    for (let n = 0; n < both; n++) {
      const [left, right] = [before.positions[i++], after.positions[j++]];
      rows.push(left === right ? unchanged(right) : { left, right, change: "changed" });
    }
    for (let n = 0; n < Math.max(gone, come); n++) {
      const left = n < gone ? before.positions[i++] : -1;
      const right = n < come ? after.positions[j++] : -1;
      rows.push({ left, right, change: "replaced" });
    }
  }
  return rows;
}

function unchanged(position) {
  return { left: position, right: position, change: "same" };
}

// How one side of a line differs from the other: same, changed, gone, come, moved or empty.
function sideOf(row, side, view) {
  const position = row[side];
  if (position < 0) return "empty";
  if (row.change !== "replaced") return row.change;
  const other = stages[side === "left" ? view.after : view.before];
  if (namesOf(other).has(nodes[position].name)) return "moved";
  return side === "left" ? "gone" : "come";
}
