#!/bin/sh
# Runs the official openai Python client against a server: openai_python.sh [URL]
# Without URL a server with the small model is built and started for the time of the run.
# PYTHON names the interpreter, VENV the folder of the client's environment.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
version=3.54.0
venv=${VENV:-$here/../target/clients/openai-$version}

if ! "$venv/bin/python" -c "import openai; assert openai.__version__ == '$version'" 2>/dev/null; then
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check "openai==$version"
fi

if [ $# -ge 1 ]; then
    exec "$venv/bin/python" "$here/openai_python.py" "$1"
fi

cd "$here/.."
cargo build --release --package nibble
output=$(mktemp)
"${CARGO_TARGET_DIR:-target}/release/nibble" serve --port 0 >"$output" &
server=$!
trap 'kill "$server" 2>/dev/null || true; rm -f "$output"' EXIT

# The address is printed once the port is open.
tries=0
until url=$(grep -Eo 'http://[^ /"]+' "$output" | head -n 1) && [ -n "$url" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 300 ] || ! kill -0 "$server" 2>/dev/null; then
        echo "the server did not print its address:" >&2
        cat "$output" >&2
        exit 1
    fi
    sleep 0.2
done
"$venv/bin/python" "$here/openai_python.py" "$url"
