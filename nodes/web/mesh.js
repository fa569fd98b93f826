// The map: each node with its load, a line for each pair, and which of them believe different things of each other.

import { byId, draw, keepChildren, make, setText } from "./dom.js";
import { STATUS_SIGNS, rate } from "./format.js";

const WIDTH = 480;
const HEIGHT = 320;
const LINES_NODES_MAX = 16; // with more, only the lines that tell of a fault are drawn
const NAMES_NODES_MAX = 24;

/** status: of /cluster/status. views: of /cluster/views, or null while unknown. */
export function drawMap(status, views) {
  const svg = byId("map");
  const places = placesOf(status.members);
  const radius = Math.max(6, Math.min(26, 190 / Math.max(1, status.members.length)));
  const lines = linesOf(status.members, views);
  svg.replaceChildren(
    ...lines.map(({ from, to, kind }) => {
      const [a, b] = [places.get(from), places.get(to)];
      return draw("line", { x1: a.x, y1: a.y, x2: b.x, y2: b.y, class: `line ${kind}` });
    }),
    ...status.members.map((member) => drawNode(member, places.get(member.node_id), radius, status, views)),
  );
  svg.setAttribute("aria-label", summary(status, views));
}

function placesOf(members) {
  const count = members.length;
  const places = new Map();
  members.forEach((member, index) => {
    const angle = (index / count) * 2 * Math.PI - Math.PI / 2;
    const spread = count === 1 ? 0 : 1;
    places.set(member.node_id, {
      x: WIDTH / 2 + spread * 175 * Math.cos(angle),
      y: HEIGHT / 2 - 18 + spread * 100 * Math.sin(angle),
    });
  });
  return places;
}

function linesOf(members, views) {
  const lines = [];
  const known = views?.views ?? {};
  const sees = (observer, node) => known[observer] && ["alive", "suspect"].includes(known[observer][node]);
  for (let i = 0; i < members.length; i += 1) {
    for (let j = i + 1; j < members.length; j += 1) {
      const [from, to] = [members[i], members[j]];
      if (from.status === "offline" || to.status === "offline") continue;
      const isKnown = known[from.node_id] && known[to.node_id];
      const isBroken = isKnown && (!sees(from.node_id, to.node_id) || !sees(to.node_id, from.node_id));
      if (!isBroken && members.length > LINES_NODES_MAX) continue;
      lines.push({ from: from.node_id, to: to.node_id, kind: isBroken ? "broken" : isKnown ? "good" : "unknown" });
    }
  }
  return lines;
}

function drawNode(member, { x, y }, radius, status, views) {
  const slots = sum(member, "slots");
  const share = member.status === "offline" || !slots ? 0 : Math.min(1, sum(member, "active") / slots);
  const ring = radius + 5;
  const length = 2 * Math.PI * ring;
  const hasName = status.members.length <= NAMES_NODES_MAX;
  const isDisputed = views?.disputed.includes(member.node_id);
  return draw(
    "g",
    { class: `node ${member.status}`, transform: `translate(${x} ${y})` },
    draw("circle", { r: radius, class: "body" }),
    draw("circle", { r: ring, class: "ring" }),
    draw("circle", {
      r: ring, class: "load", transform: "rotate(-90)", "stroke-dasharray": `${share * length} ${length}`,
    }),
    draw("text", { class: "sign", y: 5 }, STATUS_SIGNS[member.status] ?? "?"),
    ...(hasName
      ? [
          draw("text", { class: "name", y: ring + 16 }, `${member.node_id}${isDisputed ? " ⚠" : ""}`),
          draw("text", { class: "detail", y: ring + 30 }, detail(member)),
        ]
      : []),
  );
}

function detail(member) {
  if (member.status === "offline") return member.reason;
  if (!member.models.length) return "entry only";
  return `${rate(member.tokens_per_s)}, ${sum(member, "active")}/${sum(member, "slots")}`;
}

export function sum(member, field) {
  return member.models.reduce((total, model) => total + (model[field] ?? 0), 0);
}

function summary(status, views) {
  const nodes = status.members.map((member) => `${member.node_id} ${member.status}`).join(", ");
  return `Map of the mesh: ${nodes}. ${viewsLine(views)}`;
}

export function viewsLine(views) {
  if (!views) return "Who sees whom is being asked …";
  const count = Object.keys(views.views).length;
  const silent = views.silent.length ? ` No answer from ${views.silent.join(", ")}.` : "";
  if (!views.disputed.length) return `All ${count} nodes asked believe the same of each other.${silent}`;
  return `⚠ Nodes disagree about ${views.disputed.join(", ")}.${silent}`;
}

/** The same as a table: a row for each observer. */
export function drawViews(views) {
  const line = byId("views-line");
  setText(line, viewsLine(views));
  line.classList.toggle("bad", Boolean(views?.disputed.length));
  if (!views || !byId("views-details").open) return;
  const table = byId("views-table");
  const observers = Object.keys(views.views);
  const members = [...new Set(observers.flatMap((observer) => Object.keys(views.views[observer])))].sort();
  const head = make("tr", {}, make("th", { scope: "col" }, "observer"));
  head.append(
    ...members.map((id) => make("th", { scope: "col" }, views.disputed.includes(id) ? `⚠ ${id}` : id)),
  );
  table.tHead.replaceChildren(head);
  keepChildren(
    table.tBodies[0],
    observers,
    () => make("tr"),
    (row, observer) => {
      row.replaceChildren(
        make("th", { scope: "row" }, observer),
        ...members.map((id) => {
          const belief = views.views[observer][id] ?? "unknown";
          return make("td", { class: views.disputed.includes(id) ? "disputed" : null }, belief);
        }),
      );
    },
  );
}
