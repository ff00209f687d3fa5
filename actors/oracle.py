"""The oracle of the whole path: the n-step transitions that training must see, from the raw steps and by plain loops.

It shares no code with the path that it judges (n-step builder, chunks, replay) and works on lists of what the environments
really gave. `actors/recording.py` writes those lists, `deploy/path_check.py` samples what replay made of them.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.config import EnvSpec
from common.messages import Array

Stack = tuple[int, ...]  # Of plane numbers, oldest first.
_ZERO = 0  # Number of the plane of zeros.
_MAX_SENTENCES = 5


@dataclass(frozen=True, slots=True)
class RawStep:
    """One call of one environment: a step, or the reset that began an episode."""

    observation: Array
    """Its own copy of what the environment returned."""
    action: int | None
    """The action really taken, from 0; None for a reset, whose other fields say nothing."""
    reward: float = 0.0
    terminated: bool = False
    """The step led to a terminal state. Where no reset follows, a life was lost and the game goes on."""
    truncated: bool = False


RawLog = list[RawStep]
"""All calls of one environment, oldest first. It begins with a reset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What training makes of raw steps."""

    n_step: int
    discount: float
    reward_clip: float | None
    terminal_reward: float | None
    frame_stack: int


@dataclass(frozen=True, slots=True)
class Item:
    """One transition as it came out of replay."""

    s_tm1: Stack
    a_tm1: int
    r_t: float
    discount_t: float
    s_t: Stack


@dataclass(frozen=True, slots=True)
class Expected:
    """One transition as it must be, and where it begins."""

    s_tm1: Stack
    a_tm1: int
    r_t: float
    discount_t: float
    s_t: Stack
    environment: int
    episode: int
    step: int
    sum_of_sizes: float
    """Sum of the absolute terms of r_t: what its rounding is measured against."""

    def place(self) -> str:
        return f"step {self.step} of episode {self.episode} of environment {self.environment}"


class PlaneNumbers:
    """Gives equal planes equal numbers, so that stacks can be compared and named; the plane of zeros is 0."""

    def __init__(self, spec: EnvSpec) -> None:
        self._shape, self._dtype = spec.plane_shape, np.dtype(spec.plane_dtype)
        self._numbers: dict[bytes, int] = {}
        assert self.of(np.zeros(self._shape)) == _ZERO

    def of(self, observation: Array) -> int:
        plane = np.asarray(observation).astype(self._dtype).reshape(self._shape)
        digest = hashlib.blake2b(plane.tobytes(), digest_size=16).digest()
        return self._numbers.setdefault(digest, len(self._numbers))


def expected_transitions(log: RawLog, numbers: Sequence[int], rules: Rules, environment: int) -> list[Expected]:
    """Returns every transition that is complete, in the order of their source steps.

    Args:
      log: the environment's calls.
      numbers: the plane number of each call's observation.
      rules: n, discount and so on.
      environment: index by which faults name it.
    """

    def stack_at(position: int) -> Stack:
        stack: list[int] = []
        while len(stack) < rules.frame_stack:
            stack.insert(0, numbers[position])
            if log[position].action is None:
                break
            position -= 1
        while len(stack) < rules.frame_stack:
            stack.insert(0, _ZERO)
        return tuple(stack)

    transitions = []
    episode, step = -1, 0
    for source in range(len(log)):
        if log[source].action is None:
            episode, step = episode + 1, 0
        else:
            step += 1
        r_t, sum_of_sizes, num_taken, position = 0.0, 0.0, 0, source
        is_complete = False
        while not is_complete and position + 1 < len(log) and log[position + 1].action is not None:
            position += 1
            taken = log[position]
            reward = taken.reward
            if rules.reward_clip is not None:
                reward = min(max(reward, -rules.reward_clip), rules.reward_clip)
            if rules.terminal_reward is not None and taken.terminated:
                reward = rules.terminal_reward
            r_t += rules.discount**num_taken * reward
            sum_of_sizes += abs(rules.discount**num_taken * reward)
            num_taken += 1
            is_complete = num_taken == rules.n_step or taken.terminated or taken.truncated
        if not is_complete:
            continue
        action = log[source + 1].action
        assert action is not None
        discount_t = 0.0 if log[position].terminated else rules.discount**num_taken
        s_tm1, s_t = stack_at(source), stack_at(position)
        transitions.append(Expected(s_tm1, action, r_t, discount_t, s_t, environment, episode, step, sum_of_sizes))
    return transitions


class TransitionOracle:
    """Takes what was sampled and says in which way it is not what the raw steps give.

    Call `see` with every batch, and `faults` at the end. Where several transitions are equal in content they are told apart
    by their number only; the others also by their order.
    """

    def __init__(self, logs: Sequence[RawLog], spec: EnvSpec, rules: Rules) -> None:
        assert rules.frame_stack == spec.frame_stack
        self._logs, self._rules = logs, rules
        self._planes = PlaneNumbers(spec)
        self._items: dict[int, Item] = {}
        self._changed: list[str] = []

    @property
    def num_seen(self) -> int:
        return len(self._items)

    def has_seen(self, item_id: int) -> bool:
        return item_id in self._items

    def see(
        self, *, item_id: Array, planes: Array, s_tm1: Array, a_tm1: Array, r_t: Array, discount_t: Array, s_t: Array
    ) -> None:
        """Takes a sampled batch.

        Args:
          item_id: i64[B].
          planes: [P, *plane_shape] decoded.
          s_tm1, s_t: int[B, K] references into `planes`.
          a_tm1, r_t, discount_t: [B].
        """
        numbers = [self._planes.of(plane) for plane in planes]
        for row in range(len(item_id)):
            item = Item(
                tuple(numbers[reference] for reference in s_tm1[row].tolist()),
                int(a_tm1[row]),
                float(r_t[row]),
                float(discount_t[row]),
                tuple(numbers[reference] for reference in s_t[row].tolist()),
            )
            before = self._items.setdefault(int(item_id[row]), item)
            if before != item:
                self._changed.append(f"item {int(item_id[row])} was {before} when it was drawn first, and later {item}")

    def expected(self) -> list[list[Expected]]:
        """Returns the transitions of each environment so far."""
        return [
            expected_transitions(log, [self._planes.of(step.observation) for step in log], self._rules, environment)
            for environment, log in enumerate(self._logs)
        ]

    def faults(self, num_unsent: int) -> list[str]:
        """Returns what is wrong, a sentence each; nothing where every item is right and none is missing.

        Args:
          num_unsent: newest transitions of each environment that may still wait in their actor.
        """
        expected = self.expected()
        must_come = [t for mine in expected for t in mine[: max(len(mine) - num_unsent, 0)]]
        may_come = [t for mine in expected for t in mine[max(len(mine) - num_unsent, 0) :]]
        open_by_content: dict[tuple[Stack, int, Stack], list[Expected]] = defaultdict(list)
        for transition in must_come + may_come:
            open_by_content[transition.s_tm1, transition.a_tm1, transition.s_t].append(transition)
        is_unique = {content for content, equals in open_by_content.items() if len(equals) == 1}

        wrong, disordered = [], []
        newest: dict[int, tuple[int, int]] = {}
        for item_id in sorted(self._items):
            item = self._items[item_id]
            content = item.s_tm1, item.a_tm1, item.s_t
            equals = open_by_content.get(content, [])
            found = next((transition for transition in equals if not _differing(item, transition)), None)
            if found is None:
                wrong.append(self._describe(item_id, item, expected))
                continue
            equals.remove(found)
            if content in is_unique:
                place = found.episode, found.step
                if newest.get(found.environment, (-1, -1)) > place:
                    disordered.append(f"item {item_id}, {found.place()}, came after a later one of that environment")
                newest[found.environment] = place
        still_open = {id(transition) for equals in open_by_content.values() for transition in equals}
        missing = [f"the transition of {t.place()} never came out" for t in must_come if id(t) in still_open]
        return [sentence for kind in (wrong, self._changed, disordered, missing) for sentence in _shortened(kind)]

    def _describe(self, item_id: int, item: Item, expected: list[list[Expected]]) -> str:
        """Says how the item differs from the expected transition that it is nearest to."""
        like = [t for mine in expected for t in mine if t.s_tm1[-1] == item.s_tm1[-1]]
        if not like:
            return f"item {item_id}: no transition begins at {self._named(item.s_tm1[-1:])}, where its s_tm1 ends"
        nearest = min(like, key=lambda t: len(_differing(item, t)))
        names = _differing(item, nearest)
        if not names:
            return f"item {item_id}: the transition of {nearest.place()} came out already"
        differences = [f"{n} is {self._named(getattr(item, n))}, not {self._named(getattr(nearest, n))}" for n in names]
        return f"item {item_id}, {nearest.place()}: {'; '.join(differences)}"

    def _named(self, value: Stack | float) -> str:
        """Names each plane of a stack by the place where it was first given, as environment.episode.step."""
        if not isinstance(value, tuple):
            return f"{value:g}"
        names = {_ZERO: "zeros"}
        for environment, log in enumerate(self._logs):
            episode, step = -1, 0
            for call in log:
                episode, step = (episode + 1, 0) if call.action is None else (episode, step + 1)
                names.setdefault(self._planes.of(call.observation), f"{environment}.{episode}.{step}")
        return f"[{', '.join(names.get(number, 'unknown') for number in value)}]"


def _differing(item: Item, wanted: Expected) -> list[str]:
    names = [name for name in ("s_tm1", "a_tm1", "s_t") if getattr(item, name) != getattr(wanted, name)]
    # r_t is a sum made in float64 and rounded to float32; discount_t is only rounded.
    if not math.isclose(item.r_t, wanted.r_t, rel_tol=1e-6, abs_tol=1e-12 * wanted.sum_of_sizes + 1e-40):
        names.append("r_t")
    if not math.isclose(item.discount_t, wanted.discount_t, rel_tol=1e-6):
        names.append("discount_t")
    return names


def _shortened(sentences: list[str]) -> list[str]:
    more = len(sentences) - _MAX_SENTENCES
    return sentences[:_MAX_SENTENCES] + ([f"... and {more} more such items"] if more > 0 else [])
