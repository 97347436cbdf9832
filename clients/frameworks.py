"""LangChain's ChatOpenAI and LiteLLM over a scripted engine: frameworks.py URL

Prints a line per check; exits 1 if one fails.
"""

import json
import os
import sys
import traceback

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
os.environ.setdefault("LANGSMITH_TRACING", "false")

import litellm
import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

BASE = sys.argv[1] + "/v1"
KEY = os.environ.get("VLLM_API_KEY", "none")
MODEL = openai.OpenAI(base_url=BASE, api_key=KEY).models.list().data[0].id
PROMPT = "[case 0] Please use get_weather."
ARGUMENTS = {"location": "Tokyo", "unit": "c"}
ANSWER = "Done with case 0."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string"}, "unit": {"type": "string"}},
            "required": ["location", "unit"],
        },
    },
}


def langchain_loop(**options):
    chat = ChatOpenAI(base_url=BASE, api_key=KEY, model=MODEL, max_retries=0, **options).bind_tools([WEATHER])
    messages = [HumanMessage(PROMPT)]
    first = chat.invoke(messages)
    assert first.tool_calls[0]["args"] == ARGUMENTS, first
    messages += [first, ToolMessage("18 degrees", tool_call_id=first.tool_calls[0]["id"])]
    last = chat.invoke(messages)
    assert last.text == ANSWER, last
    assert last.usage_metadata["output_tokens"] > 0


def langchain_stream(**options):
    chat = ChatOpenAI(base_url=BASE, api_key=KEY, model=MODEL, max_retries=0, **options).bind_tools([WEATHER])
    whole = None
    for chunk in chat.stream([HumanMessage(PROMPT)]):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == ARGUMENTS, whole


def litellm_loop(provider):
    options = {"model": f"{provider}/{MODEL}", "api_base": BASE, "api_key": KEY, "tools": [WEATHER], "num_retries": 0}
    messages = [{"role": "user", "content": PROMPT}]
    first = litellm.completion(messages=messages, **options).choices[0].message
    assert json.loads(first.tool_calls[0].function.arguments) == ARGUMENTS, first
    assert first.reasoning_content == "I need get_weather.", first
    messages += [first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "18 degrees"}]
    last = litellm.completion(messages=messages, **options)
    assert last.choices[0].message.content == ANSWER, last
    assert last.usage.completion_tokens > 0


def litellm_stream(provider):
    messages = [{"role": "user", "content": PROMPT}]
    options = {"model": f"{provider}/{MODEL}", "api_base": BASE, "api_key": KEY, "tools": [WEATHER], "num_retries": 0}
    chunks = list(litellm.completion(messages=messages, stream=True, **options))
    whole = litellm.stream_chunk_builder(chunks, messages=messages)
    assert json.loads(whole.choices[0].message.tool_calls[0].function.arguments) == ARGUMENTS, whole
    assert whole.choices[0].message.reasoning_content == "I need get_weather.", whole


CHECKS = {
    "LangChain, chat": langchain_loop,
    "LangChain, streamed chat": lambda: langchain_stream(stream_usage=True),
    "LangChain, responses": lambda: langchain_loop(use_responses_api=True),
    "LangChain, streamed responses": lambda: langchain_stream(use_responses_api=True),
    "LiteLLM, openai": lambda: litellm_loop("openai"),
    "LiteLLM, streamed openai": lambda: litellm_stream("openai"),
    "LiteLLM, hosted_vllm": lambda: litellm_loop("hosted_vllm"),
    "LiteLLM, streamed hosted_vllm": lambda: litellm_stream("hosted_vllm"),
}

failed = 0
for name, check in CHECKS.items():
    try:
        check()
        print(f"ok: {name}")
    except Exception:
        failed += 1
        print(f"FAILED: {name}: {traceback.format_exc()}")
sys.exit(1 if failed else 0)
