// A chat over /v1/chat/completions. Comments in the stream tell which node goes on with an answer, and why.

import { byId, make, setText } from "./dom.js";
import { moveReason, rate, seconds } from "./format.js";

const MESSAGES_MAX = 40; // of the conversation, sent with each question
const ANNOUNCED_CHARS = 600;
const COLOURS = 6;
let messages = []; // a new list with each conversation: an answer that ends late belongs to the former one
const colours = new Map(); // by node, in the order in which they served
let running = null; // the AbortController of the answer that comes

export function startChat() {
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const question = byId("question").value.trim();
    if (question && !running) ask(question);
  });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("chat-form").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    byId("talk").replaceChildren();
    byId("question").focus();
  });
}

export function offerModels(status) {
  const names = [...new Set(status.members.flatMap((member) => member.models.map((model) => model.name)))].sort();
  const select = byId("model");
  const offered = [...select.options].map((option) => option.value);
  if (names.join("\n") === offered.join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(chosen)) select.value = chosen;
}

async function ask(question) {
  const conversation = messages;
  conversation.push({ role: "user", content: question });
  byId("question").value = "";
  byId("talk").append(make("li", { class: "mine" }, make("p", { class: "who" }, "You"), make("p", {}, question)));
  const answer = new Answer();
  byId("talk").append(answer.item);
  scroll();
  running = new AbortController();
  setBusy(true);
  try {
    await answer.read(conversation, running.signal);
    conversation.push({ role: "assistant", content: answer.text });
    answer.finish("");
  } catch (error) {
    answer.finish(error.name === "AbortError" ? "stopped" : error.message);
    // What was seen stays in the conversation; a question without any answer is taken back.
    if (answer.text) conversation.push({ role: "assistant", content: answer.text });
    else conversation.pop();
    if (error.status === 401) {
      byId("api-key").closest("details").open = true;
      byId("api-key").focus();
    }
  }
  while (conversation.length > MESSAGES_MAX) conversation.shift();
  running = null;
  setBusy(false);
}

function setBusy(isBusy) {
  byId("send").disabled = isBusy;
  byId("stop").disabled = !isBusy;
}

function scroll() {
  const talk = byId("talk");
  talk.scrollTop = talk.scrollHeight;
}

const say = (text) => (byId("chat-news").textContent = text);

class Answer {
  constructor() {
    this.text = "";
    this.node = "";
    this.tokens = null;
    this.startedAt = performance.now();
    this.firstAt = null;
    this.body = make("p", { class: "text" });
    this.path = make("p", { class: "path" }, "waiting for a node …");
    this.fault = make("p", { class: "fault" });
    this.fault.hidden = true;
    this.item = make("li", { class: "theirs" }, make("p", { class: "who" }, "Assistant"), this.body, this.path, this.fault);
    this.part = null;
    say("The answer is being written.");
  }

  async read(messages, signal) {
    const headers = { "content-type": "application/json" };
    const key = byId("api-key").value.trim();
    if (key) headers.authorization = `Bearer ${key}`;
    const body = {
      model: byId("model").value,
      messages,
      stream: true,
      stream_options: { include_usage: true },
      temperature: Number(byId("temperature").value),
      max_tokens: Number(byId("max-tokens").value) || 512,
    };
    let response;
    try {
      response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The node that this page came from does not answer.");
    }
    if (!response.ok) {
      const refusal = await response.json().catch(() => null);
      throw Object.assign(new Error(refusal?.error?.message ?? `The node answered ${response.status}.`), {
        status: response.status,
      });
    }
    this.servedBy(response.headers.get("x-ai-cluster-node") ?? "");
    if (!(await this.readEvents(response.body))) {
      throw new Error("The stream broke: the node that this page came from is gone, and with it the end of the answer.");
    }
  }

  /** True where the answer came to its end. */
  async readEvents(stream) {
    const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      let chunk;
      try {
        chunk = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        return false;
      }
      if (chunk.done) return false;
      buffer += chunk.value;
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        if (block === "data: [DONE]") return true;
        if (block.startsWith(": ")) this.comment(block.slice(2));
        else if (block.startsWith("data: ")) this.take(JSON.parse(block.slice(6)));
      }
    }
  }

  comment(text) {
    const [kind, origin, node, reason] = text.split(" ");
    if (kind === "failover" || kind === "retry" || kind === "hedge") this.movedTo(origin, node, reason);
  }

  servedBy(node) {
    this.node = node;
    this.path.replaceChildren("served by ", chip(node));
    this.begin(node);
  }

  movedTo(origin, node, reason) {
    this.node = node;
    this.path.append(` → `, chip(node), ` (${origin}: ${moveReason(reason)})`);
    if (this.text) this.body.append(make("span", { class: "handoff" }, `⤳ ${node}`));
    this.begin(node);
    say(`${node} goes on with the answer: ${origin}, ${moveReason(reason)}.`);
  }

  begin(node) {
    this.part = make("span", { class: `part colour-${colourOf(node)}`, "data-node": node });
    this.body.append(this.part);
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const text = chunk.choices?.[0]?.delta?.content;
    if (!text) return;
    this.firstAt ??= performance.now();
    this.text += text;
    this.part.append(text);
    this.part.normalize();
    scroll();
  }

  finish(fault) {
    const now = performance.now();
    this.item.dataset.state = fault ? "failed" : "done";
    if (this.firstAt !== null && this.tokens !== null) {
      const speed = this.tokens / Math.max(0.001, (now - this.startedAt) / 1000);
      this.path.append(`; first token in ${seconds((this.firstAt - this.startedAt) / 1000)}, ${rate(speed)}`);
    }
    this.fault.hidden = !fault;
    setText(this.fault, fault);
    if (!this.node) this.path.hidden = true;
    say(fault ? `The answer ended: ${fault}` : `Answer from ${this.node}: ${this.text.slice(0, ANNOUNCED_CHARS)}`);
    scroll();
  }
}

function chip(node) {
  return make("strong", { class: `chip colour-${colourOf(node)}` }, node);
}

function colourOf(node) {
  if (!colours.has(node)) colours.set(node, colours.size % COLOURS);
  return colours.get(node);
}
