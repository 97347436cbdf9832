// Drives the chat page in a headless Chromium over its debugging protocol: see chat_page.sh.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import assert from "node:assert/strict";

const [url] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), "chat-page-"));
const browser = spawn(process.env.CHROMIUM ?? "chromium", [
  "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", `--user-data-dir=${profile}`, "about:blank",
]);

let failed = true;
try {
  const endpoint = await new Promise((found, missing) => {
    let said = "";
    browser.stderr.on("data", data => {
      said += data;
      const match = said.match(/ws:\/\/([^/]+)\//);
      if (match) found(match[1]);
    });
    browser.on("exit", () => missing(new Error("the browser ended: " + said)));
  });
  const targets = await (await fetch(`http://${endpoint}/json/list`)).json();
  const socket = new WebSocket(targets.find(target => target.type === "page").webSocketDebuggerUrl);
  await new Promise(open => socket.addEventListener("open", open));
  const waiting = new Map(), faults = [];
  let count = 0;
  socket.addEventListener("message", ({ data }) => {
    const message = JSON.parse(data);
    if (message.id) waiting.get(message.id)(message);
    if (message.method === "Runtime.exceptionThrown") faults.push(message.params.exceptionDetails.exception?.description);
    if (message.method === "Log.entryAdded" && message.params.entry.level === "error") faults.push(message.params.entry.text);
  });
  const send = (method, params = {}) =>
    new Promise(answer => { waiting.set(++count, answer); socket.send(JSON.stringify({ id: count, method, params })); });
  const value = async expression => {
    const { result } = await send("Runtime.evaluate", { expression, returnByValue: true, awaitPromise: true });
    assert(!result.exceptionDetails, JSON.stringify(result.exceptionDetails));
    return result.result.value;
  };
  const until = async expression => {
    while (!(await value(expression))) await new Promise(later => setTimeout(later, 50));
  };
  const say = async text => {
    await value(`document.getElementById("text").value = ${JSON.stringify(text)}; document.getElementById("form").requestSubmit()`);
    await until(`document.getElementById("send").textContent === "Send"`);
  };
  setTimeout(() => { console.error("the page took too long"); browser.kill(); process.exit(1); }, 60_000).unref();

  await send("Runtime.enable");
  await send("Log.enable");
  await send("Page.enable");
  await send("Emulation.setDeviceMetricsOverride", { width: 360, height: 740, deviceScaleFactor: 2, mobile: true });
  await send("Page.navigate", { url });
  await until(`document.readyState === "complete" && document.getElementById("model")?.options.length > 0`);

  await say("Hello");
  const found = await value(`(() => {
    const answer = document.querySelector("article.assistant");
    return {
      reasoning: answer.querySelector("details > div").textContent, open: answer.querySelector("details").open,
      strong: answer.querySelector("strong")?.textContent, code: answer.querySelector("pre code")?.textContent,
      items: answer.querySelectorAll("li").length, images: answer.querySelectorAll("img, script").length,
      text: answer.textContent, wide: document.documentElement.scrollWidth > innerWidth, touched: window.touched ?? null,
    };
  })()`);
  assert.equal(found.reasoning, "Let me think.");
  assert.equal(found.open, false);
  assert.equal(found.strong, "bold");
  assert.equal(found.code, "let x = 1;");
  assert.equal(found.items, 2);
  assert.equal(found.images, 0, "markup of an answer stays text");
  assert(found.text.includes("<img src=x onerror=touched=1>"));
  assert.equal(found.touched, null);
  assert.equal(found.wide, false, "nothing is wider than a phone");
  await say("And again");
  assert.equal(await value(`document.querySelectorAll("article.assistant").length`), 2);
  assert.equal(await value(`document.querySelectorAll(".wrong").length`), 0);
  await value(`document.getElementById("fresh").click()`);
  assert.equal(await value(`document.querySelectorAll("article").length`), 0);
  const scheme = async value_ => {
    await send("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: value_ }] });
    return value(`getComputedStyle(document.body).backgroundColor`);
  };
  assert.notEqual(await scheme("light"), await scheme("dark"));
  assert.deepEqual(faults, []);
  console.log("the chat page works");
  failed = false;
} finally {
  browser.kill();
  await new Promise(ended => (browser.exitCode === null ? browser.on("exit", ended) : ended()));
  rmSync(profile, { recursive: true, force: true, maxRetries: 5 });
}
process.exit(failed ? 1 : 0);
