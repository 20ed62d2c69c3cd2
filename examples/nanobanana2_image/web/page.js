// Orders a picture or a video, and shows what becomes of it. All that is shown is set as text, never as HTML.

const POLL = 500; // milliseconds
const form = document.querySelector("#order");
const at = (selector) => document.querySelector(selector);
let watched = null; // the call that is shown
let watching = false; // whether it is asked for again and again

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  let body = null;
  try { body = await answer.json(); } catch { /* told below */ }
  if (!answer.ok) throw new Error(body?.detail ?? `The server answers ${answer.status}.`);
  return body;
}

function post(path, value) {
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(value) });
}

async function address(slot) {
  const file = form.elements[`${slot}_file`].files[0];
  if (!file) return form.elements[`${slot}_url`].value.trim();
  return (await ask("/api/pictures", { method: "POST", body: file })).url;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button");
  button.disabled = true;
  at("#problem").textContent = "";
  try {
    const kind = form.elements.kind.value;
    const order = { kind, prompt: form.elements.prompt.value };
    if (kind === "picture") {
      [order.source_image_url, order.uploaded_image_url] = await Promise.all([address("source"), address("uploaded")]);
      if (!order.source_image_url || !order.uploaded_image_url) throw new Error("Choose two pictures.");
    } else {
      order.image_url = (await address("source")) || null;
    }
    location.hash = (await post("/api/calls", order)).id;
  } catch (problem) {
    at("#problem").textContent = problem.message;
  } finally {
    button.disabled = false;
  }
});

for (const slot of document.querySelectorAll("[data-slot]")) {
  const shown = slot.querySelector("img");
  slot.querySelector("input[type=file]").addEventListener("change", (event) => {
    URL.revokeObjectURL(shown.src);
    const [file] = event.target.files;
    shown.hidden = !file;
    if (file) shown.src = URL.createObjectURL(file);
  });
}

at("#again").addEventListener("click", async () => {
  try {
    show(await ask(`/api/calls/${watched}/try-again`, { method: "POST" }));
    if (!watching) watch(watched);
  } catch (problem) {
    at("#problem").textContent = problem.message;
  }
});

function element(name, text, kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = kind;
  return made;
}

function step({ key, state, attempts, last_error, next_attempt_at }) {
  const line = element("li", "", state);
  line.dataset.key = key;
  line.append(element("span", state, "state"), element("span", key));
  if (attempts > 1) line.append(element("small", `, attempt ${attempts}`));
  if (next_attempt_at) line.append(element("small", `, again at ${new Date(next_attempt_at).toLocaleTimeString()}`));
  if (last_error && state !== "completed") line.append(element("div", last_error));
  return line;
}

function show(call) {
  at("#call").hidden = false;
  at("#kind").textContent = call.kind;
  at("#status").textContent = call.status;
  at("#prompt").textContent = call.request_params.prompt;
  at("#error").textContent = call.status === "failed" ? call.error : "";
  if (call.next_try_at) at("#error").textContent += ` (again at ${new Date(call.next_try_at).toLocaleTimeString()})`;
  at("#again").hidden = call.status !== "failed";
  if (call.steps) at("#steps").replaceChildren(...call.steps.map(step));
  const result = at("#result");
  const made = call.response?.merged_image_url ?? call.response?.video_url;
  result.hidden = !made;
  if (made && result.dataset.shown !== made) {
    result.dataset.shown = made;
    const view = document.createElement(call.response.video_url ? "video" : "img");
    if (call.response.video_url) view.controls = true; else view.alt = call.request_params.prompt;
    view.src = made;
    const { width, height, format } = call.response;
    result.replaceChildren(view, element("figcaption", width ? `${width} × ${height}, ${format}` : format));
  }
}

async function watch(id) {
  if (watched !== id) at("#steps").replaceChildren();
  watched = id;
  watching = true;
  while (watched === id) {
    try {
      const call = await ask(`/api/calls/${id}`);
      if (watched !== id) return;
      show(call);
      if (call.status === "completed" || (call.status === "failed" && !call.next_try_at)) break;
    } catch (problem) {
      at("#status").textContent = problem.message; // the server may be back in a moment
    }
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
  if (watched !== id) return;
  watching = false;
  list();
}

async function list() {
  const calls = await ask("/api/calls").catch(() => []);
  at("#calls").replaceChildren(...calls.map((call) => {
    const line = document.createElement("li");
    const link = element("a", `${call.kind}, ${call.status}: ${call.request_params.prompt.slice(0, 80)}`);
    link.href = `#${call.id}`;
    line.append(link);
    return line;
  }));
}

function follow() {
  const id = location.hash.slice(1);
  if (/^[0-9a-f]{32}$/.test(id)) watch(id);
}

addEventListener("hashchange", follow);
list();
follow();
