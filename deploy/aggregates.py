"""Aggregates of scores over runs and games, with bootstrap intervals: numbers in, numbers out.

The statistics are those of Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice", https://arxiv.org/abs/2108.13264,
and of its library rliable: percentile intervals of a bootstrap that resamples runs within each game. `Scores` holds one array a
game, f64[R, N]: R resamples (1 for the scores themselves) of that game's N runs. Games may have different numbers of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Scores = Sequence[Floats]
Statistic = Callable[[Scores], Floats]

NUM_RESAMPLES = 50_000  # As rliable.
_RESAMPLES_AT_ONCE = 2_000  # 57 games of 5 runs: 5 MB.
_CONFIDENCE = 0.95


def mean(scores: Scores) -> Floats:
    """Returns f64[R], the mean over games of the mean over runs."""
    result: Floats = _over_games(scores).mean(axis=0)
    return result


def median(scores: Scores) -> Floats:
    """Returns f64[R], the median over games of the mean over runs."""
    result: Floats = np.median(_over_games(scores), axis=0)
    return result


def interquartile_mean(scores: Scores) -> Floats:
    """Returns f64[R], the mean of the middle half of all runs of all games: scipy's trim_mean(scores, 0.25).

    A quarter is cut at both ends, rounded down: of fewer than four scores nothing is.
    """
    pooled = np.sort(np.concatenate(scores, axis=1), axis=1)
    num_cut = pooled.shape[1] // 4
    result: Floats = pooled[:, num_cut : pooled.shape[1] - num_cut].mean(axis=1)
    return result


def optimality_gap(scores: Scores) -> Floats:
    """Returns f64[R], by how much runs fall short of 1 (a person) on average; what is above 1 counts as 1. Less is better."""
    result: Floats = 1.0 - np.minimum(np.concatenate(scores, axis=1), 1.0).mean(axis=1)
    return result


STATISTICS: dict[str, Statistic] = {
    "IQM": interquartile_mean,
    "median": median,
    "mean": mean,
    "optimality gap": optimality_gap,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A statistic and its 95 % interval; None where no game has two runs, so that nothing can be said of their spread."""

    value: float
    low: float | None
    high: float | None


def estimate(
    scores: Sequence[Sequence[float]], statistic: Statistic, rng: np.random.Generator, *, num_resamples: int = NUM_RESAMPLES
) -> Estimate:
    """Returns `statistic` of scores[game][run], with the interval of a stratified bootstrap."""
    games = [np.asarray(game, np.float64) for game in scores]
    value = float(statistic([game[None, :] for game in games])[0])
    if all(len(game) < 2 for game in games):
        return Estimate(value=value, low=None, high=None)
    resampled = np.concatenate(
        [
            statistic([_resample(game, min(_RESAMPLES_AT_ONCE, num_resamples - begin), rng) for game in games])
            for begin in range(0, num_resamples, _RESAMPLES_AT_ONCE)
        ]
    )
    low, high = _interval(resampled)
    return Estimate(value=value, low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """The mean of several runs' curves, f64[P] each; the interval is None for one run."""

    x: Floats
    mean: Floats
    low: Floats | None
    high: Floats | None


def mean_curve(
    curves: Sequence[tuple[Floats, Floats]], rng: np.random.Generator, *, num_points: int = 50, num_resamples: int = 2_000
) -> Curve | None:
    """Returns the mean of the runs' (x, y), x rising, with a bootstrap interval over the runs at each point.

    Curves are interpolated linearly at evenly spaced points of the range that all of them cover, and never prolonged; None
    where there is no such range. One run's curve is itself.
    """
    if len(curves) == 1:
        x, y = curves[0]
        return Curve(x=x, mean=y, low=None, high=None) if len(x) else None
    begin = max((x[0] for x, _ in curves if len(x)), default=0.0)
    end = min((x[-1] if len(x) else begin for x, _ in curves), default=0.0)
    if end <= begin:
        return None
    at = np.linspace(begin, end, num_points)
    values = np.stack([np.interp(at, x, y) for x, y in curves])  # [N, P]
    drawn = rng.integers(len(curves), size=(num_resamples, len(curves)))
    low, high = _interval(values[drawn].mean(axis=1))
    return Curve(x=at, mean=values.mean(axis=0), low=low, high=high)


def _over_games(scores: Scores) -> Floats:
    """Returns f64[G, R], the mean over the runs of each game."""
    return np.stack([game.mean(axis=1) for game in scores])


def _resample(game: Floats, num_resamples: int, rng: np.random.Generator) -> Floats:
    return game[rng.integers(len(game), size=(num_resamples, len(game)))]


def _interval(resampled: Floats) -> Floats:
    """Returns f64[2, ...], the percentiles between which 95 % of the resamples (axis 0) lie."""
    tail = 50 * (1 - _CONFIDENCE)
    result: Floats = np.percentile(resampled, [tail, 100 - tail], axis=0)
    return result
