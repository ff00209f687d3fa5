"""Who can reach a run: which sockets its processes listen on. test_prometheus.py asks that of a real run."""

import contextlib
import ipaddress
import subprocess
import sys

import psutil
import pytest


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
