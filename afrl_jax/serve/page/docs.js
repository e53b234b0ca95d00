"use strict";

// Element by tag, properties and children; texts are texts, never markup.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// A schema with its references followed; `depth` ends what refers to itself.
function resolved(schema, all, depth = 0) {
  while (schema && schema.$ref) schema = all[schema.$ref.split("/").pop()];
  return depth > 6 ? {} : schema || {};
}

function kind(schema, all) {
  const found = resolved(schema, all);
  const any = found.anyOf || found.oneOf;
  if (any) return any.map(one => kind(one, all)).join(" or ");
  if ("const" in found) return JSON.stringify(found.const);
  if (found.enum) return found.enum.map(value => JSON.stringify(value)).join(" or ");
  if (found.type === "array") return `[${kind(found.items, all)}]`;
  return found.type === "object" ? found.title || "object" : found.type || "anything";
}

function example(schema, all, depth = 0) {
  const found = resolved(schema, all, depth);
  if ("default" in found && found.default !== null) return found.default;
  if (found.examples) return found.examples[0];
  const any = found.anyOf || found.oneOf;
  if (any) return example(any[0], all, depth + 1);
  if (found.type === "array") return [example(found.items, all, depth + 1)];
  if (found.type === "object") {
    const needed = found.required || [];
    return Object.fromEntries(needed.map(name => [name, example(found.properties[name], all, depth + 1)]));
  }
  return { string: "chess for kids", integer: 1, number: 1, boolean: false }[found.type] ?? null;
}

function fields(schema, all) {
  const any = schema.anyOf || schema.oneOf;
  if (any) return any.map(one => fields(resolved(one, all), all)).reduce((a, b) => [...a, ...b], []);
  const rows = Object.entries(schema.properties || {}).map(([name, field]) => make("tr", {},
    make("td", {}, make("code", { textContent: name })),
    make("td", { textContent: kind(field, all) + ((schema.required || []).includes(name) ? "" : ", optional") }),
    make("td", { textContent: resolved(field, all).description || field.description || "" })));
  return [make("table", {}, make("tbody", {}, ...rows))];
}

async function send(method, path, body, key, shown) {
  shown.textContent = "…";
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  try {
    const answer = await fetch(path, { method, headers, body: method === "GET" ? undefined : body });
    const text = await answer.text();
    let told = text;
    try { told = JSON.stringify(JSON.parse(text), null, 2); } catch { /* events, metrics: shown as they came */ }
    shown.textContent = `${answer.status}\n${told}`;
  } catch (error) {
    shown.textContent = String(error);
  }
}

function operation(path, method, told, all) {
  const parts = [make("p", { className: "description", textContent: told.description || "" })];
  const schema = told.requestBody && resolved(told.requestBody.content["application/json"].schema, all);
  const body = make("textarea", { rows: 6, spellcheck: false, ariaLabel: `body of ${path}` });
  if (schema) {
    body.value = JSON.stringify(example(schema, all), null, 2);
    parts.push(make("h3", { textContent: "Body" }), ...fields(schema, all), body);
  }
  const answers = Object.entries(told.responses).map(([status, answer]) => make("tr", {},
    make("td", {}, make("code", { textContent: status })), make("td", { textContent: answer.description })));
  const shown = make("pre", { ariaLive: "polite", hidden: true });
  const key = make("input", { type: "password", placeholder: "API key, where one is asked for", ariaLabel: "API key" });
  const button = make("button", { type: "button", textContent: "Send" });
  button.addEventListener("click", () => {
    shown.hidden = false;
    send(method.toUpperCase(), path, body.value, key.value, shown);
  });
  if (told.security) parts.push(key);
  parts.push(make("div", { className: "actions" }, button), shown);
  parts.push(make("h3", { textContent: "Answers" }), make("table", {}, make("tbody", {}, ...answers)));
  return make("details", {}, make("summary", {},
    make("span", { className: "method", textContent: method.toUpperCase() }),
    make("span", { className: "path", textContent: path }), " ",
    make("span", { className: "summary", textContent: told.summary || "" })), ...parts);
}

async function main() {
  const main = document.getElementById("operations");
  const status = document.getElementById("status");
  try {
    const told = await (await fetch("/openapi.json")).json();
    const all = (told.components || {}).schemas || {};
    document.querySelector("h1").textContent = told.info.title;
    for (const [path, methods] of Object.entries(told.paths))
      for (const [method, one] of Object.entries(methods)) main.append(operation(path, method, one, all));
    status.remove();
  } catch (error) {
    status.textContent = `It cannot be read: ${error}`;
    status.className = "error";
  }
}

main();
