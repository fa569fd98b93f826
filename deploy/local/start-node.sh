#!/usr/bin/env bash
# Start node N of a local mesh: HTTP port 8079+N, mesh port 7945+N, data in data/node-N.
# It joins whatever other local nodes run. Usage: deploy/local/start-node.sh N [more `ai-cluster serve` flags]
set -euo pipefail
n=${1:?usage: start-node.sh N [serve flags]}
shift
cd "$(dirname "$0")/../.."
[ -x .venv/bin/ai-cluster ] || { echo "start-node.sh: no environment yet; run: make run (or make .venv/.installed)" >&2; exit 2; }
joins=()
for other in 1 2 3; do
  [ "$other" = "$n" ] || joins+=(--join "127.0.0.1:$((7945 + other))")
done
if curl -s -m 2 -o /dev/null "http://127.0.0.1:$((8079 + n))/health/live"; then
  echo "start-node.sh: something answers at 127.0.0.1:$((8079 + n)) already; for another life of node-$n: deploy/local/restart-node.sh $n" >&2
  exit 1
fi
mkdir -p "logs/node-$n"
.venv/bin/ai-cluster serve --name "node-$n" --http "127.0.0.1:$((8079 + n))" --mesh "127.0.0.1:$((7945 + n))" \
  "${joins[@]}" --data-dir "data/node-$n" --log-dir "logs/node-$n" --threads 1 --no-spinning --log-console plain \
  "$@" </dev/null 2>"logs/node-$n/stderr.log" &
pid=$!
for _ in $(seq 300); do
  if ! kill -0 "$pid" 2>/dev/null; then
    cat "logs/node-$n/stderr.log" >&2
    exit 1
  fi
  if curl -fs -o /dev/null "http://127.0.0.1:$((8079 + n))/health/ready" && kill -0 "$pid" 2>/dev/null; then
    echo "node-$n is ready on http://127.0.0.1:$((8079 + n)) (process $pid, logs in logs/node-$n)"
    exit 0
  fi
  sleep 0.2
done
echo "start-node.sh: node-$n is not ready after 60 s; see logs/node-$n" >&2
exit 1
