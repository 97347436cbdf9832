// OpenAI's Agents SDK over both APIs, whole and streamed: what OpenAI's compatibility test of gpt-oss asks of a provider.
// agents.mjs URL [SECONDS]: thirty cases with one function tool each; prints a line per way, exits 1 if a case fails.
import { Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, setTracingDisabled, tool } from "@openai/agents";
import OpenAI from "openai";
import { CASES, TOOLS } from "./cases.mjs";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: process.env.VLLM_API_KEY ?? "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
setTracingDisabled(true);

const equal = (a, b) => JSON.stringify(sorted(a)) === JSON.stringify(sorted(b));
const sorted = (value) =>
  Array.isArray(value) ? value.map(sorted)
    : value && typeof value === "object"
      ? Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])])) : value;

async function run({ tool: name, args, prompt, answer }, api, stream) {
  const problems = [];
  const calls = [];
  const execute = async (given) => (calls.push(given), "the tool's result");
  const agent = new Agent({
    name, instructions: "Use the tool, then answer.",
    tools: [tool({ name, description: `Does ${name}`, parameters: TOOLS[name], strict: true, execute })],
  });
  const Model = api === "chat" ? OpenAIChatCompletionsModel : OpenAIResponsesModel;
  const runner = new Runner({ model: new Model(client, model) });
  const result = await runner.run(agent, prompt, { stream, maxTurns: 4 });
  const events = [];
  if (stream) {
    for await (const event of result) {
      if (event.type === "raw_model_stream_event" && event.data.type === "model") events.push(event.data.event);
    }
    await result.completed;
  }
  const call = result.newItems.find((item) => item.type === "tool_call_item")?.rawItem;
  if (call?.name !== name) problems.push(`called ${call?.name}`);
  else if (!equal(JSON.parse(call.arguments), args) || !equal(calls[0], args)) problems.push(`arguments ${call.arguments}`);
  if (result.finalOutput !== answer) problems.push(`answered ${result.finalOutput}`);

  if (api === "chat" && stream) {
    if (!events.some((event) => event.choices?.[0]?.delta?.reasoning?.length > 0)) problems.push("no reasoning deltas");
  } else if (api === "chat") {
    const messages = result.rawResponses.map((response) => response.providerData?.choices?.[0]?.message);
    if (!messages.some((message) => message?.reasoning?.length > 0)) problems.push("no reasoning field");
  } else {
    if (stream && !["delta", "done"].every((end) => events.some((event) => event.type === `response.reasoning_text.${end}`)))
      problems.push("no reasoning events");
    // Of a stream the SDK keeps the items, each as it came.
    const response = result.rawResponses[0];
    const output = response.providerData?.output ?? response.output.map((item) => item.providerData);
    const reasoning = output.filter((item) => item.type === "reasoning");
    const good = (item) => item.content?.length > 0 && item.content.every((part) => part.type === "reasoning_text" && part.text);
    if (!reasoning.length || !reasoning.every(good)) problems.push("no reasoning item with text");
  }
  return problems;
}

let failed = 0;
for (const api of ["chat", "responses"]) {
  for (const stream of [false, true]) {
    let passed = 0;
    const waiting = [...CASES];
    const worker = async () => {
      for (let next = waiting.shift(); next; next = waiting.shift()) {
        const problems = await run(next, api, stream).catch((error) => [String(error)]);
        if (problems.length) console.log(`case ${next.number}, ${api}, ${stream ? "streamed" : "whole"}: ${problems.join("; ")}`);
        else passed += 1;
      }
    };
    await Promise.all(Array.from({ length: 5 }, worker));
    failed += CASES.length - passed;
    console.log(`${api}, ${stream ? "streamed" : "whole"}: ${passed} of ${CASES.length}`);
  }
}
process.exit(failed ? 1 : 0);
