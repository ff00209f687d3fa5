"""Environments: ale-py's traps on real games, and Gymnasium's three ways to begin the next episode."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import gymnasium
import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from scipy import stats

from actors.environments import GymnasiumEnvironment, check_atari_game, make_environment, probe
from common.config import EnvConfig, EnvSpec
from common.errors import UserError


class Record(NamedTuple):
    """Each [num_steps, E, ...]."""

    planes: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    is_first: np.ndarray
    episode_return: np.ndarray


def play(config, num_steps, *, seed=0, num_envs=1, num_threads=1, action=None):
    """Plays at random, with the same actions in every call, or always one action."""
    environment = make_environment(config, num_envs, num_threads=num_threads)
    rng = np.random.default_rng(0)
    planes = [environment.reset(seed)]
    steps = []
    for _ in range(num_steps):
        actions = rng.integers(environment.spec.num_actions, size=num_envs)
        steps.append(environment.step(actions if action is None else np.full(num_envs, action)))
        planes.append(steps[-1].planes)
        assert steps[-1].final_planes is None
    environment.close()
    names = ("reward", "terminated", "truncated", "is_first", "episode_return")
    return Record(np.array(planes), *(np.array([getattr(step, name) for step in steps]) for name in names))


@pytest.mark.parametrize(("game", "num_steps"), [("breakout", 320), ("seaquest", 420)])
def test_atari_life_loss_terminates_and_the_game_goes_on(game, num_steps):
    """Kills `episodic_life=True` (resets the game), a reset row told by the number of lives, and a reset row lost."""
    plain = play(EnvConfig(game=game), num_steps)
    lives = play(EnvConfig(game=game, life_loss_terminates=True), num_steps)
    for name in ("planes", "reward", "truncated", "is_first", "episode_return"):
        np.testing.assert_array_equal(getattr(lives, name), getattr(plain, name), err_msg=name)
    # Without the signal, a step begins an episode exactly where the one before ended it.
    ended = plain.terminated | plain.truncated
    assert not plain.is_first[0].any()
    np.testing.assert_array_equal(plain.is_first[1:], ended[:-1])
    assert ended.sum() >= 1 and not plain.truncated.any()
    # With it, more steps are terminal, and after those the next step is a real one.
    assert (lives.terminated & plain.terminated).sum() == plain.terminated.sum()
    lost = lives.terminated & ~plain.terminated
    assert lost.sum() >= 2 * plain.terminated.sum()
    assert not lives.is_first[1:][lost[:-1]].any()


def test_atari_points_lost_without_lives_are_no_ends():
    record = play(EnvConfig(game="pong", life_loss_terminates=True), 100)
    assert (record.reward < 0).sum() >= 1
    assert not (record.terminated | record.is_first).any()


def test_atari_rewards_are_raw_and_returns_are_their_sums():
    record = play(EnvConfig(game="ms_pacman", max_episode_frames=400, life_loss_terminates=True), 210)
    assert record.reward.max() >= 10
    totals, total = [], 0.0
    for reward, is_first in zip(record.reward[:, 0], record.is_first[:, 0], strict=True):
        if is_first:
            totals.append(total)
            total = 0.0
        else:
            total += reward
    reported = record.episode_return[~np.isnan(record.episode_return)]
    assert len(totals) >= 2
    assert reported.tolist() == totals
    assert sum(totals) > 0


def test_atari_seed_decides_everything():
    config = EnvConfig(game="pong", sticky_action_probability=0.25)
    record, same, other = (play(config, 30, seed=seed, num_envs=2) for seed in (3, 3, 9))
    np.testing.assert_array_equal(record.planes, same.planes)
    assert (record.planes != other.planes).any()
    assert (record.planes[:, 0] != record.planes[:, 1]).any()  # Environments differ from one another.


def test_atari_number_of_threads_changes_nothing():
    config = EnvConfig(game="breakout")
    one, two = (play(config, 30, num_envs=3, num_threads=threads) for threads in (1, 2))
    np.testing.assert_array_equal(one.planes, two.planes)


def test_atari_reset_with_a_seed_begins_anew():
    environment = make_environment(EnvConfig(game="breakout"), 1)
    first = environment.reset(5)
    for _ in range(30):
        environment.step(np.array([1]))
    np.testing.assert_array_equal(environment.reset(5), first)
    environment.close()


def test_atari_sticky_actions_repeat_the_last_one():
    plain = play(EnvConfig(game="pong", noop_max=0), 40)
    sticky = play(EnvConfig(game="pong", noop_max=0, sticky_action_probability=0.25), 40)
    assert (plain.planes != sticky.planes).any()


def first_frames(config, num_envs):
    """Returns how many frames each of `num_envs` environments has played when an episode begins."""
    kept = []
    environment = make_environment(config, num_envs, wrap=lambda envs: kept.append(envs) or envs)
    frames = kept[0].reset(seed=0)[1]["episode_frame_number"]
    environment.close()
    return frames.tolist()


def test_protocols_begin_an_episode_with_no_ops_or_without():
    legacy = EnvConfig(game="breakout").with_protocol("legacy")
    frames = first_frames(legacy, 12)
    assert 0 < min(frames) < max(frames) < 30 and len(set(frames)) >= 4
    assert set(first_frames(replace(legacy, noop_max=0), 2)) == {1}  # FIRE, which ale-py presses unless told not to.
    assert set(first_frames(replace(legacy, noop_max=0, fire_reset=False), 2)) == {0}
    assert set(first_frames(legacy.with_protocol("machado"), 4)) == {0}


def test_protocols_seed_decides_the_game_by_sticky_actions_or_by_no_ops_only():
    """Three environments with seeds of their own take the same actions. Kills: sticky actions in legacy, none in machado."""
    legacy = EnvConfig(game="breakout").with_protocol("legacy")
    machado = legacy.with_protocol("machado")
    actions = np.random.default_rng(0).integers(4, size=10)

    def num_games(config):
        environment = make_environment(config, 3)
        planes = [environment.reset(0)] + [environment.step(np.full(3, action)).planes for action in actions]
        environment.close()
        return len({game.tobytes() for game in np.stack(planes, axis=1)})

    assert num_games(replace(legacy, noop_max=0)) == 1
    assert num_games(replace(machado, sticky_action_probability=0.0)) == 1
    assert num_games(legacy) > 1
    assert num_games(machado) > 1


def test_machado_actions_stick_in_a_quarter_of_the_frames():
    """One frame of FIRE launches the ball of Breakout unless the emulator repeats the no-op before it: 64 games, binomial law."""
    machado = replace(EnvConfig(game="breakout").with_protocol("machado"), frame_skip=1)

    def planes_after(action, config, num_envs):
        environment = make_environment(config, num_envs)
        environment.reset(0)
        planes = environment.step(np.full(num_envs, action)).planes.copy()
        environment.close()
        return planes

    (resting,) = planes_after(0, machado, 1)
    assert (planes_after(1, replace(machado, sticky_action_probability=0.0), 1) != resting).any()
    num_launched = (planes_after(1, machado, 64) != resting).any(axis=(1, 2)).sum()
    assert stats.binomtest(int(num_launched), 64, 0.75).pvalue > 1e-6
    assert stats.binomtest(64, 64, 0.75).pvalue < 1e-6  # What no sticky actions would give.


def test_protocols_choose_the_action_set():
    for game, num_actions in (("pong", 6), ("breakout", 4), ("boxing", 18)):
        config = EnvConfig(game=game)
        assert probe(config.with_protocol("legacy")).num_actions == num_actions
        assert probe(config.with_protocol("machado")).num_actions == 18


def test_action_sets_of_one_size_are_the_same_actions():
    """Boxing uses all 18 actions: its minimal set is the full one, in the same order."""
    minimal, full = (play(EnvConfig(game="boxing", full_action_set=full), 60) for full in (False, True))
    np.testing.assert_array_equal(minimal.planes, full.planes)


def test_atari_planes_are_the_newest_alone():
    """Kills the oldest plane of a stack, and a stack in place of a plane: ale-py's own stack of four is the witness."""
    environment = make_environment(EnvConfig(game="breakout", frame_stack=4), 2)
    assert environment.spec == EnvSpec((84, 84), "|u1", 4, 4)
    witness = AtariVectorEnv("breakout", 2, num_threads=1, reward_clipping=False)
    planes, (stacks, _) = environment.reset(3), witness.reset(seed=3)
    assert planes.shape == (2, 84, 84) and planes.dtype == np.uint8
    num_moved = 0
    for number in range(40):
        np.testing.assert_array_equal(planes, stacks[:, -1])
        num_moved += (stacks[:, -1] != stacks[:, 0]).any()
        actions = np.full(2, 2 + number // 5 % 2)
        planes, stacks = environment.step(actions).planes, witness.step(actions)[0]
    environment.close()
    witness.close()
    assert num_moved > 20


def test_atari_full_action_set():
    assert probe(EnvConfig(game="pong", full_action_set=True)).num_actions == 18
    assert probe(EnvConfig(game="breakout")).num_actions == 4


@pytest.mark.parametrize(("max_episode_frames", "life_loss_terminates"), [(4, False), (4, True), (100, True)])
def test_atari_max_episode_frames_truncates(max_episode_frames, life_loss_terminates):
    """Also where an episode is shorter than the no-ops of the next one's start, so that frame counters do not fall."""
    config = EnvConfig(game="pong", max_episode_frames=max_episode_frames, life_loss_terminates=life_loss_terminates)
    record = play(config, 60, num_envs=2)
    num_steps = max_episode_frames // 4
    one_episode = [False] * (num_steps - 1) + [True] + [False]  # The last row begins the next one.
    expected = np.array((one_episode * 60)[:60])
    np.testing.assert_array_equal(record.truncated, np.stack([expected, expected], axis=1))
    assert not record.terminated.any()
    np.testing.assert_array_equal(record.is_first[1:], record.truncated[:-1])
    assert not record.is_first[0].any()


@pytest.mark.parametrize(
    ("game", "nearest"),
    [
        ("Pong", "'pong'"),
        ("pongg", "'pong'"),
        ("MsPacman", "'ms_pacman'"),
        ("CartPol-v1", "'CartPole-v1'"),
        ("CartPole-v99", "'CartPole-v1'"),
        ("gridworld-v0", "'GridWorld-v0'"),
    ],
)
def test_unknown_game_names_its_nearest(game, nearest):
    with pytest.raises(UserError, match=f"{game}.*{nearest}"):
        make_environment(EnvConfig(game=game), 1)


@pytest.mark.parametrize(("game", "nearest"), [("ALE/Pong-v5", "'pong'"), ("ALE/MsPacman-v5", "'ms_pacman'")])
def test_atari_game_under_its_gymnasium_name_is_refused_with_the_right_one(game, nearest):
    """Gymnasium would make it, with whole RGB screens, no frame stack and sticky actions."""
    with pytest.raises(ValueError, match=f"{game}.*{nearest}"):
        make_environment(EnvConfig(game=game), 1)


@pytest.mark.parametrize("game", ["qqqqqqqq", "", "foo bar-v1", "../x-v1"])
def test_unknown_game_like_no_other_is_still_one_line(game):
    with pytest.raises(UserError) as caught:
        make_environment(EnvConfig(game=game), 1)
    assert "\n" not in str(caught.value) and game in str(caught.value)


def test_check_atari_game_accepts_its_games():
    check_atari_game("ms_pacman")
    with pytest.raises(UserError, match="unknown game"):
        check_atari_game("CartPole-v1")


def test_continuous_actions_are_refused():
    with pytest.raises(UserError, match=r"Pendulum-v1 .*Discrete"):
        make_environment(EnvConfig(game="Pendulum-v1"), 1)


def test_observation_that_is_no_box_is_refused():
    with pytest.raises(UserError, match=r"FrozenLake-v1 .*Box"):
        make_environment(EnvConfig(game="FrozenLake-v1"), 1)


class EchoEnv(gymnasium.Env):
    """The observation is the action that came in; episodes never end."""

    def __init__(self, actions, observations):
        self.action_space, self.observation_space = actions, observations
        self.seen = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._observation(0), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.seen.append(int(action))
        return self._observation(int(action)), 0.0, False, False, {}

    def _observation(self, value):
        space = self.observation_space
        return np.full(space.shape, value, space.dtype)


def echo(num_envs, actions, observations):
    envs = [EchoEnv(actions, observations) for _ in range(num_envs)]
    vector = SyncVectorEnv([lambda env=env: env for env in envs], autoreset_mode=AutoresetMode.NEXT_STEP)
    return GymnasiumEnvironment(vector, 1), envs


def test_discrete_actions_that_start_elsewhere():
    box = gymnasium.spaces.Box(-10, 10, (1,), np.float32)
    environment, envs = echo(2, gymnasium.spaces.Discrete(3, start=-1), box)
    assert environment.spec.num_actions == 3
    environment.reset(0)
    step = environment.step(np.array([0, 2]))
    assert [env.seen for env in envs] == [[-1], [1]]
    np.testing.assert_array_equal(step.planes, [[-1], [1]])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(np.uint8, "|u1"), (np.float32, "<f4"), (np.float64, "<f4"), (np.int64, "<f4")],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_planes_have_the_shape_and_dtype_of_the_spec(dtype, expected, shape):
    """A Box without dimensions is one number: its planes are vectors of one."""
    environment, _ = echo(2, gymnasium.spaces.Discrete(3), gymnasium.spaces.Box(0, 10, shape, dtype))
    assert environment.spec == EnvSpec(shape or (1,), expected, 1, 3)
    for planes in (environment.reset(0), environment.step(np.array([2, 2])).planes):
        assert planes.shape == (2, *environment.spec.plane_shape)
        assert planes.dtype == np.dtype(expected)


SCRIPT = [([1.0, 2.0], "terminated"), ([5.0], "truncated"), ([7.0, 8.0, 9.0], "terminated")]


def test_gymnasium_next_step_mode_gives_the_last_observation_and_then_a_row_that_is_first(scripted):
    environment, (env,) = scripted([SCRIPT], mode=AutoresetMode.NEXT_STEP)
    first = environment.reset(0)
    steps = [environment.step(np.array([0])) for _ in range(6)]
    assert [bool(s.is_first[0]) for s in steps] == [False, False, True, False, True, False]
    assert [bool(s.terminated[0]) for s in steps] == [False, True, False, False, False, False]
    assert [bool(s.truncated[0]) for s in steps] == [False, False, False, True, False, False]
    assert all(s.final_planes is None for s in steps)
    np.testing.assert_array_equal([s.episode_return[0] for s in steps], [np.nan, np.nan, 3, np.nan, 5, np.nan])
    seen = [first[0], *(s.planes[0] for s in steps)]
    logged = [o for episode in env.episodes for o in episode.observations]
    np.testing.assert_array_equal(seen, logged)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.value)
def test_gymnasium_other_modes_give_both_observations_at_the_end(scripted, mode):
    environment, (env, longer) = scripted([SCRIPT, [([1.0] * 9, "truncated")]], mode=mode)
    environment.reset(0)
    steps = [environment.step(np.array([0, 1])) for _ in range(3)]
    assert not any(s.is_first.any() for s in steps)
    assert [s.final_planes is None for s in steps] == [True, False, False]
    np.testing.assert_array_equal([s.episode_return[0] for s in steps], [np.nan, 3, 5])
    assert np.isnan([s.episode_return[1] for s in steps]).all()
    np.testing.assert_array_equal(steps[1].final_planes[0], env.episodes[0].observations[-1])
    np.testing.assert_array_equal(steps[1].planes[0], env.episodes[1].observations[0])
    np.testing.assert_array_equal(steps[2].final_planes[0], env.episodes[1].observations[-1])
    np.testing.assert_array_equal(steps[2].planes[0], env.episodes[2].observations[0])
    np.testing.assert_array_equal([s.planes[1] for s in steps], longer.episodes[0].observations[1:4])
    assert len(longer.episodes) == 1  # A neighbour's end does not reset it.


def test_gymnasium_planes_are_copies(scripted):
    """The vector environment of the fakes writes every step into one buffer."""
    environment, _ = scripted([SCRIPT])
    first = environment.reset(0)
    kept = first.copy()
    environment.step(np.array([0]))
    np.testing.assert_array_equal(first, kept)


def test_gymnasium_reset_forgets_the_episode_under_way(scripted):
    environment, _ = scripted([[([1.0, 1.0], "terminated")]])
    environment.reset(0)
    for _ in range(2):
        environment.step(np.array([0]))  # Ended: the next step would be a reset.
    environment.reset(1)
    steps = [environment.step(np.array([0])) for _ in range(3)]
    assert [bool(s.is_first[0]) for s in steps] == [False, False, True]
    assert steps[-1].episode_return[0] == 2.0
