// What the page asks of the server. Paths are relative: the page may stand below a prefix.

const PAUSE = 1000; // ms between two questions whether the server is ready

/** The server's answer is an error, or none arrives; the message is for people. */
export class ServerError extends Error {}

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

const WAITING = {
  loading: "The model is being loaded …",
  draining: "The server is ending; waiting for it to start again …",
  unreachable: "The server cannot be reached; trying again …",
};

/** Resolves when the server answers requests; says through `onWait(text)` what it waits for. */
export async function ready(signal, onWait) {
  for (;;) {
    let state = "unreachable";
    try {
      const response = await fetch("health", { signal });
      state = (await response.json()).status;
    } catch (error) {
      if (signal?.aborted) throw error;
    }
    if (state === "ok") return;
    onWait(WAITING[state] ?? WAITING.unreachable);
    await sleep(PAUSE);
  }
}

/** `/props`: the model, its devices, the defaults. */
export async function props() {
  return (await request("props")).json();
}

/** The chunks of an answer, as `/v1/chat/completions` streams them. */
export async function* chat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await unbroken(reader.read(), signal);
    if (done) throw new ServerError("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ServerError(chunk.error.message);
      yield chunk;
    }
  }
}

async function request(path, options) {
  const response = await unbroken(fetch(path, options), options?.signal);
  if (response.ok) return response;
  const text = await response.text();
  let message = `The server answers ${response.status} ${response.statusText}.`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // a proxy's own page
  }
  throw new ServerError(message);
}

/** What a promise of the network gives; its failures are told in plain words. */
async function unbroken(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ServerError("The connection to the server is broken; is it still running?");
  }
}
