// The official Node client over a scripted engine: openai_node.mjs URL. Prints a line per check; exits 1 if one fails.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { CASES, TOOLS } from "./cases.mjs";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: process.env.VLLM_API_KEY ?? "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const { prompt, args, tool: name, answer } = CASES[0];
const messages = [{ role: "user", content: prompt }];
const tools = [{ type: "function", function: { name, parameters: TOOLS[name] } }];
const flat = [{ type: "function", name, parameters: TOOLS[name], strict: true }];

const checks = {
  "a chat with a tool": async () => {
    const first = await client.chat.completions.create({ model, messages, tools });
    const { message, finish_reason } = first.choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), args);
    const result = { role: "tool", tool_call_id: message.tool_calls[0].id, content: "18 degrees" };
    const second = await client.chat.completions.create({ model, messages: [...messages, message, result], tools });
    assert.equal(second.choices[0].message.content, answer);
    assert.ok(second.usage.total_tokens > 0);
  },
  "a streamed chat, put together by the client": async () => {
    const stream = client.chat.completions.stream({ model, messages, tools, stream_options: { include_usage: true } });
    const whole = await stream.finalChatCompletion();
    assert.deepEqual(JSON.parse(whole.choices[0].message.tool_calls[0].function.arguments), args);
    assert.ok((await stream.totalUsage()).completion_tokens > 0);
  },
  "a response with a tool": async () => {
    const first = await client.responses.create({ model, input: prompt, tools: flat });
    const call = first.output.find((item) => item.type === "function_call");
    assert.deepEqual(JSON.parse(call.arguments), args);
    const output = { type: "function_call_output", call_id: call.call_id, output: "18 degrees" };
    const input = [{ role: "user", content: prompt }, ...first.output, output];
    const second = await client.responses.create({ model, input, tools: flat });
    assert.equal(second.output_text, answer);
  },
  "a streamed response, put together by the client": async () => {
    const stream = client.responses.stream({ model, input: prompt, tools: flat });
    const types = [];
    for await (const event of stream) types.push(event.type);
    const whole = await stream.finalResponse();
    assert.equal(whole.output.at(-1).type, "function_call");
    assert.equal(types.at(-1), "response.completed");
    assert.ok(types.includes("response.reasoning_text.delta"));
  },
  "a raw completion": async () => {
    const whole = await client.completions.create({ model, prompt: "[case 0]", max_tokens: 5, echo: true, logprobs: 1 });
    assert.equal(whole.choices[0].logprobs.tokens.length, whole.usage.total_tokens);
  },
  "errors are the client's classes": async () => {
    await assert.rejects(client.chat.completions.create({ model: "nope", messages }), OpenAI.NotFoundError);
    await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), OpenAI.BadRequestError);
  },
  "a stream that is left": async () => {
    const stream = await client.chat.completions.create({ model, messages, stream: true });
    for await (const _ of stream) break;
    stream.controller.abort();
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  const problem = await check().then(() => null, (error) => error);
  console.log(`${problem ? "FAILED" : "ok"}: ${name}${problem ? `: ${problem.stack ?? problem}` : ""}`);
  failed += problem ? 1 : 0;
}
process.exit(failed ? 1 : 0);
