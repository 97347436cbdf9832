"""Checks a server with the official openai Python client: openai_python.py URL

The prompts are ones that the small model answers right at temperature 0. Prints a line per check; exits 1 if one fails.
"""

import json
import os
import sys
import threading
import time

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Gets the weather",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "City"}},
            "required": ["location"],
        },
    },
}


def wait_until_ready(client):
    """The port answers 503 while the model is loaded."""
    deadline = time.monotonic() + 300
    while True:
        try:
            return client.models.list().data[0].id
        except openai.InternalServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def user(text):
    return [{"role": "user", "content": text}]


def check_models(client, model):
    assert client.models.retrieve(model).id == model


def check_chat(client, model):
    answer = client.chat.completions.create(
        model=model, messages=user("What is the capital of France?"), temperature=0, max_completion_tokens=200
    )
    choice = answer.choices[0]
    assert "Paris" in (choice.message.content or ""), choice
    assert choice.finish_reason == "stop", choice
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_stream(client, model):
    question = dict(
        model=model, messages=user("What is the capital of Italy?"), temperature=0, max_completion_tokens=200
    )
    whole = client.chat.completions.create(**question)
    content, reasoning, finish, usage = "", "", None, None
    for chunk in client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            finish = finish or choice.finish_reason
        usage = chunk.usage or usage
    message = whole.choices[0].message
    assert content == message.content, (content, message.content)
    assert reasoning == (message.reasoning or ""), (reasoning, message.reasoning)
    assert finish == "stop" and usage.completion_tokens == whole.usage.completion_tokens


def check_tool(client, model):
    messages = user("What is the weather in Paris?")
    question = dict(model=model, tools=[WEATHER], temperature=0, max_completion_tokens=300)
    choice = client.chat.completions.create(messages=messages, **question).choices[0]
    assert choice.finish_reason == "tool_calls", choice
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather", call
    assert "Paris" in json.loads(call.function.arguments).values(), call

    with client.chat.completions.stream(messages=messages, **question) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments

    messages = messages + [
        choice.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18, "condition": "sunny"}'},
    ]
    report = client.chat.completions.create(messages=messages, **question).choices[0]
    assert report.finish_reason == "stop" and report.message.content, report


def check_structured_output(client, model):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=model, messages=user("What is the capital of France?"), temperature=0, response_format=format
    )
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"city", "sure"} and isinstance(found["sure"], bool), found
    assert answer.choices[0].message.reasoning and answer.choices[0].finish_reason == "stop"
    forced = client.chat.completions.create(
        model=model, messages=user("Hello"), temperature=0, tools=[WEATHER], tool_choice="required", max_tokens=300
    )
    choice = forced.choices[0]
    if choice.finish_reason != "length":
        assert "location" in json.loads(choice.message.tool_calls[0].function.arguments), choice


def check_responses(client, model):
    question = "What is the capital of France?"
    answer = client.responses.create(model=model, input=question, temperature=0)
    assert answer.status == "completed" and "Paris" in answer.output_text, answer
    assert [item.type for item in answer.output] == ["reasoning", "message"], answer.output
    assert answer.output[0].content[0].text and answer.usage.output_tokens > 0
    texts, last = [], None
    for event in client.responses.create(model=model, input=question, temperature=0, stream=True):
        if event.type == "response.output_text.delta":
            texts.append(event.delta)
        last = event
    assert last.type == "response.completed" and "".join(texts) == answer.output_text
    with client.responses.stream(model=model, input=question, temperature=0) as stream:
        assert stream.get_final_response().output_text == answer.output_text
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    called = client.responses.create(
        model=model, input="What is the weather in Paris?", temperature=0, tools=[tool], tool_choice="required"
    )
    call = next(item for item in called.output if item.type == "function_call")
    assert call.name == "get_weather" and "location" in json.loads(call.arguments), call
    history = [{"role": "user", "content": "What is the weather in Paris?"}, *called.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    assert client.responses.create(model=model, input=history, temperature=0, tools=[tool]).output_text
    try:
        client.responses.retrieve("resp_none")
    except openai.NotFoundError as caught:
        assert caught.body["param"] == "response_id", caught.body


def check_completions(client, model):
    answer = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=2, echo=True
    )
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon a time"), choice
    assert "".join(choice.logprobs.tokens) == choice.text, choice
    assert choice.logprobs.token_logprobs[0] is None and answer.usage.completion_tokens == 8
    streamed = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=8, temperature=0, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed) == choice.text


def check_errors(client, model):
    for error, arguments in [
        (openai.NotFoundError, dict(model="no-such-model", messages=user("Hi"))),
        (openai.BadRequestError, dict(model=model, messages=user("Hi"), temperature=3)),
        (openai.BadRequestError, dict(model=model, messages=[])),
    ]:
        try:
            client.chat.completions.create(**arguments)
        except error as caught:
            assert caught.body["param"], caught.body
        else:
            raise AssertionError(f"{arguments} was answered")


def check_interleaving(client, model):
    order, failures = [], []
    barrier = threading.Barrier(2)

    def run(name):
        try:
            barrier.wait()
            stream = client.completions.create(
                model=model,
                prompt="Once upon a time",
                max_tokens=200,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for _ in stream:
                order.append(name)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    turns = sum(before != after for before, after in zip(order, order[1:]))
    assert turns >= 10, f"{len(order)} chunks in {turns + 1} blocks"


def main():
    url = sys.argv[1].rstrip("/")
    client = openai.OpenAI(base_url=url + "/v1", api_key=os.environ.get("VLLM_API_KEY", "none"), max_retries=0)
    model = wait_until_ready(client)
    failed = 0
    for check in [
        check_models,
        check_chat,
        check_stream,
        check_tool,
        check_structured_output,
        check_responses,
        check_completions,
        check_errors,
        check_interleaving,
    ]:
        name = check.__name__.removeprefix("check_")
        try:
            check(client, model)
            print(f"passed  {name}")
        except Exception as error:
            failed += 1
            print(f"FAILED  {name}: {type(error).__name__}: {error}")
    print(f"openai {openai.__version__}: {'all passed' if not failed else f'{failed} failed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
