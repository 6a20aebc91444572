"""The page in a real browser: no errors, no network requests, and nothing cut off on a phone or a desktop.

QEMBED_SCREENSHOTS names a folder for screenshots, to be looked at.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from qembed.eval.report import html
from qembed.eval.thresholds import Thresholds
from tests.eval.report.conftest import full

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt-get install chromium)")
SECONDS = 60
CUT_OFF = """(() => {
  const width = document.documentElement.clientWidth, faults = [];
  if (document.documentElement.scrollWidth > width) faults.push(`page ${document.documentElement.scrollWidth}`);
  for (const element of document.querySelectorAll('body *')) {
    const box = element.getBoundingClientRect();
    if (!box.width || element.tagName === 'title') continue;
    const svg = element.ownerSVGElement && element.ownerSVGElement.getBoundingClientRect();
    const left = svg ? svg.left : 0, right = svg ? svg.right : width;
    const text = (element.textContent || '').slice(0, 40);
    if (box.right > right + 1 || box.left < left - 1) faults.push(`${element.tagName} ${text}`);
    const hides = getComputedStyle(element).overflow !== 'visible';
    if (!svg && element.scrollWidth > element.clientWidth + 1 && hides) faults.push(element.tagName);
  }
  return faults;
})()"""
OVERLAPS = """(() => {
  const faults = [];
  for (const svg of document.querySelectorAll('svg')) {
    const boxes = [...svg.querySelectorAll('text')].map(element => [element.getBoundingClientRect(), element.textContent]);
    boxes.forEach(([a, first], index) => boxes.slice(index + 1).forEach(([b, second]) => {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > a.height / 3) faults.push(`${first} over ${second}`);
    }));
  }
  return faults;
})()"""

BROKEN_WORDS = """(() => [...document.querySelectorAll('td')].filter(cell => {
  if (!/^\\S{1,12}$/.test(cell.textContent)) return false;
  const range = document.createRange();
  range.selectNodeContents(cell);
  return range.getClientRects().length > 1;
}).map(cell => cell.textContent))()"""


class Tab:
    """A tab of a headless browser, controlled through the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=SECONDS))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def show(self, path: Path, width: int, scheme: str) -> None:
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + SECONDS
        while self.evaluate("document.readyState") != "complete" or self.evaluate("location.href") != path.as_uri():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def events_named(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    assert BROWSER is not None
    with tempfile.TemporaryDirectory(prefix="qembed-browser-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HOME": folder},
        )  # fmt: skip
        try:
            note = Path(folder) / "DevToolsActivePort"
            deadline = time.monotonic() + SECONDS
            while not note.exists() or len(note.read_text().splitlines()) < 2:
                assert process.poll() is None, "the browser ended"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            port, _ = note.read_text().splitlines()[:2]
            with connect(f"ws://127.0.0.1:{port}{_page(int(port))}", max_size=2**27) as socket:
                tab = Tab(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    tab.call(f"{domain}.enable")
                yield tab
        finally:
            process.terminate()
            process.wait(SECONDS)


def _page(port: int) -> str:
    from urllib.request import urlopen

    with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=SECONDS) as answer:
        targets = json.load(answer)
    address = str(next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"))
    return "/" + address.split("/", 3)[3]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    result = full(Thresholds(0.9999, 0.5, 0.005), 120)
    for row in result["results"]["worst"]:  # the longest text, which leaves the other columns little room
        row["text"] = "語" * 80
    path.write_text(html.page(result), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_has_no_errors_or_requests(tab: Tab, page: Path, width: int, scheme: str) -> None:
    tab.show(page, width, scheme)
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate(OVERLAPS) == []
    assert tab.evaluate(BROKEN_WORDS) == []
    assert tab.events_named("Log.entryAdded") == []
    assert tab.events_named("Runtime.exceptionThrown") == []
    assert tab.events_named("Runtime.consoleAPICalled") == []
    requests = [event["request"]["url"] for event in tab.events_named("Network.requestWillBeSent")]
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    smallest = tab.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(element => element.getBoundingClientRect().height))"
    )
    assert smallest >= 8
    if folder := os.environ.get("QEMBED_SCREENSHOTS"):
        size = tab.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
        picture = tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        (Path(folder) / f"report-{width}-{scheme}.png").write_bytes(base64.b64decode(picture))


def test_the_page_prints_black_on_white(tab: Tab, page: Path) -> None:
    tab.show(page, 1280, "dark")
    tab.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    pdf = base64.b64decode(tab.call("Page.printToPDF", printBackground=False)["data"])
    assert pdf.startswith(b"%PDF")
    if folder := os.environ.get("QEMBED_SCREENSHOTS"):
        (Path(folder) / "report.pdf").write_bytes(pdf)
    tab.call("Emulation.setEmulatedMedia", media="")
