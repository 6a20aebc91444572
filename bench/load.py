"""Overload of a server, and hostile clients: `make bench-load`.

The sample is quantized and served with default limits. Requests are sent at a fixed rate whether or not they are answered: a
minute with one text each, and a minute with eight, which is more than two cores can compute. Then a minute for each attack in
hostile.py, with a lawful load of one text each beside it. All answers to lawful requests must be 200 or 503, and beside an
attack only 200; none may hang, memory must not grow, and afterwards the server must answer as before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hostile
import httpx
import results

from qembed.vllm import machine

BUILD = Path(__file__).parents[1] / "build" / "bench" / "load"
TEXT = (
    "an open-source audio player for the terminal that plays playlists, remembers where it was and shows the words of songs; "
)
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)
MOST_MEMORY = 0.3e9
LARGE_MEMORY = 1.2e9
"""Beside large bodies: four times --max-body in all, the process that reads one of them, and its answer."""
PATIENCE = 120.0


@dataclass
class Answers:
    """Answers: counts by status (HTTP's, "hung" and "cut"), seconds to each 200 and 503, and samples of resident bytes.

    `allowed` are the statuses that are good, `most_memory` the bytes by which memory may move, and `endings` how the server
    ended connections of an attack.
    """

    allowed: frozenset[str] = frozenset({"200", "503"})
    most_memory: float = MOST_MEMORY
    endings: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    served: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    without_wait: int = 0

    @property
    def is_good(self) -> bool:
        """Whether all answers were of an allowed status, each 503 with Retry-After, and memory did not grow."""
        return self.statuses.keys() <= self.allowed and not self.without_wait and self.spread < self.most_memory

    @property
    def spread(self) -> int:
        """Largest minus smallest resident memory, in bytes."""
        return max(self.memory) - min(self.memory) if self.memory else 0


@contextmanager
def serving() -> Iterator[dict[str, Any]]:
    """Run `qembed serve` of the sample; yields its JSON line."""
    BUILD.mkdir(parents=True, exist_ok=True)
    qembed = str(Path(sys.executable).parent / "qembed")
    folder = BUILD / "sample-AWQ-INT4"
    if not (folder / "config.json").exists():
        subprocess.run([qembed, "quantize", "--model", "sample", "--output", str(folder)], check=True)
    with (BUILD / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [qembed, "serve", "--int4", "--model", str(folder), "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                sys.exit(f"the server did not start; see {BUILD / 'serve.log'}")
            yield json.loads(line)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)


async def send(address: tuple[str, int], body: bytes, answers: Answers) -> None:
    """Send a request on its own connection: a client's pool of thousands of connections would cost more than the server."""
    start = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(HEAD % len(body) + body)
                head = await reader.readuntil(b"\r\n\r\n")
                while await reader.read(2**16):
                    pass
            finally:
                writer.close()
    except TimeoutError:
        answers.statuses["hung"] += 1
        return
    except (OSError, asyncio.IncompleteReadError):
        answers.statuses["cut"] += 1
        return
    status = head.split()[1].decode()
    answers.statuses[status] += 1
    (answers.served if status == "200" else answers.refused).append(time.monotonic() - start)
    if status == "503" and re.search(rb"\r\nretry-after: \d+\r\n", head.lower()) is None:
        answers.without_wait += 1


async def load(
    url: str, pid: int, rate: float, seconds: float, texts: int, answers: Answers, attack: hostile.Attack | None = None
) -> None:
    """`rate` requests a second for `seconds`, each of `texts` texts, into `answers`; ends when all have been answered.

    An `attack` begins before, and goes on until then.
    """
    parts = urlsplit(url)
    address = parts.hostname or "", parts.port or 80
    attacking = asyncio.create_task(attack(address, answers.endings)) if attack else None
    body = json.dumps({"input": [TEXT] * texts, "encoding_format": "base64"}).encode()
    start = time.monotonic()
    sent: set[asyncio.Task[None]] = set()
    count = next_sample = 0
    while (elapsed := time.monotonic() - start) < seconds:
        for _ in range(int(elapsed * rate) - count):
            task = asyncio.create_task(send(address, body, answers))
            sent.add(task)
            task.add_done_callback(sent.discard)
            count += 1
        if elapsed >= next_sample:
            answers.memory.append(machine.resident(pid) or 0)
            next_sample += 5
            print(f"\r{elapsed:5.0f} s  {count} sent  {dict(answers.statuses)}", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(0.005)
    await asyncio.gather(*sent)
    answers.memory.append(machine.resident(pid) or 0)
    if attacking:
        attacking.cancel()
        await asyncio.wait([attacking])
        if not attacking.cancelled() and (error := attacking.exception()):
            raise error
    print(file=sys.stderr)


def calm(url: str) -> tuple[float, bool]:
    """Median seconds of twenty requests one after another, and whether all were answered."""
    seconds = []
    good = True
    for _ in range(20):
        start = time.monotonic()
        good &= httpx.post(f"{url}/embeddings", json={"input": TEXT}, timeout=PATIENCE).status_code == 200
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds), good


def main() -> None:
    """Run, print, and write bench/RESULTS.md. Exit code 1: a requirement is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=100, help="requests a second [default: 100]")
    parser.add_argument("--seconds", type=float, default=60, help="how long [default: 60]")
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 8], help="texts in a request, one run each [default: 1 8]")
    parser.add_argument(
        "--attacks",
        nargs="*",
        choices=hostile.ATTACKS,
        default=list(hostile.ATTACKS),
        help=f"attacks, one run each [default: {' '.join(hostile.ATTACKS)}]",
    )
    parser.add_argument("--lawful", type=float, default=10, help="requests a second beside an attack [default: 10]")
    parser.add_argument("--results", type=Path, default=results.FILE, help="where the tables go [default: bench/RESULTS.md]")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    rows, hostile_rows = [], []
    good = True
    with serving() as server:
        before, _ = calm(server["url"])
        for texts in arguments.texts:
            answers = Answers()
            asyncio.run(load(server["url"], server["pid"], arguments.rate, arguments.seconds, texts, answers))
            after, answered = calm(server["url"])
            good &= answers.is_good and answered
            name = f"{arguments.rate:g} requests/s of {texts} text{'s' if texts > 1 else ''}"
            rows.append(row(name, answers, before, after))
        for attack in arguments.attacks:
            what, run = hostile.ATTACKS[attack]
            answers = Answers(frozenset({"200"}), LARGE_MEMORY if attack == "large" else MOST_MEMORY)
            asyncio.run(load(server["url"], server["pid"], arguments.lawful, arguments.seconds, 1, answers, run))
            after, answered = calm(server["url"])
            good &= answers.is_good and answered
            endings = ", ".join(f"{ending} ({count})" for ending, count in sorted(answers.endings.items()))
            hostile_rows.append([*row(what, answers, before, after), endings])
    columns = ("load", "200", "503", "other", "hung", "p50, p99 of 200", "slowest 503", "memory moved", "calm: before, after")
    conditions = f"{results.machine()}; {date.today():%Y-%m-%d}. The bundled sample in INT4 with default limits"
    how = f"{arguments.seconds:g} s of each load; the generator runs on the same machine."
    body = f"## Load (`make bench-load`)\n\n{conditions}, {how}\n\n{results.table(columns, rows)}"
    if hostile_rows:
        beside = (
            f"Beside attacks: {arguments.lawful:g} lawful requests a second of 1 text, which the columns but the last count."
        )
        body += f"\n\n{beside}\n\n{results.table(('attack', *columns[1:], 'attacker'), hostile_rows)}"
    print(body)
    results.replace_section("load", body, arguments.results)
    sys.exit(0 if good else 1)


def row(name: str, answers: Answers, before: float, after: float) -> list[str]:
    """A row of the table."""
    other = sum(count for status, count in answers.statuses.items() if status not in ("200", "503", "hung"))
    served = sorted(answers.served) or [float("nan")]
    return [
        name,
        str(answers.statuses["200"]),
        str(answers.statuses["503"]),
        str(other),
        str(answers.statuses["hung"]),
        f"{statistics.median(served):.2f} s, {served[int(0.99 * (len(served) - 1))]:.2f} s",
        f"{max(answers.refused):.2f} s" if answers.refused else "",
        f"{answers.spread / 1e6:.0f} MB",
        f"{before * 1000:.0f} ms, {after * 1000:.0f} ms",
    ]


if __name__ == "__main__":
    main()
