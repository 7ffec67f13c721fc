const by = (id) => document.getElementById(id);
const [form, text, file, results, error, more] = ["form", "text", "file", "results", "error", "more"].map(by);
const FIRST = 24;
let about = { rows: 0, sample: [], prefixes: false, max_bytes: 0, max_results: 0 };
let image = null; // a data URI
const states = []; // what was asked, by its number in the browser's history
let latest = 0; // the number of the newest request: answers to earlier ones are dropped

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  if (answer.status === 401) location.reload(); // for the token
  const told = await answer.json().catch(() => null);
  if (!answer.ok) throw new Error(told?.error?.message ?? `The server answers ${answer.status}.`);
  return told;
}

function element(kind, className, content) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (content !== undefined) made.textContent = content; // never HTML: ids and texts are strangers'
  return made;
}

function frame(hit) {
  const made = element("span", "frame");
  if (!hit.image) {
    made.append(element("span", "words", hit.text ?? hit.id));
    return made;
  }
  const picture = element("img");
  picture.alt = hit.text ?? "";
  picture.loading = "lazy";
  picture.decoding = "async";
  picture.src = `/thumbnails/${hit.row}`;
  picture.addEventListener("error", () => picture.replaceWith(element("span", "none", "This image cannot be shown.")));
  made.append(picture);
  return made;
}

function tile(hit, asGrid) {
  const button = element("button", "hit");
  const told = element("span", "about");
  const shownTwice = !hit.image && hit.text?.startsWith(hit.id);
  told.append(element("span", "id", shownTwice ? `row ${hit.row}` : hit.id));
  if (hit.score !== undefined) told.append(element("span", "score", hit.score.toFixed(3)));
  button.append(asGrid ? frame(hit) : element("span", "words", hit.text ?? hit.id));
  if (hit.image && hit.text) button.append(element("span", "caption", hit.text));
  button.append(told);
  button.type = "button";
  button.title = hit.text ? `${hit.id}\n${hit.text}` : hit.id;
  const score = hit.score === undefined ? "" : `, score ${hit.score.toFixed(3)}`;
  button.setAttribute("aria-label", `More like ${hit.text ?? hit.id}${score}`);
  button.addEventListener("click", () => go({ like: hit.row, name: hit.id, shown: hit.image, prefix: by("prefix").value }));
  const item = element("li");
  item.append(button);
  return item;
}

function show(hits) {
  const asGrid = hits.some((hit) => hit.image);
  results.className = asGrid ? "grid" : "list";
  results.replaceChildren(...hits.map((hit) => tile(hit, asGrid)));
  results.querySelectorAll("button").forEach((button, place) => (button.tabIndex = place ? -1 : 0));
}

function say(words, wrong = "") {
  by("status").textContent = words;
  error.textContent = wrong;
  error.hidden = !wrong;
}

function start() {
  document.title = "Search";
  more.hidden = true;
  show(about.sample);
  const count = about.rows.toLocaleString("en");
  if (!about.rows) say("This corpus is empty: there is nothing to search yet.");
  else say(`${count} row${about.rows === 1 ? "" : "s"}. Type, or drop or paste an image, or both.`);
}

async function run(state) {
  const number = ++latest;
  document.body.classList.add("busy");
  const { name, shown, ...query } = state;
  try {
    const told = await ask("/search", query);
    if (number !== latest) return;
    show(told.results);
    const took = told.milliseconds;
    const what = name === undefined ? "" : `More like ${name}: `;
    const found = `${what}${told.results.length} of ${told.rows.toLocaleString("en")} rows`;
    say(told.results.length ? `${found}, ${Math.round(took.embedding + took.search)} ms` : nothing(state));
    more.hidden = told.results.length < state.k || state.k >= about.max_results;
  } catch (problem) {
    if (number !== latest) return;
    show([]);
    more.hidden = true;
    say("", problem.message);
  } finally {
    if (number === latest) document.body.classList.remove("busy");
  }
}

function nothing(state) {
  if (!about.rows) return "This corpus is empty: there is nothing to find yet.";
  return state.prefix ? `No id begins with “${state.prefix}”: nothing was found.` : "Nothing was found.";
}

function go(asked) {
  const state = Object.fromEntries(Object.entries({ k: FIRST, ...asked }).filter(([, value]) => value || value === 0));
  const params = new URLSearchParams();
  if (state.text) params.set("q", state.text);
  if (state.like !== undefined) params.set("like", state.like);
  states.push(state);
  history.pushState({ number: states.length - 1 }, "", params.size ? `/?${params}` : "/");
  apply(state);
  scrollTo(0, 0);
}

function apply(state) {
  text.value = state.text ?? "";
  pick(state.image ?? null, state.image ?? (state.shown ? `/thumbnails/${state.like}` : null));
  by("instruction").value = state.instruction ?? "";
  by("prefix").value = state.prefix ?? "";
  document.title = state.text ? `${state.text} – Search` : "Search";
  return run(state);
}

function pick(uri, shown = uri) {
  image = uri;
  by("picked").hidden = !shown;
  by("preview").hidden = false;
  if (shown) by("preview").src = shown;
  else by("preview").removeAttribute("src");
  text.placeholder = uri ? "Add words, or search by the image alone" : "Describe what you look for";
}

function take(chosen) {
  if (!chosen) return;
  if (chosen.size * 4 / 3 > about.max_bytes) {
    say("", `${chosen.name || "The image"} has ${(chosen.size / 2 ** 20).toFixed(1)} MiB; at most ${(about.max_bytes * 0.75 / 2 ** 20).toFixed(0)} may be sent.`);
    return;
  }
  const reader = new FileReader();
  reader.addEventListener("load", () => {
    const body = reader.result.slice(reader.result.indexOf(",") + 1);
    pick(`data:${chosen.type || "application/octet-stream"};base64,${body}`);
    submit();
  });
  reader.addEventListener("error", () => say("", "The file cannot be read."));
  reader.readAsDataURL(chosen);
}

function submit() {
  const asked = { text: text.value.trim(), image, instruction: by("instruction").value.trim(), prefix: by("prefix").value };
  if (asked.text || asked.image) go(asked);
  else {
    history.pushState(null, "", "/");
    start();
  }
}

function move(event) {
  const buttons = [...results.querySelectorAll("button")];
  const place = buttons.indexOf(document.activeElement);
  const columns = getComputedStyle(results).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (step === undefined || !buttons.length) return;
  if (place < 0 && !(document.activeElement === text && event.key === "ArrowDown") && document.activeElement !== document.body) return;
  event.preventDefault();
  const next = place < 0 ? 0 : place + step;
  if (next < 0 && event.key === "ArrowUp") text.focus();
  if (!buttons[next]) return;
  for (const button of buttons) button.tabIndex = -1;
  buttons[next].tabIndex = 0;
  buttons[next].focus();
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const typing = document.activeElement?.tagName === "INPUT" && document.activeElement.type === "text";
  if (event.key === "/" && !typing) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (event.key === "Escape") {
    if (document.activeElement === text && image) pick(null);
    text.focus();
  } else move(event);
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
file.addEventListener("change", () => {
  take(file.files[0]);
  file.value = "";
});
by("preview").addEventListener("error", () => (by("preview").hidden = true));
by("unpick").addEventListener("click", () => {
  pick(null);
  text.focus();
});
more.addEventListener("click", () => {
  const state = { ...states[history.state.number], k: Math.min(states[history.state.number].k * 2, about.max_results) };
  states[history.state.number] = state;
  run(state);
});
document.addEventListener("paste", (event) => {
  const pasted = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!pasted) return;
  event.preventDefault();
  take(pasted);
});
const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  by("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) by("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  by("drop").hidden = true;
  if (!holdsFiles(event)) return;
  event.preventDefault();
  take(event.dataTransfer.files[0]);
});
addEventListener("popstate", (event) => {
  if (event.state) apply(states[event.state.number] ?? asked());
  else {
    latest++;
    document.body.classList.remove("busy");
    text.value = "";
    pick(null);
    start();
  }
});

function asked() {
  const params = new URLSearchParams(location.search);
  if (params.has("q")) return { text: params.get("q"), k: FIRST };
  return params.has("like") ? { like: Number(params.get("like")), name: `row ${params.get("like")}`, k: FIRST } : null;
}

try {
  about = await ask("/about");
  by("prefix-field").hidden = !about.prefixes;
  const state = asked();
  if (state) {
    states.push(state);
    history.replaceState({ number: 0 }, "");
    await apply(state);
  } else start();
} catch (problem) {
  say("", problem.message);
}
