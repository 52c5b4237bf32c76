// A pane: the settings and the text of one model. Two panes answer the same prompt side by side.

import { events, nameOf, texts } from "./tokens.js";

const TOP = 10;

/** Name, default, limits and meaning of each setting. An empty field is not sent. */
const FIELDS = [
  ["temperature", 0.8, { min: 0, max: 2, step: 0.05 }, "How boldly tokens are drawn. 0: always the likeliest one; 1: as the model predicts."],
  ["max_tokens", 120, { min: 1, step: 1 }, "The longest answer, in tokens."],
  ["top_p", 1, { min: 0.01, max: 1, step: 0.01 }, "Draw from the likeliest tokens that together have this probability. 1: all."],
  ["top_k", 0, { min: 0, step: 1 }, "Draw from this many likeliest tokens. 0: all."],
  ["min_p", 0, { min: 0, max: 1, step: 0.01 }, "Drop tokens less likely than this share of the likeliest one. 0: none."],
  ["repetition_penalty", 1, { min: 0.1, max: 10, step: 0.05 }, "Above 1: tokens that occurred become less likely."],
  ["presence_penalty", 0, { min: -2, max: 2, step: 0.1 }, "Above 0: tokens that occurred in the answer become less likely, once."],
  ["frequency_penalty", 0, { min: -2, max: 2, step: 0.1 }, "Above 0: the same, for each time that they occurred."],
  ["min_tokens", 0, { min: 0, step: 1 }, "The text does not end before so many tokens."],
  ["seed", "", { min: 0, step: 1 }, "The same seed and settings give the same text. Empty: another text each time."],
];

export class Pane {
  /** `shared` has `key()`, `popup`, and `changed()`, which is called when a pane starts or ends. */
  constructor(parent, title, shared, { address = "" } = {}) {
    const copy = document.querySelector("#pane-template").content.cloneNode(true);
    this.element = copy.querySelector(".pane");
    this.shared = shared;
    this.find = (selector) => this.element.querySelector(selector);
    this.textBox = this.find(".text");
    this.find("h2").textContent = title;
    this.prompt = [];       // tokens that the model read
    this.tokens = [];       // tokens of the answer
    this.said = "";         // its text, without a stop text and without special tokens
    this.ended = false;     // whether said is whole
    this.messages = [];     // of a conversation, before the answer
    this.source = null;     // {prompt} or {messages}
    this.history = [];
    this.running = null;
    this.#makeFields(address);
    parent.append(this.element);
    this.find(".undo").onclick = () => this.undo();
    this.textBox.onclick = (event) => this.#show(event.target.closest(".token"));
    this.textBox.onmouseover = (event) => {
      const token = event.target.closest(".token");
      if (token && !this.shared.popup.pinned) this.#show(token, { pinned: false });
    };
    this.textBox.onmouseleave = () => this.shared.popup.leave();
    this.textBox.onkeydown = (event) => this.#keys(event);
    this.#makeAttention();
  }

  get base() { return this.address.value.trim().replace(/\/+$/, ""); }

  #makeFields(address) {
    const box = this.find(".fields");
    this.inputs = {};
    for (const [name, value, limits, meaning] of FIELDS) {
      const label = document.createElement("label");
      const input = Object.assign(document.createElement("input"), { type: "number", value, ...limits, name });
      label.append(name.replaceAll("_", " "), input, small(meaning));
      box.append(label);
      this.inputs[name] = input;
    }
    const stop = document.createElement("label");
    stop.className = "wide";
    this.stopText = Object.assign(document.createElement("textarea"), { rows: 2, name: "stop" });
    stop.append("stop", this.stopText, small("The answer ends before one of these texts, one a line (\\n is a new line)."));
    const bias = document.createElement("label");
    bias.className = "wide";
    this.bias = Object.assign(document.createElement("input"), { name: "logit_bias", pattern: "\\s*(\\d+=-?\\d+(\\.\\d+)?(\\s+|$))*", placeholder: "262=-100 11=2.5" });
    bias.append("logit bias", this.bias, small("Numbers that are added to the logits of token ids, -100 to 100. -100: never."));
    const server = document.createElement("label");
    server.className = "wide";
    this.address = Object.assign(document.createElement("input"), { type: "url", value: address, name: "server", placeholder: "this server" });
    server.append("server", this.address, small("Another gpt serve on this machine, such as http://127.0.0.1:9000, without a key, started with --allow_origin and this page's address."));
    this.address.onchange = () => this.greet();
    box.append(stop, bias, server);
  }

  settings() {
    const asked = { logprobs: TOP, stream: true, return_token_ids: true };
    for (const [name, input] of Object.entries(this.inputs)) {
      if (!input.reportValidity()) throw new Error(`${name.replaceAll("_", " ")}: ${input.validationMessage}`);
      if (input.value !== "") asked[name] = Number(input.value);
    }
    if (!this.bias.reportValidity()) throw new Error(`logit bias: ${this.bias.validationMessage}`);
    const biases = this.bias.value.split(/\s+/).filter(Boolean).map((pair) => pair.split("="));
    if (biases.length) asked.logit_bias = Object.fromEntries(biases.map(([id, value]) => [id, Number(value)]));
    const stops = this.stopText.value.split("\n").filter(Boolean);
    if (stops.length) asked.stop = stops.map((text) => text.replaceAll("\\n", "\n"));
    return asked;
  }

  async ask(path, body, signal) {
    const headers = { "Content-Type": "application/json" };
    const isOwn = new URL(this.base || "/", location).origin === location.origin;
    if (this.shared.key() && isOwn) headers.Authorization = `Bearer ${this.shared.key()}`;
    const response = await fetch(this.base + path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    return response;
  }

  /** Find out which model answers. */
  async greet() {
    try {
      const { data } = await (await this.ask("/v1/models")).json();
      this.model = data[0];
      this.find("h2").textContent = this.model.id;
      this.#say("");
    } catch (error) {
      this.#say(error.message, true);
    }
    this.shared.changed();
    return this.model;
  }

  /** Continue `source`, {prompt} or {messages}, after the tokens `begun` of its answer. */
  async run(source, begun = []) {
    this.stop();
    if (this.tokens.length || this.prompt.length) this.#remember();
    const said = this.#textOf(begun);
    Object.assign(this, { source, messages: source.messages ?? [], tokens: begun, said, ended: false });
    if (!begun.length) this.prompt = [];
    this.draw();
    const running = (this.running = new AbortController());
    this.element.classList.add("busy");
    this.shared.changed();
    const start = performance.now();
    try {
      const asked = this.settings();
      const ids = begun.map((token) => token.id);
      let path = "/v1/completions";
      if (source.messages) {
        path = "/v1/chat/completions";
        Object.assign(asked, { messages: source.messages, top_logprobs: TOP, logprobs: true, answer_token_ids: ids });
      } else {
        asked.prompt = ids.length ? [...this.prompt.map((token) => token.id), ...ids] : source.prompt;
      }
      this.#say("reading");
      for await (const event of events(await this.ask(path, asked, running.signal))) {
        if (running.signal.aborted) return;
        const choice = event.choices[0];
        if (choice?.prompt_tokens && !begun.length) this.prompt = choice.prompt_tokens;
        this.tokens = [...this.tokens, ...(choice?.tokens ?? [])];
        this.said += choice?.delta?.content ?? choice?.text ?? "";
        this.ended = Boolean(choice?.finish_reason);
        this.draw();
        const made = this.tokens.length - begun.length;
        const rate = made / ((performance.now() - start) / 1000);
        this.#say(`${made} tokens, ${rate.toFixed(0)} per second${choice?.finish_reason ? `, ended: ${choice.finish_reason}` : ""}`);
      }
    } catch (error) {
      if (!running.signal.aborted) this.#say(error.message, true);
    } finally {
      if (this.running === running) {
        this.running = null;
        this.element.classList.remove("busy");
        this.shared.changed();
      }
    }
  }

  stop() {
    if (!this.running) return;
    this.running.abort();
    this.said = this.#textOf(this.tokens);
    this.#say(`stopped with ${this.tokens.length} tokens`);
  }

  /** Go on from another token at `index` of the answer. */
  fork(index, other) {
    const old = this.tokens[index];
    const chosen = { ...other, top: old.top, chosen: true };
    return this.run(this.source, [...this.tokens.slice(0, index), chosen]);
  }

  #remember() {
    const { prompt, tokens, said, ended, messages, source } = this;
    this.history.push({ prompt, tokens, said, ended, messages, source });
    this.find(".undo").disabled = false;
  }

  undo() {
    this.stop();
    Object.assign(this, this.history.pop() ?? {});
    this.find(".undo").disabled = !this.history.length;
    this.draw();
  }

  clear() {
    this.stop();
    if (this.tokens.length || this.prompt.length) this.#remember();
    Object.assign(this, { prompt: [], tokens: [], said: "", ended: false, messages: [], source: null });
    this.draw();
    this.#say("");
  }

  /** The text of tokens that are the beginning of this answer. */
  #textOf(tokens) {
    const text = texts(tokens.filter((token) => !token.special)).join("");
    return this.#opens(text) ? text.slice(1) : text;
  }

  /** Whether the tokens' text begins with a space that is not the answer's. */
  #opens(text) { return text.startsWith(" ") && this.said !== "" && !this.said.startsWith(" "); }

  draw() { this.#look(null); }

  /** Messages and answer; where attention is shown, a conversation is shown as the model reads it. */
  #render() {
    const box = document.createDocumentFragment();
    const isChat = Boolean(this.source?.messages);
    const asTokens = !isChat || this.weights;
    for (const { role, content } of asTokens ? [] : this.messages) {
      const message = document.createElement("div");
      message.className = `message ${role}`;
      message.dataset.role = role;
      message.textContent = content;
      box.append(message);
    }
    const answer = document.createElement("div");
    if (isChat) Object.assign(answer, { className: "message assistant" }).dataset.role = asTokens ? "as the model reads it" : "assistant";
    if (asTokens) answer.append(this.#spans(this.prompt, "prompt"));
    answer.append(this.#spans(this.tokens, "made"));
    if (this.source) box.append(answer);
    this.textBox.replaceChildren(box);
  }

  #spans(tokens, kind) {
    const group = document.createElement("span");
    group.className = kind;
    const shown = texts(tokens);
    let written = this.#opens(shown.join("")) ? -1 : 0;
    tokens.forEach((token, index) => {
      const span = document.createElement("span");
      span.className = token.chosen ? "token chosen" : "token";
      const isPast = this.ended && written >= this.said.length;
      const isUnsaid = kind === "made" && (token.special || isPast);  // an end, or a stop text
      span.classList.toggle("unsaid", Boolean(isUnsaid));
      if (!token.special) written += shown[index].length;
      span.textContent = shown[index];
      span.dataset.index = index;
      if (kind === "made") {
        span.style.setProperty("--p", Math.exp(token.logprob ?? 0).toFixed(3));
        span.tabIndex = index === 0 ? 0 : -1;
        span.setAttribute("role", "button");
        span.setAttribute("aria-label", `${nameOf(token)}, alternatives`);
      }
      group.append(span);
    });
    return group;
  }

  #show(span, { pinned = true } = {}) {
    if (!span || !span.closest(".made")) return;
    const index = Number(span.dataset.index);
    this.shared.popup.show(this, index, span, pinned);
  }

  #keys(event) {
    const span = event.target.closest?.(".made .token");
    if (!span) return;
    const move = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
    if (move) {
      const next = span[move];
      if (next) {
        span.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
        this.#show(next, { pinned: false });
      }
      event.preventDefault();
    } else if (event.key === "Enter" || event.key === " ") {
      this.#show(span);
      event.preventDefault();
    }
  }

  #makeAttention() {
    const [layer, head] = [this.find(".layer"), this.find(".head")];
    layer.oninput = head.oninput = () => this.#paint();
    this.find(".close").onclick = () => this.#look(null);
  }

  /** Show where the token at `index` of the answer looked when it was read. */
  async attend(index) {
    const ids = [...this.prompt, ...this.tokens.slice(0, index + 1)].map((token) => token.id);
    try {
      const { weights } = await (await this.ask("/v1/attention", { token_ids: ids })).json();
      this.#look(weights, index);
    } catch (error) {
      this.#say(error.message, true);
    }
  }

  #look(weights, index) {
    this.weights = weights;
    this.#render();
    this.find(".attention").hidden = !weights;
    this.textBox.classList.toggle("looked", Boolean(weights));
    if (!weights) return;
    this.asking = index;
    this.find(`.made .token[data-index="${index}"]`)?.focus();
    this.find(".of").textContent = nameOf(this.tokens[index]);
    this.find(".layer").max = weights.length;       // the first stop is the mean over all
    this.find(".head").max = weights[0].length;
    this.#paint();
  }

  #paint() {
    const [layer, head] = [this.find(".layer"), this.find(".head")].map((input) => Number(input.value));
    this.find(".layer + output").value = layer ? `${layer} of ${this.weights.length}` : "mean";
    this.find(".head + output").value = head ? `${head} of ${this.weights[0].length}` : "mean";
    const layers = layer ? [this.weights[layer - 1]] : this.weights;
    const rows = layers.flatMap((heads) => (head ? [heads[head - 1]] : heads));
    const mean = rows[0].map((_, at) => rows.reduce((sum, row) => sum + row[at], 0) / rows.length);
    // Heads that need nothing look at the first token: the scale is that of the others.
    const most = Math.max(...mean.slice(1), 1e-9);
    const inPrompt = [...this.textBox.querySelectorAll(".prompt .token")];
    const inAnswer = [...this.textBox.querySelectorAll(".made .token")];
    const start = this.prompt.length;
    inPrompt.forEach((span, at) => mark(span, mean[at], most));
    inAnswer.forEach((span, at) => {
      mark(span, mean[start + at], most);
      span.classList.toggle("asking", at === this.asking);
    });
  }

  #say(text, bad = false) {
    const status = this.find(".status");
    status.textContent = text;
    status.classList.toggle("bad", bad);
  }
}

function mark(span, weight = 0, most = 1) {
  span.style.setProperty("--w", Math.min(1, weight / most).toFixed(3));
  span.title = weight ? weight.toFixed(4) : "";
}

function small(text) {
  return Object.assign(document.createElement("small"), { textContent: text });
}
