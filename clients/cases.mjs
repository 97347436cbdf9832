// Thirty conversations with one tool each, and what a scripted engine says in them: reasoning and a call, then an answer.
// `cases.mjs` writes the lines of text to be encoded; `cases.mjs IDS` writes the scripts of their tokens.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const text = (description) => ({ type: "string", description });
const object = (properties, required = Object.keys(properties)) => ({
  type: "object", properties, required, additionalProperties: false,
});

export const TOOLS = {
  get_weather: object({ location: text("City"), unit: { type: "string", enum: ["c", "f"] } }),
  get_time: object({ zone: text("Time zone") }),
  add_numbers: object({ numbers: { type: "array", items: { type: "number" } } }),
  search_products: object({
    query: text("Words"), limit: { type: "integer" }, filters: object({ in_stock: { type: "boolean" }, price: { type: "number" } }),
  }),
  send_message: object({ to: { type: "array", items: text("Address") }, subject: text("Subject"), body: text("Body") }),
  system_status: object({}),
};

const ARGUMENTS = [
  ["get_weather", { location: "Tokyo", unit: "c" }], ["get_weather", { location: "São Paulo", unit: "c" }],
  ["get_weather", { location: "Zürich", unit: "f" }], ["get_weather", { location: "京都", unit: "c" }],
  ["get_weather", { location: "St. John's", unit: "f" }], ["get_time", { zone: "Europe/Zurich" }],
  ["get_time", { zone: "America/Argentina/Buenos_Aires" }], ["get_time", { zone: "UTC" }],
  ["get_time", { zone: "Asia/Kolkata" }], ["get_time", { zone: "Pacific/Auckland" }],
  ["add_numbers", { numbers: [1, 2, 3] }], ["add_numbers", { numbers: [] }], ["add_numbers", { numbers: [-1.5, 2e10] }],
  ["add_numbers", { numbers: [0] }], ["add_numbers", { numbers: Array.from({ length: 40 }, (_, i) => i) }],
  ["search_products", { query: "shoes", limit: 3, filters: { in_stock: true, price: 99.5 } }],
  ["search_products", { query: "a \"quoted\" word", limit: 1, filters: { in_stock: false, price: 0 } }],
  ["search_products", { query: "back\\slash", limit: 10, filters: { in_stock: true, price: 1 } }],
  ["search_products", { query: "<less> & {more}", limit: 2, filters: { in_stock: true, price: 5 } }],
  ["search_products", { query: "émoji 👋🏽", limit: 7, filters: { in_stock: false, price: 12 } }],
  ["send_message", { to: ["a@example.org"], subject: "Hello", body: "Line one\nline two" }],
  ["send_message", { to: ["a@example.org", "b@example.org"], subject: "", body: "" }],
  ["send_message", { to: [], subject: "Tab\there", body: "\u2028" }],
  ["send_message", { to: ["x@example.org"], subject: "{}", body: "{\"a\": [1]}" }],
  ["send_message", { to: ["y@example.org"], subject: "long", body: "word ".repeat(60) }],
  ["system_status", {}], ["system_status", {}], ["system_status", {}], ["system_status", {}], ["system_status", {}],
];

export const CASES = ARGUMENTS.map(([tool, args], number) => ({
  number, tool, args, prompt: `[case ${number}] Please use ${tool}.`, answer: `Done with case ${number}.`,
}));

/// Scripts of these cases, and those of the suites of single clients, by their numbers.
function scripts() {
  const turn = "<|end|><|start|>assistant";
  const final = (answer) => `<|channel|>analysis<|message|>I have the result.${turn}<|channel|>final<|message|>${answer}<|return|>`;
  const call = (tool, args) =>
    `<|channel|>analysis<|message|>I need ${tool}.${turn}<|channel|>commentary to=functions.${tool} <|constrain|>json<|message|>${args}<|call|>`;
  const all = CASES.flatMap(({ tool, args, answer }) => [call(tool, JSON.stringify(args)), final(answer)]);
  const command = process.env.CODEX_CALL ?? JSON.stringify({ cmd: "echo said by the shell" });
  all.push(call(process.env.CODEX_TOOL ?? "exec_command", command), final("The shell has answered."));
  return all;
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  if (process.argv[2]) {
    const lines = readFileSync(process.argv[2], "utf8").trim().split("\n");
    const entries = lines.map((line, seed) => [seed, { tokens: JSON.parse(line).ids }]);
    const other = entries[entries.length - 1][1];
    console.log(JSON.stringify({ ...Object.fromEntries(entries), default: other }));
  } else {
    scripts().forEach((script) => console.log(JSON.stringify(script)));
  }
}
