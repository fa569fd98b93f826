// What every Node client is told of the mesh, read from the file that the driver wrote, and the schemas they share.
import { readFileSync } from "node:fs";
import { z } from "zod";

export const stage = JSON.parse(readFileSync(process.env.AI_CLUSTER_CONFORMANCE, "utf8"));
export const url = stage.urls[0];
export const question = "How do I add a node?";
export const messages = [{ role: "user", content: question }];

export const Forecast = z.strictObject({
  city: z.enum(["Ulm", "Bonn"]),
  days: z.int().min(0).max(9), // unbounded, this model would write digits until its context is full
});

// What tests/conformance/stage.py offers.
export async function ask(path, body = {}) {
  const response = await fetch(stage.control + path, { method: "POST", body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

export async function limitedKey(name, settings) {
  return (await ask("/keys", { name, ...settings })).key;
}

// A fetch that notes what was asked and answered, for tests of a client's own retries.
export function notingFetch() {
  const statuses = [];
  const waiting = [];
  async function noted(input, init) {
    const response = await fetch(input, init);
    statuses.push(response.status);
    waiting.filter(([status]) => status === response.status).forEach(([, resolve]) => resolve());
    return response;
  }
  noted.statuses = statuses;
  noted.seen = (status) => new Promise((resolve) => waiting.push([status, resolve]));
  return noted;
}

// One stream that holds the only place of a key with concurrency 1, until it is cancelled.
export async function holdPlace(key) {
  const response = await fetch(`${url}/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${key}` },
    body: JSON.stringify({ model: stage.model, messages, stream: true, temperature: 0, max_tokens: 900, ignore_eos: true }),
  });
  if (!response.ok) throw new Error(`the place was not had: ${response.status}`);
  const reader = response.body.getReader();
  await reader.read();
  return () => reader.cancel();
}
