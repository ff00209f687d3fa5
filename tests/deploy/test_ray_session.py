"""What a person is told who cannot be attached to a cluster. Ray is played: it writes to file descriptor 2, as its C++ does, and raises."""

import json
import os
import socket

import pytest

from common.errors import UserError
from deploy import ray_session
from deploy.cli import main
from deploy.ray_environment import prepare_to_attach


@pytest.fixture
def refuse(monkeypatch):
    """Has Ray say and raise something; returns what it was asked."""
    asked = {}

    def begin(said, error):
        def init(**named):
            asked.update(named)
            os.write(2, said.encode())
            if error is not None:
                raise error

        monkeypatch.setattr(ray_session.ray, "init", init)
        return asked

    return begin


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


REFUSED = (
    "W gcs_client.cc:210: Unauthenticated: RPC error: InvalidAuthToken: Authentication token is missing or incorrect\n" * 20
)


@pytest.mark.parametrize(
    ("mode", "said", "error", "told"),
    [
        ("token", REFUSED, "Failed to connect", "the cluster refuses the token that it was shown"),
        ("disabled", REFUSED, "Failed to connect", "the cluster asks for a token, and RAY_AUTH_MODE is not token"),
        ("token", "", "Could not find any running Ray instance. Please", "this machine is no node of a cluster"),
        ("token", "", "Not a node", "this machine is no node of that cluster"),
        ("token", "", "Version mismatch: the cluster has Ray 2.54\nand more", "Version mismatch: the cluster has Ray 2.54"),
    ],
    ids=["wrong_token", "no_token", "no_cluster", "no_node", "anything_else"],
)
def test_one_line_says_why_a_cluster_lets_nobody_in(monkeypatch, capfd, refuse, listening, mode, said, error, told):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    failed = ConnectionError(error)
    failed.__cause__ = RuntimeError("No node info found matching attributes: ''") if error == "Not a node" else None
    refuse(said, failed)
    with pytest.raises(UserError, match=told) as caught:
        ray_session.attach(listening)
    assert "\n" not in str(caught.value)
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_a_cluster_gets_this_checkout_without_what_workers_do_not_need(monkeypatch, refuse, listening, tmp_path):
    asked = refuse("", None)
    ray_session.attach(listening)
    assert asked["address"] == listening
    root = asked["runtime_env"]["working_dir"]
    assert os.path.exists(f"{root}/deploy/ray_session.py") and {"/tests", "/.venv", "/runs"} <= set(
        asked["runtime_env"]["excludes"]
    )
    monkeypatch.setenv(ray_session._JOB_VARIABLE, json.dumps({"runtime_env": {"working_dir": "gcs://code.zip"}}))
    ray_session.attach(listening)
    assert asked["runtime_env"] == {}, "a job has brought its own"
    monkeypatch.delenv(ray_session._JOB_VARIABLE)
    monkeypatch.setattr(ray_session, "_CHECKOUT", tmp_path)
    ray_session.attach(listening)
    assert asked["runtime_env"] == {}, "an installed package is on every node, or it is not"


def test_auto_is_the_cluster_that_ray_last_joined_here(monkeypatch, refuse, listening, tmp_path):
    asked = refuse("", None)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray_session.attach("auto")
    assert asked["address"] == "auto", "Ray looks for processes then"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(listening)
    ray_session.attach("auto")
    assert asked["address"] == listening
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        UserError,
        match=r"--address auto, which is 127.0.0.1:1 here .RAY_ADDRESS, or the last `ray start`.: nothing answers there",
    ):
        ray_session.attach("auto")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(UserError, match="the address of jobs: unset it here"):
        ray_session.attach("auto")


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:1"])
def test_an_address_where_nothing_listens_is_told_at_once(refuse, address):
    """Ray would try for minutes."""
    asked = refuse("", None)
    with pytest.raises(UserError, match="nothing answers there"):
        ray_session.attach(address)
    assert not asked


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_cluster_is_joined_with_a_token_or_by_somebodys_word(monkeypatch, no_token):
    with pytest.raises(
        UserError, match=r"\.ray/auth_token has no token .No such file or directory.: copy the head's there, with mode 600"
    ):
        prepare_to_attach("10.0.0.1:6379")
    (no_token / ".ray").mkdir()
    (no_token / ".ray" / "auth_token").write_text("secret")
    prepare_to_attach("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ, "Ray reads the file"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(no_token / "gone"))
    with pytest.raises(UserError, match="gone has no token"):
        prepare_to_attach("10.0.0.1:6379")
    (no_token / "gone").touch()
    with pytest.raises(UserError, match=r"gone has no token .it is empty.:"):
        prepare_to_attach("10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    prepare_to_attach("10.0.0.1:6379")


def test_a_mistake_about_the_cluster_leaves_no_run_directory(capsys, no_token, tmp_path):
    path = tmp_path / "run"
    assert main(["train", "gridworld", "--address", "127.0.0.1:1", "--run-dir", str(path)]) == 2
    assert "has no token" in capsys.readouterr().err and not path.exists()


def test_a_job_keeps_nothing_in_its_working_directory(monkeypatch, capsys):
    """Ray removes it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(ray_session._JOB_VARIABLE, json.dumps({"runtime_env": {"working_dir": "gcs://code.zip"}}))
    assert main(["train", "gridworld", "--address", "127.0.0.1:1", "--run-dir", "runs/x"]) == 2
    assert "give an absolute path on a disk that stays" in capsys.readouterr().err
