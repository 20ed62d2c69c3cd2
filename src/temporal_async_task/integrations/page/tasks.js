// Shows the runs of all tasks, live. Everything that comes from a run is set as text, never as HTML.
"use strict";

const PAGE_SIZE = 25;
const REFRESH = 3000; // ms between two looks at the list, while somebody looks at it
const ENDED = new Set(["completed", "failed"]);
const $ = (id) => document.getElementById(id);

const state = { tasks: [], runs: new Map(), limit: PAGE_SIZE, chosen: null, shown: null, stream: null, turn: 0 };

// The API: all addresses are relative to the page's, so that it works under any prefix. ------------------

const taskUrl = (name) => `./${encodeURIComponent(name)}`;
const runUrl = (run, rest = "") => `${taskUrl(run.task)}/${encodeURIComponent(run.task_id)}${rest}`;

async function call(url, options = {}) {
  let answer;
  try {
    answer = await fetch(url, { credentials: "same-origin", redirect: "error", ...options });
  } catch {
    throw new Error("The web server does not answer.");
  }
  const text = await answer.text();
  let said = null;
  try {
    said = JSON.parse(text);
  } catch {
    // not of this API: a proxy's own page
  }
  if (!answer.ok) {
    const parts = (said?.errors ?? []).map((part) => `${part.pointer || part.where}: ${part.detail}`);
    throw new Error([said?.detail ?? `The web server answers ${answer.status}.`, ...parts].join("\n"));
  }
  return said;
}

const post = (url, body) =>
  call(url, { method: "POST", headers: { "Content-Type": "application/json" }, body });

// Small helpers -------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const badge = (word) => element("span", { className: `badge ${word}`, textContent: word });

function clock(time) {
  const date = new Date(time);
  const today = date.toDateString() === new Date().toDateString();
  return today ? date.toLocaleTimeString() : date.toLocaleString();
}

function span(ms) {
  if (ms < 1000) return `${Math.max(0, Math.round(ms))} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  const minutes = Math.floor(ms / 60_000);
  return minutes < 60 ? `${minutes} min ${Math.floor((ms % 60_000) / 1000)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function tell(error) {
  $("notice").textContent = error ? error.message : "";
  $("notice").hidden = !error;
}

// The list -------------------------------------------------------------------------------------------------

async function refresh() {
  const turn = ++state.turn;
  const names = $("task").value ? [$("task").value] : state.tasks.map((task) => task.name);
  const wanted = $("status").value ? `&status=${$("status").value}` : "";
  let pages;
  try {
    pages = await Promise.all(names.map((name) => call(`${taskUrl(name)}?limit=${Math.min(state.limit, 100)}${wanted}`)));
  } catch (error) {
    tell(error);
    return;
  }
  if (turn !== state.turn) return; // another choice was made meanwhile
  tell(null);
  const runs = pages.flatMap((page) => page.runs).sort((a, b) => (a.created_at < b.created_at ? 1 : -1));
  $("more").hidden = state.limit >= 100 || (runs.length <= state.limit && pages.every((page) => page.next === null));
  showList(runs.slice(0, state.limit));
}

function showList(runs) {
  const had = document.activeElement?.dataset?.run;
  $("empty").hidden = runs.length > 0;
  $("runs").replaceChildren(...runs.map((run) => {
    const key = runUrl(run);
    const live = state.shown && runUrl(state.shown) === key ? state.shown : run;
    const button = element("button", { type: "button", title: run.task_id },
      element("span", { textContent: run.task }), badge(live.status),
      element("span", { className: "id", textContent: `${clock(run.created_at)} · ${run.task_id}` }));
    button.dataset.run = key;
    button.setAttribute("aria-current", String(state.chosen !== null && runUrl(state.chosen) === key));
    button.addEventListener("click", () => choose(run));
    return element("li", {}, button);
  }));
  if (had) [...$("runs").querySelectorAll("button")].find((button) => button.dataset.run === had)?.focus();
}

// One run, live --------------------------------------------------------------------------------------------

function choose(run) {
  state.stream?.close();
  state.chosen = { task: run.task, task_id: run.task_id };
  state.shown = null;
  history.replaceState(null, "", `#${new URLSearchParams(state.chosen)}`);
  for (const button of $("runs").querySelectorAll("button")) {
    button.setAttribute("aria-current", String(button.dataset.run === runUrl(run)));
  }
  listen();
}

function listen() {
  state.stream?.close();
  const stream = state.stream = new EventSource(runUrl(state.chosen, "/events"));
  stream.addEventListener("run", (event) => {
    if (state.stream !== stream) return;
    state.shown = JSON.parse(event.data);
    tell(null);
    showRun();
  });
  stream.addEventListener("end", () => {
    stream.close();
    refresh();
  });
  stream.addEventListener("error", async () => {
    if (state.stream !== stream || stream.readyState !== EventSource.CLOSED) return; // else it comes back by itself
    try {
      state.shown = await call(runUrl(state.chosen)); // says what is wrong; or is here already, where all went well
      showRun();
    } catch (error) {
      tell(error);
    }
  });
}

function showRun() {
  const run = state.shown;
  const ended = ENDED.has(run.status);
  const failed = run.status === "failed";
  const fact = (name, value) => value === null ? null :
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }));
  const parts = [
    element("div", { className: "head" },
      element("h2", { textContent: run.task }), badge(run.status),
      element("div", { className: "buttons" },
        ended ? null : action("Cancel", "cancel"),
        failed ? action("Resume", "resume") : null)),
    element("p", { className: "run-id", textContent: run.task_id }),
    element("dl", { className: "facts" },
      fact("submitted", clock(run.created_at)),
      fact("began", run.started_at && clock(run.started_at)),
      fact("ended", run.completed_at && clock(run.completed_at)),
      fact("attempt", run.attempt > 1 ? String(run.attempt) : null),
      fact("goes on", !ended && run.next_retry_at ? clock(run.next_retry_at) : null)),
  ];
  if (run.status !== "completed" && (run.progress !== null || run.progress_message)) {
    parts.push(element("h3", { textContent: run.progress_message || "Progress" }));
    if (run.progress !== null) parts.push(element("progress", { max: 1, value: run.progress, "aria-label": "Progress" }));
  }
  parts.push(element("h3", { textContent: "Steps" }), steps(run));
  if (run.error !== null) parts.push(element("h3", { textContent: run.error_type ?? "Error" }), element("pre", { className: "error", textContent: run.error }));
  else if (!ended && run.last_error !== null) parts.push(element("h3", { textContent: "Last error" }), element("pre", { className: "error", textContent: run.last_error }));
  if (run.status === "completed") parts.push(element("h3", { textContent: "Result" }), element("pre", { textContent: JSON.stringify(run.result, null, 2) }));
  const had = document.activeElement?.dataset?.verb;
  $("run").replaceChildren(...parts);
  if (had) $("run").querySelector(`[data-verb="${had}"]`)?.focus();
  const listed = [...$("runs").querySelectorAll("button")].find((button) => button.dataset.run === runUrl(run));
  listed?.querySelector(".badge").replaceWith(badge(run.status));
}

function action(text, verb) {
  const button = element("button", { type: "button", textContent: text });
  button.dataset.verb = verb;
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      await post(runUrl(state.chosen, `/${verb}`), "{}");
      tell(null);
      if (verb === "resume") listen(); // its stream had come to its end
    } catch (error) {
      button.disabled = false;
      tell(error);
    }
    refresh();
  });
  return button;
}

function steps(run) {
  if (run.steps.length === 0) {
    const none = { pending: "It waits for a worker.", completed: "It had no steps." };
    return element("p", { className: "quiet", textContent: none[run.status] ?? "None yet." });
  }
  const times = run.steps.map((step) => Date.parse(step.started_at ?? run.started_at ?? run.created_at));
  const first = Math.min(...times);
  const until = run.completed_at ? Date.parse(run.completed_at) : Date.now();
  const whole = Math.max(until - first, 1);
  return element("ol", { className: "steps" }, ...run.steps.map((step, index) => {
    const ended = step.finished_at ? Date.parse(step.finished_at) : until;
    const took = Math.max(ended - times[index], 0);
    const error = step.state === "completed" ? null : step.last_error;
    return element("li", { className: step.state },
      element("span", { className: "key", textContent: step.key }),
      badge(step.state),
      bar((times[index] - first) / whole, took / whole),
      element("span", { className: "took", textContent: span(took) }),
      step.attempts > 1 || step.next_attempt_at ? element("span", { className: "more", textContent: [
        step.attempts > 1 ? `${step.attempts} calls` : "",
        step.next_attempt_at && !ENDED.has(run.status) ? `again at ${clock(step.next_attempt_at)}` : "",
      ].filter(Boolean).join(" · ") }) : null,
      error ? element("span", { className: "more error", textContent: error }) : null);
  }));
}

// An SVG, whose attributes need no inline style, which the page's security policy forbids.
function bar(start, length) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "bar");
  svg.setAttribute("aria-hidden", "true");
  for (const [name, x, width] of [["track", 0, 100], ["time", Math.min(start * 100, 99), Math.max(length * 100, 0.7)]]) {
    const part = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const attributes = { class: name, x: `${x}%`, width: `${Math.min(width, 100 - x)}%`, y: 0, height: "100%", rx: 3 };
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    svg.append(part);
  }
  return svg;
}

// A new run ------------------------------------------------------------------------------------------------

function example(schema, root = schema, depth = 0) {
  if (!schema || depth > 6) return null;
  if (schema.$ref) return example(root.$defs?.[schema.$ref.split("/").pop()], root, depth + 1);
  if ("default" in schema) return schema.default;
  if ("const" in schema) return schema.const;
  if (schema.enum) return schema.enum[0];
  const one = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (one) return example(one[0], root, depth + 1);
  switch (schema.type) {
    case "object":
      return Object.fromEntries(Object.entries(schema.properties ?? {}).map(([name, part]) => [name, example(part, root, depth + 1)]));
    case "array": return [];
    case "string": return "";
    case "integer": case "number": return schema.minimum ?? 0;
    case "boolean": return false;
    default: return null;
  }
}

function prepare() {
  const task = state.tasks.find((one) => one.name === $("submit-task").value);
  $("params-label").hidden = !task.takes_params;
  $("no-params").hidden = task.takes_params;
  $("params").value = task.takes_params ? JSON.stringify(example(task.params_schema), null, 2) : "";
  $("submit-problem").hidden = true;
  key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`;
}

let key = ""; // of this form: a second click on Submit is no second run

async function submit() {
  const task = state.tasks.find((one) => one.name === $("submit-task").value);
  try {
    if (task.takes_params) JSON.parse($("params").value);
  } catch (error) {
    throw new Error(`The params are not JSON: ${error.message}`);
  }
  const made = await call(taskUrl(task.name), {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": key },
    ...(task.takes_params ? { body: $("params").value } : {}),
  });
  $("submit").close();
  choose({ task: task.name, task_id: made.task_id });
  setTimeout(refresh, 300); // the list is a moment behind
}

// Beginning -------------------------------------------------------------------------------------------------

async function begin() {
  try {
    state.tasks = (await call("../tasks")).tasks;
  } catch (error) {
    tell(error);
    setTimeout(begin, REFRESH);
    return;
  }
  for (const id of ["task", "submit-task"]) {
    $(id).append(...state.tasks.map((task) => element("option", { value: task.name, textContent: task.name })));
  }
  for (const id of ["task", "status"]) $(id).addEventListener("change", refresh);
  $("more").addEventListener("click", () => { state.limit += PAGE_SIZE; refresh(); });
  $("new").addEventListener("click", () => {
    if ($("task").value) $("submit-task").value = $("task").value;
    prepare();
    $("submit").showModal();
  });
  $("submit-task").addEventListener("change", prepare);
  $("params").addEventListener("input", () => { key = crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`; });
  $("submit-close").addEventListener("click", () => $("submit").close());
  $("submit").querySelector("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    $("submit-send").disabled = true;
    try {
      await submit();
    } catch (error) {
      $("submit-problem").textContent = error.message;
      $("submit-problem").hidden = false;
    }
    $("submit-send").disabled = false;
  });
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.get("task") && asked.get("task_id")) choose({ task: asked.get("task"), task_id: asked.get("task_id") });
  await refresh();
  setInterval(() => { if (!document.hidden) refresh(); }, REFRESH);
  setInterval(() => { if (state.shown && !ENDED.has(state.shown.status)) showRun(); }, 1000); // the bars grow
}

begin();
