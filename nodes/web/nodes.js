// A card for each node, and the mesh in figures.

import { byId, draw, keepChildren, make, setText } from "./dom.js";
import { STATUS_SIGNS, pageOf, rate, seconds } from "./format.js";
import { sum } from "./mesh.js";

const CARDS_MAX = 200;
const HISTORY = 60; // seconds of throughput in a card
const histories = new Map();

export function drawFigures(status) {
  const live = status.members.filter((member) => member.status !== "offline");
  const total = (field) => live.reduce((count, member) => count + sum(member, field), 0);
  const tokens = live.reduce((count, member) => count + member.tokens_per_s, 0);
  const waits = live.filter((member) => member.status === "healthy").flatMap(waitsOf);
  setText(byId("figure-nodes"), `${status.nodes.healthy} of ${status.nodes_expected}`);
  setText(byId("figure-throughput"), rate(tokens));
  setText(byId("figure-first-token"), waits.length ? `≈ ${seconds(Math.min(...waits))}` : "–");
  setText(byId("figure-slots"), `${total("active")} of ${total("slots")}`);
  setText(byId("figure-queued"), String(total("queued")));
  byId("warnings").hidden = !status.warnings.length;
  keepChildren(byId("warnings"), status.warnings, (text) => make("li", {}, text), () => {});
}

const waitsOf = (member) =>
  member.models.map((model) => model.first_token_s ?? 0).filter((wait) => wait > 0);

export function drawNodes(status) {
  const members = status.members.slice(0, CARDS_MAX);
  const byName = new Map(members.map((member) => [member.node_id, member]));
  for (const name of histories.keys()) if (!byName.has(name)) histories.delete(name);
  keepChildren(byId("nodes"), [...byName.keys()], makeCard, (card, name) => updateCard(card, byName.get(name)));
  const more = byId("nodes-more");
  more.hidden = status.members.length <= CARDS_MAX;
  setText(more, `and ${status.members.length - CARDS_MAX} more, which ai-cluster status lists`);
}

const ROWS = [
  ["throughput", "Throughput"],
  ["first-token", "First token in"],
  ["slots", "Slots"],
  ["queue", "Queue"],
  ["models", "Models"],
  ["seen", "Heard of"],
];

function makeCard(name) {
  const rows = ROWS.map(([key, label]) => make("div", {}, make("dt", {}, label), make("dd", { class: key })));
  return make(
    "li",
    { class: "node-card" },
    make("div", { class: "row spread" }, make("h3", {}, make("a", {}, name)), make("span", { class: "badge" })),
    draw("svg", { class: "history", viewBox: `0 0 ${HISTORY - 1} 20`, preserveAspectRatio: "none", "aria-hidden": "true" },
      draw("polyline", { points: "" })),
    make("dl", {}, ...rows),
  );
}

function updateCard(card, member) {
  const isOffline = member.status === "offline";
  card.className = `node-card ${member.status}`;
  const link = card.querySelector("h3 a");
  setText(link, member.is_self ? `${member.node_id} (this page)` : member.node_id);
  const page = member.is_self ? null : pageOf(member);
  if (page) link.setAttribute("href", page);
  else link.removeAttribute("href");
  const reason = member.reason && member.reason !== member.status ? `: ${member.reason}` : "";
  setText(card.querySelector(".badge"), `${STATUS_SIGNS[member.status] ?? ""} ${member.status}${reason}`);
  const set = (key, text) => setText(card.querySelector(`.${key}`), text);
  const waits = waitsOf(member);
  set("throughput", isOffline ? "–" : rate(member.tokens_per_s));
  set("first-token", isOffline || !waits.length ? "–" : `≈ ${seconds(Math.min(...waits))}`);
  set("slots", isOffline || !sum(member, "slots") ? "–" : `${sum(member, "active")} of ${sum(member, "slots")} in use`);
  set("queue", isOffline ? "–" : String(sum(member, "queued")));
  set("models", member.models.map((model) => model.name).join(", ") || "none: an entry");
  set("seen", member.is_self ? "now" : `${seconds(member.age_s)} ago`);
  const history = histories.get(member.node_id) ?? [];
  history.push(isOffline ? 0 : member.tokens_per_s);
  histories.set(member.node_id, history.slice(-HISTORY));
  drawHistory(card.querySelector("polyline"), histories.get(member.node_id));
}

function drawHistory(line, history) {
  const top = Math.max(1, ...history);
  const start = HISTORY - history.length;
  line.setAttribute("points", history.map((value, i) => `${start + i},${(19 - (value / top) * 18).toFixed(1)}`).join(" "));
}
