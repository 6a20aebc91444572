"""`qembed top`: a running server, live in the terminal."""

from __future__ import annotations

import os
import sys
import time
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from qembed.client import http, metrics
from qembed.errors import BadInput, QembedError
from qembed.sizes import gib
from qembed.text import strict_json
from qembed.vllm import api_keys

if TYPE_CHECKING:
    from rich.table import Table

TIMEOUT = 10.0
ONCE_SECONDS = 1.0
LARGEST = 16 * 2**20


@click.command("top")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--once", is_flag=True, help="Look once, for a second, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, a line for each look.")
@click.option("--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds between looks.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="A key for the server, where it asks for one.  [default: QEMBED_API_KEY]",
)
def command(url: str, once: bool, as_json: bool, interval: float, api_key_file: Path | None) -> None:
    """Show memory, requests, tokens a second, latencies and cache of the server at URL, from its /metrics.

    \b
    qembed top                                  this machine's port 8000
    qembed top http://box:8000 --once --json    for scripts

    Exit codes: 0 ended by --once or Ctrl-C, 1 no server answers there, 2 bad input.
    """  # noqa: D301 - click wants the real backspace character
    given = api_keys.find(api_key_file, os.environ)
    try:
        if once or as_json or not sys.stdout.isatty():
            _lines(url, given[0] if given else None, ONCE_SECONDS if once else interval, once, as_json)
        else:
            _live(url, given[0] if given else None, interval)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # `qembed top | head`
        sys.stderr.close()


def fetch(url: str, key: str | None) -> metrics.Samples:
    """The server's numbers now.

    Raises:
        BadInput: `url` is none, or the server wants a key.
        QembedError: nothing answers there, or something else than a server with /metrics.
    """
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        _ = parts.port
    except ValueError as error:
        raise BadInput(f"{url}: not the URL of a server: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"{url}: not the URL of a server, such as http://127.0.0.1:8000")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        status, body = http.request(
            f"{parts.scheme}://{parts.netloc}/metrics", headers=headers, timeout=TIMEOUT, largest=LARGEST
        )
    except ValueError as error:
        raise BadInput(f"{url}: not the URL of a server: {error}") from error
    except (OSError, HTTPException) as error:
        raise QembedError(
            f"{url}: no server answers there ({getattr(error, 'reason', None) or error or type(error).__name__})"
        ) from error
    if status == 401:
        raise BadInput(f"{url}: the server asks for a key; give --api-key-file or QEMBED_API_KEY")
    samples = metrics.parse(body.decode(errors="replace")) if status == 200 else {}
    if not any(name.startswith(("vllm:", "qembed_")) for name in samples):
        raise QembedError(f"{url}: what answers there is no vLLM (status {status} for /metrics)")
    return samples


def _lines(url: str, key: str | None, interval: float, once: bool, as_json: bool) -> None:
    before, when = fetch(url, key), time.monotonic()
    while True:
        time.sleep(interval)
        samples, now = fetch(url, key), time.monotonic()
        reading = metrics.read(samples, before, now - when)
        if as_json:
            click.echo(strict_json.dumps({"url": url, **reading.as_json()}))
        else:
            from rich.console import Console

            Console(highlight=False).print(table(url, reading))
        if once:
            return
        before, when = samples, now


def _live(url: str, key: str | None, interval: float) -> None:
    from rich.live import Live
    from rich.text import Text

    before, when = fetch(url, key), time.monotonic()
    with Live(table(url, metrics.read(before, None, 0)), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                samples, now = fetch(url, key), time.monotonic()
            except QembedError as error:  # it may be starting again
                live.update(Text(f"{error}\nlooking again every {interval:g} s; Ctrl-C ends"), refresh=True)
                continue
            live.update(table(url, metrics.read(samples, before, now - when)), refresh=True)
            before, when = samples, now


def table(url: str, reading: metrics.Reading) -> Table:
    """The view of a moment."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table(box=None, show_header=False, pad_edge=False, title=escape(url), title_justify="left")
    shown.add_column(style="bold", min_width=12)
    shown.add_column()
    if reading.memory_bytes is not None:
        planned = f" of {gib(reading.planned_bytes)} planned" if reading.planned_bytes else ""
        part = reading.memory_bytes / reading.planned_bytes if reading.planned_bytes else 0
        shown.add_row("memory", f"{gib(reading.memory_bytes)}{planned}  {_bar(part)}")
    shown.add_row("cache", f"{reading.cache_used:.0%}  {_bar(reading.cache_used)}")
    shown.add_row("texts", f"{reading.running} computed, {reading.waiting} waiting")
    shown.add_row("speed", f"{_number(reading.tokens_per_second)} tokens/s, {_number(reading.texts_per_second)} texts/s")
    shown.add_row("latency", ", ".join(f"{name} {_seconds(value)}" for name, value in reading.latency.items()))
    if reading.requests:
        shown.add_row("answers", ", ".join(f"{count} × {status}" for status, count in sorted(reading.requests.items())))
    if reading.restarts or reading.nonfinite:
        shown.add_row("trouble", f"{reading.restarts} restarts, {reading.nonfinite} vectors with NaN", style="red")
    return shown


def _bar(part: float, width: int = 20) -> str:
    full = round(min(max(part, 0.0), 1.0) * width)
    return "━" * full + "┄" * (width - full)


def _number(value: float | None) -> str:
    return "…" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return "…" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
