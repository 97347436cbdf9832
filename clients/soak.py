"""Mixed traffic against a server for a while: streams that are read, streams that are left, bad requests, slow readers.

usage: soak.py URL MINUTES

At the end every request that the server took must be accounted for, no block of the key/value cache may be held, and the
memory must be what it was after a quarter of the time, when caches are full and threads have started. Exit status 1 if one of these fails.
"""

import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from urllib.parse import urlparse

CLIENTS = 12
# Resident memory may grow by this share.
GROWTH = 0.05


def metrics(address):
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", "/metrics")
    values = {}
    for line in connection.getresponse().read().decode().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            values[name] = float(value)
    connection.close()
    return values


def total(values, name, label=""):
    return sum(value for key, value in values.items() if key.split("{")[0] == name and label in key)


class Client(threading.Thread):
    def __init__(self, address, seed, until):
        super().__init__()
        self.address, self.random, self.until = address, random.Random(seed), until
        self.counts, self.faults = Counter(), []

    def run(self):
        kinds = [self.chat, self.chat, self.stream, self.stream, self.left, self.left, self.several, self.bad, self.slow]
        while time.monotonic() < self.until:
            kind = self.random.choice(kinds)
            try:
                kind()
                self.counts[kind.__name__] += 1
            except Exception as error:  # noqa: BLE001: whatever goes wrong is what is looked for
                self.faults.append(f"{kind.__name__}: {error!r}")

    def body(self, **more):
        words = " ".join(self.random.choice(["the", "capital", "of", "a", "story", "once"]) for _ in range(self.random.randint(1, 200)))
        return {"messages": [{"role": "user", "content": words}], "max_tokens": self.random.randint(1, 120), "ignore_eos": True, **more}

    def send(self, body, path="/v1/chat/completions"):
        connection = http.client.HTTPConnection(self.address, timeout=300)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        return connection, connection.getresponse()

    def expect(self, answer, status):
        if answer.status != status:
            raise AssertionError(f"status {answer.status} instead of {status}: {answer.read()[:200]}")

    def chat(self):
        body = self.body()
        connection, answer = self.send(body)
        self.expect(answer, 200)
        usage = json.loads(answer.read())["usage"]
        if usage["completion_tokens"] != body["max_tokens"]:
            raise AssertionError(f"{usage} for {body['max_tokens']} tokens")
        connection.close()

    def stream(self):
        body = self.body(stream=True, stream_options={"include_usage": True})
        connection, answer = self.send(body)
        self.expect(answer, 200)
        events = answer.read().decode().split("\n\n")
        if events[-2:] != ["data: [DONE]", ""]:
            raise AssertionError(f"the stream ends with {events[-2:]}")
        usage = json.loads(events[-3].removeprefix("data: "))["usage"]
        if usage["completion_tokens"] != body["max_tokens"]:
            raise AssertionError(f"{usage} for {body['max_tokens']} tokens")
        connection.close()

    def left(self):
        connection, answer = self.send(self.body(stream=self.random.random() < 0.7, max_tokens=2000)) if self.random.random() < 0.6 else self.unanswered()
        if answer is not None:
            answer.read1(self.random.randint(1, 3000))
            answer.close()
        connection.close()

    def unanswered(self):
        """Gone before anything was answered."""
        connection = http.client.HTTPConnection(self.address, timeout=300)
        connection.request("POST", "/v1/chat/completions", json.dumps(self.body()), {"content-type": "application/json"})
        time.sleep(self.random.random() / 20)
        return connection, None

    def several(self):
        prompts = [[self.random.randint(0, 3000) for _ in range(self.random.randint(1, 60))] for _ in range(3)]
        body = {"prompt": prompts, "n": 2, "max_tokens": 8, "ignore_eos": True, "logprobs": 3}
        connection, answer = self.send(body, "/v1/completions")
        self.expect(answer, 200)
        if len(json.loads(answer.read())["choices"]) != 6:
            raise AssertionError("choices are missing")
        connection.close()

    def bad(self):
        body = self.random.choice([{"messages": []}, self.body(temperature=9), self.body(n=1000), {"messages": [{"role": "user", "content": "x " * 200_000}]}])
        connection, answer = self.send(body)
        self.expect(answer, 400)
        answer.read()
        connection.close()

    def slow(self):
        """Reads a little, waits, reads the rest."""
        connection = socket.create_connection(self.address.rsplit(":", 1), timeout=300)
        body = json.dumps(self.body(stream=True)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        answer = connection.recv(200)
        time.sleep(self.random.random())
        while part := connection.recv(4096):
            answer += part
        if b"data: [DONE]" not in answer:
            raise AssertionError(f"the stream ends with {answer[-100:]}")
        connection.close()


def main():
    address, minutes = urlparse(sys.argv[1]).netloc, float(sys.argv[2])
    before = metrics(address)
    start = time.monotonic()
    clients = [Client(address, seed, start + 60 * minutes) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    memory = []
    while any(client.is_alive() for client in clients):
        time.sleep(5)
        values = metrics(address)
        memory.append((time.monotonic() - start, values["process_resident_memory_bytes"]))
        if len(memory) % 12 == 0:
            generated = total(values, "vllm:generation_tokens_total")
            print(f"{memory[-1][0] / 60:5.1f} min  {memory[-1][1] / 2**20:7.1f} MiB  {generated:.0f} tokens", flush=True)
    # What clients have left may take a step to go.
    for _ in range(100):
        values = metrics(address)
        if total(values, "vllm:num_requests_running") + total(values, "vllm:num_requests_waiting") == 0:
            break
        time.sleep(0.1)
    counts = sum((client.counts for client in clients), Counter())
    faults = [fault for client in clients for fault in client.faults]
    grew = lambda name: total(values, name) - total(before, name)
    ended, taken = grew("vllm:request_success_total"), grew("vllm:request_params_n_sum")
    warm = [bytes for at, bytes in memory if at >= 15 * minutes][0]
    last = memory[-1][1]
    print(f"{sum(counts.values())} requests: {dict(counts)}")
    print(f"{taken:.0f} answers begun, {ended:.0f} ended, {grew('gptoss_client_disconnects_total'):.0f} clients left")
    print(f"memory {warm / 2**20:.1f} MiB after a quarter of the time, {last / 2**20:.1f} MiB at the end ({last / warm - 1:+.1%})")
    failures = faults[:5]
    if total(values, "vllm:kv_cache_usage_perc") != 0:
        failures.append(f"a share of {total(values, 'vllm:kv_cache_usage_perc')} of the key/value cache is held")
    if ended < taken:
        failures.append(f"{taken - ended:.0f} answers are not accounted for")
    if last > warm * (1 + GROWTH):
        failures.append("the memory grew")
    for failure in failures:
        print(f"FAILED {failure}")
    sys.exit(bool(failures))


main()
