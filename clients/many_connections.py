"""Many open connections that each ask for /health every few seconds.

usage: many_connections.py URL [CONNECTIONS [SECONDS [PERIOD]]]

Prints how long the answers took. Exit status 1 if one was wrong or missing, or the 99th of a hundred took over 50 ms.
"""

import heapq
import resource
import select
import socket
import sys
import time
from urllib.parse import urlparse

LIMIT_MS = 50
REQUEST = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


def main():
    address = urlparse(sys.argv[1])
    count, seconds, period = [float(a) if a else d for a, d in zip(sys.argv[2:5] + [""] * 3, (10_000, 20, 4))]
    count = int(count)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    epoll = select.epoll()
    sockets, sent, times, wrong = {}, {}, [], 0
    for _ in range(count):
        connection = socket.create_connection((address.hostname, address.port))
        connection.setblocking(False)
        sockets[connection.fileno()] = connection
        epoll.register(connection, select.EPOLLIN)
    print(f"{count} connections are open", flush=True)
    start = time.perf_counter()
    due = [(start + period * i / count, number) for i, number in enumerate(sockets)]
    end = start + period + seconds
    warm = start + period
    while (now := time.perf_counter()) < end:
        while due and due[0][0] <= now:
            _, number = heapq.heappop(due)
            sent[number] = time.perf_counter()
            sockets[number].send(REQUEST)
        wait = due[0][0] - now if due else 0.01
        for number, _ in epoll.poll(min(max(wait, 0), 0.1)):
            answer = sockets[number].recv(4096)
            now = time.perf_counter()
            begun = sent.pop(number, None)
            if begun is None or not answer.startswith(b"HTTP/1.1 200"):
                wrong += 1
                epoll.unregister(number)
                continue
            if begun > warm:
                times.append(now - begun)
            heapq.heappush(due, (begun + period, number))
    missing = sum(now - begun > 1 for begun in sent.values())
    times.sort()
    at = lambda share: times[round(share * (len(times) - 1))] * 1e3
    print(f"{len(times)} answers, {len(times) / seconds:.0f} per second; {wrong} wrong, {missing} missing")
    print(f"milliseconds: p50 {at(0.5):.2f}, p90 {at(0.9):.2f}, p99 {at(0.99):.2f}, longest {at(1):.2f}")
    sys.exit(wrong > 0 or missing > 0 or at(0.99) > LIMIT_MS)


main()
