// LangChain.js: ChatOpenAI.
import assert from "node:assert/strict";
import { test } from "node:test";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { Forecast, ask, holdPlace, limitedKey, notingFetch, question, stage, url } from "./stage.mjs";

const make = ({ baseURL = url, apiKey = stage.key, fetch, ...options } = {}) =>
  new ChatOpenAI({
    model: stage.model, temperature: 0, maxTokens: 24, maxRetries: 0, timeout: 60_000, apiKey, useResponsesApi: false,
    configuration: { baseURL, fetch }, ...options,
  });
const weather = tool(async ({ city }) => `sun in ${city}`, { name: "weather", description: "The weather", schema: Forecast });

async function readAll(stream) {
  let total;
  for await (const chunk of stream) total = total === undefined ? chunk : total.concat(chunk);
  return total;
}

test("chat and streaming at each node", async () => {
  for (const baseURL of stage.urls) {
    const whole = await make({ baseURL }).invoke(question);
    assert.ok(whole.content);
    for (const streamUsage of [true, false]) {
      const streamed = await readAll(await make({ baseURL, streamUsage }).stream(question));
      assert.equal(streamed.content, whole.content);
      if (streamUsage) assert.equal(streamed.usage_metadata.output_tokens, whole.usage_metadata.output_tokens);
      else assert.equal(streamed.usage_metadata, undefined);
    }
  }
});

test("n and stop", async () => {
  const { generations } = await make({ n: 3, temperature: 1.5 }).generate([[{ role: "user", content: question }]]);
  assert.equal(generations[0].length, 3);
  const text = (await make().invoke(question)).content;
  const word = text.split(/\s+/)[3];
  assert.equal((await make({ stop: [word] }).invoke(question)).content, text.slice(0, text.indexOf(word)));
});

for (const choice of ["none", "auto", "required", "weather"]) {
  test(`tools, whole and streamed: ${choice}`, async () => {
    const model = make({ maxTokens: 200 }).bindTools([weather], { tool_choice: choice, parallel_tool_calls: false, strict: true });
    for (const answer of [await model.invoke(question), await readAll(await model.stream(question))]) {
      if (choice === "none") assert.equal(answer.tool_calls.length, 0);
      if (choice === "none" || choice === "auto") {
        assert.ok(answer.content || answer.tool_calls.length);
        continue;
      }
      assert.equal(answer.tool_calls.length, 1);
      assert.equal(answer.tool_calls[0].name, "weather");
      Forecast.parse(answer.tool_calls[0].args);
    }
  });
}

test("a tool's result goes back to the model", async () => {
  const model = make({ maxTokens: 200 });
  const asked = await model.bindTools([weather], { tool_choice: "weather", parallel_tool_calls: false }).invoke(question);
  const told = await weather.invoke(asked.tool_calls[0]);
  const answer = await model.invoke([{ role: "user", content: question }, asked, told]);
  assert.ok(answer.content);
});

for (const method of ["jsonSchema", "functionCalling"]) {
  test(`structured output by zod: ${method}`, async () => {
    const model = make({ maxTokens: 200 }).withStructuredOutput(Forecast, { method, strict: true, name: "forecast" });
    Forecast.parse(await model.invoke(question));
  });
}

test("embeddings", async () => {
  const model = new OpenAIEmbeddings({ model: stage.embedding_model, apiKey: stage.key, configuration: { baseURL: url } });
  const rows = await model.embedDocuments(["A node", "The mesh"]);
  assert.equal(rows.length, 2);
  for (const row of rows) assert.ok(Math.abs(row.reduce((sum, value) => sum + value * value, 0) - 1) < 1e-3);
});

test("errors have their status", async () => {
  const told = (promise, status) => assert.rejects(promise, (error) => error.status === status || assert.fail(String(error)));
  await told(make({ apiKey: "sk-wrong-key" }).invoke(question), 401);
  await told(make({ model: "absent" }).invoke(question), 404);
  await told(make({ temperature: 3 }).invoke(question), 400);
  const limited = make({ apiKey: await limitedKey("langchain-node-minute", { requests_per_minute: 1 }) });
  await limited.invoke(question);
  await told(limited.invoke(question), 429);
});

test("the client's own retries wait out a limit", async () => {
  const apiKey = await limitedKey("langchain-node-concurrency", { concurrency: 1 });
  const free = await holdPlace(apiKey);
  const fetch = notingFetch();
  fetch.seen(429).then(free);
  const answer = await make({ apiKey, fetch, maxRetries: 8 }).invoke(question);
  assert.ok(answer.content);
  assert.equal(fetch.statuses[0], 429);
  assert.equal(fetch.statuses.at(-1), 200);
});

test("a stream outlives its node", async () => {
  const long = { maxTokens: 900, modelKwargs: { ignore_eos: true } };
  const whole = (await make(long).invoke(question)).content;
  let text = "";
  let killed = false;
  for await (const chunk of await make(long).stream(question)) {
    text += chunk.content;
    if (text && !killed) killed = Boolean(await ask("/kill-executor"));
  }
  assert.equal(text, whole);
});
