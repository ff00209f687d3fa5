"""`qfleet check-env`: one tiny faulty environment for each fault, and the sentence that names it."""

from __future__ import annotations

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

from actors import n_step
from actors.environments import probe
from common.config import EnvConfig
from common.errors import UserError
from deploy import cli

FLAGS = ["--steps", "150"]


class Walk(gymnasium.Env):
    """A right one: a random walk that ends at 4, cut after 12 steps."""

    metadata = {"render_modes": []}
    observation_space = gymnasium.spaces.Box(-20, 20, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = int(self.np_random.integers(-2, 3)), 0
        return self.observe(), {}

    def step(self, action):
        self.place += 1 if action else -1
        self.time += 1
        return self.observe(), self.reward(), self.place >= 4, self.time >= 12, {}

    def observe(self):
        return np.array([self.place, self.time], np.float32)

    def reward(self):
        return float(self.place)


class ListObservation(Walk):
    def observe(self):
        return [self.place, self.time]


class WrongShape(Walk):
    def observe(self):
        return np.array([self.place], np.float32)


class WrongDtype(Walk):
    def observe(self):
        return np.array([self.place, self.time], np.float64)


class OutOfBounds(Walk):
    observation_space = gymnasium.spaces.Box(-20, 3, (2,), np.float32)


class NanObservation(Walk):
    def observe(self):
        return np.array([self.place, np.nan if self.time == 3 else 0], np.float32)


class Reuses(Walk):
    def observe(self):
        if self.time == 0:
            self.buffer = np.zeros(2, np.float32)
        self.buffer[:] = self.place, self.time
        return self.buffer


class ReusesOneForAll(Walk):
    buffer = np.zeros(2, np.float32)
    observe = Reuses.observe

    def reset(self, *, seed=None, options=None):
        kept = self.buffer
        observation, info = super().reset(seed=seed)
        self.buffer = kept
        self.buffer[:] = observation
        return self.buffer, info


class InfiniteReward(Walk):
    def reward(self):
        return -np.inf


class NanReward(Walk):
    def reward(self):
        return np.float32("nan")


class ArrayReward(Walk):
    def reward(self):
        return np.array([1.0])


class NoReward(Walk):
    def reward(self):
        return None


class TextReward(Walk):
    def reward(self):
        return "1.0"


class IntegerEnds(Walk):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, int(terminated), True if truncated else None, info


class GlobalReset(Walk):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.time = float(np.random.default_rng().uniform(-7, 7)), 0  # Not past 20 in 12 steps.
        return self.observe(), {}


class GlobalStep(Walk):
    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, float(np.random.default_rng().random()), terminated, truncated, info


class DeclaredGlobalStep(GlobalStep):
    pass


class ResetsItself(Walk):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            observation, _ = self.reset()
        return observation, reward, terminated, truncated, info


class NeverEnds(Walk):
    def step(self, action):
        observation, reward, _, _, info = super().step(action)
        self.place, self.time = self.place % 4, self.time % 9
        return observation, reward, False, False, info


class OnlyObservationFromReset(Walk):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class OldReset(Walk):
    def reset(self):
        return super().reset()[0]


class NoInfo(Walk):
    def step(self, action):
        return *super().step(action)[:4], None


class OldStep(Walk):
    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class Raises(Walk):
    def step(self, action):
        return super().step(action) if self.time < 6 else 1 / 0


class RaisesWhenMade(Walk):
    def __init__(self):
        raise FileNotFoundError("level1.map")


class NoSpaces(gymnasium.Env):
    metadata = {"render_modes": []}


class NeedsTheLastReset(Walk):
    """The copies disturb one another: a fault that only playing several at once can show."""

    alive = []

    def reset(self, *, seed=None, options=None):
        self.alive.append(self)
        del self.alive[:-2]
        return super().reset(seed=seed)

    def observe(self):
        if len(self.alive) == 2 and self.alive[0] is not self.alive[1]:
            raise RuntimeError("two at once")
        return super().observe()


FAULTS = [
    (ListObservation, "reset() returned the observation as a list of 2: return a NumPy array of dtype float32"),
    (WrongShape, "reset() returned an observation of shape (1,), observation_space says (2,): make them agree"),
    (
        WrongDtype,
        "reset() returned an observation of dtype float64, observation_space says float32: return "
        "observation.astype(np.float32), or declare the space so",
    ),
    (OutOfBounds, "step() returned an observation with the value 4 at (0,), observation_space says -20 to 3: widen the space"),
    (NanObservation, "step() returned an observation that holds NaN or infinity"),
    (Reuses, "the observation that reset() returned was changed by the step() after it: return a copy (observation.copy())"),
    (ReusesOneForAll, "the observation that reset() returned was changed by the step() after it: return a copy"),
    (InfiniteReward, "step() returned the reward -inf: rewards must be finite, and training ends at the first that is not"),
    (NanReward, "step() returned the reward nan: rewards must be finite"),
    (ArrayReward, "step() returned the reward as an array of shape (1,): return float(reward)"),
    (NoReward, "step() returned the reward as None: return float(reward)"),
    (TextReward, "step() returned the reward as a str: return float(reward)"),
    (IntegerEnds, "step() returned terminated as an int: return bool(terminated)"),
    (IntegerEnds, "step() returned truncated as None: return bool(truncated)"),
    (
        GlobalReset,
        "reset(seed=0) began in two different states: call super().reset(seed=seed) at the start of reset, and draw ",
    ),
    (
        GlobalStep,
        "the same seed and the same actions gave another reward at step 1: draw from self.np_random only, or register ",
    ),
    (
        ResetsItself,
        "every episode ends with the first observation of one, and step() goes on after the end: it seems to reset by ",
    ),
    (
        OnlyObservationFromReset,
        "reset() returned an array of shape (2,), not (observation, info): return both, info may be an ",
    ),
    (OldReset, "keyword argument 'seed' (core.py"),
    (OldReset, "; declare it as reset(self, *, seed=None, options=None)"),
    (NoInfo, "step() returned info as None: return a dict, which may be empty"),
    (
        OldStep,
        "step() returned a tuple of 4, not (observation, reward, terminated, truncated, info); that was the API of the old",
    ),
    (Raises, "step(1) raised ZeroDivisionError: division by zero (test_check_env.py, line "),
    (Raises, ") at step 7 of episode 7"),
    (RaisesWhenMade, "making it raised FileNotFoundError: level1.map (test_check_env.py, line "),
    (NoSpaces, "it has no observation_space: set self.observation_space in __init__"),
    (NeedsTheLastReset, "playing 2 environments at once raised RuntimeError: two at once (test_check_env.py, line "),
]


@pytest.fixture
def check(monkeypatch, capsys):
    """Registers a class and checks it; returns (exit status, lines)."""
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    monkeypatch.setattr(gymnasium, "registry", gymnasium.envs.registration.registry)

    def run(cls, *flags, **spec):
        gymnasium.register(f"{cls.__name__}-v0", entry_point=cls, **spec)
        status = cli.main(["check-env", f"{cls.__name__}-v0", *FLAGS, *flags])
        out, err = capsys.readouterr()
        assert err == "" and "Traceback" not in out
        return status, out.splitlines()

    return run


@pytest.mark.parametrize(("cls", "sentence"), FAULTS, ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_a_fault_is_named_in_one_line(check, cls, sentence):
    status, lines = check(cls)
    assert status == 2
    faults = [line for line in lines if line.startswith("wrong: ")]
    assert lines[-1].startswith(f"{cls.__name__}-v0: {len(faults)} fault")
    assert any(sentence in line for line in faults), lines
    assert len(faults) == (2 if cls is IntegerEnds else 1)  # And nothing else is said of it.


def test_a_right_environment_passes_with_a_summary(check):
    status, lines = check(Walk)
    assert status == 0
    assert lines[0].startswith("Walk-v0: observations f32[2], 2 actions; played at random for ")
    assert lines[1].startswith("all right: ") and lines[1].endswith(
        "transitions (n = 3, stacks of 1) came out of replay as the environment gave them"
    )
    assert len(lines) == 2


def test_an_episode_without_end_is_a_warning(check):
    status, lines = check(NeverEnds)
    assert status == 0
    assert lines[0].startswith("warning: no episode ended within 150 steps: give max_episode_steps when you register it")
    assert "no episode ended, rewards" in lines[1]


class EndsByTimeLimit(NeverEnds):
    pass


def test_an_end_by_gymnasiums_time_limit_is_an_end(check):
    status, lines = check(EndsByTimeLimit, max_episode_steps=20)
    assert status == 0 and len(lines) == 2
    assert "episodes of 20 to 20 steps" in lines[0]


def test_declared_randomness_is_no_fault(check):
    status, lines = check(DeclaredGlobalStep, nondeterministic=True)
    assert status == 0
    assert not any("wrong" in line for line in lines)


class SharesInfo(Walk):
    info = {}

    def step(self, action):
        return *super().step(action)[:4], self.info


def test_what_gymnasiums_checker_adds_is_a_warning(check):
    status, lines = check(SharesInfo)
    assert status == 0
    assert lines[0].startswith("warning: Gymnasium's own checker says: AssertionError: The infos returned by")


class Continuous(Walk):
    action_space = gymnasium.spaces.Box(-1, 1, (1,))


class Structured(Walk):
    observation_space = gymnasium.spaces.Dict(place=gymnasium.spaces.Discrete(3))


@pytest.mark.parametrize(("cls", "sentence"), [(Continuous, "needs a Discrete one"), (Structured, "must be a Box")])
def test_unsupported_spaces_are_refused_as_training_refuses_them(check, capsys, cls, sentence):
    gymnasium.register(f"{cls.__name__}-v0", entry_point=cls)
    with pytest.raises(UserError) as refused:
        probe(EnvConfig(game=f"{cls.__name__}-v0"))
    assert sentence in str(refused.value)
    assert cli.main(["check-env", f"{cls.__name__}-v0"]) == 2
    assert capsys.readouterr().err == f"qfleet: {refused.value}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["check-env"], "needs an environment first"),
        (["check-env", "CartPol-v1"], "did you mean 'CartPole-v1'"),
        (["check-env", "pongg"], "did you mean 'pong'"),
        (["check-env", "ALE/Pong-v5"], "did you mean 'pong'"),
        (["check-env", "nowhere:Walk-v0"], "'nowhere'; put its directory on PYTHONPATH, or install it"),
        (["check-env", "CartPole-v1", "--steps", "5"], "--steps must be at least 100, got 5"),
        (["check-env", "CartPole-v1", "--n-step", "0"], "--n-step must be positive, got 0"),
        (["check-env", "CartPole-v1", "--stpes", "500"], "did you mean --steps"),
        (["chek-env", "CartPole-v1"], "did you mean 'check-env'"),
    ],
)
def test_a_mistake_is_one_line(words, expected, capsys):
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qfleet: ") and expected in line


def test_an_atari_game_is_checked_by_its_rom_name(capsys):
    assert cli.main(["check-env", "pong", "--steps", "100", "--num-envs", "1", "--n-step", "5"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("pong: observations u8[84, 84], 6 actions;") and "(n = 5, stacks of 4)" in second


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's that registers an environment when it is imported."""

    def write(name, tail=""):
        text = f"import gymnasium\ngymnasium.register('Mine-v0', entry_point='user_walk:Walk')\n{tail}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, "user_walk", sys.modules[__name__])
        return f"{name}:Mine-v0"

    yield write
    gymnasium.registry.pop("Mine-v0", None)


def test_an_environment_of_a_module_is_imported(user_module, capsys):
    """As gymnasium.make("module:Id-v0") does; training finds it in the same way."""
    game = user_module("my_environments")
    assert probe(EnvConfig(game=game)).num_actions == 2
    assert cli.main(["check-env", game, *FLAGS]) == 0
    assert capsys.readouterr().out.startswith("my_environments:Mine-v0: observations f32[2]")


def test_a_module_that_raises_is_named(user_module):
    with pytest.raises(
        UserError, match="importing 'my_broken_module' raised ZeroDivisionError: division by zero; mend that module"
    ):
        probe(EnvConfig(game=user_module("my_broken_module", tail="1 / 0\n")))


class TwoBuffers(Walk):
    """All copies write in turn into the same two arrays: one alone seems right, three overwrite one another."""

    buffers, turn = [np.zeros(2, np.float32), np.zeros(2, np.float32)], [0]

    def observe(self):
        self.turn[0] ^= 1
        self.buffers[self.turn[0]][:] = self.place, self.time
        return self.buffers[self.turn[0]]


def test_what_only_the_oracle_can_see_is_named(check):
    status, lines = check(TwoBuffers, "--num-envs", "3")
    assert status == 2
    assert any("s_t is [" in line or "no transition begins at" in line for line in lines), lines
    assert any("a scripted environment came through right: look for state that its copies share" in line for line in lines)


class Vector(VectorEnv):
    """A vector entry point that resets in the same step, and may forget to tell the last observations."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
    single_observation_space = gymnasium.spaces.Box(0, 20, (1,), np.float32)
    single_action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, num_envs, forgets=False):
        self.num_envs, self.forgets = num_envs, forgets

    def reset(self, *, seed=None, options=None):
        self.time = np.arange(self.num_envs, dtype=np.float32)
        return self.time[:, None].copy(), {}

    def step(self, actions):
        self.time += 1
        ended = self.time >= 9
        info = {} if self.forgets else {"final_obs": list(self.time[:, None].copy())}
        self.time[ended] = 0
        return self.time[:, None].copy(), np.ones(self.num_envs), ended, np.zeros(self.num_envs, bool), info


def test_a_vector_entry_point_is_checked_too(check, capsys):
    gymnasium.register("Vector-v0", vector_entry_point=Vector)
    assert cli.main(["check-env", "Vector-v0", *FLAGS]) == 0
    assert "f32[1], 2 actions; played at random for 300 steps" in capsys.readouterr().out
    gymnasium.register("Forgets-v0", vector_entry_point=Vector, kwargs={"forgets": True})
    assert cli.main(["check-env", "Forgets-v0", *FLAGS]) == 2
    assert "gives no info['final_obs']: give the last observations there" in capsys.readouterr().err


def test_a_path_that_alters_what_it_was_given_is_said_to_be_ours(check, monkeypatch):
    """Where a scripted environment comes out wrong too, the fault is not the user's."""
    add = n_step.NStepBuilder.add
    monkeypatch.setattr(n_step.NStepBuilder, "add", lambda self, **step: add(self, **step | {"a_tm1": step["a_tm1"] * 0}))
    status, lines = check(Walk)
    assert status == 2
    assert any("a_tm1 is 0, not 1" in line for line in lines)
    assert any("a scripted environment came out wrong too: this is a bug of qfleet" in line for line in lines)
