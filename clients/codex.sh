#!/bin/sh
# Codex CLI over a scripted engine, which has it run one command: codex.sh CODEX URL
set -eu
codex=$1 url=$2
home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
cat >"$home/config.toml" <<END
model = "scripted"
model_provider = "here"
approval_policy = "never"
sandbox_mode = "danger-full-access"
[model_providers.here]
name = "here"
base_url = "$url/v1"
wire_api = "responses"
END
mkdir "$home/work"
cd "$home/work"
CODEX_HOME=$home timeout 120 "$codex" exec --skip-git-repo-check --json '[case 30] Ask the shell.' </dev/null >"$home/events" 2>"$home/errors" || {
    cat "$home/events" "$home/errors"
    exit 1
}
for expected in 'said by the shell' 'The shell has answered.'; do
    if grep -q "$expected" "$home/events"; then echo "ok: $expected"; else
        echo "FAILED: $expected is not among the events"
        cat "$home/events" "$home/errors"
        exit 1
    fi
done
