"""Hosts with addresses of their own on this machine, for tests of what happens between machines.

A host is a process that holds namespaces: its own network, host name, processes and /dev/shm. What runs in it sees the processes of that
host only, and shares the files. The holder waits for the end of a pipe from the tests; where it ends, the kernel kills all that runs in the
host and takes its network away, so nothing is left, however the tests end. The switch that links the hosts is one more holder: the network
of the machine itself is never touched.
"""

import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
UNSHARE = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
HOLD = """
import signal, socket, subprocess, sys
socket.sethostname(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Orphans become children of a host's first process, which waits for none.
print("ready", flush=True)
sys.stdin.read()
"""
RAY_DIRECTORY = "/dev/shm/ray"
"""Each host's own. It is short, as Ray's sockets lie in it and their paths may have 107 bytes."""
RAY_PORT = 6379
METRICS_PORT = 8080


def why_no_hosts():
    """Returns in one sentence why no hosts can be made here, or None."""
    if missing := [tool for tool in ("ip", "mount", "nsenter", "unshare") if shutil.which(tool) is None]:
        return f"hosts need {', '.join(missing)}: install iproute2 and util-linux"
    return _refusal("hosts", "mount -t tmpfs tmpfs /dev/shm && ip link add name switch type bridge && ip link add type veth")


def why_no_delay():
    """Returns in one sentence why links cannot be made slow here, or None."""
    if shutil.which("tc") is None:
        return "slow links need tc: install iproute2"
    return why_no_hosts() or _refusal("slow links", "tc qdisc add dev lo root netem delay 1ms")


def _refusal(what, commands):
    tried = subprocess.run([*UNSHARE, "sh", "-c", commands], capture_output=True, text=True)
    return f"this kernel, or the lack of root, allows no {what}: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """Hosts by name on one switch. `directory` takes their logs and the token of a Ray cluster on them."""

    def __init__(self, directory, *names):
        self.directory = directory
        self.token = directory / "token"
        self.token.touch(mode=0o600)
        self.token.write_text(secrets.token_hex(32))
        self._hosts = {}
        self._num_added = 0
        self._switch = Holder("switch")
        try:
            self._switch.ip("link", "add", "name", "switch", "up", "type", "bridge")
            for name in names:
                self.add(name)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __getitem__(self, name):
        return self._hosts[name]

    def add(self, name):
        """Makes one more host; it has an address that none had before, also where the name comes again after a kill."""
        if name in self._hosts:
            self._hosts[name].kill()
        self._num_added += 1
        host = Host(self, name, self._num_added, self._switch)
        for other in self._hosts.values():
            if other.is_alive():
                other.meet(host)
                host.meet(other)
        self._hosts[name] = host
        return host

    def close(self):
        for host in self._hosts.values():
            host.kill()
        self._switch.end()


class Host:
    """Its host name is `qf<pid of the tests>-<name>`."""

    def __init__(self, hosts, name, number, switch):
        self.name = name
        self.hostname = f"qf{os.getpid()}-{name}"
        self.address = f"10.77.0.{number}"
        self._mac = f"02:00:00:00:00:{number:02x}"
        self._directory, self._token = hosts.directory, hosts.token
        self._switch, self._port = switch, f"port{number}"
        self._processes, self._ray = [], None
        self._holder = Holder(self.hostname)
        try:
            switch.ip(
                *["link", "add", self._port, "master", "switch", "type", "veth"],
                *["peer", "name", "eth0", "address", self._mac, "netns", self._holder.pid],
            )
            switch.ip("link", "set", self._port, "up")
            self._holder.ip("address", "add", f"{self.address}/24", "dev", "eth0")
            self._holder.ip("link", "set", "eth0", "up")
        except BaseException:
            self._holder.end()
            raise

    def meet(self, other):
        """Notes for ever which card has another host's address, so that packets to one that is away vanish as they do behind a router."""
        self._holder.ip("neighbor", "add", other.address, "lladdr", other._mac, "dev", "eth0", "nud", "permanent")

    @property
    def environment(self):
        """Of what runs in it: as of the tests, with nothing for Ray but what a cluster's user sets."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return ours | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self._token), "RAY_USAGE_STATS_ENABLED": "0"}

    def popen(self, words, **options):
        """Starts a command in the host, in a session of its own, as `subprocess.Popen` does it. It begins in the directory `/`."""
        options = {"env": self.environment, "stdin": subprocess.DEVNULL, "start_new_session": True} | options
        process = HostProcess([*self._holder.enter(*NAMESPACES), *map(str, words)], **options)
        self._processes.append(process)
        return process

    def run(self, words, seconds=30, **options):
        """Runs a command to its end; returns what `subprocess.run` would."""
        with self.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
            try:
                out, errors = process.communicate(timeout=seconds)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(words, process.returncode, out, errors)

    def ray_start(self, head=None, *, num_cpus, labels="", object_store_memory=150 << 20):
        """Runs `ray start --block`, of a head or of a node that joins one; `wait_for_ray` waits until it is up."""
        cluster = (
            ["--head", "--port", RAY_PORT, "--include-dashboard", "false"] if head is None else ["--address", head.ray_address]
        )
        words = [
            *[sys.executable, "-m", "ray.scripts.scripts", "start", *cluster, "--block", "--node-ip-address", self.address],
            *["--num-cpus", num_cpus, "--object-store-memory", object_store_memory, "--temp-dir", RAY_DIRECTORY],
            *["--labels", labels, "--disable-usage-stats", "--include-log-monitor", "false"],
            *["--metrics-export-port", METRICS_PORT],
        ]
        patience = {
            "RAY_health_check_failure_threshold": "10"
        }  # As docs/cluster.md has it: else 40 s of silence may end a node.
        with self.ray_log.open("w") as log:
            self._ray = self.popen(words, stdout=log, stderr=subprocess.STDOUT, env=self.environment | patience)

    def wait_for_ray(self, seconds=60):
        deadline = time.monotonic() + seconds
        while "Ray runtime started" not in self.ray_log.read_text():
            assert self._ray.poll() is None, self.ray_log.read_text()
            assert time.monotonic() < deadline, f"no Ray after {seconds} s: {self.ray_log.read_text()}"
            time.sleep(0.1)

    @property
    def ray_address(self):
        return f"{self.address}:{RAY_PORT}"

    @property
    def ray_log(self):
        return self._directory / f"ray-{self.hostname}.log"

    def link_down(self):
        """Packets to it and from it vanish; its network card does not know."""
        self._switch.ip("link", "set", self._port, "nomaster")

    def link_up(self):
        self._switch.ip("link", "set", self._port, "master", "switch")

    def delay(self, milliseconds, loss_percent=0):
        """Holds each packet back for so long, in either direction, and loses some. Needs what `why_no_delay` asks for."""
        for holder, device in ((self._switch, self._port), (self._holder, "eth0")):
            holder.tc(
                "qdisc", "replace", "dev", device, "root", "netem", "delay", f"{milliseconds}ms", "loss", f"{loss_percent}%"
            )

    def is_alive(self):
        return self._holder.is_alive()

    def pids(self):
        """Returns the processes in it, by the numbers that they have outside."""
        return self._holder.pids()

    def kill(self):
        """Kills all that runs in it, and returns when nothing is left. The kernel closes its connections, unless its link is down: then
        nobody is told, as where a machine loses power."""
        self._holder.end()
        for process in self._processes:
            with process:
                process.wait(10)


class HostProcess(subprocess.Popen):
    """A command in a host. A signal is for the command, not for `nsenter`, which waits outside and ends as the command ends."""

    def send_signal(self, sig):
        if self.poll() is None:
            for command in psutil.Process(self.pid).children():
                command.send_signal(sig)


class Holder:
    """The process that holds namespaces, and the ways into them."""

    def __init__(self, hostname):
        words = [*UNSHARE, sys.executable, "-IS", "-c", HOLD, hostname]
        self._outer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert self._outer.stdout.readline() == "ready\n", f"{hostname} did not start"
            (inner,) = psutil.Process(self._outer.pid).children()
            self.pid = inner.pid
            self._namespace = _namespace_of(self.pid)
        except BaseException:
            self.end()
            raise

    def enter(self, *namespaces):
        """Returns the words that precede a command which is to run in these namespaces."""
        return ["nsenter", "--target", str(self.pid), *namespaces]

    def ip(self, *words):
        self._configure("ip", *words)

    def tc(self, *words):
        self._configure("tc", *words)

    def _configure(self, *words):
        done = subprocess.run([*self.enter("--net"), *map(str, words)], capture_output=True, text=True, timeout=10)
        assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr}"

    def is_alive(self):
        return self._outer.poll() is None

    def pids(self):
        return [pid for pid in psutil.pids() if _namespace_of(pid) == self._namespace]

    def end(self):
        """Ends the holder, and so all that is in its namespaces; returns when it is gone."""
        self._outer.stdin.close()
        self._outer.wait(10)
        self._outer.stdout.close()


def _namespace_of(pid):
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return None  # It has ended.
