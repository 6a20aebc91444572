"""`qembed top`: a live view of a running server in the terminal."""

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
from qembed.command.options import api_key_file_option, json_help
from qembed.errors import BadInput, QembedError
from qembed.sizes import gib
from qembed.text import strict_json
from qembed.text.display import one_line
from qembed.vllm import api_keys

if TYPE_CHECKING:
    from rich.table import Table

TIMEOUT = 10.0  # seconds
ONCE_SECONDS = 1.0
MAX_BYTES = 16 * 2**20


@click.command("top")
@click.argument("url", default="http://127.0.0.1:8000")
@click.option("--once", is_flag=True, help="Measure for one second, print, and end.")
@click.option("--json", "as_json", is_flag=True, help=json_help("one JSON object for each measurement"))
@click.option("--interval", type=click.FloatRange(0.2), default=2.0, show_default=True, help="Seconds between measurements.")
@api_key_file_option()
def command(url: str, once: bool, as_json: bool, interval: float, api_key_file: Path | None) -> None:
    """Show memory, cache, requests, tokens per second and latencies of the server at URL, from its /metrics.

    \b
    qembed top                                  this machine's port 8000
    qembed top http://box:8000 --once --json    for scripts

    Exit codes: 0 ended by --once or Ctrl-C, 1 no server answers at URL, 2 bad input.
    """  # noqa: D301 - click wants the real backspace character
    keys = api_keys.find(api_key_file, os.environ)
    key = keys[0] if keys else None
    try:
        if once or as_json or not sys.stdout.isatty():
            _lines(url, key, ONCE_SECONDS if once else interval, once, as_json)
        else:
            _live(url, key, interval)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # `qembed top | head`
        sys.stderr.close()


def fetch(url: str, key: str | None) -> metrics.Samples:
    """The server's current /metrics.

    Raises:
        BadInput: `url` is not a URL, or the server requires a key.
        QembedError: no server answers at `url`, or it is not vLLM.
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
            f"{parts.scheme}://{parts.netloc}/metrics", headers=headers, timeout=TIMEOUT, largest=MAX_BYTES
        )
    except ValueError as error:
        raise BadInput(f"{url}: not the URL of a server: {error}") from error
    except (OSError, HTTPException) as error:
        raise QembedError(
            f"{url}: no server answers there ({getattr(error, 'reason', None) or error or type(error).__name__})"
        ) from error
    if status == 401:
        raise BadInput(f"{url}: the server requires a key; give --api-key-file or QEMBED_API_KEY")
    samples = metrics.parse(body.decode(errors="replace")) if status == 200 else {}
    if not any(name.startswith(("vllm:", "qembed_")) for name in samples):
        raise QembedError(f"{url}: the server is not vLLM (status {status} for /metrics)")
    return samples


def _lines(url: str, key: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Print a table or JSON after each interval; only once if `once`."""
    before, start = fetch(url, key), time.monotonic()
    while True:
        time.sleep(interval)
        samples, now = fetch(url, key), time.monotonic()
        reading = metrics.read(samples, before, now - start)
        if as_json:
            click.echo(strict_json.dumps({"url": url, **reading.as_json()}))
        else:
            from rich.console import Console

            Console(highlight=False).print(table(url, reading))
        if once:
            return
        before, start = samples, now


def _live(url: str, key: str | None, interval: float) -> None:
    """Update a table on the whole terminal after each interval, until Ctrl-C."""
    from rich.live import Live
    from rich.text import Text

    before, start = fetch(url, key), time.monotonic()
    with Live(table(url, metrics.read(before, None, 0)), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                samples, now = fetch(url, key), time.monotonic()
            except QembedError as error:  # it may be restarting
                live.update(Text(f"{error}\ntrying again every {interval:g} s; Ctrl-C ends"), refresh=True)
                continue
            live.update(table(url, metrics.read(samples, before, now - start)), refresh=True)
            before, start = samples, now


def table(url: str, reading: metrics.Reading) -> Table:
    """A table of the reading."""
    from rich.markup import escape
    from rich.table import Table

    rows = Table(box=None, show_header=False, pad_edge=False, title=escape(url), title_justify="left")
    rows.add_column(style="bold", min_width=12)
    rows.add_column()
    if reading.memory_bytes is not None:
        planned = f" of {gib(reading.planned_bytes)} planned" if reading.planned_bytes else ""
        share = reading.memory_bytes / reading.planned_bytes if reading.planned_bytes else 0
        rows.add_row("memory", f"{gib(reading.memory_bytes)}{planned}  {_bar(share)}")
    rows.add_row("cache", f"{reading.cache_used:.0%}  {_bar(reading.cache_used)}")
    rows.add_row("texts", f"{reading.running} computed, {reading.waiting} waiting")
    rows.add_row("speed", f"{_number(reading.tokens_per_second)} tokens/s, {_number(reading.texts_per_second)} texts/s")
    rows.add_row("latency", ", ".join(f"{name} {_seconds(value)}" for name, value in reading.latency.items()))
    if reading.requests:
        rows.add_row(
            "answers", ", ".join(f"{count} × {escape(one_line(status))}" for status, count in sorted(reading.requests.items()))
        )
    if reading.restarts or reading.nonfinite:
        rows.add_row("trouble", f"{reading.restarts} restarts, {reading.nonfinite} vectors with NaN", style="red")
    return rows


def _bar(share: float, width: int = 20) -> str:
    full = round(min(max(share, 0.0), 1.0) * width)
    return "━" * full + "┄" * (width - full)


def _number(value: float | None) -> str:
    return "…" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return "…" if value is None else f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
