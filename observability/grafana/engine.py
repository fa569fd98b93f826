"""The dashboard of the engine: slots, caches, steps, and the machine below."""

from __future__ import annotations

from observability.grafana.form import Dashboard, Panel, Query, Row
from observability.grafana.queries import (
    CPU_SHARE,
    MODEL_NODE,
    MODEL_PROCESS,
    PROCESS,
    PROCESS_NAME,
    RATE,
    per_process,
    rates,
    ratio,
)

HIT_TOKENS = rates("ai_cluster_prefix_cache_hit_tokens_total", "model", MODEL_PROCESS)
QUERY_TOKENS = rates("ai_cluster_prefix_cache_query_tokens_total", "model", MODEL_PROCESS)

ENGINE = Dashboard(
    "ai-cluster-engine",
    "AI Cluster Engine",
    "Slots, queue, KV cache, prefix cache, steps, and the machine below them.",
    ("datasource", "model", "node", "instance"),
    (
        Row(
            "Slots and queue",
            (
                Panel(
                    "Running, waiting and free",
                    "Slots in use, requests that wait for one, and slots free, over all nodes.",
                    "short",
                    (
                        Query(f'sum(ai_cluster_engine_slots{{{MODEL_PROCESS}, state="active"}})', "running"),
                        Query(f"sum(ai_cluster_engine_queue_depth{{{MODEL_PROCESS}}})", "waiting"),
                        Query(f'sum(ai_cluster_engine_slots{{{MODEL_PROCESS}, state="free"}})', "free"),
                    ),
                ),
                Panel(
                    "Queue by node",
                    "Requests that wait for a slot, by process.",
                    "short",
                    (
                        Query(
                            f"sum by (instance, node_id) (ai_cluster_engine_queue_depth{{{MODEL_PROCESS}}})",
                            PROCESS_NAME,
                        ),
                    ),
                ),
                Panel(
                    "Prompt tokens waiting",
                    "Prompt tokens that have not been prefilled yet, by process.",
                    "suffix: tok",
                    (
                        Query(
                            f"sum by (instance, node_id) (ai_cluster_engine_queued_tokens{{{MODEL_PROCESS}}})",
                            PROCESS_NAME,
                        ),
                    ),
                ),
                Panel(
                    "State",
                    "Engines in each state: loading, ready, stuck (a step does not return), failed.",
                    "short",
                    (Query(f"sum by (state) (ai_cluster_engine_state{{{MODEL_PROCESS}}})", "{{state}}"),),
                ),
                Panel(
                    "Tokens per second",
                    "Tokens generated per second over the last 10 s, by node; the objective is above 50 for each.",
                    "suffix: tok/s",
                    (Query(f"sum by (node_id) (ai_cluster_tokens_per_second{{{MODEL_NODE}}})", "{{node_id}}"),),
                    is_stacked=True,
                ),
                Panel(
                    "Generations begun",
                    "Generations begun per second, by model.",
                    "reqps",
                    (Query(rates("ai_cluster_inference_started_total", "model", MODEL_PROCESS), "{{model}}"),),
                ),
            ),
        ),
        Row(
            "Caches",
            (
                Panel(
                    "KV cache in use",
                    "Rows of the KV cache that requests in slots use, as a share of all there are.",
                    "percentunit",
                    (
                        Query(
                            f"max by (instance, node_id, model) (ai_cluster_kv_cache_usage_ratio{{{MODEL_PROCESS}}})",
                            PROCESS_NAME + " {{model}}",
                        ),
                    ),
                    warn=0.8,
                    alarm=0.95,
                    maximum=1,
                ),
                Panel(
                    "KV cache rows",
                    "Rows, one a token, used by requests in slots, kept for prompts to come, and in all.",
                    "suffix: tok",
                    (Query(f"sum by (state) (ai_cluster_kv_cache_rows{{{MODEL_PROCESS}}})", "{{state}}"),),
                ),
                Panel(
                    "Prefix cache hits",
                    "Share of prompt tokens that were found in the prefix cache and not computed again.",
                    "percentunit",
                    (Query(ratio(HIT_TOKENS, QUERY_TOKENS), "{{model}}"),),
                    maximum=1,
                ),
                Panel(
                    "Memory of models",
                    "Memory that each loaded model takes on each node.",
                    "bytes",
                    (
                        Query(
                            f"max by (model, node_id) (ai_cluster_model_memory_bytes{{{MODEL_NODE}}})",
                            "{{node_id}} {{model}}",
                        ),
                    ),
                ),
                Panel(
                    "Memory of the KV cache",
                    "Memory of the KV cache, used or not, by process.",
                    "bytes",
                    (
                        Query(
                            f"sum by (instance, node_id) (ai_cluster_kv_cache_bytes{{{MODEL_PROCESS}}})", PROCESS_NAME
                        ),
                    ),
                ),
                Panel(
                    "Load time",
                    "Time it took to load each model at each node's start.",
                    "s",
                    (
                        Query(
                            f"max by (model, node_id) (ai_cluster_model_load_time_seconds{{{MODEL_NODE}}})",
                            "{{node_id}} {{model}}",
                        ),
                    ),
                    "bargauge",
                ),
            ),
        ),
        Row(
            "Steps",
            (
                Panel(
                    "Median step",
                    "Median time of the engine's last 63 steps, by process and model.",
                    "s",
                    (
                        Query(
                            "max by (instance, node_id, model)"
                            f" (ai_cluster_engine_step_median_seconds{{{MODEL_PROCESS}}})",
                            PROCESS_NAME + " {{model}}",
                        ),
                    ),
                ),
                Panel(
                    "Busy",
                    "Share of the time in which the engine makes a step, by model, over the processes chosen.",
                    "percentunit",
                    (
                        Query(
                            f"avg by (model) (rate(ai_cluster_engine_step_seconds_total{{{MODEL_PROCESS}}}[{RATE}]))",
                            "{{model}}",
                        ),
                    ),
                    maximum=1,
                ),
                Panel(
                    "In ONNX Runtime",
                    "Share of the steps' time that is spent inside ONNX Runtime; the rest is ours.",
                    "percentunit",
                    (
                        Query(
                            ratio(
                                rates("ai_cluster_engine_session_seconds_total", "model", MODEL_PROCESS),
                                rates("ai_cluster_engine_step_seconds_total", "model", MODEL_PROCESS),
                            ),
                            "{{model}}",
                        ),
                    ),
                    maximum=1,
                ),
                Panel(
                    "Steps per second",
                    "Steps of the engines: a decode step of the batch, a prefill chunk, or both.",
                    "ops",
                    (Query(rates("ai_cluster_engine_steps_total", "model", MODEL_PROCESS), "{{model}}"),),
                ),
                Panel(
                    "Steps that broke",
                    "Faults of the engine; each ends the requests of its own step.",
                    "ops",
                    (Query(rates("ai_cluster_engine_step_faults_total", "model", MODEL_PROCESS), "{{model}}"),),
                    alarm=0.01,
                ),
            ),
        ),
        Row(
            "The machine",
            (
                Panel(
                    "CPU use",
                    "CPU time of each process over the cores it may use; the objective is below 80 %.",
                    "percentunit",
                    (Query(CPU_SHARE, PROCESS_NAME),),
                    warn=0.8,
                    alarm=0.95,
                    maximum=1,
                ),
                Panel(
                    "GPU use",
                    "Share of the driver's last sample period in which each GPU worked; empty without a GPU.",
                    "percentunit",
                    (
                        Query(
                            f"max by (instance, gpu) (ai_cluster_gpu_utilisation_ratio{{{PROCESS}}})",
                            "{{instance}} {{gpu}}",
                        ),
                    ),
                    maximum=1,
                ),
                Panel(
                    "GPU memory",
                    "Share of each GPU's memory in use, by all processes; empty without a GPU.",
                    "percentunit",
                    (
                        Query(
                            f"max by (instance, gpu) (ai_cluster_gpu_memory_used_bytes{{{PROCESS}}})"
                            f" / max by (instance, gpu) (ai_cluster_gpu_memory_total_bytes{{{PROCESS}}})",
                            "{{instance}} {{gpu}}",
                        ),
                    ),
                    warn=0.9,
                    maximum=1,
                ),
                Panel(
                    "GPU temperature",
                    "Temperature of each GPU; empty without a GPU.",
                    "celsius",
                    (
                        Query(
                            f"max by (instance, gpu) (ai_cluster_gpu_temperature_celsius{{{PROCESS}}})",
                            "{{instance}} {{gpu}}",
                        ),
                    ),
                    warn=80,
                    alarm=90,
                ),
                Panel(
                    "Event loop lag",
                    "How late each event loop woke up within the last second; above 0.25 s a node is degraded.",
                    "s",
                    (per_process("ai_cluster_loop_lag_seconds"),),
                    warn=0.1,
                    alarm=0.25,
                ),
                Panel(
                    "Open file descriptors",
                    "Share of the file descriptors allowed that each process has open.",
                    "percentunit",
                    (
                        Query(
                            f"sum by (instance, node_id) (process_open_fds{{{PROCESS}}})"
                            f" / sum by (instance, node_id) (process_max_fds{{{PROCESS}}})",
                            PROCESS_NAME,
                        ),
                    ),
                    warn=0.7,
                    alarm=0.9,
                    maximum=1,
                ),
            ),
        ),
    ),
)
