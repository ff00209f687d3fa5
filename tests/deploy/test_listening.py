"""Who can reach a run: Ray takes commands from everybody who reaches its sockets and has its token."""

import contextlib
import ipaddress
import signal
import subprocess
import sys

import psutil
import pytest
from ray_runs import Run, end_all


def listening(process):
    """Returns (address, port, name of the process) of every TCP socket on which a process or one that it started takes connections."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # It ends meanwhile.
            of_one = one.net_connections("tcp")
            found |= {(*socket.laddr, one.name()) for socket in of_one if socket.status == psutil.CONN_LISTEN}
    return found


def is_open(address):
    """Whether others than this machine reach an address."""
    return not ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback


# As a grandchild; it ends with its input.
SERVER = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("address", "reached"), [("0.0.0.0", True), ("127.0.0.1", False), ("::", True), ("::1", False)])
def test_listening_finds_the_socket_of_a_grandchild(address, reached):
    words = ["sh", "-c", '"$@"; exit', "sh", sys.executable, "-c", SERVER, address]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        port = int(shell.stdout.readline())
        found = listening(psutil.Process(shell.pid))
        shell.stdin.close()
    assert [(ip, its_port, is_open(ip)) for ip, its_port, _ in found] == [(address, port, reached)]


@pytest.mark.ray
def test_a_local_run_listens_on_loopback_only(tmp_path):
    words = ["train", "gridworld", "--run-dir", tmp_path / "run", "--max-updates", "1000000000", "--log-period-seconds", "1"]
    run = Run(tmp_path / "run", *words, "--evaluation.period-seconds", "1")
    try:
        run.wait_for("an evaluation", lambda: any("evaluator/return_mean" in row for row in run.rows()))
        found = listening(psutil.Process(run.process.pid))
        run.process.send_signal(signal.SIGINT)
        assert run.end()[0] == 130
    finally:
        end_all([run])
    assert {"gcs_server", "raylet"} < {name for _, _, name in found}
    assert [socket for socket in sorted(found) if is_open(socket[0])] == []
