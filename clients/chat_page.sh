#!/bin/sh
# Tries the chat page in a headless Chromium, over a scripted engine: chat_page.sh
# CHROMIUM names the browser. Node 20 or later is needed, no package.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
cargo build --release --package nibble
nibble=${NIBBLE:-${CARGO_TARGET_DIR:-target}/release/nibble}
folder=$(mktemp -d)

said='<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant<|channel|>final<|message|>This is **bold** and <img src=x onerror=touched=1>.

- one
- two

```rust
let x = 1;
```
A long word: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa<|return|>'
ids=$("$nibble" --json tokens encode --allow-special --text "$said" | sed 's/.*"ids":\(\[[^]]*\]\).*/\1/')
printf '{"default": {"tokens": %s}}' "$ids" >"$folder/script.json"

"$nibble" serve --port 0 --engine "scripted:$folder/script.json" >"$folder/url" 2>/dev/null &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
tries=0
until url=$(grep -Eo 'http://[^ /"]+' "$folder/url" | head -n 1) && [ -n "$url" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
        echo "the server did not start" >&2
        exit 1
    fi
    sleep 0.1
done
node --experimental-websocket "$here/chat_page.mjs" "$url"
