"""Every transition that replay gives, on any script of episodes, is the one that really happened, and none is missing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from hypothesis import given, settings
from hypothesis import strategies as st

from actors import environments
from actors.environments import AtariEnvironment, GymnasiumEnvironment, make_environment
from actors.oracle import Item, RawStep, Rules, TransitionOracle, expected_transitions
from actors.recording import Recorder
from actors.scripted import Outcome, ScriptedEnv
from common.config import ActorsConfig, EnvConfig, EnvSpec, ExplorationConfig
from deploy.path_check import check_path

MODES = list(AutoresetMode)
EXPLORE = ExplorationConfig(initial=1.0, final=1.0)


# The reference itself, by hand.


def plane(value):
    return np.full((1,), value, np.float32)


LOG = [
    RawStep(plane(1), None),
    RawStep(plane(2), 0, 10.0),
    RawStep(plane(3), 1, 0.5, truncated=True),
    RawStep(plane(4), None),
    RawStep(plane(5), 2, -1.0, terminated=True),  # A lost life: no reset follows.
    RawStep(plane(6), 1, 1.0, terminated=True, truncated=True),
    RawStep(plane(7), None),
    RawStep(plane(8), 0, 1.0),
]


def test_reference_is_what_the_definition_says():
    """Kills: bootstrapping from a terminal state or not from a truncated one, a stack over a reset or cut at a lost life, a
    window over either, the reward of a reset, an incomplete tail."""
    rules = Rules(n_step=2, discount=0.5, reward_clip=2.0, terminal_reward=None, frame_stack=3)
    got = expected_transitions(LOG, [1, 2, 3, 4, 5, 6, 7, 8], rules, 0)
    assert [Item(t.s_tm1, t.a_tm1, t.r_t, t.discount_t, t.s_t) for t in got] == [
        Item((0, 0, 1), 0, 2.0 + 0.5 * 0.5, 0.5**2, (1, 2, 3)),
        Item((0, 1, 2), 1, 0.5, 0.5, (1, 2, 3)),
        Item((0, 0, 4), 2, -1.0, 0.0, (0, 4, 5)),
        Item((0, 4, 5), 1, 1.0, 0.0, (4, 5, 6)),
    ]
    assert [t.place() for t in got[2:]] == [f"step {i} of episode 1 of environment 0" for i in (0, 1)]


def test_reference_replaces_the_reward_of_a_terminating_step():
    rules = Rules(n_step=1, discount=0.5, reward_clip=2.0, terminal_reward=-9.0, frame_stack=1)
    got = expected_transitions(LOG, [1, 2, 3, 4, 5, 6, 7, 8], rules, 0)
    assert [t.r_t for t in got] == [2.0, 0.5, -9.0, -9.0, 1.0]


def sampled(**changes):
    """All transitions of LOG with n = 1, as a batch would give them."""
    fields = {
        "item_id": np.arange(5),
        "planes": np.array([[0], [1], [2], [3], [4], [5], [6], [7], [8]], np.float32),
        "s_tm1": np.array([[0, 1], [1, 2], [0, 4], [4, 5], [0, 7]]),
        "a_tm1": np.array([0, 1, 2, 1, 0]),
        "r_t": np.array([10, 0.5, -1, 1, 1], np.float32),
        "discount_t": np.array([0.9, 0.9, 0, 0, 0.9], np.float32),
        "s_t": np.array([[1, 2], [2, 3], [4, 5], [5, 6], [7, 8]]),
    }
    return fields | changes


def faults_of(*batches, num_unsent=0):
    rules = Rules(n_step=1, discount=0.9, reward_clip=None, terminal_reward=None, frame_stack=2)
    oracle = TransitionOracle([LOG], EnvSpec((1,), "<f4", 2, 3), rules)
    for batch in batches:
        oracle.see(**batch)
    return oracle.faults(num_unsent)


def test_oracle_is_silent_where_all_is_right():
    assert faults_of(sampled()) == []
    assert faults_of(sampled(), sampled()) == []
    first_four = {name: value if name == "planes" else value[:4] for name, value in sampled().items()}
    assert faults_of(first_four, num_unsent=1) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"a_tm1": np.array([0, 1, 2, 1, 2])}, "item 4, step 0 of episode 2 of environment 0: a_tm1 is 2, not 0"),
        ({"r_t": np.array([10, 0.5, -1, 1, 1.001])}, "item 4, step 0 of episode 2 of environment 0: r_t is 1.001, not 1"),
        (
            {"discount_t": np.array([0.9, 0.9, 0, 0.9, 0.9])},
            "item 3, step 1 of episode 1 of environment 0: discount_t is 0.9, not 0",
        ),
        (
            {"s_tm1": np.array([[0, 1], [1, 2], [3, 4], [4, 5], [0, 7]])},
            "item 2, step 0 of episode 1 of environment 0: s_tm1 is [0.0.2, 0.1.0], not [zeros, 0.1.0]",
        ),
        (
            {"planes": np.array([[0], [1], [2], [3], [4], [5], [6], [7], [9]], np.float32)},
            "item 4, step 0 of episode 2 of environment 0: s_t is [0.2.0, unknown], not [0.2.0, 0.2.1]",
        ),
        ({"item_id": np.array([0, 2, 1, 3, 4])}, "item 2, step 1 of episode 0 of environment 0, came after a later one"),
    ],
)
def test_oracle_names_the_item_and_what_is_wrong_with_it(change, sentence):
    assert any(fault.startswith(sentence) for fault in faults_of(sampled(**change))), faults_of(sampled(**change))


def test_oracle_names_what_is_missing_repeated_and_changed():
    rows = [0, 1, 1, 3, 4]
    repeated = {name: value if name in ("planes", "item_id") else value[rows] for name, value in sampled().items()}
    assert faults_of(repeated) == [
        "item 2: the transition of step 1 of episode 0 of environment 0 came out already",
        "the transition of step 0 of episode 1 of environment 0 never came out",
    ]
    changed = faults_of(sampled(), sampled(a_tm1=np.array([0, 1, 2, 1, 1])))
    assert len(changed) == 1 and changed[0].startswith("item 4 was Item(")


# The path, on scripts.

outcomes = st.builds(
    Outcome,
    reward=st.sampled_from([0.0, 1.0, -1.0, 3.0, -2.5]),
    terminated=st.sampled_from([False, False, False, False, True]),
    truncated=st.sampled_from([False, False, False, False, True]),
    stands_still=st.sampled_from([False, False, False, True]),
)


@st.composite
def paths(draw):
    """Everything that decides a run of the path, but for the autoreset mode."""
    num_actors = draw(st.sampled_from([1, 2]))
    num_scripts = num_actors * draw(st.sampled_from([1, 2]))
    chunk_transitions = draw(st.integers(1, 7))
    return {
        "scripts": [draw(st.lists(outcomes, min_size=1, max_size=12)) for _ in range(num_scripts)],
        "num_actors": num_actors,
        "frame_stack": draw(st.sampled_from([1, 4, 2])),
        "pixels": draw(st.sampled_from([(6, 5), None])),
        "n_step": draw(st.sampled_from([1, 3, 5])),
        "reward_clip": draw(st.sampled_from([None, 2.0])),
        "terminal_reward": draw(st.sampled_from([None, -5.0])),
        "chunk_transitions": chunk_transitions,
        "chunk_bytes": draw(st.sampled_from([90_000, 40, 200])),
        "capacity": draw(st.integers(chunk_transitions + 5, 30)),
        "priority_exponent": draw(st.sampled_from([1.0, 0.6, 0.0])),
        "send_compressed": draw(st.booleans()),
        "turns": draw(st.lists(st.integers(0, 1), max_size=5)),
        "seed": draw(st.integers(0, 100)),
    }


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_every_script_comes_through_the_path(play_path, mode):
    num_sampled, num_evicted, ends, lengths = [], [], set(), set()

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(path=paths())
    def holds(path):
        report, logs = play_path(**path, mode=mode, num_steps=60)
        assert report.faults == []
        num_sampled.append(report.num_transitions)
        num_evicted.append(report.stats.num_evicted)
        for log in logs:
            resets = [i for i, call in enumerate(log) if call.action is None]
            ends.update((call.terminated, call.truncated) for call in log)
            lengths.update(end - start - 1 for start, end in itertools.pairwise(resets))

    holds()
    # The scripts were not empty ones: every kind of end, episodes shorter than n and the stack, the ring gone round.
    assert ends == {(False, False), (True, False), (False, True), (True, True)}
    assert lengths >= {1, 2, 3, 4, 5} and max(lengths) > 5
    assert sum(num_evicted) > 300 and sum(num_sampled) > 1_000


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_eviction_by_memory_comes_through_the_path(play_path, mode):
    """Planes of noise fill the smallest budget long before the count does."""
    rng = np.random.default_rng(3)
    scripts = [[Outcome(float(rng.integers(5)), rng.random() < 0.1, rng.random() < 0.1) for _ in range(23)] for _ in range(2)]
    report, _ = play_path(scripts, mode=mode, num_actors=2, pixels=(84, 84), num_steps=240, memory=5 << 18, capacity=400)
    assert report.faults == []
    assert report.stats.num_evicted > 50 and report.stats.num_inserted < 400  # So it was not the count.
    assert report.num_transitions == report.stats.num_inserted


class ScriptedAtari(VectorEnv):
    """In the place of ale-py's vector env: the outcomes of its scripts, where `stands_still` here makes a life of the end."""

    scripts: list[list[Outcome]] = []
    logs: list[list[RawStep]] = []

    def __init__(self, game, num_envs, **settings):
        assert settings["autoreset_mode"] is AutoresetMode.NEXT_STEP and settings["stack_num"] == 1
        assert settings["life_loss_info"] and not settings["episodic_life"] and not settings["reward_clipping"]
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.single_observation_space = gymnasium.spaces.Box(0, 255, (1, 84, 84), np.uint8)
        self.single_action_space = gymnasium.spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        self._calls, self._taken = [0] * self.num_envs, [0] * self.num_envs
        self._frames, self._over = np.full(self.num_envs, 2), [False] * self.num_envs
        observations = np.stack([self._observe(i) for i in range(self.num_envs)])
        for log, observation in zip(self.logs, observations, strict=True):
            log.append(RawStep(observation[0].copy(), None))
        return observations, {"episode_frame_number": self._frames.copy()}

    def step(self, actions):
        results = [self._step(i, int(action)) for i, action in enumerate(actions)]
        observations, rewards, terminated, truncated = (np.array(column) for column in zip(*results, strict=True))
        return observations, rewards, terminated, truncated, {"episode_frame_number": self._frames.copy()}

    def _step(self, row, action):
        observation = self._observe(row)
        if self._over[row]:
            self._over[row], self._frames[row] = False, 2
            self.logs[row].append(RawStep(observation[0].copy(), None))
            return observation, np.float32(0), False, False
        outcome = self.scripts[row][self._taken[row] % len(self.scripts[row])]
        self._taken[row] += 1
        self._frames[row] += 4
        is_life = outcome.stands_still and outcome.terminated and not outcome.truncated
        self._over[row] = (outcome.terminated or outcome.truncated) and not is_life
        step = RawStep(observation[0].copy(), action, outcome.reward, outcome.terminated, outcome.truncated)
        self.logs[row].append(step)
        return observation, np.float32(outcome.reward), outcome.terminated, outcome.truncated

    def _observe(self, row):
        self._calls[row] += 1
        observation = np.zeros((1, 84, 84), np.uint8)
        observation[0, 0, :3] = row + 1, self._calls[row] % 256, self._calls[row] // 256
        return observation


def atari_settings(n_step):
    return ActorsConfig(num_envs=2, n_step=n_step, reward_clip=1.0, chunk_transitions=6, exploration=EXPLORE)


@pytest.mark.parametrize("n_step", [1, 3, 5])
def test_lost_lives_come_through_the_path(monkeypatch, n_step):
    """The fake keeps the truth, and the recorder around it must write the same."""
    rng = np.random.default_rng(n_step)
    scripts = [[Outcome(rng.normal(), *(rng.random(3) < (0.3, 0.06, 0.7)).tolist()) for _ in range(31)] for _ in range(2)]
    monkeypatch.setattr(ScriptedAtari, "scripts", scripts)
    monkeypatch.setattr(ScriptedAtari, "logs", [[], []])
    monkeypatch.setattr(environments, "AtariVectorEnv", ScriptedAtari)
    recorder = Recorder()
    config = EnvConfig(game="breakout", frame_stack=4, life_loss_terminates=True)
    environment = AtariEnvironment(config, 2, wrap=recorder.attach)
    report = check_path([environment], ScriptedAtari.logs, actors=atari_settings(n_step), num_steps=120, capacity=40)
    assert report.faults == [] and report.stats.num_evicted > 100
    for truth, recorded in zip(ScriptedAtari.logs, recorder.logs, strict=True):
        assert len(truth) == len(recorded)
        for one, other in zip(truth, recorded, strict=True):
            np.testing.assert_array_equal(one.observation, other.observation[0])
            assert (one.action, one.terminated, one.truncated) == (other.action, other.terminated, other.truncated)
            assert one.reward == pytest.approx(other.reward, rel=1e-6)
        lives = [one.terminated and other.action is not None for one, other in itertools.pairwise(truth)]
        assert sum(lives) >= 5 and sum(step.action is None for step in truth) >= 5


def test_a_real_game_comes_through_the_path():
    recorder = Recorder()
    config = EnvConfig(game="breakout", frame_stack=4, life_loss_terminates=True)
    environment = make_environment(config, 2, wrap=recorder.attach)
    report = check_path([environment], recorder.logs, actors=atari_settings(3), num_steps=260, capacity=120)
    assert report.faults == [] and report.stats.num_evicted > 200
    for log in recorder.logs:
        assert sum(step.action is None for step in log) >= 2
        assert sum(step.terminated for step in log) >= 5


class CountingVector(VectorEnv):
    """Two counters that end at 4 and begin again in the same step, as vector entry points may do."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    num_envs = 2
    single_observation_space = gymnasium.spaces.Box(0, np.inf, (2,), np.float32)
    single_action_space = gymnasium.spaces.Discrete(2, start=3)

    def reset(self, *, seed=None, options=None):
        self._count, self._episode = np.zeros(2), np.array([1.0, 1001.0])
        return self._observe(), {}

    def step(self, actions):
        self._count += 1 + (actions == 4)
        terminated = self._count >= 4
        final = [row.copy() if over else None for row, over in zip(self._observe(), terminated, strict=True)]
        self._episode += terminated
        self._count[terminated] = 0
        return self._observe(), actions - 3.0, terminated, np.zeros(2, bool), {"final_obs": np.array(final, object)}

    def _observe(self):
        return np.stack([self._count, self._episode], axis=1).astype(np.float32)


def test_a_vector_entry_point_comes_through_the_path():
    recorder = Recorder()
    environment = GymnasiumEnvironment(recorder.attach(CountingVector()), 2)
    actors = ActorsConfig(num_envs=2, n_step=3, chunk_transitions=4, exploration=EXPLORE)
    report = check_path([environment], recorder.logs, actors=actors, num_steps=100, capacity=50)
    assert report.faults == [] and report.num_transitions > 150


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_recorders_around_a_vector_and_below_it_write_the_same(mode):
    rng = np.random.default_rng(7)
    script = [Outcome(float(rng.integers(5)), *(rng.random(2) < 0.2).tolist()) for _ in range(29)]
    vector = SyncVectorEnv([lambda i=i: ScriptedEnv(script, number=i) for i in range(3)], copy=False, autoreset_mode=mode)
    below, around = Recorder(), Recorder()
    environment = GymnasiumEnvironment(around.attach(VectorWrapper(below.attach(vector))), 1)
    environment.reset(0)
    for _ in range(60):
        environment.step(rng.integers(3, size=3))
    for one, other in zip(below.logs, around.logs, strict=True):
        assert len(one) == len(other) >= 60
        for step, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(step.observation, same.observation)
            assert replace(step, observation=None) == replace(same, observation=None)
