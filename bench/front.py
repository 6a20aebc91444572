"""What stands before the engine: `make bench-front`.

The gate runs in uvicorn around an engine that answers at once with the vectors of a 1,024-dimensional model. So the requests a
second are what parsing HTTP, checking and answering allow. httptools drops the body of a POST with `Upgrade: h2c`, so qembed
uses h11; the bench tells what that costs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import socket
import statistics
import subprocess
import sys
import time
from datetime import date
from typing import Any

import results

TOKENS = 43
BATCHES = (1, 32)
CONNECTIONS = 8
SECONDS = 5.0
ROUNDS = 5
LENGTH = 1024
PARSERS = {
    "httptools": "httptools",
    "h11": "h11",
    "h11 with limits of connections (qembed)": "qembed.serve.connections:Connection",
}


def text() -> str:
    """A text of TOKENS tokens."""
    from qembed.checkpoint.find import SAMPLE, find

    tokenizer = find(SAMPLE).tokenizer()
    words = "an audio player for the terminal that keeps playlists and remembers where it was, "
    length = next(size for size in range(1, 2000) if len(tokenizer.encode((words * 20)[:size]).ids) == TOKENS)
    return (words * 20)[:length]


def serve(parser: str, descriptor: int) -> None:
    """Serve the gate, around an engine that answers at once, on a listening socket."""
    import uvicorn

    from qembed.serve.gate import Gate
    from qembed.vllm.gate_rules import Rules

    vector = base64.b64encode(bytes(4 * LENGTH)).decode()
    usage = {"prompt_tokens": TOKENS, "total_tokens": TOKENS}
    answers = {}
    for texts in BATCHES:
        data = [{"object": "embedding", "index": index, "embedding": vector} for index in range(texts)]
        answers[texts] = json.dumps({"object": "list", "model": "m", "data": data, "usage": usage}).encode()

    async def engine(_scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answers[len(body["input"])]})

    gate = Gate(engine, Rules(folder="", max_model_len=32_768, dimensions=[LENGTH], hosts=["localhost"]))
    config = uvicorn.Config(gate, http=parser, log_level="error", access_log=False, lifespan="off")
    uvicorn.Server(config).run([socket.socket(fileno=descriptor)])


async def ask(port: int, request: bytes, until: float) -> int:
    """Send `request` again and again on one connection until that time; the number of answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    count = 0
    while time.perf_counter() < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.partition(b":")[2]))
        count += 1
    writer.close()
    return count


async def rate(port: int, request: bytes, seconds: float) -> float:
    """Answers a second on CONNECTIONS connections."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(ask(port, request, start + seconds) for _ in range(CONNECTIONS)))
    return sum(counts) / (time.perf_counter() - start)


def measure(parser: str, requests: list[bytes], seconds: float) -> list[float]:
    """Answers a second to each of `requests`, from a new server with `parser`."""
    with socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS) as listener:
        command = [sys.executable, __file__, "--serve", parser, "--socket", str(listener.fileno())]
        with subprocess.Popen(command, pass_fds=[listener.fileno()]) as server:
            try:
                port = listener.getsockname()[1]
                asyncio.run(rate(port, requests[0], 1.0))  # it starts, and is warm
                return [asyncio.run(rate(port, request, seconds)) for request in requests]
            finally:
                server.terminate()


def main() -> None:
    """Measure all parsers in turn, several times, and write the medians."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--serve")
    options.add_argument("--socket", type=int)
    options.add_argument("--seconds", type=float, default=SECONDS)
    options.add_argument("--rounds", type=int, default=ROUNDS)
    options.add_argument("--note", default="", help="a sentence for the section, such as what else ran meanwhile")
    chosen = options.parse_args()
    if chosen.serve:
        serve(chosen.serve, chosen.socket)
        return
    content = text()
    requests = []
    for texts in BATCHES:
        body = json.dumps({"model": "m", "input": [content] * texts, "encoding_format": "base64"}).encode()
        head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        requests.append(f"{head}{len(body)}\r\n\r\n".encode() + body)
    rates: dict[str, list[list[float]]] = {name: [] for name in PARSERS}
    for _ in range(chosen.rounds):
        for name, parser in PARSERS.items():
            rates[name].append(measure(parser, requests, chosen.seconds))
    rows = []
    for name, measured in rates.items():
        columns = [sorted(column) for column in zip(*measured, strict=True)]
        cells = [f"{statistics.median(column):,.0f} ({column[0]:,.0f} to {column[-1]:,.0f})" for column in columns]
        rows.append([name, *cells])
    section = f"""
## Before the engine (`make bench-front`)

{results.machine()}; {date.today()}. Requests a second through uvicorn and the gate, with an engine that answers at once;
{CONNECTIONS} connections, texts of {TOKENS} tokens, answers in base64 of {LENGTH} dimensions. Medians of {chosen.rounds} runs
of {chosen.seconds:g} s, with the lowest and the highest. The client takes a part of the same cores. {chosen.note}

{results.table(["parser of HTTP", *(f"{texts} text{'s' if texts > 1 else ''} a request" for texts in BATCHES)], rows)}
"""
    results.replace_section("front", section)
    print(section)


if __name__ == "__main__":
    main()
