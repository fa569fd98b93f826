// API keys that have little left of a limit, for whoever has this node's admin token. The token is kept in memory alone.

import { byId, keepChildren, make, setText } from "./dom.js";

const INTERVAL_MS = 5000;
const NEAR = 0.2; // of a limit that is left
let token = "";
let timer = null;

export function startKeys() {
  byId("keys-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = byId("admin-token").value.trim();
    refresh();
  });
}

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) {
    timer = setTimeout(refresh, INTERVAL_MS);
    return;
  }
  try {
    const response = await fetch("admin/keys", { headers: { authorization: `Bearer ${token}` }, cache: "no-store" });
    if (response.status === 401) {
      setText(byId("keys-line"), "This node does not take that token.");
      byId("keys").replaceChildren();
      byId("admin-token").focus();
      return;
    }
    const body = await response.json();
    if (!response.ok) throw new Error(body.error.message);
    show(body.keys);
  } catch (error) {
    setText(byId("keys-line"), `The keys could not be read: ${error.message}`);
  }
  timer = setTimeout(refresh, INTERVAL_MS);
}

function show(keys) {
  const near = keys.filter((key) => leftOf(key) <= NEAR).sort((a, b) => leftOf(a) - leftOf(b));
  const limited = keys.filter((key) => Object.keys(key.remaining).length).length;
  setText(byId("keys-line"), `${near.length} of ${keys.length} keys are near a limit; ${limited} have one per minute.`);
  const byKey = new Map(near.map((key) => [key.id, key]));
  keepChildren(
    byId("keys"),
    [...byKey.keys()],
    () => make("li", {}, make("strong"), make("span")),
    (item, id) => {
      const key = byKey.get(id);
      setText(item.querySelector("strong"), `${key.name} (${key.id})`);
      const left = Object.entries(key.remaining).map(([kind, { limit, remaining }]) => `${remaining} of ${limit} ${kind}`);
      setText(item.querySelector("span"), `${left.join(", ")} left this minute`);
    },
  );
}

function leftOf(key) {
  return Math.min(1, ...Object.values(key.remaining).map(({ limit, remaining }) => remaining / limit));
}
