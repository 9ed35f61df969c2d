// The page: conversations, messages, settings.

import * as client from "./client.js";
import { MarkdownView, codeBlock, h } from "./markdown.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const SAVE_EVERY = 2000; // ms, while an answer grows
const REST = 4; // times what it took to draw, before an answer is drawn again

const scroller = $("scroller");
const text = $("text");

let conversations = store.load();
let current =
  conversations.find(({ id }) => `#${encodeURIComponent(id)}` === location.hash) ??
  store.newConversation(conversations[0]?.settings);
let views = []; // of the messages shown
const runs = new Map(); // by conversation: the answer being generated

// Messages

class View {
  #content;
  #reasoning;

  constructor(message) {
    this.message = message;
    this.node = $(`for-${message.role}`).content.firstElementChild.cloneNode(true);
    if (message.role === "assistant") {
      this.#content = new MarkdownView(this.part(".content"));
      this.#reasoning = new MarkdownView(this.part(".reasoning .markdown"));
      this.part(".reasoning").addEventListener("toggle", () => this.draw());
    }
    this.draw();
  }

  part(selector) {
    return this.node.querySelector(selector);
  }

  /** Shows the message as it is now. */
  draw() {
    const { message, node } = this;
    if (message.role === "user") {
      this.part(".content").textContent = message.content;
      return;
    }
    const running = runs.get(current)?.message === message;
    node.classList.toggle("running", running);
    node.ariaBusy = running;
    const reasoning = this.part(".reasoning");
    reasoning.hidden = !message.reasoning;
    this.part("summary").textContent = running && !message.content ? "Reasoning …" : "Reasoning";
    if (reasoning.open) this.#reasoning.update(message.reasoning);
    this.#content.update(message.content);
    if (message.calls) {
      const blocks = message.calls.map((call) => codeBlock(call.arguments, `call of ${call.name}`));
      this.part(".calls").replaceChildren(...blocks);
    }
    this.part(".notice").hidden = !message.error;
    this.part(".notice span").textContent = message.error ?? "";
    this.part(".statistics").textContent = running ? "" : summary(message);
  }

  edit() {
    const form = $("for-editing").content.firstElementChild.cloneNode(true);
    const area = form.querySelector("textarea");
    area.value = this.message.content;
    const hide = (hidden) => [".content", "footer"].forEach((s) => (this.part(s).hidden = hidden));
    this.cancel = () => {
      form.remove();
      hide(false);
      this.part("[data-do=edit]").focus();
    };
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (area.value.trim() && settingsValid()) ask(area.value, this.message);
    });
    form.addEventListener("keydown", (event) => {
      if (sends(event)) form.requestSubmit();
      if (event.key !== "Escape") return;
      event.stopPropagation(); // else it stops an answer
      this.cancel();
    });
    hide(true);
    this.node.append(form);
    area.focus();
  }
}

const FINISHES = {
  length: "token limit reached",
  stopped: "stopped",
  interrupted: "interrupted",
};

/** What stands under an answer. */
function summary({ finish, statistics: s = {} }) {
  return [
    FINISHES[finish],
    s.rate && `${s.rate.toFixed(1)} tokens/s`,
    s.tokens && `${s.tokens} tokens`,
    s.first && `first token after ${s.first.toFixed(2)} s`,
    s.prompt && `${s.prompt} prompt tokens, ${s.cached} cached`,
  ].filter(Boolean).join(" · ");
}

function show(conversation) {
  current = conversation;
  for (const message of conversation.messages) {
    const ended = message.finish || message.error || runs.get(conversation)?.message === message;
    if (message.role === "assistant" && !ended) message.finish = "interrupted";
  }
  views = conversation.messages.map((message) => new View(message));
  const welcome = h("p", { className: "welcome" }, "What would you like to know?");
  $("messages").replaceChildren(...(views.length ? views.map((view) => view.node) : [welcome]));
  for (const field of $("fields").elements) {
    if (field.name) field.value = conversation.settings[field.name] ?? "";
  }
  // A reload shows it again.
  const kept = conversation.messages.length > 0;
  history.replaceState(null, "", kept ? `#${encodeURIComponent(conversation.id)}` : "#");
  pinned = true;
  follow();
  refresh();
}

/** Brings everything but the messages up to date. */
function refresh() {
  document.title = `${current.title || "New conversation"} · jaxsplit`;
  const running = runs.has(current);
  $("send").textContent = running ? "Stop" : "Send";
  $("send").classList.toggle("stops", running);
  drawList();
}

// Drawing: once a frame, and never so often that drawing is all the page does

let due = false;
let cost = 0;

function drawSoon() {
  if (due) return;
  due = true;
  setTimeout(() => requestAnimationFrame(drawNow), cost > 4 ? REST * cost : 0);
}

function drawNow() {
  due = false;
  const start = performance.now();
  const run = runs.get(current);
  if (!run) return;
  views.find((view) => view.message === run.message)?.draw();
  follow();
  cost = performance.now() - start;
}

let pinned = true; // the reader is at the end
let lastTop = 0;

function follow() {
  if (pinned) scroller.scrollTop = scroller.scrollHeight;
  $("latest").hidden = pinned;
}

scroller.addEventListener("scroll", () => {
  const left = scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;
  if (left < 8) pinned = true;
  else if (scroller.scrollTop < lastTop) pinned = false;
  lastTop = scroller.scrollTop;
  $("latest").hidden = pinned;
});
new ResizeObserver(follow).observe(scroller);
$("latest").addEventListener("click", () => {
  pinned = true;
  follow();
  focusText();
});

// Answers

/** Adds a user's message, in place of `old` and all after it if that is given. */
async function ask(content, old) {
  const conversation = current;
  await stop(conversation);
  const { messages } = conversation;
  if (old && !messages.includes(old)) return; // sent twice
  if (old) messages.length = messages.indexOf(old);
  messages.push({ role: "user", content });
  conversation.title ||= content.trim().split("\n", 1)[0].slice(0, 60);
  if (!conversations.includes(conversation)) conversations.push(conversation);
  answer(conversation);
}

/** Generates the answer to the last message. */
function answer(conversation) {
  const message = { role: "assistant", content: "" };
  const { settings } = conversation;
  const body = { messages: requestMessages(conversation) };
  for (const name of store.SAMPLING) if (settings[name] !== undefined) body[name] = settings[name];
  conversation.messages.push(message);
  const controller = new AbortController();
  const run = { message, stop: () => controller.abort() };
  runs.set(conversation, run);
  run.ended = generate(conversation, message, body, controller.signal);
  keep(conversation);
  show(conversation);
  focusText();
}

function requestMessages({ settings, messages }) {
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const said = messages.filter(({ role, content }) => role === "user" || content);
  return [...system, ...said.map(({ role, content }) => ({ role, content }))];
}

async function generate(conversation, message, body, signal) {
  let saved = performance.now();
  try {
    await whenReady(signal);
    const started = performance.now();
    for await (const chunk of client.chat(body, signal)) {
      take(message, chunk, started);
      drawSoon();
      if (performance.now() - saved > SAVE_EVERY) {
        keep(conversation);
        saved = performance.now();
      }
    }
    message.finish ??= "stop";
  } catch (error) {
    if (signal.aborted) message.finish ??= "stopped";
    else message.error = error.message;
  }
  say("");
  runs.delete(conversation);
  keep(conversation);
  refresh();
  const view = views.find((one) => one.message === message);
  if (view) {
    view.draw();
    follow();
    $("announced").textContent = view.part(".content").textContent;
  }
  if ($("settings").matches(":popover-open")) describe();
}

/** Adds a chunk of the stream to a message. */
function take(message, { choices: [choice] = [], usage, timings }, started) {
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice?.delta ?? {};
  const statistics = (message.statistics ??= {});
  if (content || reasoning || calls) statistics.first ??= (performance.now() - started) / 1000;
  if (content) message.content += content;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  for (const { index, function: f } of calls ?? []) {
    const call = ((message.calls ??= [])[index] ??= { name: "", arguments: "" });
    call.name += f.name ?? "";
    call.arguments += f.arguments ?? "";
  }
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (timings) statistics.rate = timings.predicted_per_second;
  if (usage) {
    statistics.tokens = usage.completion_tokens;
    statistics.prompt = usage.prompt_tokens;
    statistics.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }
}

async function stop(conversation) {
  const run = runs.get(conversation);
  run?.stop();
  await run?.ended;
}

// Conversations

function keep(conversation, changed = Date.now()) {
  conversation.changed = changed;
  try {
    store.save(conversation);
  } catch {
    toast("The browser has no room for this conversation: export it, or delete others.");
  }
}

function drawList() {
  if ($("list").querySelector("input")) return; // one is being renamed
  conversations.sort((a, b) => b.changed - a.changed);
  $("list").replaceChildren(
    ...conversations.map((conversation) => {
      const title = conversation.title || "New conversation";
      const open = h("button", { title }, runs.has(conversation) ? `${title} …` : title);
      open.addEventListener("click", () => enter(conversation));
      if (conversation !== current) return h("li", {}, open);
      open.ariaCurrent = "true";
      const actions = ["rename", "clear", "remove"].map((name) => {
        const label = { rename: "Rename", clear: "Clear", remove: "Delete" }[name];
        const button = h("button", { className: "plain" }, label);
        button.dataset.do = name;
        return button;
      });
      return h("li", {}, open, h("div", { className: "row" }, ...actions));
    }),
  );
}

/** Where the list stands over the messages. */
function closeList() {
  if ($("conversations").matches(":popover-open")) $("conversations").hidePopover();
}

function enter(conversation) {
  closeList();
  show(conversation);
  focusText();
}

function rename() {
  const [open, actions] = $("list").querySelector("li:has([aria-current])").children;
  const input = h("input", { value: current.title, ariaLabel: "Title", maxLength: 200 });
  let ended = false;
  const end = (title) => {
    if (ended) return; // the input loses the focus when it goes
    ended = true;
    if (title?.trim()) current.title = title.trim();
    input.remove();
    keep(current);
    refresh();
    $("list").querySelector("[data-do=rename]").focus();
  };
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault(); // else Enter presses the next button, and Escape closes the list
    event.stopPropagation();
    end(event.key === "Enter" ? input.value : undefined);
  });
  input.addEventListener("blur", () => end(input.value));
  open.replaceWith(input);
  actions.remove();
  input.select();
}

/** Changes a conversation, and offers to take that back. */
async function undoable(done, change) {
  const conversation = current;
  await stop(conversation);
  const before = structuredClone(conversation);
  change(conversation);
  toast(done, () => {
    Object.assign(conversation, before);
    if (!conversations.includes(conversation)) conversations.push(conversation);
    keep(conversation);
    enter(conversation);
  });
}

function exportAll() {
  const blob = new Blob([store.exported(conversations)], { type: "application/json" });
  const date = new Date().toISOString().slice(0, 10);
  const href = URL.createObjectURL(blob);
  h("a", { href, download: `jaxsplit-conversations-${date}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}

async function importFile(file) {
  let found;
  try {
    found = store.imported(await file.text());
  } catch (error) {
    toast(`${file.name} cannot be imported: ${error.message}.`);
    return;
  }
  const said = ({ messages }) => JSON.stringify(messages);
  const added = found.filter((one) => !conversations.some((c) => c.id === one.id && said(c) === said(one)));
  toast(`${added.length} of ${found.length} conversations imported; the others were here already.`);
  for (const one of added) {
    if (conversations.some(({ id }) => id === one.id)) one.id = store.newConversation().id;
    conversations.push(one);
    keep(one, one.changed);
  }
  drawList();
}

// What buttons do

const ACTIONS = {
  create() {
    enter(current.messages.length ? store.newConversation(current.settings) : current);
  },
  export: exportAll,
  import: () => $("file").click(),
  rename,
  clear() {
    undoable("Messages deleted.", (conversation) => {
      conversation.messages = [];
      keep(conversation);
      show(conversation);
    });
  },
  remove() {
    undoable("Conversation deleted.", (conversation) => {
      conversations = conversations.filter((one) => one !== conversation);
      store.remove(conversation);
      show(conversations[0] ?? store.newConversation(conversation.settings));
    });
  },
  copy: (_, { message }) => copy(message.content),
  "copy-code": (button) => copy(button.closest("figure").querySelector("code").textContent),
  edit: (_, view) => view.edit(),
  cancel: (_, view) => view.cancel(),
  async again(_, { message }) {
    const conversation = current;
    await stop(conversation);
    const { messages } = conversation;
    if (message.role === "assistant") messages.length = messages.indexOf(message);
    answer(conversation);
  },
  delete(_, { message }) {
    undoable("Message deleted.", (conversation) => {
      const { messages } = conversation;
      const at = messages.indexOf(message);
      // A question goes with its answer.
      const both = message.role === "user" && messages[at + 1]?.role === "assistant";
      messages.splice(at, both ? 2 : 1);
      keep(conversation);
      show(conversation);
    });
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (!button) return;
  const article = button.closest("article");
  ACTIONS[button.dataset.do](button, views.find(({ node }) => node === article));
});

$("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) importFile(target.files[0]);
  target.value = "";
});

async function copy(content) {
  try {
    await navigator.clipboard.writeText(content);
  } catch {
    // Browsers have no clipboard for pages without HTTPS.
    const area = h("textarea", { value: content, className: "unseen" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
  toast("Copied.");
}

let hiding;

/** Says something for a while; if it can be taken back, until the focus moves on. */
function toast(said, undo) {
  clearTimeout(hiding);
  closeList();
  const hide = () => $("toast").replaceChildren();
  $("toast").replaceChildren(said);
  if (!undo) {
    hiding = setTimeout(hide, 5000);
    return;
  }
  const button = h("button", {}, "Undo");
  button.addEventListener("click", () => {
    hide();
    undo();
  });
  button.addEventListener("blur", () => document.activeElement !== button && hide());
  $("toast").append(button);
  button.focus();
}

// The composer and the keyboard

const touch = matchMedia("(pointer: coarse)");

/** Whether a key sends what was typed; on touch screens, Enter starts a new line. */
function sends(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || touch.matches) return false;
  event.preventDefault();
  return true;
}

/** Not on touch screens: a keyboard would come up. */
function focusText() {
  if (!touch.matches) text.focus();
}

function submit() {
  const content = text.value;
  if (!content.trim() || runs.has(current) || !settingsValid()) return;
  text.value = "";
  grow();
  ask(content);
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (runs.has(current)) stop(current);
  else submit();
});
text.addEventListener("keydown", (event) => sends(event) && submit());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector(":popover-open")) stop(current);
});

/** For browsers without `field-sizing`. */
function grow() {
  if (CSS.supports("field-sizing", "content")) return;
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
}
text.addEventListener("input", grow);

// Settings, and the model

$("fields").addEventListener("submit", (event) => event.preventDefault());
$("fields").addEventListener("input", ({ target }) => {
  if (!target.checkValidity()) return;
  const value = target.type === "number" && target.value !== "" ? +target.value : target.value;
  current.settings[target.name] = value === "" ? undefined : value;
});
$("fields").addEventListener("change", () => keepSettings());
$("fields").addEventListener("reset", () => {
  current.settings = {};
  keepSettings();
});

/** Whether all fields are; else it shows the one that is not. */
function settingsValid() {
  if ($("fields").checkValidity()) return true;
  $("settings").showPopover();
  return $("fields").reportValidity();
}

function keepSettings() {
  if (conversations.includes(current)) keep(current);
}

$("settings").addEventListener("toggle", ({ newState }) => newState === "open" && describe());

/** Shows the model and the devices as they are now. */
async function describe() {
  let found;
  try {
    found = await client.props();
  } catch {
    return; // it is being loaded
  }
  $("model").textContent = found.model_alias;
  const { params } = found.default_generation_settings;
  const defaults = { ...params, max_tokens: params.n_predict };
  for (const name of store.SAMPLING) {
    const words = { seed: "random", max_tokens: "no limit" }[name];
    $("fields").elements[name].placeholder = defaults[name] === -1 ? words : defaults[name] ?? "";
  }
  const facts = found.mesh.split(" | ").map((fact) => h("li", {}, fact));
  $("about").replaceChildren(
    h("p", {}, h("strong", {}, found.model_alias)),
    h("ul", {}, ...facts),
    ...found.devices.map(drawDevice),
  );
}

function drawDevice({ name, memory, used }, i) {
  const of = memory && used !== null ? `${gib(used)} of ${gib(memory)} GiB` : "memory not known";
  const node = h("div", { className: "device" }, h("span", {}, `${i}: ${name}`), h("span", {}, of));
  if (memory && used !== null) {
    node.append(h("meter", { max: memory, value: used, ariaLabel: `Memory of device ${i}` }));
  }
  return node;
}

const gib = (bytes) => (bytes / 2 ** 30).toFixed(1);

function say(what) {
  if ($("status").textContent !== what) $("status").textContent = what;
}

async function whenReady(signal) {
  await client.ready(signal, say);
  say("");
}

// Other windows, and the beginning

addEventListener("storage", (event) => {
  if (!store.concerns(event) || runs.size) return;
  conversations = store.load();
  const same = conversations.find(({ id }) => id === current.id);
  if (same && JSON.stringify(same) !== JSON.stringify(current)) show(same);
  else drawList();
});
addEventListener("pagehide", () => {
  for (const [conversation, run] of runs) {
    run.message.finish = "interrupted";
    run.stop();
    keep(conversation);
  }
});

show(current);
focusText();
whenReady().then(describe);
