"use strict";
// Draws the page from its embedded data. Document text only ever becomes text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

function element(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

const heat = (share) => `rgba(var(--heat), ${share > 0 ? 0.12 + 0.78 * share : 0})`;

// Appends tokens to a node, tinted by their share of the largest value.
function appendTinted(node, tokens, values) {
  const most = Math.max(...values, 1e-30);
  tokens.forEach((token, i) => {
    if (values[i] > 0) {
      const mark = element("mark", token);
      mark.style.background = heat(values[i] / most);
      mark.title = values[i].toPrecision(4);
      node.append(mark);
    } else node.append(document.createTextNode(token));
  });
}

function drawFacts() {
  for (const [name, value] of data.facts) {
    const row = element("div");
    row.append(element("dt", name), element("dd", value));
    find("facts").append(row);
  }
}

function drawLanguages() {
  const head = element("tr");
  head.append(element("th", "Language"));
  for (const name of ["Layer", "Feature", "AUROC", "Fires", "Fires elsewhere, at most"])
    head.append(element("th", name, "number"));
  head.append(element("th", "Strongest contexts"));
  const body = element("tbody");
  for (const row of data.languages) {
    const tr = element("tr");
    tr.append(element("td", row.language));
    for (const value of [row.layer, row.feature, row.auroc.toFixed(3), percent(row.rate),
                         `${percent(row.other_rate)} (${row.other})`])
      tr.append(element("td", value, "number"));
    const contexts = element("td");
    for (const context of row.contexts) {
      const span = element("span", undefined, "context");
      appendTinted(span, context.tokens, context.values);
      contexts.append(span);
    }
    tr.append(contexts);
    body.append(tr);
  }
  const thead = element("thead");
  thead.append(head);
  find("languages").append(thead, body);
}

// A table of anything: {title, note, head: [name, …], rows: [[cell, …], …]}; a cell is text, a number, or
// {text, share}, which gets a bar of that share of its width. Columns are aligned by their first cell.
function drawSummary({title, note, head, rows}) {
  const section = find("summary");
  section.querySelector("h2").textContent = title;
  section.querySelector("p").textContent = note;
  const kind = (i) => (rows.length && typeof rows[0][i] !== "string" ? "number" : undefined);
  const thead = element("thead"), body = element("tbody"), names = element("tr");
  head.forEach((name, i) => names.append(element("th", name, kind(i))));
  thead.append(names);
  for (const row of rows) {
    const tr = element("tr");
    row.forEach((cell, i) => {
      const td = element("td", cell.text ?? cell, kind(i));
      if (cell.share > 0)
        td.style.background = `linear-gradient(to left, ${heat(0.4)} ${100 * cell.share}%, transparent 0)`;
      tr.append(td);
    });
    body.append(tr);
  }
  section.querySelector("table").append(thead, body);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function option(value, label) {
  const node = element("option", label);
  node.value = value;
  return node;
}

// A row is {feature, cells: [[token index, value], …]}; spread makes it one value per token.
function spread(row, length) {
  const values = new Array(length).fill(0);
  for (const [token, value] of row.cells) values[token] = value;
  return values;
}

function drawHeatmap() {
  const text = data.texts[find("text").value];
  const rows = text.layers[find("layer").value].rows;
  const length = text.tokens.length;
  const head = element("tr");
  head.append(element("th", "feature"));
  for (const token of text.tokens) {
    const th = element("th");
    th.append(element("span", token));
    head.append(th);
  }
  const thead = element("thead"), body = element("tbody");
  thead.append(head);
  for (const row of rows) body.append(heatmapRow(text, row, spread(row, length)));
  find("heatmap").replaceChildren(thead, body);
  find("detail").textContent = "";
  if (rows.length) choose(body.firstChild, text, spread(rows[0], length));
}

function heatmapRow(text, row, values) {
  const most = Math.max(...values, 1e-30);
  const tr = element("tr"), th = element("th"), button = element("button", row.feature);
  button.type = "button";
  button.addEventListener("click", () => choose(tr, text, values));
  th.append(button);
  tr.append(th);
  values.forEach((value, i) => {
    const td = element("td");
    if (value > 0) td.style.background = heat(value / most);
    td.addEventListener("mouseenter", () => {
      find("detail").textContent = `feature ${row.feature} at token ${i} “${text.tokens[i]}”: ${value.toPrecision(4)}`;
    });
    tr.append(td);
  });
  return tr;
}

function choose(tr, text, values) {
  for (const other of tr.parentNode.children) other.classList.toggle("chosen", other === tr);
  find("reading").replaceChildren();
  appendTinted(find("reading"), text.tokens, values);
}

drawFacts();
if (data.summary) drawSummary(data.summary);
else find("summary").remove();
if (data.languages) drawLanguages();
else find("by-language").remove();
if (data.rows) find("rows").textContent = data.rows;
data.texts.forEach((text, i) => find("text").append(option(i, text.label)));
data.texts[0].layers.forEach((layer, i) => find("layer").append(option(i, layer.layer)));
find("layer").value = data.layer;
find("text").addEventListener("change", drawHeatmap);
find("layer").addEventListener("change", drawHeatmap);
drawHeatmap();
