// Puts the page together: one feed, and what is drawn of it.

import { offerModels, startChat } from "./chat.js";
import { byId, make, setText } from "./dom.js";
import { addEvent, announce, drawEvents } from "./events.js";
import { Feed } from "./feed.js";
import { clock, pageOf, seconds } from "./format.js";
import { startKeys } from "./keys.js";
import { drawMap, drawViews } from "./mesh.js";
import { drawFigures, drawNodes } from "./nodes.js";

const VIEWS_INTERVAL_MS = 5000;
const NEWS_S = 10; // events older than this were there before the page
let status = null;
let statusAt = 0;
let views = null;
let isLost = false;
let eventsAreNew = false;

const feed = new Feed({
  status(told) {
    status = told;
    statusAt = Date.now() / 1000;
    document.title = `${told.nodes.healthy}/${told.nodes_expected} · ${told.cluster_name}`;
    setText(byId("where"), `${told.cluster_name}, as ${told.node_id} sees it (version ${told.version})`);
    setState("live", "live");
    offerModels(told);
    redraw();
  },
  event(event) {
    if (addEvent(event) && Date.now() / 1000 - event.at < NEWS_S) announce(event);
    eventsAreNew = true;
    // Many may come at once; they are drawn together.
    requestAnimationFrame(() => {
      if (eventsAreNew) drawEvents();
      eventsAreNew = false;
    });
  },
  lost() {
    isLost = true;
    setState("lost", "no answer");
    showOutage();
  },
  found() {
    isLost = false;
    setState("live", "live");
    showOutage();
    askViews();
  },
});

function setState(state, text) {
  byId("link-state").dataset.state = state;
  setText(byId("link-state"), text);
}

function redraw() {
  if (!status) return;
  drawFigures(status);
  drawMap(status, views);
  drawNodes(status);
  drawViews(views);
}

function showOutage() {
  const box = byId("outage");
  box.hidden = !isLost;
  if (!isLost) {
    box.replaceChildren();
    return;
  }
  const others = (status?.members ?? []).filter((member) => !member.is_self && member.status !== "offline");
  const links = others
    .map((member) => [member.node_id, pageOf(member)])
    .filter(([, page]) => page)
    .flatMap(([name, page]) => [" ", make("a", { href: page }, name)]);
  box.replaceChildren(
    make("strong", {}, status ? `${status.node_id}, which serves this page, does not answer. ` : "No node answers. "),
    status ? `What you see is how the mesh was at ${clock(statusAt)}. ` : "",
    "It is tried again every two seconds.",
    ...(links.length ? [" The same page is on", ...links, "."] : []),
  );
}

async function askViews() {
  if (document.hidden || isLost) return;
  try {
    const response = await fetch("cluster/views", { signal: AbortSignal.timeout(4000) });
    views = response.ok ? await response.json() : null;
  } catch {
    views = null; // the feed says what is wrong
  }
  if (status) {
    drawViews(views);
    drawMap(status, views);
  }
}

startChat();
startKeys();
byId("views-details").addEventListener("toggle", () => drawViews(views));
setInterval(askViews, VIEWS_INTERVAL_MS);
askViews();
setInterval(() => {
  if (!isLost || !status) return;
  setState("lost", `no answer for ${seconds(Date.now() / 1000 - statusAt)}`);
}, 1000);
window.addEventListener("pagehide", () => feed.close());
window.addEventListener("pageshow", (event) => event.persisted && feed.open());
