"use strict";

const $ = (id) => document.getElementById(id);
const MARKS = { met: "✓ met", violated: "✗ violated", unknown: "? unknown" };
let info = null;

// A candidate is a line; where empty lines part them, a title, then text and "name: value" lines.
function parseCandidates(pasted) {
  const text = pasted.replace(/\r\n?/g, "\n").trim();
  if (!/\n[ \t]*\n/.test(text)) return text.split("\n").map((line) => line.trim()).filter(Boolean).map((title) => ({ title }));
  return text.split(/\n(?:[ \t]*\n)+/).map((block) => {
    const [title, ...rest] = block.split("\n").map((line) => line.trim()).filter(Boolean);
    const document = { title }, words = [];
    for (const line of rest) {
      const field = /^(\w[\w -]{0,30}): +(\S.*)$/.exec(line);
      if (field && !["title", "text"].includes(field[1])) document[field[1]] = field[2];
      else words.push(line);
    }
    if (words.length) document.text = words.join(" ");
    return document;
  });
}

async function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  if (response.status === 401) $("key-field").hidden = false;
  const problem = await response.json().catch(() => ({}));
  throw Object.assign(new Error(problem.message || `the service answered ${response.status}`), { status: response.status });
}

function tell(message, isError = false) {
  $("status").textContent = message;
  $("status").classList.toggle("error", isError);
}

const place = (label) => info.labels.indexOf(label) / Math.max(1, info.labels.length - 1);
const percent = (share) => `${Math.round(100 * share)} %`;

async function readInfo() {
  try {
    info = await (await ask("/info")).json();
  } catch (problem) {
    if (problem.status === 503) return setTimeout(readInfo, 1000);
    $("model").textContent = problem.status === 401 ? "An API key is needed" : problem.message;
    return;
  }
  const version = info.model_version ? ` · version ${info.model_version.slice(0, 12)}` : "";
  const calibrated = info.calibrated ? "calibrated" : "not calibrated";
  $("model").textContent = `${info.model}${version} · ${info.parameters.toLocaleString("en")} parameters · ${calibrated}`;
  $("legend").textContent = info.labels.map((label, i) => [label, info.meanings[i]].filter(Boolean).join(" ")).join(" · ");
}

function showResult(result, position, query, document) {
  const item = $("result").content.cloneNode(true).querySelector("li");
  const find = (selector) => item.querySelector(selector);
  const { title, text, ...fields } = document;
  const moved = result.index - position;
  find(".grade").textContent = result.grade;
  find(".grade").style.setProperty("--place", place(result.grade));
  find(".title").textContent = title;
  find(".rest").textContent = [text, ...Object.entries(fields).map(([name, value]) => `${name}: ${value}`)].filter(Boolean).join(" · ");
  find(".score").textContent = result.relevance_score.toFixed(3);
  const arrow = moved > 0 ? `↑ ${moved}` : moved < 0 ? `↓ ${-moved}` : "=";
  find(".move").textContent = `was ${result.index + 1} ${arrow}`;
  const shares = Object.entries(result.grade_probs);
  find(".bar").setAttribute("aria-label", shares.map(([label, share]) => `grade ${label}: ${percent(share)}`).join(", "));
  find(".bar").title = shares.map(([label, share]) => `${label}: ${percent(share)}`).join("   ");
  for (const [label, share] of shares) {
    const part = find(".bar").appendChild(window.document.createElement("span"));
    part.style.setProperty("--share", share);
    part.style.setProperty("--place", place(label));
  }
  const row = find(".row");
  row.addEventListener("click", () => toggle(item, query, document));
  row.addEventListener("keydown", (pressed) => {
    const neighbour = { ArrowDown: item.nextElementSibling, ArrowUp: item.previousElementSibling }[pressed.key];
    if (neighbour) { pressed.preventDefault(); neighbour.querySelector(".row").focus(); }
  });
  $("results").append(item);
}

function toggle(item, query, document) {
  const row = item.querySelector(".row"), panel = item.querySelector(".explanation");
  const open = panel.hidden;
  panel.hidden = !open;
  row.setAttribute("aria-expanded", open);
  if (open && !panel.dataset.state) explain(panel, query, document);
}

// Server-sent events of a POST, which EventSource cannot send.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    for (let end; (end = buffer.indexOf("\n\n")) >= 0; buffer = buffer.slice(end + 2)) {
      const lines = Object.fromEntries(buffer.slice(0, end).split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
      yield [lines.event, JSON.parse(lines.data)];
    }
  }
}

async function explain(panel, query, document) {
  const state = panel.querySelector(".state"), written = panel.querySelector(".written");
  panel.dataset.state = "writing";
  state.classList.remove("error");
  state.textContent = "The model is writing";
  written.textContent = "";
  try {
    const response = await ask("/v1/relevance", { query, document, explain: true });
    for await (const [name, data] of events(response)) {
      if (name === "grade") written.textContent = data.grade;
      if (name === "text") written.textContent += data.text;
      if (name === "explanation" && data) showExplanation(panel, data);
      if (name === "error") throw new Error(data.message);
      if (name === "done") finish(panel, data.truncated);
    }
    if (panel.dataset.state === "writing") throw new Error("the stream ended early");
  } catch (problem) {
    delete panel.dataset.state; // asked again at the next click
    state.classList.add("error");
    state.textContent = problem.message;
  }
}

function finish(panel, truncated) {
  const structured = !panel.querySelector("table").hidden;
  panel.dataset.state = "done";
  panel.querySelector(".state").textContent = structured ? "Explanation" : truncated ? "Cut off at the limit of tokens" : "Not in the form that can be checked, shown as written";
}

function showExplanation(panel, { constraints, rule, verdict, consistent }) {
  const body = panel.querySelector("tbody");
  for (const { need, fact, verdict } of constraints) {
    const row = body.insertRow();
    row.insertCell().textContent = need;
    row.insertCell().textContent = fact;
    const cell = row.insertCell();
    cell.textContent = MARKS[verdict];
    cell.className = verdict;
  }
  panel.querySelector(".rule").textContent = `Decided by rule ${rule.number}${rule.text ? `: ${rule.text}` : ", which is none of the rulebook"}`;
  if (!consistent) panel.querySelector(".warning").textContent = `Verdict ${verdict} by rule ${rule.number} does not go with the grade: do not trust this explanation.`;
  for (const part of panel.querySelectorAll("table, .rule")) part.hidden = false;
  panel.querySelector(".written").hidden = true;
}

$("ask").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  const query = $("query").value.trim(), documents = parseCandidates($("candidates").value);
  if (!query || !documents.length) return tell("A query and at least one candidate are needed", true);
  $("rank").disabled = true;
  tell("Ranking");
  try {
    if (!info) await readInfo();
    const start = performance.now();
    const answer = await (await ask("/v1/rerank", { query, documents, return_documents: false })).json();
    $("empty").hidden = true;
    $("results").replaceChildren();
    answer.results.forEach((result, position) => showResult(result, position, query, documents[result.index]));
    tell(`${answer.results.length} candidates in ${Math.round(performance.now() - start)} ms`);
  } catch (problem) {
    tell(problem.message, true);
  } finally {
    $("rank").disabled = false;
  }
});

$("example").addEventListener("click", async () => {
  const example = await (await fetch("/page/example.json")).json();
  $("query").value = example.query;
  $("candidates").value = example.candidates.join("\n\n");
  $("query").focus();
  tell("The example is one of a world of short videos; models trained elsewhere grade it as they can");
});

document.addEventListener("keydown", (pressed) => {
  if (pressed.key === "Enter" && (pressed.ctrlKey || pressed.metaKey)) $("ask").requestSubmit();
});

readInfo();
