// The page of `nc-audit review`. Words of the dataset reach the document through textContent only.

const PAGE = 20;
const STALE = 20_000; // milliseconds after which a page of pairs is asked for again, since others may have decided
const DONE = { keep: "Kept", drop: "Dropped", fix: "Caption fixed", rematch: "Other caption taken" };

const el = (id) => document.getElementById(id);
const state = { reviewer: "", at: null, total: 0, decided: 0, view: "open", sample: false, busy: false, over: false };
const pages = new Map();

// What the browser keeps for this very address, so that another server on the same port does not inherit it; a browser
// that keeps nothing is fine too.
const kept = {
  key: (name) => `${name} ${location.pathname}`,
  get(name) { try { return sessionStorage.getItem(this.key(name)); } catch { return null; } },
  set(name, value) { try { sessionStorage.setItem(this.key(name), value); } catch { /* nothing is kept */ } },
};

class Refused extends Error {}

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ reviewer: state.reviewer, ...body }),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refused("The server does not answer, so nothing more is saved. Start nc-audit review again; "
      + "every decision up to here is on the disk.");
  }
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refused([value.error || `error ${answer.status}`, value.hint].filter(Boolean).join(": "));
  return value;
}

const query = (values) => new URLSearchParams({ reviewer: state.reviewer, ...values });

function say(text) { el("said").textContent = text; }

function complain(problem) {
  if (!(problem instanceof Refused)) throw problem;
  el("problem").textContent = problem.message;
  el("problem").hidden = false;
}

// One thing at a time. A key pressed while a decision is on its way must not decide the next pair unseen, so it is let
// go; what merely looks elsewhere waits for its turn.
let turn = Promise.resolve();

function alone(work) {
  return state.busy ? turn : inTurn(work);
}

function inTurn(work) {
  turn = turn.then(async () => {
    if (state.over) return;
    state.busy = true;
    try {
      await work();
      el("problem").hidden = true;
    } catch (problem) {
      complain(problem);
    } finally {
      state.busy = false;
    }
  });
  return turn;
}

async function pairAt(at) {
  const from = Math.floor(at / PAGE) * PAGE;
  let page = pages.get(from);
  if (!page || Date.now() - page.since > STALE) {
    const found = await ask(`api/pairs?${query({ from, count: PAGE })}`);
    page = { since: Date.now(), pairs: found.pairs };
    pages.set(from, page);
    if (pages.size > 50) pages.delete(pages.keys().next().value);
  }
  return page.pairs[at - from];
}

function remember(pair) {
  const page = pages.get(Math.floor(pair.at / PAGE) * PAGE);
  if (page) page.pairs[pair.at % PAGE] = pair;
}

async function find(at, step, view, include = false) {
  if (view === "all" && !include) return at + step >= 0 && at + step < state.total ? at + step : null;
  return (await ask(`api/find?${query({ at, step, view, include: include ? 1 : 0 })}`)).at;
}

// --- showing

const percent = (share) => share >= 0.995 ? "over 99 %" : share < 0.005 ? "under 1 %" : `${Math.round(100 * share)} %`;
const signed = (margin) => margin === null ? "" : `(${margin >= 0 ? "+" : "−"}${Math.abs(margin).toFixed(2)} cosine)`;

function pill(word, kind) {
  const span = document.createElement("span");
  span.textContent = word;
  span.className = kind;
  return span;
}

function words(decision) {
  const what = { keep: "keep", drop: "drop", fix: "fix", rematch: "re-match" }[decision.decision];
  return decision.caption ? `${what} “${decision.caption}”` : what;
}

function progress(found) {
  Object.assign(state, { total: found.total, decided: found.decided });
  el("bar").max = Math.max(1, found.total);
  el("bar").value = found.decided;
  el("count").textContent = `${found.decided.toLocaleString("en")} of ${found.total.toLocaleString("en")} decided`;
  const option = el("view").querySelector("[value=conflicts]");
  option.textContent = found.conflicts ? `conflicts (${found.conflicts.toLocaleString("en")})` : "conflicts";
}

function show(pair) {
  state.at = pair.at;
  state.pair = pair;
  el("pair").hidden = false;
  el("done").hidden = true;
  const image = el("image");
  const source = `image/${encodeURIComponent(pair.image_id)}`;
  if (image.getAttribute("src") !== source) {
    el("unreadable").hidden = true;
    image.hidden = false;
    image.src = source;
  }
  image.alt = `Image ${pair.image}`;
  const facts = [`${(pair.at + 1).toLocaleString("en")} of ${state.total.toLocaleString("en")}`, pair.image, `row ${pair.row.toLocaleString("en")}`];
  if (pair.copies > 1) facts.push(`${pair.copies.toLocaleString("en")} copies`);
  if (pair.split) facts.push(pair.split);
  el("facts").textContent = facts.join(" · ");

  el("tag").textContent = pair.is_hidden ? "tag hidden until you decide" : pair.tag ?? "not tagged";
  el("tag").className = pair.is_hidden ? "unknown" : pair.tag ?? "unknown";
  el("likely").textContent = pair.is_hidden ? "Does the caption describe the image?"
    : pair.probability == null ? "" : `${percent(pair.probability)} likely noise`;
  el("mine").replaceChildren(...(pair.mine ? [pill(`you: ${words({ ...pair.mine, caption: null })}`, pair.mine.decision)] : []));
  el("caption").textContent = pair.caption_shown || "(no caption)";
  el("caption").className = pair.caption_shown.length > 220 ? "long" : "";
  el("caption").tabIndex = pair.caption_shown.length > 220 ? 0 : -1;

  const everybody = [...(pair.mine ? [pair.mine] : []), ...pair.others];
  const told = everybody.map((one) => `${one.reviewer}: ${words(one)}`).join("; ");
  el("conflict").hidden = !pair.conflict;
  el("conflict").textContent = pair.conflict ? `Reviewers disagree. ${told}. The last word, ${pair.stands || "nameless"}’s, counts.` : "";
  el("others").hidden = pair.conflict || !(pair.others.length || pair.mine?.caption);
  el("others").textContent = told;

  el("reasons").replaceChildren(...(pair.reasons ?? []).map((reason) => {
    const line = document.createElement("li");
    line.textContent = reason;
    line.dir = "auto";
    return line;
  }));
  const [caption, better] = [el("better-caption"), el("better-image")];
  const [wins, imageWins] = [!(pair.best_caption_margin <= 0), !(pair.best_image_margin <= 0)];
  caption.hidden = !pair.best_caption;
  caption.querySelector(".what").textContent = wins ? "A caption that fits this image better" : "The next best caption for this image";
  el("rematch").firstElementChild.textContent = wins ? "Use better caption" : "Use next best caption";
  caption.querySelector(".words").textContent = pair.best_caption ?? "";
  caption.querySelector(".margin").textContent = signed(pair.best_caption_margin ?? null);
  better.hidden = !pair.best_image_id;
  better.querySelector(".what").textContent = imageWins ? "An image that fits this caption better" : "The next best image for this caption";
  better.querySelector(".words").textContent = pair.best_image ?? "";
  better.querySelector(".margin").textContent = signed(pair.best_image_margin ?? null);
  if (pair.best_image_id) {
    better.querySelector("img").src = `image/${encodeURIComponent(pair.best_image_id)}?size=small`;
    better.querySelector("img").alt = `Image ${pair.best_image}`;
  }
  for (const id of ["keep", "drop", "fix", "skip", "next"]) el(id).disabled = false;
  el("rematch").disabled = !pair.best_caption;
  el("pair").scrollTop = 0;
  document.querySelector("article").scrollTop = 0;
  preload(pair.at);
}

async function preload(at) {
  if (at + 1 >= state.total) return;
  const next = await pairAt(at + 1).catch(() => null);
  if (next) new Image().src = `image/${encodeURIComponent(next.image_id)}`;
}

async function showDone() {
  const title = { decided: "Nothing is decided yet", conflicts: "No conflicts" }[state.view]
    ?? `All ${state.total.toLocaleString("en")} pairs are decided`;
  const { lines } = await ask(`api/figures?${query({})}`);
  el("pair").hidden = true;
  el("done").hidden = false;
  el("done-title").textContent = title;
  el("figures").replaceChildren(...lines.map((text) => {
    const line = document.createElement("li");
    line.textContent = text;
    return line;
  }));
  el("done-hint").textContent = state.view === "open" || state.view === "all"
    ? "Finish lets tags, reports and exports follow your decisions. Undo takes the last one back."
    : "Choose under “Show” what to see.";
  state.at = null;
  state.pair = null;
  for (const id of ["keep", "drop", "fix", "rematch", "skip", "next"]) el(id).disabled = true;
}

async function go(at) {
  if (at === null) return showDone();
  show(await pairAt(at));
}

// --- doing

async function onward(step) {
  const at = state.at ?? state.total;
  const found = await find(at, step, state.view === "open" && step < 0 ? "all" : state.view);
  if (found !== null) return go(found);
  say(step > 0 ? "This is the last pair." : "This is the first pair.");
}

async function nextToDo() {
  const view = state.view === "conflicts" ? "conflicts" : "open";
  const ahead = await find(state.at, 1, view);
  await go(ahead ?? await find(0, 1, view, true));
}

async function decide(decision, caption, pair = state.pair) {
  if (!pair) return;
  const found = await ask("api/decide", { pair_id: pair.pair_id, decision, caption });
  remember(found.pair);
  const seen = state.sample && pair.is_hidden && found.pair.tag ? ` The tag: ${found.pair.tag}, ${percent(found.pair.probability ?? 0)} likely noise.` : "";
  say(`${DONE[decision]}: row ${pair.row.toLocaleString("en")}.${seen}`);
  try {
    if (state.view === "decided") show(found.pair);
    else await nextToDo();
  } finally {
    progress(found);
  }
}

async function undo() {
  const found = await ask("api/undo", {});
  progress(found);
  if (!found.pair) return say("There is nothing to undo.");
  remember(found.pair);
  show(found.pair);
  say(`Undone: row ${found.pair.row.toLocaleString("en")}.`);
}

let fixed = null; // the pair whose caption is being written, whatever is shown by the time it is saved

function openFix() {
  if (!state.pair || state.busy) return;
  fixed = state.pair;
  el("words").value = state.pair.mine?.decision === "fix" ? state.pair.mine.words : state.pair.caption;
  el("fixing").returnValue = "";
  el("fixing").showModal();
  el("words").focus();
}

async function begin() {
  const found = await ask(`api/state?${query({})}`);
  Object.assign(state, { reviewer: found.reviewer, sample: found.sample });
  document.title = `Review ${found.run} · nc-audit`;
  el("run").textContent = found.sample ? `${found.run} · random sample` : found.run;
  el("who").textContent = found.reviewer;
  el("who").setAttribute("aria-label", `Reviewer ${found.reviewer}, change`);
  pages.clear();
  progress(found);
  await go(state.view === "open" ? found.begin : await find(0, 1, state.view, true));
}

const actions = {
  keep: () => alone(() => decide("keep")),
  drop: () => alone(() => decide("drop")),
  fix: openFix,
  rematch: () => { if (!el("rematch").disabled) alone(() => decide("rematch")); },
  skip: () => alone(async () => { say("Skipped."); await onward(1); }),
  undo: () => alone(undo),
  previous: () => alone(() => onward(-1)),
  next: () => alone(() => onward(1)),
  help: () => el("helping").showModal(),
  who: () => {
    el("reviewer").value = state.reviewer;
    el("naming").returnValue = "";
    el("naming").showModal();
    el("reviewer").select();
  },
  finish: () => inTurn(async () => {
    await ask("api/finish", {});
    state.over = true;
    el("pair").hidden = true;
    el("done").hidden = false;
    el("done-title").textContent = "Saved";
    el("figures").replaceChildren();
    el("done-hint").textContent = "Tags follow your decisions now. You can close this page; nc-audit review opens it again.";
    for (const button of document.querySelectorAll("footer button, .tools button, .tools select")) button.disabled = true;
    say("");
  }),
};
for (const [id, action] of Object.entries(actions)) el(id).addEventListener("click", action);

const KEYS = {
  k: "keep", d: "drop", f: "fix", r: "rematch", s: "skip", u: "undo", arrowleft: "previous", arrowright: "next", "?": "help",
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.closest("input, select, textarea")) return;
  const key = event.key.toLowerCase();
  const action = Object.hasOwn(KEYS, key) ? KEYS[key] : null;
  const moves = key.startsWith("arrow");
  if (!action || (event.repeat && !moves) || (key.length === 1 && !el("keys").checked)) return;
  event.preventDefault();
  actions[action]();
});

el("fixing").addEventListener("close", () => {
  if (el("fixing").returnValue === "save") inTurn(() => decide("fix", el("words").value, fixed));
});
el("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) el("fixing").close("save");
});
el("naming").addEventListener("close", () => {
  const name = el("reviewer").value.trim();
  if (el("naming").returnValue !== "save" || !name || name === state.reviewer) return;
  inTurn(async () => {
    const before = state.reviewer;
    state.reviewer = name;
    try {
      await begin();
      kept.set("reviewer", state.reviewer);
    } catch (problem) {
      state.reviewer = before;
      throw problem;
    }
  });
});
el("view").addEventListener("change", () => inTurn(async () => {
  state.view = el("view").value;
  pages.clear();
  el("view").blur();
  await go(await find(state.at ?? 0, 1, state.view, true) ?? await find(0, 1, state.view, true));
}));
el("image").addEventListener("error", () => {
  el("image").hidden = true;
  el("unreadable").hidden = false;
});
el("keys").addEventListener("change", () => kept.set("keys", el("keys").checked ? "on" : "off"));
el("keys").checked = kept.get("keys") !== "off";
el("view").value = "open";
state.reviewer = kept.get("reviewer") ?? "";
inTurn(begin);
