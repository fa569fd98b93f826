// Vercel AI SDK, which checks each chunk against strict schemas, by both providers that reach such an API.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embedMany, generateText, stepCountIs, streamText, tool } from "ai";
import { Forecast, ask, holdPlace, limitedKey, notingFetch, question, stage, url } from "./stage.mjs";

const providers = {
  openai: (options = {}) => createOpenAI({ baseURL: url, apiKey: stage.key, ...options }).chat,
  compatible: (options = {}) =>
    createOpenAICompatible({
      name: "cluster", baseURL: url, apiKey: stage.key, includeUsage: true, supportsStructuredOutputs: true, ...options,
    }),
};
const short = { prompt: question, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const weather = tool({ description: "The weather", inputSchema: Forecast });

// Every part, and what failed: streamText tells errors as parts, and does not throw.
async function readAll(result) {
  const parts = [];
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    parts.push(part);
  }
  return parts;
}

for (const [name, make] of Object.entries(providers)) {
  const model = make()(stage.model);

  test(`${name}: chat and streaming at each node`, async () => {
    for (const baseURL of stage.urls) {
      const here = make({ baseURL })(stage.model);
      const whole = await generateText({ model: here, ...short });
      assert.ok(whole.text);
      assert.ok(["stop", "length"].includes(whole.finishReason));
      assert.equal(whole.usage.totalTokens, whole.usage.inputTokens + whole.usage.outputTokens);
      const result = streamText({ model: here, ...short });
      const parts = await readAll(result);
      assert.equal(parts.filter((part) => part.type === "text-delta").map((part) => part.text).join(""), whole.text);
      assert.equal(await result.finishReason, whole.finishReason);
      assert.equal((await result.usage).outputTokens, whole.usage.outputTokens);
    }
  });

  test(`${name}: seed and stop`, async () => {
    const wanted = { model, ...short, temperature: 1.5, seed: 7 };
    assert.equal((await generateText(wanted)).text, (await generateText(wanted)).text);
    const { text } = await generateText({ model, ...short });
    const word = text.split(/\s+/)[3];
    const cut = await generateText({ model, ...short, stopSequences: [word] });
    assert.equal(cut.text, text.slice(0, text.indexOf(word)));
    assert.equal(cut.finishReason, "stop");
  });

  for (const toolChoice of ["none", "auto"]) {
    test(`${name}: tools that need not be called: ${toolChoice}`, async () => {
      const answer = await generateText({ model, ...short, tools: { weather }, toolChoice });
      assert.ok(answer.text || answer.toolCalls.length);
      if (toolChoice === "none") assert.equal(answer.toolCalls.length, 0);
    });
  }

  for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
    test(`${name}: forced tools, whole and streamed: ${toolChoice.type ?? toolChoice}`, async () => {
      // Up to 16 calls: the model was taught no tools, and this SDK has no general word for one call at most.
      const wanted = { model, prompt: question, temperature: 0, maxRetries: 0, tools: { weather }, toolChoice };
      const answer = await generateText(wanted);
      assert.equal(answer.finishReason, "tool-calls");
      assert.ok(answer.toolCalls.length >= 1);
      for (const call of answer.toolCalls) Forecast.parse(call.input);
      const parts = await readAll(streamText(wanted));
      assert.ok(parts.some((part) => part.type === "tool-input-delta"));
      assert.deepEqual(
        parts.filter((part) => part.type === "tool-call").map((part) => part.input),
        answer.toolCalls.map((call) => call.input),
      );
    });
  }

  test(`${name}: a tool's result goes back to the model`, async () => {
    const called = [];
    const answer = await generateText({
      model, prompt: question, temperature: 0, maxRetries: 0, stopWhen: stepCountIs(2),
      tools: { weather: tool({ inputSchema: Forecast, execute: (input) => { called.push(input); return { sun: true }; } }) },
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    });
    assert.equal(answer.steps.length, 2);
    assert.ok(called.length >= 1);
    assert.ok(answer.text);
  });

  test(`${name}: structured output by zod`, async () => {
    const wanted = { model, prompt: question, temperature: 0, maxRetries: 0, output: Output.object({ schema: Forecast }) };
    const { output } = await generateText(wanted);
    Forecast.parse(output);
    const result = streamText(wanted);
    await readAll(result);
    assert.deepEqual(await result.output, output);
  });

  test(`${name}: errors have their status and message`, async () => {
    const told = async (promise, status, pattern) =>
      assert.rejects(promise, (error) => {
        assert.ok(APICallError.isInstance(error), String(error));
        assert.equal(error.statusCode, status);
        assert.match(error.message, pattern);
        return true;
      });
    await told(generateText({ model: make({ apiKey: "sk-wrong-key" })(stage.model), ...short }), 401, /API key/);
    await told(generateText({ model: make()("absent"), ...short }), 404, /absent/);
    await told(generateText({ model, ...short, temperature: 3 }), 400, /temperature/);
    const apiKey = await limitedKey(`ai-sdk-${name}-minute`, { requests_per_minute: 1 });
    const limited = make({ apiKey })(stage.model);
    await generateText({ model: limited, ...short });
    await told(generateText({ model: limited, ...short }), 429, /requests per minute/);
    await assert.rejects(readAll(streamText({ model: make()("absent"), ...short, onError() {} })), APICallError);
  });

  test(`${name}: the client's own retries wait out a limit`, async () => {
    const apiKey = await limitedKey(`ai-sdk-${name}-concurrency`, { concurrency: 1 });
    const free = await holdPlace(apiKey);
    const fetch = notingFetch();
    fetch.seen(429).then(free);
    const answer = await generateText({ model: make({ apiKey, fetch })(stage.model), ...short, maxRetries: 6 });
    assert.ok(answer.text);
    assert.equal(fetch.statuses[0], 429);
    assert.equal(fetch.statuses.at(-1), 200);
  });

  test(`${name}: embeddings`, async () => {
    const provider = name === "openai" ? createOpenAI({ baseURL: url, apiKey: stage.key }) : make();
    const embedder = (provider.embeddingModel ?? provider.textEmbeddingModel)(stage.embedding_model);
    const { embeddings, usage } = await embedMany({ model: embedder, values: ["A node", "The mesh"] });
    assert.equal(embeddings.length, 2);
    assert.ok(usage.tokens > 0);
    for (const row of embeddings) assert.ok(Math.abs(row.reduce((sum, value) => sum + value * value, 0) - 1) < 1e-3);
  });

  test(`${name}: a stream outlives its node`, async () => {
    // The SDK has no word for it, and an answer of a few words would be over before its node is killed.
    const fetchLong = (input, init) =>
      fetch(input, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ignore_eos: true }) });
    const model = make({ fetch: fetchLong })(stage.model);
    const wanted = { model, prompt: question, temperature: 0, maxOutputTokens: 900, maxRetries: 0 };
    const whole = await generateText(wanted);
    let text = "";
    let killed = false;
    for await (const part of streamText(wanted).fullStream) {
      if (part.type === "error") throw part.error;
      if (part.type !== "text-delta") continue;
      text += part.text;
      if (!killed) killed = Boolean(await ask("/kill-executor"));
    }
    assert.equal(text, whole.text);
    await ask("/heal");
  });
}
