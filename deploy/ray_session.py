"""The Ray that a run uses: one of its own on this machine, or a cluster that is there; and the cluster's nodes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil
import ray
from ray._private import internal_api
from ray.exceptions import RayError

from common.config import RunConfig
from common.errors import UserError
from deploy.outcome import RunFault
from deploy.ray_errors import one_line

_CHECKOUT = Path(__file__).resolve().parent.parent
_NOT_SHIPPED = (".git", ".venv", "benchmarks", "build", "docs", "runs", "tests")
_HEAD_RESOURCE = "node:__internal_head__"
_CONNECT_SECONDS = 5.0
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # What `ray job submit` leaves for the driver.


class Node(NamedTuple):
    """A living node of the cluster."""

    node_id: str
    host: str
    is_head: bool
    resources: dict[str, float]
    """All that it has, whoever uses it: CPU, GPU, memory in bytes."""
    labels: dict[str, str]

    def describe(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in self.labels.items() if not name.startswith("ray.io/"))
        gpus = self.resources.get("GPU", 0)
        return f"{self.host} ({self.resources.get('CPU', 0):g} CPUs{f', {gpus:g} GPUs' if gpus else ''}{f', {own}' if own else ''})"


def nodes() -> list[Node]:
    """Returns the living nodes."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            _HEAD_RESOURCE in node["Resources"],
            dict(node["Resources"]),
            dict(node.get("Labels") or {}),
        )
        for node in found
        if node["Alive"]
    ]


def has_labels(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one that Ray would take for a label selector."""
    for name, wanted in selector.items():
        negated, text = wanted.startswith("!"), wanted.removeprefix("!")
        several = re.fullmatch(r"in\((.*)\)", text)
        values = [value.strip() for value in several.group(1).split(",")] if several else [text]
        if (labels.get(name) in values) == negated:
            return False
    return True


def leaving_nodes() -> set[str]:
    """Returns the ids of nodes that drain (a preemption, a scale-down); what Ray has for it is private."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except (AttributeError, RayError):
        return set()


def object_store() -> tuple[int, int] | None:
    """Returns the bytes that the nodes' object stores hold, and those that they ever spilled to disk; None where Ray does not say.

    What Ray has for it is private.
    """
    try:
        state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)  # type: ignore[no-untyped-call]
        stats = internal_api.get_memory_info_reply(state, timeout_seconds=_CONNECT_SECONDS).store_stats  # type: ignore[no-untyped-call]
        return stats.object_store_bytes_used, stats.spilled_bytes_total
    except Exception:  # grpc's errors, and whatever else a private call raises in another version.
        return None


def make_temp_dir() -> str:
    """Makes a directory for Ray's files, named after this process, and removes those of processes that are gone."""
    root = Path(tempfile.gettempdir())
    for path in root.glob("qfleet-*-*"):
        pid = path.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"qfleet-{os.getpid()}-")


def start_ray(config: RunConfig, temp_dir: str) -> None:
    """Starts a local Ray of its own, with its files in `temp_dir`. Call `ray_environment.prepare` before importing Ray."""
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=int(config.object_store_memory),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=temp_dir,
            _metrics_export_port=config.metrics_port,
        )
    except Exception as error:  # Ray raises bare ones here.
        raise RunFault(f"Ray did not start: {one_line(error)}; is the machine overloaded or out of memory?") from error


def attach(address: str) -> None:
    """Connects to a running cluster, whose workers get this checkout's modules. Call `ray_environment.prepare` before importing Ray.

    Raises:
      UserError: where there is none, or it does not let this process in.
    """
    there = _address_of_this_machine() if address == "auto" else address
    if there is not None:
        _check_that_something_listens(address, there)
    with tempfile.TemporaryFile() as said:
        try:
            with _stderr_into(said):  # Only there Ray says that a token was refused, once a second.
                ray.init(address=there or "auto", log_to_driver=False, logging_level=logging.ERROR, runtime_env=_runtime_env())
        except Exception as error:  # Ray raises bare ones here.
            said.seek(0)
            raise UserError(f"--address {address}: {_why_not_attached(error, said.read().decode(errors='replace'))}") from error


def runs_as_job() -> bool:
    """Whether `ray job submit` started this process, in a copy of a working directory that Ray removes again."""
    return "working_dir" in json.loads(os.environ.get(_JOB_VARIABLE, "{}")).get("runtime_env", {})


def _runtime_env() -> dict[str, Any]:
    """Returns how workers on other nodes get the code: with the job, from their own installation, or from this checkout."""
    if runs_as_job() or not (_CHECKOUT / "pyproject.toml").exists():
        return {}
    return {"working_dir": str(_CHECKOUT), "excludes": [f"/{name}" for name in _NOT_SHIPPED]}


def _address_of_this_machine() -> str | None:
    """Returns the cluster that auto means: that of RAY_ADDRESS, or that of the last `ray start` here; None where neither is known."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    return (file.read_text().strip() or None) if file.exists() else None


def _check_that_something_listens(asked: str, address: str) -> None:
    """Raises UserError where nothing does: Ray would wait for minutes."""
    if "://" in address:
        raise UserError(
            f"--address {asked}: RAY_ADDRESS is {address}, the address of jobs: unset it here, or give the head's HOST:PORT"
        )
    where = (
        f"--address {asked}"
        if asked == address
        else f"--address {asked}, which is {address} here (RAY_ADDRESS, or the last `ray start`)"
    )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(
            f"{where}: nothing answers there ({error}): give the head's address as `ray start --head` printed it; its port is 6379 "
            f"unless it was told otherwise"
        ) from error


@contextlib.contextmanager
def _stderr_into(file: IO[bytes]) -> Iterator[None]:
    """Has a file take what anything in this process, C++ too, writes to standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _why_not_attached(error: Exception, said: str) -> str:
    """Returns a sentence, by what Ray 2.60 raises and writes."""
    if "InvalidAuthToken" in said:
        if os.environ.get("RAY_AUTH_MODE") != "token":
            return "the cluster asks for a token, and RAY_AUTH_MODE is not token: unset it, and have the head's token in ~/.ray/auth_token"
        return (
            "the cluster refuses the token that it was shown: it must be the one that its head was started with; RAY_AUTH_TOKEN comes before "
            "RAY_AUTH_TOKEN_PATH, and that before ~/.ray/auth_token"
        )
    if "No node info found" in str(error.__cause__):
        return "this machine is no node of that cluster, and a driver goes through one: run the command on a node, or by `ray job submit`"
    if "Could not find any running Ray instance" in str(error):
        return "this machine is no node of a cluster: start one with `ray start`, or give the HOST:PORT of a head"
    if str(error).startswith("Failed to connect to Ray cluster"):
        return f"{one_line(error)}: is it a Ray of this version, and this machine one of its nodes? `ray status --address HOST:PORT` says more"
    return one_line(error)
