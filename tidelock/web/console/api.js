// The one place that speaks HTTP. The key goes into a header and nowhere else; whole numbers come back exact.

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Strings are matched too, so that digits inside them are left alone.
const WORDS = /"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;
const LONG = /^-?\d{16,}$/;

/** JSON in which whole numbers too long for a double become decimal strings (BigInt takes them). */
export function parseExact(text) {
  return JSON.parse(text.replace(WORDS, (found) => (LONG.test(found) ? `"${found}"` : found)));
}

export class Api {
  /** `onGone` is called when the key is no longer good. */
  constructor(key, onGone = () => {}) {
    this.key = key;
    this.onGone = onGone;
  }

  get(path, query = {}, signal = undefined) {
    return this.#json("GET", path, { query, signal });
  }

  post(path, body) {
    return this.#json("POST", path, { body });
  }

  delete(path) {
    return this.#json("DELETE", path, {});
  }

  /** All items of a list, page after page, at most `most`. */
  async all(path, query = {}, most = 1000) {
    const items = [];
    let after;
    do {
      const page = await this.get(path, { limit: 100, ...query, after });
      items.push(...page.data);
      after = page.has_more && page.last_id ? page.last_id : null;
    } while (after && items.length < most);
    return items;
  }

  /** What needs no key: text, as it is. */
  async text(path, signal) {
    return (await this.#fetch("GET", path, { signal })).text();
  }

  /** Server-sent events until `signal` aborts or the stream ends; returns why it ended. */
  async stream(path, query, onEvent, signal) {
    const response = await this.#fetch("GET", path, { query, signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const name = lines.find((l) => l.startsWith("event: "))?.slice(7);
        const data = lines.find((l) => l.startsWith("data: "))?.slice(6);
        if (name) onEvent(name, data ? parseExact(data) : null);
      }
    }
  }

  async #json(method, path, options) {
    const response = await this.#fetch(method, path, options);
    return parseExact(await response.text());
  }

  async #fetch(method, path, { query = {}, body, signal }) {
    const url = new URL(path, location.origin);
    for (const [name, value] of Object.entries(query)) {
      for (const one of Array.isArray(value) ? value : [value]) {
        if (one !== undefined && one !== null && one !== "") url.searchParams.append(name, one);
      }
    }
    let response;
    try {
      response = await fetch(url, {
        method,
        signal,
        cache: "no-store",
        credentials: "omit",
        headers: { authorization: `Bearer ${this.key}`, ...(body ? { "content-type": "application/json" } : {}) },
        body: body ? JSON.stringify(body) : undefined,
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached. Check that it runs, then try again.");
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    const error = new ApiError(
      response.status,
      said.error?.message ?? `the server answered ${response.status}`,
      said.error?.code,
    );
    if (response.status === 401) this.onGone(error);
    throw error;
  }
}
