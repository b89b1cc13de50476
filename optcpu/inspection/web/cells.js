// One node as a line of code.

const MARKS = { gone: "\u2212", come: "+", changed: "~", moved: "\u2195", same: "", empty: "" };
const SPOKEN = { gone: "gone: ", come: "come: ", changed: "changed: ", moved: "moved: " };
const TOKEN = /'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[A-Za-z_]\w*=?|[^A-Za-z_'"]+|./g;

// A cell of a line. `other` is the node it is compared with, so that only what differs stands out.
function cellOf(position, change, side, other = null) {
  if (position < 0) return el("div", { class: `cell ${side} empty` });
  const node = nodes[position];
  const cell = el(
    "div",
    {
      class: `cell ${side} ${change}`,
      tabindex: "-1",
      "data-node": position,
      "data-side": side,
      "aria-label": `${SPOKEN[change] ?? ""}${statementOf(node)}`,
    },
    el("span", { class: "mark", "data-mark": MARKS[change], "aria-hidden": "true" }),
    el("code", {}, ...codeOf(node, change === "changed" ? other : null)),
  );
  return cell;
}

function statementOf(node) {
  if (node.operator === "return") return `return ${node.args}`;
  const value = node.operator === "input" ? "input" : `${node.operator}(${node.args})`;
  return `${node.name}: ${node.type} = ${value}`;
}

function codeOf(node, other) {
  const different = (kind, text, before) =>
    span(other !== null && text !== before ? `${kind} differs` : kind, text);
  if (node.operator === "return") {
    return [span("operator", "return"), " ", ...argumentsOf(node, other)];
  }
  const parts = [span("name", node.name)];
  if (node.type !== "") parts.push(": ", different("type", node.type, other?.type));
  parts.push(" = ");
  if (node.operator === "input") {
    parts.push(span("operator", "input"));
    if (node.label !== "") parts.push(span("label", node.label));
    return parts;
  }
  parts.push(different("operator", node.operator, other?.operator), "(");
  parts.push(...argumentsOf(node, other), ")");
  return parts;
}

// The arguments, with the nodes among them as links.
function argumentsOf(node, other) {
  const inputs = new Set(node.inputs);
  const before = other === null ? null : new Set(other.args.match(TOKEN) ?? []);
  return (node.args.match(TOKEN) ?? []).map((token) => {
    const differs = before !== null && /\w/.test(token) && !before.has(token);
    const kind = inputs.has(token) ? "input" : /^['"]/.test(token) ? "text" : "";
    if (kind === "" && !differs) return token;
    const element = span(`${kind}${differs ? " differs" : ""}`, token);
    if (kind === "input") element.dataset.name = token;
    return element;
  });
}

// The user's line that the nodes below it come from; only the module where the line stays the same.
function headingOf(node, above) {
  const where = [];
  if (node.source !== null && node.sourceIndex !== above?.sourceIndex) {
    const { file, line, code, library } = node.source;
    where.push(span(library ? "file library" : "file", `${file}:${line}`));
    if (code !== "") where.push(el("code", { class: "source" }, code));
  }
  if (node.module !== "") where.push(moduleOf(node.module));
  return el("div", { class: "heading" }, ...where);
}

function moduleOf(path) {
  const kind = data.classes[path];
  return el("span", { class: "module" }, path, kind ? span("class", kind) : null);
}
