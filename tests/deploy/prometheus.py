"""A Prometheus of a test's own, the text that it scrapes, and which metrics its expressions name."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DASHBOARD = json.loads((ROOT / "deploy/grafana/qfleet.json").read_text())
_NO_METRICS = re.compile(
    r"'(?:[^'\\\\]|\\\\.)*'|"
    r'"(?:[^"\\]|\\.)*"|\{[^}]*\}|\[[^\]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)'
)
_WORDS = {"and", "or", "unless", "bool", "offset", "atan2"}


def binary(name):
    """Returns the path of Debian's `prometheus` or `promtool`, or skips the test."""
    if (given := os.environ.get("QFLEET_PROMETHEUS")) is not None:
        found = shutil.which(Path(given).with_name(name))
        assert found, f"QFLEET_PROMETHEUS={given}: there is no {name} beside it"
        return found
    return shutil.which(name) or pytest.skip(f"no {name} on PATH (apt-get install prometheus), nor in QFLEET_PROMETHEUS")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def yaml_blocks(page):
    return re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE)


def metrics_of(expression):
    """Returns the names of the metrics in a PromQL expression."""
    words = re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", _NO_METRICS.sub(" ", expression))
    return set(words) - _WORDS


def dashboard_queries():
    """Returns (panel, expression) of every query of the dashboard."""
    return [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def samples(text):
    """Returns (name, labels, value) of each sample of a scraped page."""
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, labels, value = re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line).groups()
            found.append((name, dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")), float(value)))
    return found


def fetch(url):
    """Returns the page, an error's too; None where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError:
        return None


class Prometheus:
    """A server that scrapes what a configuration says, on loopback, until it is left."""

    def __init__(self, directory, config):
        program = binary("prometheus")
        self.config = directory / "prometheus.yml"
        self.config.write_text(config)
        self._url = f"127.0.0.1:{free_port()}"
        words = [
            f"--config.file={self.config}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={self._url}",
        ]
        self._log = (directory / "prometheus.log").open("w+")
        self._process = subprocess.Popen([program, *words], stdout=self._log, stderr=subprocess.STDOUT)

    def query(self, expression, **more):
        """Returns the result of an instant query, or of a range query where `start`, `end` and `step` are given."""
        words = urllib.parse.urlencode({"query": expression} | more)
        page = fetch(f"http://{self._url}/api/v1/query{'_range' if 'start' in more else ''}?{words}")
        if page is None:
            assert self._process.poll() is None, self._text()
            return []
        answer = json.loads(page)
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def close(self):
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._process.kill()
        self._log.close()

    def _text(self):
        self._log.seek(0)
        return self._log.read()
