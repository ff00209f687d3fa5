"""Learning runs on Ray, as a user starts them: `make test-slow`."""

import json
import subprocess
import sys

import av
import pytest

from deploy import cli

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def train(path, *words):
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "train", *words, "--run-dir", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((path / "summary.json").read_text())


@pytest.mark.parametrize("seed", range(5))
def test_cartpole_is_solved_within_two_minutes(tmp_path, seed):
    summary = train(tmp_path / "run", "cartpole", "--seed", str(seed))
    assert summary["stopped_by"] == "target_return"
    assert summary["evaluation"]["mean_return"] >= 475 and summary["evaluation"]["episodes"] == 100
    assert summary["wall_seconds"] <= 120


@pytest.mark.parametrize("recipe", ["cartpole-keras-rl", "cartpole-24"])
def test_the_seeds_cartpole_recipes_reach_195(tmp_path, recipe):
    summary = train(tmp_path / "run", recipe)
    assert summary["evaluation"]["mean_return"] >= 195 and summary["evaluation"]["episodes"] == 100


def test_video_of_a_run_plays(tmp_path):
    summary = train(tmp_path / "run", "cartpole", "--max-updates", "200", "--evaluation.final-episodes", "2")
    assert summary["updates"] == 200
    video = tmp_path / "cartpole.mp4"
    assert cli.main(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--video", str(video)]) == 0
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 10
