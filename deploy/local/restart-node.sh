#!/usr/bin/env bash
# Stop node N of a local mesh gracefully if it runs, and start it again. Usage: deploy/local/restart-node.sh N [serve flags]
set -euo pipefail
n=${1:?usage: restart-node.sh N [serve flags]}
here=$(cd "$(dirname "$0")" && pwd)
if "$here/stop-node.sh" "$n" 2>/dev/null; then
  file="$here/../../data/node-$n/node.json"
  for _ in $(seq 400); do # up to the drain time and a little more
    [ -f "$file" ] || break
    sleep 0.1
  done
fi
exec "$here/start-node.sh" "$@"
