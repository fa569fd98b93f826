#!/usr/bin/env bash
# Stop node N of a local mesh: gracefully, or with --kill as a crash would. Usage: deploy/local/stop-node.sh N [--kill]
set -euo pipefail
n=${1:?usage: stop-node.sh N [--kill]}
cd "$(dirname "$0")/../.."
file="data/node-$n/node.json"
[ -f "$file" ] || { echo "stop-node.sh: node-$n has not been started from here ($file is missing)" >&2; exit 2; }
pid=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' "$file")
# Both files outlive a crash, and the number may be another process's by then; a lock that can be had says nobody runs.
if flock --nonblock "data/node-$n/lock" true; then
  echo "node-$n is not running" >&2
  exit 1
fi
case "${2:-}" in
  --kill) kill -KILL "$pid" && echo "node-$n (process $pid) is killed" ;;
  "") kill -TERM "$pid" && echo "node-$n (process $pid) drains and stops" ;;
  *) echo "stop-node.sh: unknown option $2; usage: stop-node.sh N [--kill]" >&2; exit 2 ;;
esac
