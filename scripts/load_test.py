"""Many clients at once, good and bad ones, against a server on this machine.

    llmlab serve --model course --max-length 200 --max-queue 24 &
    python scripts/load_test.py http://127.0.0.1:8000 --requests 1000

Each request must end with an answer or with an error that names the reason. Afterwards
nothing may be in work and no block in use. Exit status 1 where that is not so.

--store FILE adds a line of what was found; the page of 07/08 reads
llmlab/inference/data/load_test.jsonl. --worker PID counts that process's memory.

A tenth of the clients hang up in the middle, a tenth send what cannot be done: an
over-long prompt, invalid JSON, an adapter that is not there, a field that nobody knows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

TEXT = "the people of this whale sea and ship state union law war time men"
WORDS = TEXT.split(" ")
KNOWN = {
    "body_too_large",
    "context_length_exceeded",
    "invalid_json",
    "invalid_value",
    "model_not_found",
    "queue_full",
    "time_limit",
    "unknown_parameter",
    "worker_failed",
    "worker_not_ready",
}


@dataclass
class Report:
    """What became of the requests.

    Attributes:
        outcomes: "answered", "hung up" or an error's code → how many.
        unexplained: what ended in any other way.
        first: seconds to the first token of those that were streamed.
        tokens: written, by the usage of answers.
    """

    outcomes: Counter = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    asked_again: int = 0


class Client:
    """Asks by hand, over a plain socket: a good client could not behave badly."""

    def __init__(self, base: str, models: list[str], limit: float) -> None:
        self.address = urlsplit(base)
        self.models = models
        self.limit = limit

    async def ask(self, body: bytes, hang_up_after: int | None = None):
        """(status, headers, body, seconds to the first byte of it); None: hung up."""
        reader, writer = await asyncio.open_connection(
            self.address.hostname, self.address.port
        )
        try:
            head = (
                "POST /v1/completions HTTP/1.1\r\n"
                f"Host: {self.address.netloc}\r\nConnection: close\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            if hang_up_after is not None:
                await asyncio.wait_for(reader.read(hang_up_after), self.limit)
                return None
            began = time.monotonic()
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.limit)
            first = time.monotonic() - began
            text = await asyncio.wait_for(reader.read(), self.limit)
            lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            return int(lines[0].split()[1]), headers, text, first
        finally:
            writer.close()


def request(random_: random.Random, models: list[str]) -> tuple[bytes, int | None]:
    """(a body, after how many bytes the client hangs up)."""
    kind = random_.random()
    prompt = " ".join(random_.choices(WORDS, k=random_.randint(1, 40)))
    body = {
        "model": random_.choice(models),
        "prompt": prompt,
        "max_tokens": random_.randint(1, 24),
        "temperature": random_.choice([0, 0.7]),
        "stream": random_.random() < 0.5,
    }
    if kind < 0.03:
        body["prompt"] = "sea " * 20_000
    elif kind < 0.05:
        return b'{"model": "', None
    elif kind < 0.07:
        body["model"] = "an adapter that is not there"
    elif kind < 0.09:
        body["temprature"] = 1
    elif kind < 0.19:
        body |= {"stream": True, "max_tokens": 100}
        return json.dumps(body).encode(), random_.randint(1, 2000)
    return json.dumps(body).encode(), None


def verdict(status: int, headers: dict[str, str], text: bytes) -> tuple[str, int]:
    """(how it ended, tokens written); a sentence with a blank where unexplained."""
    data = text
    if headers.get("transfer-encoding") == "chunked":
        data = dechunked(text)
    if "event-stream" in headers.get("content-type", ""):
        events = [line[6:] for line in data.split(b"\n") if line.startswith(b"data: ")]
        if events and events[-1] == b"[DONE]":
            return "answered", len(events) - 1
        last = json.loads(events[-1]) if events else {}
        if "error" in last:
            return last["error"]["code"], 0
        return f"a stream that broke off after {len(events)} events", 0
    found = json.loads(data)
    if status == 200:
        return "answered", found["usage"]["completion_tokens"]
    return found["error"]["code"] or f"no code: {found}", 0


def dechunked(text: bytes) -> bytes:
    """The body of a chunked answer."""
    out = b""
    while text:
        size, _, rest = text.partition(b"\r\n")
        length = int(size, 16)
        out += rest[:length]
        text = rest[length + 2 :]
    return out


async def one(client: Client, number: int, seed: int, report: Report) -> None:
    """A request, asked again as often as the server says that it is full."""
    body, hang_up = request(random.Random(f"{seed} {number}"), client.models)
    end = time.monotonic() + client.limit
    while True:
        try:
            answer = await client.ask(body, hang_up)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            report.unexplained.append(f"request {number}: {error!r}")
            report.outcomes["unexplained"] += 1
            return
        if answer is None:
            report.outcomes["hung up"] += 1
            return
        status, headers, text, first = answer
        how, tokens = verdict(status, headers, text)
        later = how in ("queue_full", "worker_not_ready")
        if later and time.monotonic() < end:
            if "retry-after" not in headers:
                report.unexplained.append(
                    f"request {number}: {how}, and no Retry-After"
                )
            report.asked_again += 1
            await asyncio.sleep(random.uniform(0.05, 0.3))
            continue
        if how not in {"answered", *KNOWN}:
            report.unexplained.append(f"request {number}: {how}")
        if how == "answered":
            report.first.append(first)
        report.outcomes[how] += 1
        report.tokens += tokens
        return


async def load(
    base: str,
    requests: int,
    clients: int,
    seed: int,
    limit: float,
    killing: Callable[[], None] | None,
) -> Report:
    """All requests, so many at a time."""
    report = Report()
    models = [each["id"] for each in (await get(base, "/v1/models"))["data"]]
    client = Client(base, models, limit)
    began = time.monotonic()
    numbers = iter(range(requests))

    async def work() -> None:
        for number in numbers:
            await one(client, number, seed, report)
            if killing is not None and number == requests // 2:
                killing()

    await asyncio.gather(*(work() for _ in range(clients)))
    report.seconds = time.monotonic() - began
    return report


async def get(base: str, path: str) -> dict:
    """A page of JSON."""
    address = urlsplit(base)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = f"GET {path} HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    text = await reader.read()
    writer.close()
    return json.loads(text.split(b"\r\n\r\n", 1)[1])


def run(
    base: str, requests: int, *, clients: int, kill=None, seed: int = 0, limit: float
) -> Report:
    """The load, from this process.

    Args:
        kill: whose worker (its `pid`) is killed in the middle.
        limit: seconds that one request may take.
    """
    killing = None
    if kill is not None:

        def killing() -> None:
            os.kill(kill.pid, signal.SIGKILL)

    return asyncio.run(load(base, requests, clients, seed, limit, killing))


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", help="as in http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120.0)
    parser.add_argument("--worker", type=int, help="process whose memory is counted")
    parser.add_argument("--store", help="file to which a line of JSON is added")
    asked = parser.parse_args()
    if urlsplit(asked.base).hostname not in ("127.0.0.1", "localhost", "::1"):
        print("only a server on this machine is loaded")
        return 2
    before = memory(asked.worker)
    report = run(
        asked.base,
        asked.requests,
        clients=asked.clients,
        seed=asked.seed,
        limit=asked.limit,
    )
    print(
        f"{asked.requests} requests, {asked.clients} at a time: {report.seconds:.1f} s"
    )
    for how, count in report.outcomes.most_common():
        print(f"  {count:5}  {how}")
    print(f"  asked again after 429 or 503: {report.asked_again}")
    print(f"  {report.tokens / report.seconds:.0f} tokens/s")
    ordered = sorted(report.first)
    if ordered:
        middle = ordered[len(ordered) // 2]
        late = ordered[int(len(ordered) * 0.99)]
        print(f"  to the first byte: median {middle:.2f} s, 99% {late:.2f} s")
    left = asyncio.run(at_rest(asked.base))
    print(f"  left in work: {left}")
    after = memory(asked.worker)
    if asked.worker is not None:
        print(f"  the worker's memory: {before} MB before, {after} MB after")
    if asked.store:
        line = {
            "model": asyncio.run(get(asked.base, "/v1/models"))["data"][0]["id"],
            "requests": asked.requests,
            "clients": asked.clients,
            "outcomes": dict(report.outcomes.most_common()),
            "unexplained": len(report.unexplained),
            "left": left,
            "worker_mb": [before, after],
        }
        with open(asked.store, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    for line in report.unexplained[:20]:
        print(line)
    return 1 if report.unexplained or any(left.values()) else 0


def memory(process: int | None) -> int | None:
    """Megabytes that a process holds."""
    import psutil

    return None if process is None else psutil.Process(process).memory_info().rss >> 20


async def at_rest(base: str) -> dict[str, float]:
    """Gauges when all clients are gone, waited for a few seconds."""
    names = ("requests_in_flight", "requests_running", "blocks_in_use")
    for _ in range(50):
        left = await gauges(base, names)
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    return left


async def gauges(base: str, names: tuple[str, ...]) -> dict[str, float]:
    """Some lines of /metrics."""
    address = urlsplit(base)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"GET /metrics HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n\r\n"
    )
    writer.write(head.encode())
    lines = (await reader.read()).decode().splitlines()
    writer.close()
    found = {}
    for line in lines:
        name, _, value = line.partition(" ")
        found[name.removeprefix("llmlab_")] = value
    return {name: float(found[name]) for name in names}


if __name__ == "__main__":
    sys.exit(main())
