// The official Node client.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { Forecast, ask, holdPlace, limitedKey, messages, notingFetch, stage, url } from "./stage.mjs";

const model = stage.model;
const make = (options = {}) => new OpenAI({ baseURL: url, apiKey: stage.key, maxRetries: 0, timeout: 60_000, ...options });
const client = make();
const greedy = { model, messages, temperature: 0, max_tokens: 24 };
const long = { model, messages, temperature: 0, max_tokens: 900, ignore_eos: true };
const weather = { ...zodFunction({ name: "weather", parameters: Forecast }) };
const named = { type: "function", function: { name: "weather" } };

async function readText(stream) {
  let text = "";
  for await (const chunk of stream) text += chunk.choices[0]?.delta.content ?? "";
  return text;
}

for (const [index, baseURL] of stage.urls.entries()) {
  test(`chat, streaming and models at node ${index + 1}`, async () => {
    const here = make({ baseURL });
    const whole = await here.chat.completions.create(greedy);
    assert.equal(whole.choices[0].message.role, "assistant");
    assert.ok(whole.choices[0].message.content);
    assert.ok(whole._request_id);
    for (const withUsage of [true, false]) {
      const options = withUsage ? { stream_options: { include_usage: true } } : {};
      const chunks = [];
      for await (const chunk of await here.chat.completions.create({ ...greedy, stream: true, ...options })) chunks.push(chunk);
      const told = chunks.filter((chunk) => chunk.choices.length);
      assert.equal(told[0].choices[0].delta.role, "assistant");
      assert.equal(told.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole.choices[0].message.content);
      const reasons = told.map((chunk) => chunk.choices[0].finish_reason);
      assert.equal(reasons.pop(), whole.choices[0].finish_reason);
      assert.ok(reasons.every((reason) => reason === null));
      assert.equal(chunks.length - told.length, withUsage ? 1 : 0);
      if (withUsage) assert.equal(chunks.at(-1).usage.total_tokens, whole.usage.total_tokens);
    }
    const names = [];
    for await (const one of here.models.list()) names.push(one.id);
    assert.ok(names.includes(model));
    assert.equal((await here.models.retrieve(model)).object, "model");
  });
}

test("the stream helper puts an answer together", async () => {
  const whole = await client.chat.completions.create(greedy);
  const runner = client.chat.completions.stream({ ...greedy, stream_options: { include_usage: true } });
  assert.equal(await runner.finalContent(), whole.choices[0].message.content);
  assert.equal((await runner.totalUsage()).total_tokens, whole.usage.total_tokens);
});

test("n and seed", async () => {
  const wanted = { model, messages, n: 3, seed: 11, temperature: 2, max_tokens: 20 };
  const texts = (await client.chat.completions.create(wanted)).choices.map((choice) => choice.message.content);
  assert.equal(new Set(texts).size, 3);
  const streamed = ["", "", ""];
  for await (const chunk of await client.chat.completions.create({ ...wanted, stream: true })) {
    for (const choice of chunk.choices) streamed[choice.index] += choice.delta.content ?? "";
  }
  assert.deepEqual(streamed, texts);
});

test("logprobs and stop", async () => {
  const answer = await client.chat.completions.create({ ...greedy, max_tokens: 8, logprobs: true, top_logprobs: 3 });
  assert.equal(answer.choices[0].logprobs.content.length, 8);
  for (const row of answer.choices[0].logprobs.content) assert.equal(row.token, row.top_logprobs[0].token);
  const text = (await client.chat.completions.create(greedy)).choices[0].message.content;
  const word = text.split(/\s+/)[3];
  const cut = await client.chat.completions.create({ ...greedy, stop: word });
  assert.equal(cut.choices[0].message.content, text.slice(0, text.indexOf(word)));
  assert.equal(cut.choices[0].finish_reason, "stop");
});

for (const choice of ["none", "auto"]) {
  test(`tools that need not be called: ${choice}`, async () => {
    const answer = await client.chat.completions.create({ ...greedy, tools: [weather], tool_choice: choice });
    const { message } = answer.choices[0];
    assert.ok(message.content || message.tool_calls);
    if (choice === "none") assert.equal(message.tool_calls, undefined);
  });
}

for (const choice of ["required", named]) {
  test(`forced tools, whole and streamed: ${choice.type ?? choice}`, async () => {
    const wanted = { model, messages, tools: [weather], tool_choice: choice, parallel_tool_calls: false, temperature: 0 };
    const answer = await client.chat.completions.create(wanted);
    assert.equal(answer.choices[0].finish_reason, "tool_calls");
    assert.equal(answer.choices[0].message.tool_calls.length, 1);
    const { id, function: called } = answer.choices[0].message.tool_calls[0];
    assert.match(id, /^call_/);
    assert.equal(called.name, "weather");
    Forecast.parse(JSON.parse(called.arguments));
    const indices = new Set();
    let streamed = "";
    for await (const chunk of await client.chat.completions.create({ ...wanted, stream: true })) {
      for (const delta of chunk.choices[0].delta.tool_calls ?? []) {
        indices.add(delta.index);
        streamed += delta.function.arguments ?? "";
      }
    }
    assert.deepEqual([...indices], [0]);
    assert.equal(streamed, called.arguments);
    const final = await client.chat.completions.stream(wanted).finalChatCompletion();
    Forecast.parse(final.choices[0].message.tool_calls[0].function.parsed_arguments);
  });
}

test("runTools calls the function and goes on with its result", async () => {
  const called = [];
  const runner = client.chat.completions.runTools({
    model, messages, temperature: 0, max_tokens: 200, parallel_tool_calls: false, tool_choice: named,
    tools: [{ type: "function", function: { name: "weather", description: "The weather", parse: JSON.parse,
      parameters: weather.function.parameters, function: (args) => { called.push(args); return "sunny"; } } }],
  });
  await runner.done();
  assert.equal(called.length, 1);
  Forecast.parse(called[0]);
});

test("structured output by zod", async () => {
  const format = zodResponseFormat(Forecast, "forecast");
  const answer = await client.chat.completions.parse({ model, messages, temperature: 0, response_format: format });
  Forecast.parse(answer.choices[0].message.parsed);
  const streamed = await client.chat.completions
    .stream({ model, messages, temperature: 0, response_format: format })
    .finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, answer.choices[0].message.parsed);
});

test("completions", async () => {
  const wanted = { model, prompt: ["A node", "The mesh"], temperature: 0, max_tokens: 8, echo: true };
  const texts = (await client.completions.create(wanted)).choices.map((choice) => choice.text);
  const streamed = ["", ""];
  for await (const chunk of await client.completions.create({ ...wanted, stream: true })) {
    for (const choice of chunk.choices) streamed[choice.index] += choice.text;
  }
  assert.deepEqual(streamed, texts);
  assert.ok(texts[1].startsWith("The mesh"));
});

for (const encoding of ["float", undefined]) {
  test(`embeddings: ${encoding ?? "the client's own base64"}`, async () => {
    const options = encoding ? { encoding_format: encoding } : {};
    const answer = await client.embeddings.create({ model: stage.embedding_model, input: ["A node", "The mesh"], ...options });
    assert.deepEqual(answer.data.map((row) => row.index), [0, 1]);
    for (const row of answer.data) {
      assert.ok(Math.abs(row.embedding.reduce((sum, value) => sum + value * value, 0) - 1) < 1e-3);
    }
  });
}

test("errors have their own classes", async () => {
  await assert.rejects(make({ apiKey: "sk-wrong-key" }).models.list(), OpenAI.AuthenticationError);
  await assert.rejects(client.chat.completions.create({ ...greedy, model: "absent" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...greedy, temperature: 3 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const other = await limitedKey("openai-node-other", { models: ["other"] });
  await assert.rejects(make({ apiKey: other }).chat.completions.create(greedy), OpenAI.PermissionDeniedError);
});

test("requests per minute are 429 with headers", async () => {
  const limited = make({ apiKey: await limitedKey("openai-node-minute", { requests_per_minute: 1 }) });
  await limited.chat.completions.create({ ...greedy, max_tokens: 1 });
  await assert.rejects(limited.chat.completions.create({ ...greedy, max_tokens: 1 }), (error) => {
    assert.ok(error instanceof OpenAI.RateLimitError);
    assert.equal(error.code, "rate_limit_exceeded");
    const after = Number(error.headers.get("retry-after"));
    assert.ok(after > 0 && after < 60, `retry-after ${after}`);
    return true;
  });
});

test("the client's own retries wait out a limit", async () => {
  const apiKey = await limitedKey("openai-node-concurrency", { concurrency: 1 });
  const free = await holdPlace(apiKey);
  const fetch = notingFetch();
  fetch.seen(429).then(free);
  const answer = await make({ apiKey, maxRetries: 8, fetch }).chat.completions.create({ ...greedy, max_tokens: 1 });
  assert.equal(answer.choices[0].finish_reason, "length");
  assert.equal(fetch.statuses[0], 429);
  assert.equal(fetch.statuses.at(-1), 200);
});

test("a stream outlives its node, and retries find it when it is back", async () => {
  const whole = (await client.chat.completions.create(long)).choices[0].message.content;
  let text = "";
  let killed = "";
  for await (const chunk of await client.chat.completions.create({ ...long, stream: true })) {
    text += chunk.choices[0].delta.content ?? "";
    if (text && !killed) killed = (await ask("/kill-executor")).url;
  }
  assert.equal(text, whole);
  await assert.rejects(make({ baseURL: killed }).models.list(), OpenAI.APIConnectionError);
  await ask("/revive");
  const back = await make({ baseURL: killed, maxRetries: 20 }).chat.completions.create({ ...greedy, max_tokens: 1 });
  assert.equal(back.choices[0].finish_reason, "length");
});
