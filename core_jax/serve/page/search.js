"use strict";

const $ = (id) => document.getElementById(id);
const number = (value) => value.toFixed(3);
let examples = [];

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.message || `the service answered ${response.status}`);
  return answer;
}

function tell(message, isError = false) {
  $("status").textContent = message;
  $("status").classList.toggle("error", isError);
}

function describe(document) {
  return [document.text, ...Object.entries(document.fields).map(([name, value]) => `${name} ${value}`)].filter(Boolean).join(" · ");
}

function movement(result, rank) {
  if (result.original_rank === null) return ["new", "added"];
  const up = result.original_rank - rank;
  return up > 0 ? ["up", `▲ ${up}`] : up < 0 ? ["down", `▼ ${-up}`] : ["", ""];
}

function show(result, rank, rewritten) {
  const item = $("result").content.cloneNode(true).querySelector("li");
  const put = (selector, text) => { item.querySelector(selector).textContent = text; };
  put(".rank", rank);
  put(".title", result.title);
  put(".rest", describe(result));
  const places = [result.recall_rank && `#${result.recall_rank}`, result.rewrite_recall_rank && `rewrite #${result.rewrite_recall_rank}`];
  put(".recall", places.filter(Boolean).join(", "));
  put(".light", number(result.light) + (result.rewrite_light ? ` + ${number(result.rewrite_light)}` : ""));
  if (rewritten && result.rewrite_relevance !== null) {
    put(".fine", `${number(result.relevance)} × ${number(result.factor)} = ${number(result.score)}`);
    item.querySelector(".fine").title = `relevance to the query ${number(result.relevance)}, to the rewrite ${number(result.rewrite_relevance)}`;
  } else put(".fine", number(result.score));
  if (rewritten) {
    const [kind, words] = movement(result, rank);
    if (kind) item.querySelector(".move").classList.add(kind);
    put(".move", words);
    item.classList.toggle("added", kind === "new");
  }
  return item;
}

function chosen() {
  const example = examples[$("examples").selectedIndex - 1];
  return example && example.query === $("query").value ? example.watched : null;
}

function showWatched() {
  const watched = chosen();
  $("watched").textContent = watched ? `Watched before: ${watched.title} · ${describe(watched)}` : "";
}

async function search(event) {
  event.preventDefault();
  $("search").disabled = true;
  tell("Searching");
  showWatched();
  try {
    const body = { query: $("query").value, watched: chosen(), consume: $("consume").value };
    if ($("rewrite").value) body.rewrite = $("rewrite").value;
    const answer = await ask("/search", body);
    for (const [list, results] of [["original", answer.original], ["results", answer.results]]) {
      $(list).replaceChildren(...results.map((result, at) => show(result, at + 1, list === "results")));
    }
    tell(answer.rewrite ? `Rewrite: “${answer.rewrite}” (${answer.reason})` : `No rewrite: ${answer.reason}. Both sides are the original path.`);
    const times = Object.entries(answer.milliseconds).map(([stage, value]) => `${stage} ${value.toFixed(1)} ms`);
    $("stages").textContent = times.join(" · ");
  } catch (problem) {
    tell(problem.message, true);
  } finally {
    $("search").disabled = false;
  }
}

async function start() {
  const info = await ask("/info");
  const rewriter = info.rewriter_version ? ` · rewriter ${info.rewriter_version.slice(0, 12)}` : "";
  $("model").textContent = `${info.model} ${info.model_version.slice(0, 12)} · ${info.documents.toLocaleString("en")} documents${rewriter}`;
  examples = await ask("/examples");
  if (!examples.length) return;
  $("offer").hidden = false;
  const option = (text) => Object.assign(document.createElement("option"), { textContent: text });
  $("examples").replaceChildren(option("Choose one, or type below"), ...examples.map((e) => option(`${e.watched.title} → ${e.query}`)));
  $("examples").addEventListener("change", () => {
    const example = examples[$("examples").selectedIndex - 1];
    if (!example) return;
    $("query").value = example.query;
    $("rewrite").value = "";
    $("ask").requestSubmit();
  });
}

$("ask").addEventListener("submit", search);
start().catch((problem) => tell(problem.message, true));
