"""The page of `qfleet report` in a headless Chromium: on a desk and on a phone, light and dark.

The browser is spoken to by its DevTools protocol over a pipe: no driver, no package, no port. Where there is no Chromium
(Debian: `apt install chromium`) the tests are skipped.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_data import write_run

from deploy import cli

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
]
# Gives Chromium its two pipes as the descriptors 3 and 4, where it looks for them.
START = """
import os, sys
ends = [os.dup(int(number)) for number in sys.argv[1:3]]
while min(ends) < 5:
    ends = [os.dup(end) for end in ends]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a headless Chromium."""

    def __init__(self, directory: Path) -> None:
        their_input, self._output = os.pipe()
        self._input, their_output = os.pipe()
        command = [sys.executable, "-c", START, str(their_input), str(their_output)]
        command += [str(BROWSER), *FLAGS, f"--user-data-dir={directory}", "about:blank"]
        with (directory.parent / "chromium.log").open("w") as log:
            self._process = subprocess.Popen(command, pass_fds=(their_input, their_output), stdout=log, stderr=log)
        os.close(their_input)
        os.close(their_output)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.messages: list[dict] = []
        targets = self("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: object) -> dict:
        """Calls a method and returns its result; events that arrive meanwhile are kept in `messages`."""
        self._count += 1
        message: dict = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self.messages.append(answer)

    def open(self, page: Path, width: int, scheme: str) -> None:
        self.messages.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Page.navigate", url=page.as_uri())
        while not any(message["method"] == "Page.loadEventFired" for message in self.messages):
            self.messages.append(self._receive())

    def evaluate(self, expression: str) -> object:
        return self("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[dict]:
        """Returns what a person would see red in the console."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        return [message["params"] for message in self.messages if message["method"] in kinds]

    def requested(self) -> list[str]:
        """Returns the addresses that the page asked for, itself and what it carries excepted."""
        sent = [message["params"] for message in self.messages if message["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in sent if request["type"] != "Document"]

    def close(self) -> None:
        self("Browser.close")
        os.close(self._output)
        os.close(self._input)
        self._process.wait(60)

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            data = os.read(self._input, 1 << 16)
            assert data, "Chromium has ended; see chromium.log"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with everything in it that is wide: several methods, long names, warnings, an evaluation file."""
    directory = tmp_path_factory.mktemp("report")
    runs = [write_run(directory / f"pong-{seed}", seed=seed, level=seed) for seed in range(3)]
    runs.append(write_run(directory / ("long" * 20), sticky=0.25, fault="a disk was full " * 10))
    runs.append(write_run(directory / "breakout", game="breakout", ends=False))
    (runs[0] / "evaluation-machado.json").write_text(json.dumps({"mean_return": 1.5, "returns": [1.5], "protocol": "machado"}))
    out = directory / "page.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out), "--no-video"]) == 0
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    browser = Browser(tmp_path_factory.mktemp("chromium") / "profile")
    yield browser
    browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_fits_and_nobody_complains(browser, page, width, scheme):
    browser.open(page, width, scheme)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert [url for url in browser.requested() if not url.startswith("data:")] == []


WIDER = """[...document.querySelectorAll("body *")].filter(e => !e.closest(".table") && !e.closest("svg")
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className)"""


def test_on_a_phone_only_tables_are_wider_than_the_page_and_scroll_alone(browser, page):
    browser.open(page, 375, "light")
    assert browser.evaluate(WIDER) == []
    scrolling = '[...document.querySelectorAll(".table")].filter(e => e.scrollWidth > e.clientWidth).length'
    assert browser.evaluate(scrolling) > 0
    assert browser.evaluate('getComputedStyle(document.querySelector(".table")).overflowX') == "auto"


def test_text_and_lines_follow_the_scheme(browser, page):
    def luminance(expression: str) -> float:
        red, green, blue = json.loads(f"[{browser.evaluate(expression).removeprefix('rgb(').removesuffix(')')}]")[:3]
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for scheme, page_is_light in (("light", True), ("dark", False)):
        browser.open(page, 1280, scheme)
        ground = luminance("getComputedStyle(document.body).backgroundColor")
        assert (ground > 128) == page_is_light
        for selector, color in (("body", "color"), ("svg .tick", "fill"), ("svg .line", "stroke"), (".alarm", "color")):
            shown = luminance(f"getComputedStyle(document.querySelector('{selector}')).{color}")
            assert abs(shown - ground) > 60, (scheme, selector)


def test_a_page_that_is_too_wide_is_found(browser, page, tmp_path):
    """The overflow test has power: a wide element and a script that fails are seen."""
    broken = tmp_path / "broken.html"
    wide = '<div style="width:2000px">wide</div><script>nothing.here()</script><img src="nowhere.png">'
    broken.write_text(page.read_text().replace("<main>", f"<main>{wide}"))
    browser.open(broken, 1280, "light")
    assert browser.evaluate("document.documentElement.scrollWidth") > 1280
    assert browser.evaluate(WIDER) == ["DIV."]
    assert browser.complaints()
    assert [url for url in browser.requested() if not url.startswith("data:")]
