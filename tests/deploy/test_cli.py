"""A user's mistakes: one clear line, exit status 2, no traceback, nothing written."""

import json

import pytest

from deploy import cli, plan, roles
from deploy.recipes import RECIPES
from deploy.run_dir import newest_checkpoint_path
from learner import checkpoint as checkpoints

TINY = ["--serial", "--max-updates", "5", "--log-period-seconds", "1000", "--evaluation.final-episodes", "2"]


def failing(capsys, *words):
    """Runs a command that must fail; returns its one line."""
    assert cli.main([str(word) for word in words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("qfleet: ") and "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian", "pong"], "did you mean 'train'"),
        (["train", "pnog"], "did you mean 'pong'"),
        (["train"], "needs a recipe"),
        (["train", "pong", "--lerner.batch-size", "3"], "did you mean --learner.batch-size"),
        (["train", "pong", "--learner.batch-size", "many"], "--learner.batch-size"),
        (["train", "pong", "--learner.batch-size", "-4"], "learner.batch_size must be positive, got -4"),
        (["train", "pong", "--actors.discount", "1.5"], "actors.discount must be in [0, 1], got 1.5"),
        (["train", "pong", "--learner.loss", "hubr"], "('huber', 'mse')"),
        (["train", "pong", "--replay.memory", "3zb"], "write 512MiB or 4GiB"),
        (["train", "pong", "--env.game", "pongg"], "did you mean 'pong'"),
        (["train", "pong", "--env.game", "ALE/Pong-v5"], "did you mean"),
        (["train", "cartpole", "--env.game", "CartPol-v1"], "did you mean 'CartPole-v1'"),
        (["train", "cartpole", "--env.game", "Pendulum-v1"], "needs a Discrete one"),
        (["train", "cartpole", "--env.game", "FrozenLake-v1"], "must be a Box"),
        (["train", "pong", "--env.game", "CartPole-v1"], "--network.torso mlp"),
        (["train", "pong", "--replay.memory", "1MiB"], "raise --replay.memory"),
        (["train", "pong", "--replay.memory", "900TiB"], "lower --replay.memory"),
        (["train", "pong", "--actors.num-actors", "5000"], "at most"),
        (["train", "pong", "--replay.min-size", "300000"], "replay.capacity"),
        (["train", "pong", "--replay.limiter-buffer-samples", "1"], "must be at least"),
        (["train", "pong", "--recipe", "breakout"], "give another recipe"),
        (["train", "pong", "--learner.device", "cuda"], "--learner.device"),
        (["train", "pong", "--learner.compilation", "cuda_graph", "--learner.device", "cpu"], "needs a GPU"),
        (["plan", "pong", "--learner.compilation", "cuda_graph", "--learner.device", "cpu"], "needs a GPU"),
        (["train", "pong", "--network.adaptive-pool", "10"], "more than the 9 x 9 that torso dqn2013 gives"),
        (["plan", "pong", "--network.adaptive-pool", "10"], "more than the 9 x 9 that torso dqn2013 gives"),
        (["train", "c51", "--network.value-max", "inf"], "must be finite"),
        (
            ["train", "pong", "--protocol", "machado", "--env.sticky-action-probability", "0"],
            "protocol machado has env.sticky_action_probability 0.25, not 0.0",
        ),
        (["train", "pong", "--env.life-loss-terminates", "--protocol=machado"], "env.life_loss_terminates False, not True"),
        (["train", "breakout", "--protocol", "legacy", "--env.full-action-set"], "env.full_action_set False, not True"),
        (["train", "apex", "--protocol", "legacy", "--env.max-episode-frames", "50000"], "108000, not 50000"),
        (["train", "pong", "--protocol", "nature"], "invalid choice 'nature'"),
        (["train", "cartpole", "--protocol", "machado"], "protocol machado is of Atari games, not of CartPole-v1"),
        (["plan", "pong", "--protocol", "machado", "--env.noop-max", "30"], "protocol machado has env.noop_max 0, not 30"),
        (["evaluate", "nowhere", "--protocol", "nature"], "invalid choice 'nature'"),
        (["train", "pong", "stray"], "stray"),
        (["resume", "nowhere"], "not a run directory"),
        (["evaluate", "nowhere"], "not a run directory"),
        (["evaluate", "nowhere", "--episodes", "0"], "must be positive"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in failing(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_compilation_without_a_compiler_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    words = ["--learner.compilation", "compile", "--learner.device", "cpu"]
    assert "there is no g++ here" in failing(capsys, "train", "cartpole", *words)
    assert list(tmp_path.iterdir()) == []


def test_too_many_actors_are_refused_with_the_number_that_fits(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "available_memory", lambda: 1 << 44)
    monkeypatch.setattr("deploy.run_dir.num_cpus", lambda: 2)
    line = failing(capsys, "train", "pong", "--actors.num-actors", "64")
    assert "no CPUs left for 64 actors" in line and "at most 13" in line


def test_help_lists_every_field_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "pong", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in ("--run-dir", "--serial", "--actors.num-envs", "--replay.num-shards", "--learner.batch-size", "--env.game"):
        assert flag in text
    assert "Transitions per update, over all shards." in text and "(default: 64)" in text


def test_usage_names_every_recipe(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in RECIPES)


def test_every_recipe_is_named_as_it_is_called():
    for name, recipe in RECIPES.items():
        assert recipe().recipe == name


@pytest.fixture
def run(tmp_path, capsys):
    """A finished tiny run."""
    path = tmp_path / "run"
    assert cli.main(["train", "gridworld", "--run-dir", str(path), *TINY]) == 0
    capsys.readouterr()
    return path


def everything(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "cartpole"], "holds a run of recipe 'gridworld'"),
        (["train", "gridworld", "--seed", "1"], "seed 0, not 1"),
        (["train", "gridworld", "--network.hidden-sizes", "32"], "network.hidden_sizes"),
        (["train", "gridworld", "--learner.optimizer", "rmsprop"], "learner.optimizer adam, not rmsprop"),
    ],
)
def test_a_run_directory_of_another_run_is_left_alone(run, words, expected, capsys):
    before = everything(run)
    assert expected in failing(capsys, *words, "--run-dir", run, *TINY)
    assert everything(run) == before


@pytest.mark.parametrize("name", ["online.safetensors", "manifest.msgpack"])
@pytest.mark.parametrize("command", ["train", "resume", "evaluate"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_overwritten(run, name, command, capsys):
    file = next(run.glob(f"checkpoints/*/{name}"))
    file.write_bytes(file.read_bytes()[:-3])
    before = everything(run)
    words = ["train", "gridworld", "--run-dir", run, *TINY] if command == "train" else [command, run]
    words += ["--max-updates", "9"] if command != "evaluate" else []
    assert name in failing(capsys, *words)
    assert everything(run) == before


def test_a_damaged_or_newer_run_json_is_named(run, capsys):
    file = run / "run.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"format_version": 2}))
    assert "format 2, but this code reads 1" in failing(capsys, "resume", run)
    file.write_text(file.read_text()[:40])
    assert "truncated or altered" in failing(capsys, "resume", run)
    info["config"]["learner"]["strange"] = 1
    file.write_text(json.dumps(info))
    assert "learner.strange" in failing(capsys, "resume", run)


def test_a_directory_with_other_files_is_not_taken_for_a_run(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "thesis.txt" in failing(capsys, "train", "gridworld", "--run-dir", tmp_path, *TINY)
    assert [file.name for file in tmp_path.iterdir() if file.name != ".lock"] == ["thesis.txt"]


def test_two_commands_on_one_run_directory_are_refused(run, capsys):
    from deploy import run_dir
    from deploy.recipes import gridworld

    held = run_dir.open_run(gridworld(), run)
    try:
        assert "another qfleet is running there" in failing(capsys, "resume", run)
    finally:
        held.close()


def test_a_run_that_reached_its_budget_says_how_to_go_on(run, capsys):
    assert cli.main(["train", "gridworld", "--run-dir", str(run), *TINY]) == 0
    assert "raise --max-updates" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--video", "x.txt"], ["--video", "."], ["--json", "."], ["--json", "nowhere/e.json"]])
def test_evaluate_refuses_what_it_cannot_write_before_it_plays(run, flags, capsys):
    assert flags[1] in failing(capsys, "evaluate", run, "--episodes", "100000", *flags)


@pytest.mark.parametrize("command", [["resume"], ["train", "gridworld", "--run-dir"]], ids=["resume", "train"])
def test_a_run_that_lacks_a_newer_setting_goes_on_with_its_default(run, command, capsys):
    info = json.loads((run / "run.json").read_text())
    for section, name in (("network", "width"), ("actors", "params_alarm_seconds"), ("learner", "num_devices")):
        del info["config"][section][name]
    for section, name in (("", "protocol"), ("env", "fire_reset")):
        del (info["config"][section] if section else info["config"])[name]
    (run / "run.json").write_text(json.dumps(info))
    more = ["--max-updates", "6", *TINY[:1], *TINY[3:]]
    assert cli.main([*command, str(run), *more]) == 0
    out = capsys.readouterr().out
    assert "changed since the last command: max_updates 5 -> 6" in out and "num_devices" not in out


def test_resume_refuses_another_run_directory(run, capsys):
    assert "--run-dir cannot be set here" in failing(capsys, "resume", run, "--run-dir", "elsewhere")


def test_a_setting_changed_on_a_continued_run_is_used(run, tmp_path):
    from deploy.run_dir import read_config

    words = ["--learner.learning-rate", "0.5", *TINY, "--max-updates", "9"]
    assert cli.main(["train", "gridworld", "--run-dir", str(run), *words]) == 0
    assert read_config(run).learner.learning_rate == 0.5


def test_evaluate_writes_the_evaluation_object(run, tmp_path):
    out = tmp_path / "evaluation.json"
    assert cli.main(["evaluate", str(run), "--episodes", "3", "--epsilon", "0.5", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["episodes"] == 3 == len(result["returns"])
    assert result["mean_return"] == pytest.approx(sum(result["returns"]) / 3)
    assert result["epsilon"] == 0.5 and result["protocol"] == "gymnasium"


def test_evaluate_plays_the_network_that_was_published(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("deploy.roles.make_evaluator", _spy_on_networks(roles.make_evaluator, loaded))
    for name in ("online", "target"):
        path = tmp_path / name
        flags = ["--learner.publish-params", name, "--learner.target-period-updates", "1000", *TINY]
        assert cli.main(["train", "gridworld", "--run-dir", str(path), *flags]) == 0
        loaded.clear()
        assert cli.main(["evaluate", str(path), "--episodes", "1"]) == 0
        tensors = checkpoints.read(newest_checkpoint_path(path)).tensors
        (network,) = loaded
        played = {key: value.numpy() for key, value in network.state_dict().items()}
        assert all((played[key] == value).all() for key, value in tensors[name].items())
        other = tensors["target" if name == "online" else "online"]
        assert any((played[key] != value).any() for key, value in other.items())


def _spy_on_networks(make_evaluator, networks):
    def make(*args, **kwargs):
        evaluator = make_evaluator(*args, **kwargs)
        networks.append(evaluator.network)
        return evaluator

    return make
