"""N-step transitions: a table of episodes, and random ones against plain loops."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import numpy as np
import pytest

from actors.n_step import NStepBuilder
from common.errors import NonFiniteError

T, C, TC, RESET = "terminated", "truncated", "terminated truncated", "reset"


class Row(NamedTuple):
    """One step of one environment: the row of a reset is no transition."""

    reward: float
    end: str = ""


class Out(NamedTuple):
    s_tm1: int
    s_t: int
    r_t: float
    discount_t: float


class Case(NamedTuple):
    name: str
    rows: list[Row]
    expected: list[Out]
    settings: dict = {}


def build(num_envs=1, n_step=3, discount=0.9, reward_clip=None, terminal_reward=None):
    return NStepBuilder(
        num_envs=num_envs, n_step=n_step, discount=discount, reward_clip=reward_clip, terminal_reward=terminal_reward
    )


def feed(builder, time, rows):
    """Adds one row for each environment; observations and actions are numbered so that they name themselves."""
    num_envs = len(rows)
    source = 1000 * np.arange(num_envs) + time
    return builder.add(
        source=source,
        a_tm1=7 * source,
        extra=source + 0.5,
        reward=np.array([row.reward for row in rows], float),
        terminated=np.array(["terminated" in row.end for row in rows]),
        truncated=np.array(["truncated" in row.end for row in rows]),
        destination=source + 1,
        is_transition=np.array([row.end != RESET for row in rows]),
    )


def outs(transitions, env):
    """The transitions of one environment, as plain values; what came with the source step must still name it."""
    t = transitions
    assert (t.a_tm1 == 7 * t.source).all() and (t.extra == t.source + 0.5).all() and (t.env == t.source // 1000).all()
    mine = np.flatnonzero(t.env == env)
    return [Out(int(t.source[i]) % 1000, int(t.destination[i]) % 1000, float(t.r_t[i]), float(t.discount_t[i])) for i in mine]


def assert_same(got, expected):
    assert [(o.s_tm1, o.s_t) for o in got] == [(o.s_tm1, o.s_t) for o in expected]
    for mine, wanted in zip(got, expected, strict=True):
        assert abs(mine.r_t - wanted.r_t) < 1e-12
        assert abs(mine.discount_t - wanted.discount_t) < 1e-12


CASES = [
    Case("shorter than n, unfinished: nothing", [Row(1), Row(2)], []),
    Case("shorter than n, terminated", [Row(1), Row(2, T)], [Out(0, 2, 1 + 0.9 * 2, 0), Out(1, 2, 2, 0)]),
    Case(
        "exactly n, terminated",
        [Row(1), Row(2), Row(4, T)],
        [Out(0, 3, 1 + 0.9 * 2 + 0.81 * 4, 0), Out(1, 3, 2 + 0.9 * 4, 0), Out(2, 3, 4, 0)],
    ),
    Case("exactly n, running", [Row(1), Row(2), Row(4)], [Out(0, 3, 1 + 0.9 * 2 + 0.81 * 4, 0.9**3)]),
    Case(
        "longer than n, terminated: the first one is not terminal",
        [Row(1), Row(2), Row(4), Row(8, T)],
        [
            Out(0, 3, 1 + 0.9 * 2 + 0.81 * 4, 0.9**3),
            Out(1, 4, 2 + 0.9 * 4 + 0.81 * 8, 0),
            Out(2, 4, 4 + 0.9 * 8, 0),
            Out(3, 4, 8, 0),
        ],
    ),
    Case("shorter than n, truncated", [Row(1), Row(2, C)], [Out(0, 2, 1 + 0.9 * 2, 0.9**2), Out(1, 2, 2, 0.9)]),
    Case(
        "longer than n, truncated: short tails bootstrap with their own length",
        [Row(1), Row(2), Row(4), Row(8, C)],
        [
            Out(0, 3, 1 + 0.9 * 2 + 0.81 * 4, 0.9**3),
            Out(1, 4, 2 + 0.9 * 4 + 0.81 * 8, 0.9**3),
            Out(2, 4, 4 + 0.9 * 8, 0.9**2),
            Out(3, 4, 8, 0.9),
        ],
    ),
    Case("terminated and truncated at once: terminated", [Row(1, TC)], [Out(0, 1, 1, 0)]),
    Case(
        "two episodes in a row, the reset is a row of its own",
        [Row(1), Row(2, T), Row(99, RESET), Row(4), Row(8, C), Row(99, RESET)],
        [Out(0, 2, 1 + 0.9 * 2, 0), Out(1, 2, 2, 0), Out(3, 5, 4 + 0.9 * 8, 0.9**2), Out(4, 5, 8, 0.9)],
    ),
    Case("episodes of one step", [Row(1, T), Row(99, RESET), Row(2, C)], [Out(0, 1, 1, 0), Out(2, 3, 2, 0.9)]),
    Case("a reset row in the middle of nothing", [Row(99, RESET), Row(1, T)], [Out(1, 2, 1, 0)]),
    Case(
        "life lost without reset: the next step is a real one",
        [Row(1), Row(2, T), Row(4), Row(8), Row(16), Row(32)],
        [
            Out(0, 2, 1 + 0.9 * 2, 0),
            Out(1, 2, 2, 0),
            Out(2, 5, 4 + 0.9 * 8 + 0.81 * 16, 0.9**3),
            Out(3, 6, 8 + 0.9 * 16 + 0.81 * 32, 0.9**3),
        ],
    ),
    Case(
        "reward beyond the clip: each is clipped, not their sum",
        [Row(5), Row(-7), Row(0.5, T)],
        [Out(0, 3, 1 - 0.9 + 0.81 * 0.5, 0), Out(1, 3, -1 + 0.9 * 0.5, 0), Out(2, 3, 0.5, 0)],
        {"reward_clip": 1.0},
    ),
    Case("no clip: a reward goes through", [Row(500, T)], [Out(0, 1, 500, 0)]),
    Case(
        "terminal reward: replaces, is not clipped, only where terminated",
        [Row(5), Row(6, T), Row(99, RESET), Row(7, C)],
        [Out(0, 2, 1 + 0.9 * -10, 0), Out(1, 2, -10, 0), Out(3, 4, 1, 0.9)],
        {"reward_clip": 1.0, "terminal_reward": -10.0},
    ),
    Case("terminal reward of zero is not off", [Row(6, T)], [Out(0, 1, 0, 0)], {"terminal_reward": 0.0}),
    Case("n = 1", [Row(1), Row(2), Row(4, T)], [Out(0, 1, 1, 0.9), Out(1, 2, 2, 0.9), Out(2, 3, 4, 0)], {"n_step": 1}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_n_step_table_of_episodes(case):
    """Kills: discount to the power n instead of m, tails dropped, a window across a reset or a lost life, a truncation that
    does not bootstrap, a clip of the sum, a reset row taken for a step, reversed exponents."""
    builder = build(**case.settings)
    got = [out for time, row in enumerate(case.rows) for out in outs(feed(builder, time, [row]), 0)]
    assert_same(got, case.expected)


def test_n_step_environments_end_apart():
    """Kills: one environment's end flushing or clearing another's window."""
    builder = build(num_envs=3)
    streams = [
        [Row(1), Row(2, T), Row(99, RESET), Row(4)],
        [Row(10), Row(20), Row(40), Row(80)],
        [Row(100), Row(200), Row(400, C), Row(99, RESET)],
    ]
    per_time = [feed(builder, time, [stream[time] for stream in streams]) for time in range(4)]
    assert [t.env.tolist() for t in per_time] == [[], [0, 0], [1, 2, 2, 2], [1]]
    got = [[out for t in per_time for out in outs(t, env)] for env in range(3)]
    assert_same(got[0], [Out(0, 2, 1 + 0.9 * 2, 0), Out(1, 2, 2, 0)])
    assert_same(got[1], [Out(0, 3, 10 + 0.9 * 20 + 0.81 * 40, 0.9**3), Out(1, 4, 20 + 0.9 * 40 + 0.81 * 80, 0.9**3)])
    assert_same(
        got[2],
        [Out(0, 3, 100 + 0.9 * 200 + 0.81 * 400, 0.9**3), Out(1, 3, 200 + 0.9 * 400, 0.81), Out(2, 3, 400, 0.9)],
    )


def random_stream(rng, length):
    """Rows of episodes of random length; after an end comes a reset row or, as after a lost life, none."""
    rows = []
    while len(rows) < length:
        rows += [Row(float(rng.integers(-5, 6))) for _ in range(rng.integers(0, 12))]
        rows.append(Row(float(rng.integers(-5, 6)), [T, C, TC][rng.integers(3)]))
        if rng.random() < 0.7:
            rows.append(Row(float("nan"), RESET))
    return rows[:length]


def by_definition(stream, *, n_step, discount, reward_clip, terminal_reward):
    """Every transition of a stream as {time of the row that completed it: [Out]}: forward from each source step."""
    result = {}
    for start, first in enumerate(stream):
        if first.end == RESET:
            continue
        r_t, num_taken, row = 0.0, 0, first
        for row in stream[start : start + n_step]:
            reward = row.reward if reward_clip is None else sorted([-reward_clip, row.reward, reward_clip])[1]
            if terminal_reward is not None and "terminated" in row.end:
                reward = terminal_reward
            r_t += discount**num_taken * reward
            num_taken += 1
            if row.end:
                break
        if num_taken < n_step and not row.end:
            continue  # The stream stopped before it was complete.
        discount_t = 0.0 if "terminated" in row.end else discount**num_taken
        end = start + num_taken
        result.setdefault(end - 1, []).append(Out(start, end, r_t, discount_t))
    return result


@pytest.mark.parametrize("n_step", [1, 3, 5, 7])
@pytest.mark.parametrize("seed", range(8))
def test_n_step_agrees_with_definition(n_step, seed):
    """Also when each transition comes out: at the step that completes it, in the order of source steps."""
    rng = np.random.default_rng([seed, n_step])
    num_envs = int(rng.integers(1, 5))
    settings = {
        "n_step": n_step,
        "discount": float(rng.choice([0.5, 0.9, 0.99, 1.0])),
        "reward_clip": [None, 1.0, 2.5][rng.integers(3)],
        "terminal_reward": [None, -4.0][rng.integers(2)],
    }
    streams = [random_stream(rng, 150) for _ in range(num_envs)]
    expected = [by_definition(stream, **settings) for stream in streams]
    builder = build(num_envs=num_envs, **settings)
    num_compared = 0
    for time in range(150):
        transitions = feed(builder, time, [stream[time] for stream in streams])
        assert transitions.env.tolist() == sorted(transitions.env.tolist())
        for env in range(num_envs):
            mine = expected[env].get(time, [])
            assert_same(outs(transitions, env), mine)
            num_compared += len(mine)
    assert num_compared > 100 * num_envs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_n_step_reward_not_finite_raises_and_names_the_environment(bad):
    builder = build(num_envs=2, reward_clip=1.0)  # A clip would hide an infinity.
    with pytest.raises(NonFiniteError, match=r"environment 1 .*(nan|inf)"):
        feed(builder, 0, [Row(1), Row(bad)])


def test_n_step_reward_not_finite_in_a_reset_row_is_ignored():
    builder = build(num_envs=2, n_step=1)
    transitions = feed(builder, 0, [Row(1), Row(float("nan"), RESET)])
    assert transitions.env.tolist() == [0]
    assert outs(feed(builder, 1, [Row(1), Row(2)]), 1) == [Out(1, 2, 2.0, 0.9)]


@pytest.mark.parametrize("seed", range(10))
def test_a_run_of_steps_at_once_is_to_the_bit_what_they_are_one_by_one(seed):
    """Single steps with ends and resets between the runs, so that windows are part full when a run begins."""
    rng = np.random.default_rng(seed)
    num_envs, n_step = int(rng.integers(1, 5)), int(rng.integers(1, 6))
    settings = {"num_envs": num_envs, "n_step": n_step, "reward_clip": 1.5, "terminal_reward": -2.0}
    at_once, one_by_one = build(**settings), build(**settings)
    no, yes = np.zeros(num_envs, bool), np.ones(num_envs, bool)
    number = 0
    for _ in range(12):
        num_steps = int(rng.integers(1, 9))
        source = number + np.arange(num_steps)[:, None] + 100 * np.arange(num_envs)
        number += num_steps
        run = {"source": source, "a_tm1": rng.integers(9, size=source.shape), "destination": source + 1}
        run |= {"extra": rng.normal(size=source.shape), "reward": 2 * rng.normal(size=source.shape)}
        found = at_once.add_run(**run)
        steps = [{name: array[i] for name, array in run.items()} for i in range(num_steps)]
        wanted = [one_by_one.add(**step, terminated=no, truncated=no, is_transition=yes) for step in steps]
        for field in fields(found):
            joined = np.concatenate([getattr(transitions, field.name) for transitions in wanted])
            assert getattr(found, field.name).dtype == joined.dtype
            np.testing.assert_array_equal(getattr(found, field.name), joined)
        flags = {name: rng.random(num_envs) < 0.3 for name in ("terminated", "truncated")}
        flags["is_transition"] = rng.random(num_envs) < 0.8
        for builder in (at_once, one_by_one):
            builder.add(**steps[-1], **flags)
        for name, array in at_once.state().items():
            np.testing.assert_array_equal(array, one_by_one.state()[name])
