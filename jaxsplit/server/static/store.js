// Conversations, in the browser's localStorage: each under a key of its own, so that two windows
// do not overwrite each other's.

const PREFIX = "jaxsplit.conversation.";
const FORMAT = "jaxsplit-conversations";

/** Settings that are sent with a request as they are. */
export const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

let count = 0;

export function newConversation(settings = { system: "" }) {
  const id = `${Date.now().toString(36)}-${count++}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "", changed: Date.now(), settings: { ...settings }, messages: [] };
}

/** All conversations, the last changed first. */
export function load() {
  const found = [];
  for (const key of keys()) {
    try {
      found.push(checked(JSON.parse(localStorage.getItem(key))));
    } catch {
      // not written by this page
    }
  }
  return found.sort((a, b) => b.changed - a.changed);
}

/** Whether a `storage` event is about a conversation. */
export const concerns = (event) => event.key === null || event.key.startsWith(PREFIX);

/** Throws where the browser has no room or keeps nothing. */
export function save(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(conversation) {
  try {
    localStorage.removeItem(PREFIX + conversation.id);
  } catch {
    // nothing is kept
  }
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of an exported text; throws an Error that says what is wrong with it. */
export function imported(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) {
    throw new Error("it is no export of this page");
  }
  return data.conversations.map((one, i) => {
    try {
      return checked(one);
    } catch (error) {
      throw new Error(`conversation ${i + 1} is damaged: ${error.message}`);
    }
  });
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return []; // the browser is set to keep nothing
  }
}

/** A conversation of known fields and types alone; throws an Error if others are needed. */
function checked(one) {
  const settings = { system: optional(one.settings?.system, "string") ?? "" };
  for (const name of SAMPLING) settings[name] = optional(one.settings?.[name], "number");
  return {
    id: needed(one.id, "string", "id"),
    title: optional(one.title, "string") ?? "",
    changed: optional(one.changed, "number") ?? 0,
    settings,
    messages: needed(one.messages, "object", "messages").map((message) => {
      if (!["user", "assistant"].includes(message.role)) throw new Error("a role is unknown");
      return {
        role: message.role,
        content: needed(message.content, "string", "content"),
        reasoning: optional(message.reasoning, "string"),
        calls: Array.isArray(message.calls)
          ? message.calls.map((call) => ({ name: `${call.name}`, arguments: `${call.arguments}` }))
          : undefined,
        finish: optional(message.finish, "string"),
        error: optional(message.error, "string"),
        statistics: numbers(message.statistics),
      };
    }),
  };
}

function numbers(given) {
  if (typeof given !== "object" || given === null) return undefined;
  return Object.fromEntries(Object.entries(given).filter(([, value]) => Number.isFinite(value)));
}

const optional = (value, type) => (typeof value === type ? value : undefined);

function needed(value, type, name) {
  if (typeof value !== type || value === null) throw new Error(`${name} is missing`);
  return value;
}
