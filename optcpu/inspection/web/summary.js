// The first thing on the page: what was captured, and what the passes did.

function summaryOf() {
  const { summary } = data;
  const sections = [
    el("h2", {}, data.title),
    el("p", { class: "lead" }, data.headline, ...finalLink(summary.final)),
    ...summary.notes.map((note) => el("p", { class: "note" }, note)),
    figures(summary.figures),
  ];
  if (summary.breaks.length > 0) {
    sections.push(section("Graph breaks", summary.breaks.map(breakOf), "breaks"));
  }
  if (summary.fallbacks.length > 0) {
    sections.push(section("Fallbacks", summary.fallbacks.map(fallbackOf), "fallbacks"));
  }
  if (summary.passes.length > 0) sections.push(section("Passes", [passTable(summary)], "passes"));
  const small = [
    summary.casts.length > 0 ? section("Casts left", [countTable(summary.casts)], "casts") : null,
    summary.fused.length > 0
      ? section("Fused operators", [countTable(summary.fused)], "fused")
      : null,
    summary.wide.length > 0 ? section("Stays in FP32", summary.wide.map(wideOf), "wide") : null,
    summary.layouts.length > 0
      ? section("Weight layouts", summary.layouts.map(chipsOf), "layouts")
      : null,
  ];
  sections.push(el("div", { class: "columns" }, ...small));
  return el("article", { class: "summary" }, ...sections);
}

function finalLink(id) {
  return id === null ? [] : [" ", el("a", { href: `#${id}` }, "Read the final graphs"), "."];
}

function section(title, content, kind) {
  return el("section", { class: kind }, el("h3", {}, title), ...content);
}

function figures(list) {
  const cards = list.map(([number, text, state]) =>
    el("div", { class: `figure ${state}` }, span("number", number), span("of", text)),
  );
  return el("div", { class: "figures" }, ...cards);
}

function passTable(summary) {
  const head = ["pass", ...summary.kinds, "numerics", "casts", "other nodes"];
  const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((text, column) =>
    el("th", { scope: "col", class: isNumber(column, summary) ? "number" : "" }, text)))));
  const body = el("tbody");
  for (const pass of summary.passes) {
    body.append(
      el(
        "tr",
        { class: pass.total === 0 && pass.errors.length === 0 ? "idle" : "" },
        el("th", { scope: "row" }, pass.name),
        ...summary.kinds.map((kind) => el("td", { class: "number" }, fired(pass.fired[kind]))),
        el("td", {}, span(pass.numerics ? "rounds" : "exact", pass.numerics ? "rounds" : "exact")),
        el("td", { class: "number" }, pass.casts === 0 ? "" : signed(pass.casts)),
        el("td", { class: "changes" }, ...pass.errors.map((error) => span("error", error)),
          ...pass.changes.map(([name, change]) =>
            span(change < 0 ? "gone" : "come", `${signed(change)} ${name}`))),
      ),
    );
  }
  table.append(body);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Passes" }, table);
}

function isNumber(column, summary) {
  return (column >= 1 && column <= summary.kinds.length) || column === summary.kinds.length + 2;
}

function fired(entry) {
  if (entry === undefined) return "";
  const [times, id] = entry;
  return id === null ? String(times) : el("a", { href: `#${id}` }, times.toLocaleString("en"));
}

function signed(number) {
  return `${number < 0 ? "\u2212" : "+"}${Math.abs(number).toLocaleString("en")}`;
}

function countTable(rows) {
  const body = rows.map(([graph, what, number]) =>
    el("tr", {}, el("th", { scope: "row" }, what), el("td", {}, graph),
      el("td", { class: "number" }, number.toLocaleString("en"))));
  return el("table", {}, el("tbody", {}, ...body));
}

function wideOf([reason, operators]) {
  return chipsOf([reason, operators.map(([name, number]) => `${number} ${name}`)]);
}

function chipsOf([reason, texts]) {
  const chips = texts.map((text) => span("chip", text));
  return el("div", {}, el("p", {}, reason), el("p", { class: "chips" }, ...chips));
}

function breakOf(found) {
  return el(
    "div",
    { class: "trouble" },
    el("p", { class: "reason" }, found.reason),
    placeOf(found.source),
    found.explanation === "" ? null : el("p", {}, found.explanation),
    found.remedies.length === 0
      ? null
      : el("ul", {}, ...found.remedies.map((remedy) => el("li", {}, remedy))),
  );
}

function placeOf(source) {
  if (source === null) return null;
  const { file, line, code } = source;
  return el("p", { class: "place" }, span("file", `${file}:${line}`), " ", el("code", {}, code));
}

function fallbackOf({ part, reason, remedy, when }) {
  return el("div", { class: "trouble" }, el("p", { class: "reason" }, `${part}${when}`),
    el("p", {}, reason), el("p", {}, `Remedy: ${remedy}`));
}
