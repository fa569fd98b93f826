// Figures and events as people read them.

export const STATUS_SIGNS = { healthy: "●", degraded: "▲", offline: "✕" };

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  if (value < 1) return `${Math.max(1, Math.round(value * 1000))} ms`;
  return value < 60 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function rate(value) {
  return `${value < 100 ? value.toFixed(1) : Math.round(value)} tok/s`;
}

export function clock(secondsSince1970) {
  return new Date(secondsSince1970 * 1000).toLocaleTimeString([], { hour12: false });
}

const MOVE_REASONS = {
  link: "its connection broke",
  fault: "its engine failed",
  hang: "it made no progress",
  drain: "it is drained",
  refused: "it had no room",
  late: "its first token was late",
};

export const moveReason = (reason) => MOVE_REASONS[reason] ?? reason;

export function describe(event) {
  const { kind, node_id: node, reason, origin } = event;
  switch (kind) {
    case "joined": return `${node} joined`;
    case "left": return `${node} left`;
    case "suspect": return `${node} is suspected to be dead`;
    case "dead": return `${node} is dead`;
    case "back": return `${node} is back (was ${reason})`;
    case "forgotten": return `${node} was forgotten`;
    case "readiness": return `${node} is ${reason}`;
    case "degraded": return `${node} is degraded: ${reason}`;
    case "healthy": return `${node} is healthy again (was: ${reason})`;
    case "model": return `${node} serves the model ${reason}`;
    case "failover": return `answers went on from ${origin} to ${node}: ${moveReason(reason)}`;
    case "retry": return `requests went from ${origin} to ${node}: ${moveReason(reason)}`;
    case "hedge": return `requests were asked of ${node} beside ${origin}: ${moveReason(reason)}`;
    default: return `${kind}: ${node} ${reason}`;
  }
}

const BAD = new Set(["suspect", "dead", "degraded", "failover", "retry"]);
const GOOD = new Set(["joined", "back", "healthy", "model"]);

export function tone(event) {
  if (event.kind === "readiness") return event.reason === "ready" ? "good" : "bad";
  return BAD.has(event.kind) ? "bad" : GOOD.has(event.kind) ? "good" : "plain";
}

/** Where a browser reaches a node: its HTTP port, at the address its peers use where it listens on all. */
export function pageOf(member) {
  if (!member.http) return null;
  const split = member.http.lastIndexOf(":");
  let host = member.http.slice(0, split);
  if (["0.0.0.0", "[::]", "::"].includes(host)) host = member.mesh.slice(0, member.mesh.lastIndexOf(":"));
  return `${location.protocol}//${host}${member.http.slice(split)}/`;
}
