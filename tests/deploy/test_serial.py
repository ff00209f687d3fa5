"""The whole system in one process: repeatable to the bit, continued, and right about where everything went."""

import json
from dataclasses import replace

import numpy as np
import pytest

from deploy import cli, run_dir
from deploy.plots import read_rows
from learner import checkpoint as checkpoints
from replay_server.replay_log import ReplayLog

QUIET = ["--log-period-seconds", "1000", "--evaluation.final-episodes", "2"]


def train(path, *words):
    status = cli.main(["train", *words, "--serial", "--run-dir", str(path), *QUIET])
    return status, json.loads((path / "summary.json").read_text())


PONG = [
    *["pong", "--actors.num-envs", "2", "--replay.min-size", "64", "--learner.batch-size", "8", "--max-env-steps", "100"],
    *["--learner.random-shift-anneal-updates", "10"],
]


@pytest.mark.parametrize("recipe", [["cartpole", "--max-updates", "40"], PONG], ids=["cartpole", "pong"])
def test_serial_run_is_repeatable_to_the_bit(recipe, tmp_path):
    recipe = [*recipe, "--evaluation.episodes", "1", "--env.max-episode-frames", "400"] if recipe[0] == "pong" else recipe
    digests = [train(tmp_path / str(i), *recipe)[1]["params_digest"] for i in range(2)]
    assert digests[0] == digests[1]
    assert train(tmp_path / "other", *recipe, "--seed", "1")[1]["params_digest"] != digests[0]


def test_ledger_and_ratio_hold_over_two_shards_with_priorities(tmp_path):
    status, summary = train(
        tmp_path,
        *["gridworld", "--max-updates", "300", "--replay.num-shards", "2", "--replay.priority-exponent", "0.6"],
        *["--replay.capacity", "600", "--actors.num-actors", "2", "--replay.min-size", "200"],
    )
    ledger = summary["ledger"]
    assert status == 0 and ledger["balanced"] and ledger["lost"] == {} and ledger["refused"] == 0
    assert ledger["sent"] == ledger["inserted"] == ledger["resident"] + ledger["evicted"]
    assert ledger["resident"] <= 600 and ledger["evicted"] > 0
    row = read_rows(tmp_path)[-1]
    assert row["shard/sampled_transitions"] == 300 * 64
    # The ratio of the limiter, within its buffer on either side: 16 a transition after the first 200.
    assert abs(row["shard/sampled_transitions"] - 16 * (row["shard/inserted_transitions"] - 200)) <= 2 * 16 * 16 * 2 * 4 + 64


def test_chunks_that_could_be_pushed_before_the_limiter_refused_the_rest_are_no_standstill(tmp_path):
    """Eight chunks are ready at once and the buffer holds one: actors wait in the middle, for updates that these pushes pay for."""
    few = ["--actors.num-envs", "8", "--actors.max-in-flight-chunks", "1", "--actors.chunk-transitions", "32"]
    status, summary = train(tmp_path, "gridworld", "--max-updates", "100", *few)
    assert status == 0 and summary["updates"] == 100


def test_the_same_command_goes_on_where_it_stopped(tmp_path):
    _, first = train(tmp_path, "gridworld", "--max-updates", "50")
    status, second = train(tmp_path, "gridworld", "--max-updates", "80")
    assert status == 0 and (first["updates"], second["updates"]) == (50, 80)
    assert second["env_steps"] > first["env_steps"] and second["samples"] == 80 * 64
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["0000000050", "0000000080"]


def test_summary_and_metrics_have_what_scripts_rely_on(tmp_path):
    _, summary = train(tmp_path, "gridworld", "--max-env-steps", "700", "--seed", "3")
    assert {"recipe", "env", "seed", "stopped_by", "wall_seconds", "env_steps", "frames", "updates", "params_digest"} <= set(
        summary
    )
    assert set(summary["evaluation"]) >= {"mean_return", "episodes", "returns", "epsilon", "protocol"}
    assert set(summary["ledger"]) >= {"sent", "inserted", "refused", "lost", "resident", "evicted"}
    assert (summary["recipe"], summary["env"], summary["seed"]) == ("gridworld", "GridWorld-v0", 3)
    assert summary["stopped_by"] == "max_env_steps" and 700 <= summary["env_steps"] < 710
    for row in read_rows(tmp_path):
        assert all(isinstance(value, (int, float)) for value in row.values())
        assert all("/" in name or name in ("time_seconds", "env_steps", "frames", "updates", "samples") for name in row)
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.glob("events.out.tfevents.*"))


@pytest.fixture
def nan_reward_env():
    import gymnasium
    import numpy as np

    class NanReward(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.steps = 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.steps += 1
            return np.ones(2, np.float32), float("nan") if self.steps == 30 else 1.0, False, False, {}

    gymnasium.register("NanReward-v0", entry_point=lambda **kwargs: NanReward())
    yield "NanReward-v0"
    gymnasium.registry.pop("NanReward-v0")


def test_a_nan_reward_stops_the_run_with_the_step(nan_reward_env, tmp_path, capsys):
    status, summary = train(tmp_path, "gridworld", "--env.game", nan_reward_env)
    assert status == 1 and summary["stopped_by"] == "non_finite"
    assert "reward nan" in summary["fault"] and "env step 116" in summary["fault"]
    assert "Traceback" not in capsys.readouterr().err


CARTPOLE = ["cartpole", "--learner.batch-size", "16", "--replay.min-size", "100"]
EXACT = {
    "cartpole": [*CARTPOLE, "--replay.capacity", "600"],
    "two shards and actors, priorities, noisy": [
        *[*CARTPOLE, "--replay.num-shards", "2", "--replay.priority-exponent", "0.6", "--actors.num-actors", "2"],
        *["--network.noisy-sigma", "0.5", "--replay.capacity", "800", "--actors.n-step", "5"],
    ],
    "implicit quantiles": [*CARTPOLE, "--network.distribution", "implicit_quantile"],
    "pong": [
        *["pong", "--actors.num-envs", "2", "--replay.min-size", "64", "--learner.batch-size", "8"],
        *["--learner.random-shift-anneal-updates", "20"],
        *["--evaluation.episodes", "1", "--env.max-episode-frames", "400"],
    ],
}


def left_behind(path):
    """Everything of the last checkpoint that a further step depends on, and what the metrics said last."""
    saved = checkpoints.read(checkpoints.paths(path / "checkpoints")[-1])
    tensors = {f"{file}/{name}": array for file, part in saved.tensors.items() for name, array in part.items()}
    records = {
        (shard.name, record.first_item_id): record.message.tobytes()
        for shard in (path / "replay").iterdir()
        if shard.is_dir()
        for record in ReplayLog(shard).records([])
        if record.num_items
    }
    meta = {name: value for name, value in saved.meta.items() if name not in ("run", "run_counters", "replay_layout")}
    for shard in meta["shards"]:
        shard.pop("priorities")
    for actor in meta["serial"]["actors"]:
        actor.pop("returns")  # Those that are not in a row of metrics yet.
    changing = ("second", "fraction", "loss_mean", "resident_bytes", "index", "slowest")
    changing += ("shard/log_",)  # The log began a segment more.
    row = {name: value for name, value in read_rows(path)[-1].items() if not any(word in name for word in changing)}
    return tensors, records, meta, row


@pytest.mark.parametrize("name", EXACT)
def test_a_run_in_two_halves_equals_one_to_the_bit(name, tmp_path, monkeypatch):
    """200 updates, stop, 200 more, against 400: networks, optimizer, replay, everything random, environments in mid-episode."""
    monkeypatch.setattr(run_dir.secrets, "token_hex", lambda num_bytes: "ab" * num_bytes)  # In every message.
    halves, whole, few = tmp_path / "halves", tmp_path / "whole", name == "pong"
    total = 40 if few else 400
    run_ids = ["--seed", "5"]
    train(halves, *EXACT[name], *run_ids, "--max-updates", str(total // 2))
    _, second = train(halves, *EXACT[name], *run_ids, "--max-updates", str(total))
    _, straight = train(whole, *EXACT[name], *run_ids, "--max-updates", str(total))
    assert second["params_digest"] == straight["params_digest"]
    of_halves, of_whole = left_behind(halves), left_behind(whole)
    assert of_halves[0].keys() == of_whole[0].keys()
    assert [key for key, array in of_whole[0].items() if not np.array_equal(array, of_halves[0][key])] == []
    assert of_halves[1:] == of_whole[1:]
    assert second["ledger"] == straight["ledger"] and straight["ledger"]["balanced"]
    assert second["evaluation"]["returns"] == straight["evaluation"]["returns"]


def test_a_run_that_goes_on_to_the_bit_says_that_its_environments_play_again(tmp_path, capsys):
    """That takes minutes for a long run, in which nothing else is to be seen."""
    _, first = train(tmp_path, *CARTPOLE, "--max-updates", "5")
    assert "again" not in capsys.readouterr().out
    train(tmp_path, *CARTPOLE, "--max-updates", "10")
    assert f"environments play their {first['env_steps']:,} steps again" in capsys.readouterr().out


def test_a_run_of_a_version_with_fewer_settings_goes_on_to_the_bit(tmp_path):
    """What they were is what a new setting is by default."""
    train(tmp_path, *CARTPOLE, "--max-updates", "5")
    run = run_dir.open_run(run_dir.read_config(tmp_path), tmp_path)
    config = run_dir.read_config(tmp_path)
    saved = run.meta["run_counters"]["config"]
    del saved["network"]["weight_standardization"]
    for name in ("pixels", "fraction", "anneal_updates"):
        del saved["learner"][f"random_shift_{name}"]
    assert run.may_go_on_exactly(config)
    assert not run.may_go_on_exactly(replace(config, learner=replace(config.learner, learning_rate=0.5)))
    saved["network"]["unheard_of"] = 1
    assert not run.may_go_on_exactly(config)
    run.close()


def test_other_actors_after_a_command_that_did_nothing_go_on_though_not_to_the_bit(tmp_path):
    """That command writes its settings to run.json. Kills: settings that are compared with those, not with the checkpoint's."""
    flags = [*CARTPOLE, "--max-updates", "20"]
    train(tmp_path, *flags)
    assert cli.main(["train", *flags, "--run-dir", str(tmp_path), "--actors.num-actors", "2", "--serial"]) == 0
    status, summary = train(tmp_path, *CARTPOLE, "--max-updates", "30", "--actors.num-actors", "2")
    assert status == 0 and summary["updates"] == 30 and summary["ledger"]["balanced"]


def test_no_epoch_comes_twice_whatever_checkpoint_a_command_goes_on_from(tmp_path):
    """Kills: incarnations of a newer command that come again, so that the ledger takes two actors for one."""
    flags = [*CARTPOLE, "--replay.capacity", "600"]
    train(tmp_path, *flags, "--max-updates", "20")
    (first,) = checkpoints.paths(tmp_path / "checkpoints")
    train(tmp_path, *flags, "--max-updates", "40", "--replay.samples-per-insert", "30")
    command = [
        "resume",
        str(tmp_path),
        "--from",
        first.name,
        "--max-updates",
        "60",
        "--replay.samples-per-insert",
        "28",
        *QUIET,
    ]
    assert cli.main(command) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["ledger"]["balanced"] and summary["updates"] == 60
    epochs = [checkpoints.read_meta(path)["epoch"] for path in checkpoints.paths(tmp_path / "checkpoints")]
    assert epochs == [0, 2]
    assert [path.name[:10] for path in (tmp_path / "checkpoints" / "aside").iterdir()] == ["0000000040"]


def test_a_run_without_a_log_goes_on_with_other_shards_and_an_empty_replay(tmp_path):
    """Kills: checkpoints of another number of shards that are taken for this one's, since neither has a layout."""
    flags = [*CARTPOLE, "--replay.sync-seconds", "None"]
    train(tmp_path, *flags, "--max-updates", "20", "--replay.num-shards", "2")
    status, summary = train(tmp_path, *flags, "--max-updates", "40", "--replay.num-shards", "3")
    assert status == 0 and summary["updates"] == 40 and summary["ledger"]["balanced"]
    assert summary["ledger"]["lost"]["of a replay without a log"] > 0
