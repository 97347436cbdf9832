// Stands between a client and a scripted engine, and gives each request the seed that chooses its script: `[case N]` in the
// conversation takes script 2N, or 2N + 1 once a tool has answered. Everything else passes through. proxy.mjs URL
import http from "node:http";

const target = new URL(process.argv[2]);

const server = http.createServer((request, response) => {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", () => {
    let body = Buffer.concat(pieces);
    const found = body.toString().match(/\[case (\d+)\]/);
    if (request.method === "POST" && found) {
      const json = JSON.parse(body);
      const answered = JSON.stringify(json.messages ?? json.input ?? "").match(/"role":"tool"|_call_output"/);
      json.seed = 2 * Number(found[1]) + (answered ? 1 : 0);
      body = Buffer.from(JSON.stringify(json));
    }
    const headers = { ...request.headers, host: target.host, "content-length": body.length };
    const options = { host: target.hostname, port: target.port, method: request.method, path: request.url, headers };
    const forwarded = http.request(options, (answer) => {
      if (process.env.PROXY_LOG) console.error(request.method, request.url, answer.statusCode, body.toString());
      response.writeHead(answer.statusCode, answer.headers);
      answer.on("error", () => response.destroy());
      answer.pipe(response);
    });
    // Either side may go away before the other has ended.
    response.on("error", () => forwarded.destroy());
    forwarded.on("error", () => response.destroy());
    response.on("close", () => forwarded.destroy());
    forwarded.end(body);
  });
});
server.listen(0, "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}`));
