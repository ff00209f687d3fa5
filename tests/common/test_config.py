from __future__ import annotations

import dataclasses
import json
import re

import pytest

from common.config import (
    ActorsConfig,
    ByteSize,
    EnvConfig,
    EvaluationConfig,
    ExplorationConfig,
    LearnerConfig,
    NetworkConfig,
    ReplayConfig,
    RunConfig,
    as_dict,
    from_dict,
)
from common.errors import UserError
from deploy.recipes import RECIPES

NAN, INF = float("nan"), float("inf")
CARTPOLE, PONG = EnvConfig(game="CartPole-v1"), EnvConfig(game="pong")


# Protocols

MACHADO = {"sticky_action_probability": 0.25, "full_action_set": True, "noop_max": 0, "fire_reset": False}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"game": "CartPole-v1"}, "gymnasium"),
        ({"game": "pong"}, "legacy"),
        ({"game": "pong", "life_loss_terminates": True, "frame_stack": 4}, "legacy"),
        ({"game": "pong", "fire_reset": False}, "legacy"),
        ({"game": "pong", **MACHADO}, "machado"),
        ({"game": "pong", **MACHADO, "frame_stack": 4}, "machado"),
        ({"game": "pong", **MACHADO, "life_loss_terminates": True}, "custom"),
        ({"game": "pong", **MACHADO, "fire_reset": True}, "custom"),
        ({"game": "pong", **MACHADO, "noop_max": 30}, "custom"),
        ({"game": "pong", **MACHADO, "full_action_set": False}, "custom"),
        ({"game": "pong", **MACHADO, "sticky_action_probability": 0.1}, "custom"),
        ({"game": "pong", "sticky_action_probability": 0.25}, "custom"),
        ({"game": "pong", "full_action_set": True}, "custom"),
        ({"game": "pong", "noop_max": 0}, "custom"),
        ({"game": "pong", "frame_skip": 1}, "custom"),
        ({"game": "pong", "max_episode_frames": 18_000}, "custom"),
    ],
    ids=str,
)
def test_protocol_name(settings, expected):
    assert EnvConfig(**settings).protocol_name == expected


@pytest.mark.parametrize("life_loss_terminates", [False, True])
def test_with_protocol_sets_what_the_protocol_says_and_nothing_else(life_loss_terminates):
    """Every field differs from both protocols before. Kills: a field left out; legacy that forbids a signal which it allows."""
    odd = EnvConfig(
        game="breakout",
        frame_stack=3,
        frame_skip=2,
        sticky_action_probability=0.5,
        full_action_set=True,
        max_episode_frames=18_000,
        noop_max=7,
        life_loss_terminates=life_loss_terminates,
    )
    kept = {"game": "breakout", "frame_stack": 3, "frame_skip": 4, "max_episode_frames": 108_000}
    assert odd.with_protocol("legacy") == EnvConfig(**kept, noop_max=30, life_loss_terminates=life_loss_terminates)
    assert odd.with_protocol("machado") == EnvConfig(**kept, **MACHADO)


def test_with_protocol_refuses_other_names_and_other_environments():
    with pytest.raises(UserError, match="unknown protocol 'nature'; there are legacy and machado"):
        PONG.with_protocol("nature")
    with pytest.raises(UserError, match="protocol legacy is of Atari games, not of CartPole-v1"):
        CARTPOLE.with_protocol("legacy")


def test_a_run_of_a_named_protocol_agrees_with_it():
    RunConfig(recipe="r", env=PONG, protocol="legacy")
    RunConfig(recipe="r", env=dataclasses.replace(PONG, life_loss_terminates=True), protocol="legacy")
    RunConfig(recipe="r", env=PONG.with_protocol("machado"), protocol="machado")
    with pytest.raises(ValueError, match=r"protocol machado has env\.noop_max 0, not 30"):
        RunConfig(recipe="r", env=EnvConfig(game="pong", **MACHADO | {"noop_max": 30}), protocol="machado")
    with pytest.raises(ValueError, match=r"protocol legacy has env\.sticky_action_probability 0\.0, not 0\.25"):
        RunConfig(recipe="r", env=EnvConfig(game="pong", **MACHADO), protocol="legacy")
    with pytest.raises(ValueError, match="is of Atari games"):
        RunConfig(recipe="r", env=CARTPOLE, protocol="machado")


# Sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("123", 123),
        ("123B", 123),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("4GiB", 4 * 1024**3),
        ("4gib", 4 * 1024**3),
        (" 4 GiB ", 4 * 1024**3),
        ("1.5GiB", 3 * 1024**3 // 2),
        ("2TiB", 2 * 1024**4),
        ("1kB", 1000),
        ("3MB", 3 * 1000**2),
        ("3GB", 3 * 1000**3),
    ],
)
def test_byte_size_is_parsed(text, expected):
    """Kills: decimal units for binary ones and the reverse; case; the fraction dropped before it is multiplied."""
    size = ByteSize.parse(text)
    assert size == expected
    assert isinstance(size, ByteSize)


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "4 G iB", "4XiB", "1,5GiB", "1e9", "0x10", "4GiB4", "nan", "inf", ".5GiB"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=re.escape(repr(text)) + r" is not a size: write 512MiB or 4GiB"):
        ByteSize.parse(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (512 * 2**20, "512MiB"),
        (4 * 2**30, "4GiB"),
        (2**40, "1024GiB"),
    ],
)
def test_byte_size_is_written_as_it_is_read(size, text):
    assert str(ByteSize(size)) == repr(ByteSize(size)) == f"{ByteSize(size)}" == text
    assert ByteSize.parse(text) == size


# What is refused, and by which name


def bad(cls, section, *names, values):
    return [(cls, f"{section}.{name}", name, value) for name in names for value in values]


NOT_POSITIVE, NOT_FRACTION = (0, -1, NAN, INF), (-0.01, 1.01, NAN)
BAD_FIELDS = [
    *bad(EnvConfig, "env", "frame_stack", "frame_skip", "max_episode_frames", values=NOT_POSITIVE),
    *bad(EnvConfig, "env", "sticky_action_probability", values=NOT_FRACTION),
    *bad(EnvConfig, "env", "noop_max", values=(-1,)),
    *bad(NetworkConfig, "network", "hidden_sizes", values=((0,), (256, -1))),
    *bad(ExplorationConfig, "actors.exploration", "initial", "final", "decay_rate", "ladder_base", values=NOT_FRACTION),
    *bad(ExplorationConfig, "actors.exploration", "decay_steps", values=NOT_POSITIVE),
    *bad(ActorsConfig, "actors", "num_actors", "num_envs", "n_step", "chunk_transitions", "chunk_bytes", values=NOT_POSITIVE),
    *bad(ActorsConfig, "actors", "max_in_flight_chunks", "pull_period_steps", "env_threads", values=NOT_POSITIVE),
    *bad(ActorsConfig, "actors", "reward_clip", values=NOT_POSITIVE),
    *bad(ActorsConfig, "actors", "discount", values=NOT_FRACTION),
    *bad(ReplayConfig, "replay", "num_shards", "memory", "capacity", "min_size", values=NOT_POSITIVE),
    *bad(ReplayConfig, "replay", "samples_per_insert", "limiter_buffer_samples", values=NOT_POSITIVE),
    *bad(ReplayConfig, "replay", "priority_exponent", values=NOT_FRACTION),
    *bad(LearnerConfig, "learner", "batch_size", "learning_rate", "optimizer_epsilon", "max_grad_norm", values=NOT_POSITIVE),
    *bad(LearnerConfig, "learner", "target_period_updates", "prefetch_batches", values=NOT_POSITIVE),
    *bad(LearnerConfig, "learner", "publish_period_updates", "checkpoint_period_seconds", values=NOT_POSITIVE),
    *bad(LearnerConfig, "learner", "checkpoints_kept", "num_threads", "priority_floor", values=NOT_POSITIVE),
    *bad(LearnerConfig, "learner", "importance_exponent", "target_soft_rate", "rmsprop_decay", values=NOT_FRACTION),
    *bad(EvaluationConfig, "evaluation", "episodes", "final_episodes", "period_seconds", "num_envs", values=NOT_POSITIVE),
    *bad(EvaluationConfig, "evaluation", "epsilon", values=NOT_FRACTION),
    *bad(RunConfig, "run", "max_minutes", "max_updates", "max_env_steps", "log_period_seconds", values=NOT_POSITIVE),
]


@pytest.mark.parametrize(("cls", "where", "name", "value"), BAD_FIELDS, ids=[f"{b[1]}={b[3]}" for b in BAD_FIELDS])
def test_a_field_out_of_range_is_refused_by_name_and_value(cls, where, name, value):
    needed = {EnvConfig: {"game": "pong"}, RunConfig: {"recipe": "r", "env": CARTPOLE}}.get(cls, {})
    with pytest.raises(ValueError, match=rf"^{re.escape(where)} must .*, got {re.escape(str(value))}$"):
        cls(**needed | {name: value})


def test_none_means_off():
    assert ActorsConfig(reward_clip=None, terminal_reward=None).reward_clip is None
    assert ReplayConfig(samples_per_insert=None, limiter_buffer_samples=None).samples_per_insert is None
    learner = LearnerConfig(max_grad_norm=None, target_period_updates=None, target_soft_rate=0.01, num_threads=None)
    assert learner.max_grad_norm is learner.target_period_updates is None
    assert RunConfig(recipe="r", env=CARTPOLE, max_minutes=None, max_updates=None, max_env_steps=None).max_minutes is None


def test_the_ends_of_a_fraction_are_in_range():
    for value in (0.0, 1.0):
        assert ExplorationConfig(initial=value, final=value, decay_rate=value, ladder_base=value).final == value
        assert ReplayConfig(priority_exponent=value).priority_exponent == value
    assert EnvConfig(game="pong", noop_max=0).noop_max == 0


def of_atari(**sections):
    return RunConfig(recipe="r", env=PONG, **sections)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NetworkConfig(num_atoms=1), r"^network\.num_atoms must be at least 2, got 1"),
        (
            lambda: NetworkConfig(value_min=3.0, value_max=3.0),
            r"^network\.value_min 3\.0 must be less than network\.value_max 3\.0",
        ),
        (lambda: NetworkConfig(torso="nature", width=2), r"^network\.width is of the impala torso"),
        (lambda: NetworkConfig(torso="nature", spectral_norm=True), r"^network\.spectral_norm is of the impala torso"),
        (lambda: NetworkConfig(adaptive_pool=6), r"^network\.adaptive_pool is of convolutional torsos"),
        (lambda: NetworkConfig(weight_standardization=True), r"^network\.weight_standardization is of convolutional torsos"),
        (
            lambda: NetworkConfig(torso="impala", spectral_norm=True, weight_standardization=True),
            r"^network\.spectral_norm and network\.weight_standardization both scale",
        ),
        (
            lambda: NetworkConfig(distribution="quantile", value_rescaling=True),
            r"^network\.value_rescaling is of expectations: .* --network\.distribution quantile",
        ),
        (lambda: LearnerConfig(munchausen_clip=0.5), r"^learner\.munchausen_clip must not be positive, got 0\.5"),
        (
            lambda: of_atari(
                network=NetworkConfig(distribution="categorical"), learner=LearnerConfig(algorithm="munchausen_q_learning")
            ),
            r"^learner\.algorithm munchausen_q_learning is for expectations and quantiles",
        ),
        (
            lambda: of_atari(
                network=NetworkConfig(value_rescaling=True), learner=LearnerConfig(algorithm="munchausen_q_learning")
            ),
            r"^network\.value_rescaling and learner\.algorithm munchausen_q_learning cannot be combined",
        ),
        (
            lambda: of_atari(network=NetworkConfig(torso="impala"), learner=LearnerConfig(memory_format="space_to_depth")),
            r"^learner\.memory_format space_to_depth is for .* not for torso impala",
        ),
        (
            lambda: of_atari(learner=LearnerConfig(num_devices=2)),
            r"^learner\.num_devices 2 needs as many shards, each its own: raise --replay\.num-shards",
        ),
        (
            lambda: of_atari(serial=True, learner=LearnerConfig(num_devices=2), replay=ReplayConfig(num_shards=2)),
            r"^a serial run is one process: leave out --learner\.num-devices, or --serial",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: ReplayConfig(min_size=11, capacity=10),
            r"^replay\.min_size 11 is more than replay\.capacity 10: the learner would",
        ),
        (
            lambda: LearnerConfig(target_soft_rate=0.1),
            r"^set exactly one of learner\.target_period_updates .* learner\.target_soft",
        ),
        (
            lambda: LearnerConfig(target_period_updates=None),
            r"^set exactly one of learner\.target_period_updates .* learner\.target",
        ),
        (lambda: RunConfig(recipe="r", env=CARTPOLE, seed=-1), r"^seed must not be negative, got -1"),
        (
            lambda: RunConfig(recipe="r", env=CARTPOLE, learner=LearnerConfig(batch_size=3), replay=ReplayConfig(num_shards=4)),
            r"^learner\.batch_size 3 is less than replay\.num_shards 4",
        ),
        (
            lambda: RunConfig(recipe="r", env=CARTPOLE, network=NetworkConfig(torso="nature")),
            r"^network\.torso nature needs an Atari game; for CartPole-v1 use --network\.torso mlp",
        ),
        (
            lambda: RunConfig(
                recipe="r",
                env=CARTPOLE,
                actors=ActorsConfig(chunk_transitions=1),
                replay=ReplayConfig(limiter_buffer_samples=31),
                learner=LearnerConfig(batch_size=32),
            ),
            r"^replay\.limiter_buffer_samples 31 holds less than a batch, or than the samples that one chunk pays for: it must be at least 32",
        ),
    ],
    ids=["min_size", "both_targets", "no_target", "seed", "shards", "torso", "limiter"],
)
def test_a_contradiction_is_refused_by_name(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_what_is_just_allowed_is_allowed():
    assert ReplayConfig(min_size=10, capacity=10).min_size == 10
    RunConfig(recipe="r", env=CARTPOLE, learner=LearnerConfig(batch_size=4), replay=ReplayConfig(num_shards=4))
    RunConfig(recipe="r", env=PONG, network=NetworkConfig(torso="nature"))
    RunConfig(
        recipe="r",
        env=CARTPOLE,
        actors=ActorsConfig(chunk_transitions=1),
        replay=ReplayConfig(limiter_buffer_samples=32),
        learner=LearnerConfig(batch_size=32),
    )


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PONG.game = "breakout"  # type: ignore[misc]


# Derived values


@pytest.mark.parametrize(
    ("game", "is_atari", "frames_per_step"),
    [("pong", True, 4), ("ms_pacman", True, 4), ("CartPole-v1", False, 1), ("a/B-v12", False, 1)],
)
def test_frames_are_those_of_atari_games(game, is_atari, frames_per_step):
    config = EnvConfig(game=game)
    assert (config.is_atari, config.frames_per_step) == (is_atari, frames_per_step)


def run_of(*, batch_size, samples_per_insert, chunk_transitions, num_shards=1, buffer=None):
    return RunConfig(
        recipe="r",
        env=CARTPOLE,
        actors=ActorsConfig(num_actors=3, num_envs=5, max_in_flight_chunks=2, chunk_transitions=chunk_transitions),
        replay=ReplayConfig(samples_per_insert=samples_per_insert, limiter_buffer_samples=buffer, num_shards=num_shards),
        learner=LearnerConfig(batch_size=batch_size),
    )


def test_limiter_buffer_holds_a_batch_and_every_chunk_in_flight():
    """Kills: the chunks of one actor only; the ratio left out; the shards left out of either buffer; floor for ceil."""
    config = run_of(batch_size=32, samples_per_insert=8.0, chunk_transitions=10)
    assert (config.min_limiter_buffer_samples, config.limiter_buffer_samples) == (8 * 10, 8 * 10 * 3 * 2)
    config = run_of(batch_size=512, samples_per_insert=8.0, chunk_transitions=10)
    assert (config.min_limiter_buffer_samples, config.limiter_buffer_samples) == (512, 512)
    config = run_of(batch_size=4, samples_per_insert=0.7, chunk_transitions=15, num_shards=4)
    assert (config.min_limiter_buffer_samples, config.limiter_buffer_samples) == (
        11 * 4,
        126,
    )  # ceil(10.5), 0.7 * 180: one to each shard
    config = run_of(batch_size=32, samples_per_insert=8.0, chunk_transitions=10, buffer=81)
    assert (config.min_limiter_buffer_samples, config.limiter_buffer_samples) == (80, 81)
    config = run_of(batch_size=32, samples_per_insert=None, chunk_transitions=10)
    assert (config.min_limiter_buffer_samples, config.limiter_buffer_samples) == (32, 32)


# As run.json holds it


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_round_trips_through_json(name):
    config = RECIPES[name]()
    assert config.recipe == name
    values = as_dict(config)
    again = from_dict(json.loads(json.dumps(values)))
    assert again == config
    assert isinstance(again.replay.memory, ByteSize) and isinstance(again.object_store_memory, ByteSize)
    assert isinstance(again.network.hidden_sizes, tuple)
    assert as_dict(again) == values


def test_recipes_differ_from_one_another():
    """Kills a round trip that holds because every configuration is equal to every other."""
    configs = [recipe() for recipe in RECIPES.values()]
    assert all(one != other for n, one in enumerate(configs) for other in configs[:n])


def test_as_dict_holds_plain_values_only():
    def walk(value):
        assert type(value) in (dict, list, str, int, float, bool, type(None)), value
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(inner)

    values = as_dict(RECIPES["apex"]())
    walk(values)
    assert values["replay"]["memory"] == 8 * 2**30
    assert values["actors"]["exploration"]["kind"] == "ladder"


@pytest.mark.parametrize("section", [(), ("replay",), ("actors", "exploration")])
def test_from_dict_refuses_an_unknown_field_by_name(section):
    values = as_dict(RECIPES["pong"]())
    inner = values
    for name in section:
        inner = inner[name]
    inner["surprise"] = 1
    with pytest.raises(ValueError, match="^" + re.escape(".".join([*section, "surprise"])) + ": a field that this version"):
        from_dict(values)


@pytest.mark.parametrize(("section", "name"), [((), "recipe"), ((), "env"), (("env",), "game")])
def test_from_dict_refuses_a_missing_field_by_name(section, name):
    values = as_dict(RECIPES["pong"]())
    inner = values
    for part in section:
        inner = inner[part]
    del inner[name]
    with pytest.raises(ValueError, match=re.escape(".".join([*section, name]))):
        from_dict(values)


def test_from_dict_refuses_a_value_out_of_range_and_a_section_that_is_none():
    values = as_dict(RECIPES["pong"]())
    values["replay"]["capacity"] = 0
    with pytest.raises(ValueError, match=r"^replay\.capacity must be positive, got 0"):
        from_dict(values)
    values["replay"] = 3
    with pytest.raises(ValueError, match=r"^replay: expected a section"):
        from_dict(values)


def test_from_dict_fills_what_an_older_version_did_not_write():
    values = as_dict(RECIPES["pong"]())
    del values["learner"]["precision"]
    assert from_dict(values) == RECIPES["pong"]()
