#!/bin/sh
# Mixed traffic against a server with the small model: soak.sh [MINUTES] (default 10; an hour is 60). See soak.py.
# The key/value cache is small, so that it is full of prefixes before the memory is looked at. PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
cargo build --release --package nibble
output=$(mktemp)
RUST_LOG=warn "${CARGO_TARGET_DIR:-target}/release/nibble" serve --port 0 --max-model-len 4096 \
    --kv-cache-memory-bytes 32M >"$output" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$output"' EXIT
until grep -q http "$output"; do
    kill -0 "$server" 2>/dev/null || { echo "the server did not start" >&2; exit 1; }
    sleep 0.2
done
"${PYTHON:-python3}" clients/soak.py "$(head -n 1 "$output")" "${1:-10}"
