// What has happened in the mesh, the newest first.

import { byId, keepChildren, make, setText } from "./dom.js";
import { clock, describe, tone } from "./format.js";

const SHOWN_MAX = 100;
const events = new Map(); // by id; an event that grew comes again under its id

export function addEvent(event) {
  const isNew = !events.has(event.id);
  events.delete(event.id);
  events.set(event.id, event);
  while (events.size > SHOWN_MAX) events.delete(events.keys().next().value);
  return isNew;
}

export function drawEvents() {
  keepChildren(
    byId("events"),
    [...events.keys()].reverse(),
    () => make("li", {}, make("time"), make("span", { class: "what" })),
    (item, id) => {
      const event = events.get(id);
      item.className = tone(event);
      setText(item.querySelector("time"), clock(event.at));
      setText(item.querySelector(".what"), describe(event) + (event.count > 1 ? ` (${event.count} times)` : ""));
    },
  );
}

/** For screen readers: what a person who looks elsewhere should know at once. */
export function announce(event) {
  if (["dead", "left", "back", "joined", "failover", "degraded"].includes(event.kind)) {
    byId("event-news").textContent = describe(event);
  }
}
