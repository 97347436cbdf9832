#!/bin/sh
# curl against a scripted engine: curl.sh URL. Prints a line per check; exits 1 if one fails.
set -u
url=$1
failed=0
# check NAME PATTERN CURL-ARGUMENTS…: what comes back has the pattern.
check() {
    name=$1 pattern=$2
    shift 2
    found=$(curl --silent --show-error --max-time 60 "$@" 2>&1)
    if printf '%s' "$found" | grep -Eq -- "$pattern"; then echo "ok: $name"; else
        echo "FAILED: $name: $found"
        failed=1
    fi
}
json='content-type: application/json'
chat='{"messages": [{"role": "user", "content": "Hi"}]'
check models '"object":"list"' "$url/v1/models"
check "a chat" '"content":"The shell has answered."' -H "$json" -d "$chat}" "$url/v1/chat/completions"
check "a streamed chat" '^data: \[DONE\]' -N -H "$json" -d "$chat, \"stream\": true}" "$url/v1/chat/completions"
check "a completion" '"object":"text_completion"' -H "$json" -d '{"prompt": "Hi"}' "$url/v1/completions"
check "a response" '"status":"completed"' -H "$json" -d '{"input": "Hi"}' "$url/v1/responses"
check "a streamed response" '^event: response.completed' -N -H "$json" -d '{"input": "Hi", "stream": true}' "$url/v1/responses"
check "a request that is wrong" '"param":"temperature"' -H "$json" -d "$chat, \"temperature\": 9}" "$url/v1/chat/completions"
check "a body that is no JSON" '"code":400' -H "$json" -d '{' "$url/v1/chat/completions"
check "another media type" '"code":415' -d "$chat}" "$url/v1/chat/completions"
check "a path that is not there" '"code":404' "$url/v1/nothing"
check "tokens" '"tokens":\[24912,2375\]' -H "$json" -d '{"prompt": "hello world"}' "$url/tokenize"
check metrics 'vllm:spec_decode_num_drafts_total' "$url/metrics"
exit "$failed"
