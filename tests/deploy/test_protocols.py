"""Evaluation protocols, from the command line to the card: what is named, what is trained, what is played, what is said."""

import json
import os
import subprocess
from dataclasses import replace

import pytest

from common.config import EnvConfig, RunConfig
from common.metrics import EvaluationResult
from deploy import cli, run_dir
from deploy import evaluate as evaluating
from deploy.progress import Progress
from deploy.protocol_card import make_card, mismatches
from deploy.recipes import RECIPES, breakout

TINY = ["--serial", "--max-env-steps", "100", "--log-period-seconds", "1000", "--evaluation.final-episodes", "2"]
TINY_PONG = [*TINY, "--actors.num-envs", "2", "--replay.min-size", "64", "--learner.batch-size", "8"]


RESULT = EvaluationResult(
    mean_return=1.0,
    episodes=1,
    returns=[1.0],
    epsilon=0.0,
    protocol="legacy",
    seed=0,
    params_epoch=0,
    params_version=1,
    seconds=1.0,
)


def configured(recipe, *flags):
    return cli._run_config(RECIPES[recipe](), list(flags), "qfleet train")


def run(capsys, *words):
    """Runs a command that must succeed; returns its lines."""
    assert cli.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


# Named for training


def test_train_protocol_sets_the_whole_environment():
    """Kills: life loss or fire reset forgotten; a flag that is no part of the protocol lost; recipes that name none changed."""
    machado = configured("breakout", "--env.frame-stack", "3", "--protocol", "machado", "--seed", "5")
    assert machado.protocol == "machado" and machado.seed == 5
    assert machado.env == EnvConfig(
        game="breakout",
        frame_stack=3,
        sticky_action_probability=0.25,
        full_action_set=True,
        noop_max=0,
        fire_reset=False,
        life_loss_terminates=False,
    )
    assert configured("breakout", "--protocol=legacy").env == breakout().env  # It keeps its signal of lost lives.
    assert configured("apex", "--protocol", "legacy").env.max_episode_frames == 108_000
    assert configured("pong", "--protocol", "legacy", "--protocol", "machado").env.protocol_name == "machado"
    assert configured("gridworld", "--env.game", "pong", "--protocol", "machado").env.protocol_name == "machado"


def test_train_without_a_protocol_takes_single_flags():
    config = configured("pong", "--env.sticky-action-probability", "0.25")
    assert config.protocol is None and config.env == replace(RECIPES["pong"]().env, sticky_action_probability=0.25)
    assert config.env.protocol_name == "custom"


def test_a_flag_that_agrees_with_the_protocol_may_be_given():
    assert configured("pong", "--protocol", "machado", "--env.noop-max", "0").env.protocol_name == "machado"


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("pong", [], "pong"),
        ("pong", ["--protocol", "legacy"], "pong"),  # It is what the recipe is.
        ("pong", ["--protocol", "machado", "--seed", "2"], "pong-machado-seed2"),
        ("pong", ["--env.game", "qbert", "--protocol", "machado"], "pong-qbert-machado"),
        ("apex", ["--protocol", "legacy"], "apex-legacy"),
    ],
)
def test_the_default_directory_names_a_protocol_that_is_not_the_recipes(recipe, flags, expected):
    assert run_dir.default_path(configured(recipe, *flags), RECIPES[recipe]().env).name == expected


# Said of an evaluation


def test_mismatches_say_each_difference_once():
    legacy, machado = (
        EnvConfig(game="breakout", life_loss_terminates=True).with_protocol(name) for name in ("legacy", "machado")
    )
    assert mismatches(legacy, legacy, "legacy", 4) == []
    assert mismatches(machado, machado, "machado", 18) == []
    assert mismatches(legacy, replace(machado, full_action_set=False, life_loss_terminates=True), "machado", 4) == [
        "trained without sticky actions, evaluated with sticky actions 0.25: this is not comparable with runs trained under machado",
        "trained with up to 30 no-ops at the start, evaluated without no-ops at the start: "
        "this is not comparable with runs trained under machado",
        "named machado, but with the minimal action set (4), since the network has 4 outputs",
        "trained with a frame of FIRE at the start, evaluated without a frame of FIRE at the start: "
        "this is not comparable with runs trained under machado",
        "named machado, but trained with a lost life as a terminal state, which machado does not allow",
    ]
    odd = replace(legacy, max_episode_frames=18_000, frame_skip=2)
    assert mismatches(odd, legacy, "legacy", 4) == [
        "trained with episodes of up to 18,000 frames, evaluated with episodes of up to 108,000 frames: "
        "this is not comparable with runs trained under legacy",
        "trained with 2 frames a step, evaluated with 4 frames a step: this is not comparable with runs trained under legacy",
    ]


@pytest.mark.parametrize("game", ["video_pinball", "pong", "tetris"])
def test_the_card_of_video_pinball_warns_of_its_random_score(game):
    env = EnvConfig(game=game)
    config = RunConfig(recipe="r", env=env)
    card = make_card(config, RESULT, env=env, num_actions=9, training_frames=0, commit=None, warnings=["a first one"])
    assert card.warnings[0] == "a first one" and len(card.warnings) == (2 if game == "video_pinball" else 1)
    assert game != "video_pinball" or ("16256.9" in card.warnings[1] and "0.0 in that of Atari-5" in card.warnings[1])
    assert (card.human_scores is None) == (game == "tetris")


def test_training_frames_are_those_of_the_evaluated_parameters():
    """Actors go on while an evaluation is played, and another may have begun when it is read. Kills: frames of now."""
    progress = Progress(RunConfig(recipe="r", env=EnvConfig(game="pong")), {"run_counters": {"env_steps": {"0": 100}}})
    progress.on_evaluation_begins()
    progress.env_steps_of[0] = 150
    progress.on_evaluation(RESULT)
    progress.on_evaluation_begins()
    assert progress.evaluated_frames == 4 * 100 and progress.frames == 4 * 150


@pytest.mark.parametrize(("game", "num_actions", "full_action_set"), [("boxing", 18, True), ("pong", 6, False)])
def test_a_game_that_uses_all_actions_can_change_its_action_set(game, num_actions, full_action_set):
    """The minimal set of Boxing is the full one, so its networks can be evaluated under either protocol."""
    legacy = EnvConfig(game=game).with_protocol("legacy")
    env = evaluating._environment_under(legacy, "machado", num_actions)
    assert env == replace(legacy.with_protocol("machado"), full_action_set=full_action_set)
    said = [sentence for sentence in mismatches(legacy, env, "machado", num_actions) if "action set" in sentence]
    assert len(said) == (0 if full_action_set else 1)


# Whole runs


@pytest.fixture(scope="module")
def machado_run(tmp_path_factory):
    """A tiny run of Pong under machado."""
    path = tmp_path_factory.mktemp("runs") / "machado"
    assert cli.main(["train", "pong", "--protocol", "machado", "--run-dir", str(path), *TINY_PONG]) == 0
    return path


def test_summary_has_the_card_and_the_score_of_its_evaluation(machado_run):
    summary = json.loads((machado_run / "summary.json").read_text())
    result = summary["evaluation"]
    assert result["protocol"] == "machado"
    assert summary["human_normalized_score"] == pytest.approx((result["mean_return"] + 20.7) / (14.6 + 20.7))
    assert summary["protocol_card"] == {
        "protocol": "machado",
        "sticky_action_probability": 0.25,
        "noop_max": 0,
        "fire_reset": False,
        "max_episode_frames": 108_000,
        "frame_skip": 4,
        "action_set": "full",
        "num_actions": 18,
        "life_loss_signal": False,
        "reward_clip": 1.0,
        "epsilon": 0.0,
        "episodes": 2,
        "training_frames": 4 * summary["env_steps"],
        "human_scores": "dqn_zoo atari_data.py, commit 45061f4",
        "commit": run_dir.commit(),
        "warnings": [],
    }


def test_evaluate_under_another_protocol_plays_it_and_says_every_mismatch(machado_run, tmp_path, capsys, monkeypatch):
    """Kills: the run's environment played after all; a silent mismatch; legacy claimed for 18 actions; another game in the video."""
    played, recorded = [], []
    make_evaluator = evaluating.roles.make_evaluator

    def watched(config, spec, params):
        played.append(config.env)
        return make_evaluator(config, spec, params)

    def record(env, network, path, *, epsilon, seed):
        recorded.append(env)
        return 0.0

    monkeypatch.setattr(evaluating.roles, "make_evaluator", watched)
    monkeypatch.setattr(evaluating, "record", record)
    out = tmp_path / "legacy.json"
    words = ["--protocol", "legacy", "--episodes", "1", "--json", out, "--video", tmp_path / "x.mp4"]
    lines = run(capsys, "evaluate", machado_run, *words)
    expected = EnvConfig(game="pong", frame_stack=4, full_action_set=True, fire_reset=False)  # Else as legacy has it.
    assert played == recorded == [expected]
    result = json.loads(out.read_text())
    card = result["protocol_card"]
    assert [line.removeprefix("protocol: ") for line in lines if line.startswith("protocol: ")] == card["warnings"]
    assert card["warnings"] == [
        "trained with sticky actions 0.25, evaluated without sticky actions: this is not comparable with runs trained under legacy",
        "trained without no-ops at the start, evaluated with up to 30 no-ops at the start: "
        "this is not comparable with runs trained under legacy",
        "named legacy, but with the full action set (18), since the network has 18 outputs",
    ]
    assert (card["sticky_action_probability"], card["noop_max"], card["action_set"], card["num_actions"]) == (
        0.0,
        30,
        "full",
        18,
    )
    assert card["protocol"] == result["protocol"] == "custom"
    summary = json.loads((machado_run / "summary.json").read_text())
    assert card["training_frames"] == summary["protocol_card"]["training_frames"] > 0
    assert card["episodes"] == 1
    assert result["human_normalized_score"] == pytest.approx((result["mean_return"] + 20.7) / (14.6 + 20.7))
    assert f"human-normalized {result['human_normalized_score']:.2f}" in lines[0]


def test_evaluate_of_a_run_without_the_newer_settings_warns_of_nothing(machado_run, tmp_path, capsys):
    """Runs of before there was --protocol or fire_reset: their episodes began with FIRE, and so they are played."""
    file, out = machado_run / "run.json", tmp_path / "own.json"
    text = file.read_text()
    info = json.loads(text)
    del info["config"]["protocol"], info["config"]["env"]["fire_reset"]
    file.write_text(json.dumps(info))
    try:
        lines = run(capsys, "evaluate", machado_run, "--episodes", "1", "--json", out)
    finally:
        file.write_text(text)
    card = json.loads(out.read_text())["protocol_card"]
    assert card["warnings"] == [] and not [line for line in lines if line.startswith("protocol: ")]
    assert card["fire_reset"] and card["protocol"] == "custom" and card["sticky_action_probability"] == 0.25


@pytest.mark.parametrize("command", [["resume"], ["train", "pong", "--run-dir"]], ids=["resume", "train"])
def test_a_run_keeps_its_protocol(machado_run, command, capsys):
    assert cli.main([*command, str(machado_run), "--protocol", "legacy", "--max-env-steps", "200", *TINY_PONG[:1]]) == 2
    error = capsys.readouterr().err
    assert f"{machado_run} holds a run of protocol machado, which it keeps" in error
    assert "qfleet train pong --protocol legacy and another --run-dir" in error


def test_a_run_outside_atari_has_a_card_and_no_protocol(tmp_path, capsys):
    path, out = tmp_path / "run", tmp_path / "e.json"
    run(capsys, "train", "gridworld", "--run-dir", path, *TINY)
    summary = json.loads((path / "summary.json").read_text())
    run(capsys, "evaluate", path, "--episodes", "3", "--json", out)
    result = json.loads(out.read_text())
    for holder, episodes in ((summary, 2), (result, 3)):
        assert holder["human_normalized_score"] is None
        assert holder["protocol_card"] == {
            "protocol": "gymnasium",
            "sticky_action_probability": None,
            "noop_max": None,
            "fire_reset": None,
            "max_episode_frames": None,
            "frame_skip": None,
            "action_set": None,
            "num_actions": 4,
            "life_loss_signal": None,
            "reward_clip": None,
            "epsilon": 0.0,
            "episodes": episodes,
            "training_frames": summary["env_steps"],
            "human_scores": None,
            "commit": run_dir.commit(),
            "warnings": [],
        }
    assert cli.main(["evaluate", str(path), "--protocol", "machado"]) == 2
    assert "protocol machado is of Atari games, not of GridWorld-v0" in capsys.readouterr().err


# The commit


def git(directory, *words):
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(directory), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_is_that_of_the_checkout_and_says_whether_it_was_changed(tmp_path, monkeypatch):
    """Kills: the repository around an installation, the one that GIT_DIR names (in a hook), an untracked file taken for a change."""
    for name in ("checkout", "other"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "--quiet")
        (tmp_path / name / "file").write_text(name)
        git(tmp_path / name, "add", "file")
        git(tmp_path / name, "commit", "--quiet", "--message", name)
        git(tmp_path / name, "tag", "--annotate", "--message", "x", "v1")
    checkout = tmp_path / "checkout"
    head = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert run_dir.commit(checkout) == head
    (checkout / "notes.txt").write_text("untracked")
    assert run_dir.commit(checkout) == head
    (checkout / "file").write_text("changed")
    assert run_dir.commit(checkout) == f"{head}-dirty"
    (checkout / "site-packages").mkdir()
    assert run_dir.commit(checkout / "site-packages") is None


def test_commit_is_none_without_git_or_with_a_broken_repository(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    assert run_dir.commit(tmp_path) is None
    monkeypatch.setenv("PATH", os.devnull)
    assert run_dir.commit() is None
