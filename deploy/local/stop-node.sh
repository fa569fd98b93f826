#!/usr/bin/env bash
# Stop node N of a local mesh: gracefully, or with --kill as a crash would. Usage: deploy/local/stop-node.sh N [--kill]
set -euo pipefail
n=${1:?usage: stop-node.sh N [--kill]}
cd "$(dirname "$0")/../.."
file="data/node-$n/node.json"
[ -f "$file" ] || { echo "stop-node.sh: node-$n has not been started from here ($file is missing)" >&2; exit 2; }
pid=$(sed -n 's/.*"pid": *\([0-9]*\).*/\1/p' "$file")
# The number may have been given to another process since; only the holder of the node's lock is the node.
if [ "$(cat "data/node-$n/lock" 2>/dev/null)" != "$pid" ] || ! kill -0 "$pid" 2>/dev/null; then
  echo "node-$n is not running" >&2
  exit 1
fi
case "${2:-}" in
  --kill) kill -KILL "$pid" && echo "node-$n (process $pid) is killed" ;;
  "") kill -TERM "$pid" && echo "node-$n (process $pid) drains and stops" ;;
  *) echo "stop-node.sh: unknown option $2; usage: stop-node.sh N [--kill]" >&2; exit 2 ;;
esac
