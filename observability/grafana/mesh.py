"""The dashboard of the mesh: views, routing, gossip and peer links."""

from __future__ import annotations

from observability.grafana.form import Dashboard, Panel, Query, Row
from observability.grafana.queries import PROCESS, PROCESS_NAME, highest, per_process, rates, total_rate

MESH = Dashboard(
    "ai-cluster-mesh",
    "AI Cluster Mesh and Routing",
    "Who sees whom, where requests go, and what gossip and peer links do.",
    ("datasource", "node", "instance"),
    (
        Row(
            "Views",
            (
                Panel(
                    "Nodes",
                    "Each node as its peers know it: running, waiting, free slots, tokens per second, loop lag.",
                    "short",
                    tuple(
                        Query(highest(f"ai_cluster_cluster_{name}", "node_id", 'node_id=~"$node"'))
                        for name in ("active_requests", "queue_depth", "free_slots", "tokens_per_second")
                    ),
                    "table",
                    12,
                ),
                Panel(
                    "Who sees whom",
                    "1 where the observer (left) holds the node (right) to be healthy, 0 where it does not.",
                    "short",
                    (
                        Query(
                            "min by (instance, node_id)"
                            f' (ai_cluster_cluster_peer_healthy{{{PROCESS}, node_id=~"$node"}})',
                            "{{instance}} → {{node_id}}",
                        ),
                    ),
                    width=12,
                    maximum=1,
                ),
                Panel(
                    "Different views",
                    "How many different sets of members the scraped nodes see; more than 1 for long is a partition.",
                    "short",
                    (Query('count(count_values("view", ai_cluster_cluster_view_hash))', "views"),),
                    alarm=2,
                ),
                Panel(
                    "Peers that disagree",
                    "Live peers that told each observer of another view last; above 0 only shortly after a change.",
                    "short",
                    (per_process("ai_cluster_cluster_views_disagreeing"),),
                    alarm=1,
                ),
                Panel(
                    "Age of what is known",
                    "Seconds since a peer's state last advanced, at the observer that knows least; usually below 2.",
                    "s",
                    (
                        Query(
                            highest("ai_cluster_cluster_peer_last_seen_age_seconds", "node_id", 'node_id=~"$node"'),
                            "{{node_id}}",
                        ),
                    ),
                    warn=3,
                    alarm=10,
                ),
            ),
        ),
        Row(
            "Routing and failover",
            (
                Panel(
                    "Forwarded",
                    "Generations that entries opened on another node per second.",
                    "reqps",
                    (Query(rates("ai_cluster_forwards_total", "instance, node_id", PROCESS), PROCESS_NAME),),
                ),
                Panel(
                    "Retries",
                    "Moves to the next candidate before a first token, per second, by what failed.",
                    "ops",
                    (Query(rates("ai_cluster_retries_total", "reason", PROCESS), "{{reason}}"),),
                ),
                Panel(
                    "Failovers",
                    "Answers that had begun and went on at another node, per second, by what ended them there.",
                    "ops",
                    (Query(rates("ai_cluster_failovers_total", "reason", PROCESS), "{{reason}}"),),
                    warn=0.1,
                ),
                Panel(
                    "Answers lost",
                    "Answers that had begun and could not go on, per second; 0 is well.",
                    "ops",
                    (Query(total_rate("ai_cluster_answers_lost_total", PROCESS), "lost"),),
                    alarm=0.01,
                ),
                Panel(
                    "Hedges",
                    "Late requests opened on a second node, per second, by who was first.",
                    "ops",
                    (Query(rates("ai_cluster_hedges_total", "first", PROCESS), "{{first}}"),),
                ),
                Panel(
                    "Tokens computed twice",
                    "Tokens given to a node to go on from, and tokens that hedges computed for nothing, per second.",
                    "suffix: tok/s",
                    (
                        Query(total_rate("ai_cluster_failover_tokens_total", PROCESS), "failover"),
                        Query(total_rate("ai_cluster_hedge_tokens_total", PROCESS), "hedge"),
                    ),
                ),
                Panel(
                    "Degraded nodes probed",
                    "Generations asked of degraded nodes, per second, by whether they served.",
                    "ops",
                    (Query(rates("ai_cluster_probes_total", "outcome", PROCESS), "{{outcome}}"),),
                ),
                Panel(
                    "Nodes that hang",
                    "Nodes that an entry saw accept streams and make no progress.",
                    "short",
                    (per_process("ai_cluster_nodes_witnessed"),),
                    alarm=1,
                ),
            ),
        ),
        Row(
            "Gossip",
            (
                Panel(
                    "Datagrams",
                    "Gossip datagrams per second, by direction and type, of the processes chosen.",
                    "pps",
                    (
                        Query(
                            rates("ai_cluster_gossip_packets_total", "direction, type", PROCESS),
                            "{{direction}} {{type}}",
                        ),
                    ),
                ),
                Panel(
                    "Bytes",
                    "Gossip bytes per second and process, in and out.",
                    "Bps",
                    (
                        Query(
                            rates("ai_cluster_gossip_bytes_total", "instance, node_id, direction", PROCESS),
                            PROCESS_NAME + " {{direction}}",
                        ),
                    ),
                ),
                Panel(
                    "Rejected and failed",
                    "Datagrams dropped per second, by why, and those the operating system refused to send.",
                    "pps",
                    (
                        Query(rates("ai_cluster_gossip_rejected_total", "reason", PROCESS), "{{reason}}"),
                        Query(total_rate("ai_cluster_gossip_send_errors_total", PROCESS), "send error"),
                    ),
                ),
                Panel(
                    "Suspicions and deaths",
                    "Members suspected, own suspicions refuted, and members declared dead, per second.",
                    "ops",
                    (
                        Query(total_rate("ai_cluster_gossip_suspicions_total", PROCESS), "suspected"),
                        Query(total_rate("ai_cluster_gossip_refutations_total", PROCESS), "refuted"),
                        Query(total_rate("ai_cluster_gossip_deaths_total", PROCESS), "dead"),
                    ),
                ),
                Panel(
                    "Awareness",
                    "Lifeguard score of each node itself, 0 (well) to 8; from 3 on it counts itself as degraded.",
                    "short",
                    (per_process("ai_cluster_gossip_awareness"),),
                    warn=1,
                    alarm=3,
                ),
                Panel(
                    "Usage of keys told",
                    "Sections of API key usage told to peers and heard of them, per second.",
                    "ops",
                    (Query(rates("ai_cluster_usage_sections_total", "direction", PROCESS), "{{direction}}"),),
                ),
            ),
        ),
        Row(
            "Peer links",
            (
                Panel(
                    "Links and streams",
                    "Peer links up and streams open on them, both counted at each end.",
                    "short",
                    (
                        Query(f"sum(ai_cluster_links{{{PROCESS}}})", "links"),
                        Query(f"sum(ai_cluster_link_streams_open{{{PROCESS}}})", "streams"),
                    ),
                ),
                Panel(
                    "Bytes on links",
                    "Bytes on peer links per second, by direction.",
                    "Bps",
                    (Query(rates("ai_cluster_link_bytes_total", "direction", PROCESS), "{{direction}}"),),
                ),
                Panel(
                    "Links that failed",
                    "Peer links that broke or were refused, and streams cancelled by their reader, per second.",
                    "ops",
                    (
                        Query(total_rate("ai_cluster_link_broken_total", PROCESS), "broken"),
                        Query(rates("ai_cluster_link_rejected_total", "reason", PROCESS), "refused: {{reason}}"),
                        Query(total_rate("ai_cluster_link_cancels_total", PROCESS), "cancelled"),
                    ),
                ),
            ),
        ),
    ),
)
