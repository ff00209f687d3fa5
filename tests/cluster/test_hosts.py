"""The hosts that the tests of this folder run on, and whom a Ray cluster on them lets in."""

import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hosts import Hosts, why_no_delay

# Sends each line of its input back to whoever sent it, and says who that is.
SERVER = """
import socket
server = socket.create_server(("", 5000))
print("listens", flush=True)
connection, (address, _) = server.accept()
print(socket.gethostname(), address, flush=True)
while data := connection.recv(100):
    connection.sendall(data)
"""
CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000))
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(100).decode(), end="", flush=True)
"""
CONNECT = """
import socket, sys, time
began = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 5000), timeout=1.0)
except OSError as error:
    print(type(error).__name__)
else:
    print(time.monotonic() - began)
"""


def start(host, script, *words):
    return host.popen([sys.executable, "-c", script, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def serve(host):
    server = start(host, SERVER)
    assert server.stdout.readline() == "listens\n"
    return server


def connect(host, other):
    """Returns after how many seconds a connection was there, or what went wrong."""
    return host.run([sys.executable, "-c", CONNECT, other.address]).stdout.strip()


def test_hosts_have_names_addresses_and_processes_of_their_own(make_hosts):
    hosts = make_hosts("a", "b")
    server = serve(hosts["a"])
    start(hosts["b"], CLIENT, hosts["a"].address)
    assert server.stdout.readline() == f"qf{os.getpid()}-a {hosts['b'].address}\n"
    assert hosts["b"].run(["hostname"]).stdout == f"qf{os.getpid()}-b\n"
    assert hosts["a"].run([sys.executable, "-c", "import os; print(os.getpid())"]).stdout != f"{server.pid}\n"
    assert set(hosts["a"].pids()).isdisjoint(hosts["b"].pids())
    assert not any(address.address.startswith("10.77.") for card in psutil.net_if_addrs().values() for address in card)


def test_a_command_ends_in_its_host_as_it_would_here(make_hosts):
    host = make_hosts("a")["a"]
    done = host.run(["sh", "-c", "echo out; echo error >&2; exit 130"])
    assert (done.returncode, done.stdout, done.stderr) == (130, "out\n", "error\n")
    interrupted = host.popen(
        ["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"], stdout=subprocess.PIPE
    )
    assert interrupted.stdout.readline() == b"ready\n"
    interrupted.send_signal(signal.SIGTERM)
    assert interrupted.wait(10) == 7
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "60"], seconds=0.2)
    assert len(host.pids()) == 1


def test_a_link_that_is_down_loses_packets_in_silence_and_heals(make_hosts):
    hosts = make_hosts("a", "b")
    serve(hosts["a"])
    client = start(hosts["b"], CLIENT, hosts["a"].address)

    def send(line):
        client.stdin.write(line)
        client.stdin.flush()

    send("before\n")
    assert client.stdout.readline() == "before\n"
    hosts["b"].link_down()
    send("meanwhile\n")
    assert connect(hosts["b"], hosts["a"]) == connect(hosts["a"], hosts["b"]) == "TimeoutError"
    assert not select.select([client.stdout], [], [], 0)[0] and client.poll() is None
    hosts["b"].link_up()
    assert client.stdout.readline() == "meanwhile\n"


def test_a_slow_link_takes_its_time(make_hosts):
    if reason := why_no_delay():
        pytest.skip(reason)
    hosts = make_hosts("a", "b")
    serve(hosts["a"])
    hosts["b"].delay(100)
    assert 0.2 <= float(connect(hosts["b"], hosts["a"])) < 0.4


def test_a_killed_host_ends_with_all_that_runs_in_it_and_others_go_on(make_hosts):
    hosts = make_hosts("a", "b")
    a, b = hosts["a"], hosts["b"]
    command = a.popen(["sh", "-c", "setsid sleep 600 & echo ready; exec sleep 600"], stdout=subprocess.PIPE)
    assert command.stdout.readline() == b"ready\n"
    serve(b)
    assert len(a.pids()) == 3
    a.kill()
    assert not a.is_alive() and a.pids() == [] and command.poll() == -signal.SIGKILL
    again = hosts.add("a")
    assert again.address != a.address and again.hostname == a.hostname
    assert float(connect(again, b)) < 1


@pytest.mark.parametrize("is_told", [True, False], ids=["link up", "link down"])
def test_of_a_killed_host_its_peers_are_told_unless_its_link_is_down(make_hosts, is_told):
    hosts = make_hosts("a", "b")
    server = serve(hosts["a"])
    start(hosts["b"], CLIENT, hosts["a"].address)
    assert hosts["b"].address in server.stdout.readline()
    if not is_told:
        hosts["b"].link_down()
    hosts["b"].kill()
    if is_told:
        assert server.wait(5) == 0  # It has read the end.
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(1)


def descendants():
    """Returns what this process has started, also indirectly: all that runs in its hosts is among it."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def test_closing_leaves_nothing(make_hosts, tmp_path):
    before, cards = descendants(), psutil.net_if_addrs()
    hosts = make_hosts("a", "b")
    name = f"of-{os.getpid()}"
    touched = hosts["a"].popen(
        ["sh", "-c", f"touch /dev/shm/{name}; setsid sleep 600 & echo ready; wait"], stdout=subprocess.PIPE
    )
    assert touched.stdout.readline() == b"ready\n"
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    assert set(hosts["a"].pids()) < descendants()
    hosts.close()
    assert (descendants(), psutil.net_if_addrs()) == (before, cards)
    assert not Path("/dev/shm", name).exists()


def test_hosts_end_with_the_tests_however_these_end(make_hosts, tmp_path):
    make_hosts()
    script = """
import signal, sys
from pathlib import Path
from hosts import Hosts
hosts = Hosts(Path(sys.argv[1]), "a")
hosts["a"].popen(["sleep", "600"])
print(*hosts["a"].pids(), flush=True)
signal.pause()
"""
    tests = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    with tests:
        pids = list(map(int, tests.stdout.readline().split()))
        tests.kill()
    assert pids
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hosts_that_cannot_all_be_made_leave_none(make_hosts, tmp_path):
    make_hosts()
    before = descendants()
    with pytest.raises(AssertionError, match="did not start"):
        Hosts(tmp_path, "a", "too-long" * 10)
    assert descendants() == before


# The cluster's nodes, or why `ray.init` does not let a client in.
RAY_CLIENT = """
import json, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    print(json.dumps({node["NodeManagerHostname"]: [node["NodeManagerAddress"], node["Labels"].get("role")] for node in ray.nodes() if node["Alive"]}))
except Exception as error:
    print(json.dumps([type(error).__name__, str(error), str(error.__cause__)]))
"""


def ask_to_be_let_in(host, head, token_path):
    """Returns what a Ray client in a host is told. `token_path` None: it has no token."""
    own = {"HOME": "/dev/shm", "RAY_NUM_REDIS_GET_RETRIES": "2"}  # No token in its home; it asks twice, not 20 times.
    environment = {name: value for name, value in host.environment.items() if name != "RAY_AUTH_TOKEN_PATH"} | own
    if token_path is not None:
        environment["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    done = host.run([sys.executable, "-c", RAY_CLIENT, head.ray_address], seconds=90, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.ray
def test_a_cluster_on_hosts_knows_them_and_lets_in_who_has_its_token(cluster):
    for client in ("head", "w1"):
        assert ask_to_be_let_in(cluster[client], cluster["head"], cluster.token) == {
            cluster[name].hostname: [cluster[name].address, role]
            for name, role in [("head", None), ("learner", "learner"), ("w1", "env"), ("w2", "env")]
        }


@pytest.mark.ray
def test_a_cluster_lets_in_nobody_without_its_token(cluster, tmp_path):
    head = cluster["head"]
    error, text, _ = ask_to_be_let_in(head, head, None)
    assert error == "AuthenticationError" and "no authentication token was found" in text
    (tmp_path / "token").write_text("wrong")
    error, text, cause = ask_to_be_let_in(head, head, tmp_path / "token")
    assert (error, text) == ("ConnectionError", f"Failed to connect to Ray cluster at {head.ray_address}")
    assert "InvalidAuthToken" in cause
