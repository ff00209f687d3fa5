"""Aggregates of scores: by hand, against scipy and rliable, and by the law that intervals must obey."""

import numpy as np
import pytest
from scipy import stats

from deploy import aggregates
from deploy.aggregates import STATISTICS, estimate, interquartile_mean, mean, mean_curve, median, optimality_gap

P_REJECT = 1e-6  # A correct interval fails once in a million seeds.


def of(statistic, scores):
    return statistic([np.array([game], np.float64) for game in scores])[0]


def test_interquartile_mean_is_of_the_middle_half_of_all_scores():
    """Kills the mean (16.5), the median of all (4), a trim of a tenth at each end (as the mean), and a trim within each game
    (5.5 and 3.5, so 4.5 only by chance: hence the unequal second case)."""
    assert of(interquartile_mean, [[100, 0, 3, 8], [1, 13, 2, 5]]) == (2 + 3 + 5 + 8) / 4
    assert of(mean, [[100, 0, 3, 8], [1, 13, 2, 5]]) == (27.75 + 5.25) / 2
    assert of(interquartile_mean, [[0, 1, 2, 3], [100, 101, 102, 103]]) == (2 + 3 + 100 + 101) / 4
    assert of(interquartile_mean, [[7, 1, 1]]) == 3  # A quarter of three is none.


def test_median_and_mean_are_of_games_and_the_median_is_not_the_mean():
    scores = [[0, 2], [2, 2], [0, 18]]  # Means of games: 1, 2 and 9. The median of all six is 2 as well, the mean of it is not.
    assert (of(median, scores), of(mean, scores)) == (2, 4)
    assert of(median, [[0, 10], [0, 0], [6, 6]]) == 5  # Of all six it is 3.


def test_optimality_gap_cuts_each_run_at_one_and_not_at_zero():
    """Kills: no cut (1 - 0.8125), a cut of the mean of a game (0.25), a cut at zero (0.4375)."""
    assert of(optimality_gap, [[-0.5, 1.5], [0.25, 2.0]]) == 1 - (-0.5 + 1 + 0.25 + 1) / 4


@pytest.mark.parametrize("seed", range(5))
def test_interquartile_mean_agrees_with_the_published_definition(seed):
    """rliable: scipy.stats.trim_mean(scores, proportiontocut=0.25, axis=None)."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(int(rng.integers(1, 6)), int(rng.integers(1, 9))))  # [G, N]
    assert of(interquartile_mean, scores) == pytest.approx(stats.trim_mean(scores, 0.25, axis=None))


def test_estimates_and_intervals_agree_with_rliable():
    """What rliable 1.2.0 (arch 7.2.0, pandas 2.3.3) gives for five runs of six games: 20,000 resamples, mean of two calls.

    Its resampling cannot be seeded, so intervals agree within what two of its own calls differ by.
    """
    scores = np.random.default_rng(0).normal(size=(5, 6)) + np.arange(6)
    expected = {
        "median": (2.13706919, 1.7307, 2.6218),
        "IQM": (2.26683429, 1.9862, 2.5564),
        "mean": (2.3785135, 2.1041, 2.6359),
        "optimality gap": (0.18270024, 0.0437, 0.3862),
    }
    for name, (value, low, high) in expected.items():
        ours = estimate(scores.T, STATISTICS[name], np.random.default_rng(1), num_resamples=20_000)
        assert ours.value == pytest.approx(value, abs=1e-7)
        assert (ours.low, ours.high) == (pytest.approx(low, abs=0.015), pytest.approx(high, abs=0.015))


def test_the_interval_resamples_within_games_and_never_across():
    """Kills a bootstrap over all scores, which would say [0, 10]."""
    ours = estimate([[0, 0], [10, 10]], mean, np.random.default_rng(0))
    assert (ours.low, ours.value, ours.high) == (5, 5, 5)


def test_the_interval_of_two_runs_by_hand():
    """Resampled means are 0, 1/2 and 1 with 1/4, 1/2 and 1/4: 2.5 % and 97.5 % fall on the outer ones."""
    ours = estimate([[0, 1]], mean, np.random.default_rng(0))
    assert (ours.low, ours.value, ours.high) == (0, 0.5, 1)


def test_one_run_a_game_has_no_interval():
    ours = estimate([[3], [5]], mean, np.random.default_rng(0))
    assert (ours.low, ours.value, ours.high) == (None, 4, None)


def test_a_number_of_resamples_beyond_one_piece_is_all_used(monkeypatch):
    sizes = []

    def counted(scores):
        sizes.append(len(scores[0]))
        return mean(scores)

    estimate([[0, 1]], counted, np.random.default_rng(0), num_resamples=aggregates._RESAMPLES_AT_ONCE * 2 + 7)
    assert sum(sizes[1:]) == aggregates._RESAMPLES_AT_ONCE * 2 + 7


def covered(resample, *, num_sets=1_000, confidence=0.95):
    """How often the interval holds the truth, for four games of 25 runs whose levels are far apart."""
    rng = np.random.default_rng(0)
    levels = np.array([0.0, 3.0, 6.0, 9.0])
    tail = 50 * (1 - confidence)
    count = 0
    for _ in range(num_sets):
        scores = [rng.normal(level, 1.0, 25) for level in levels]
        low, high = np.percentile(mean(resample(scores, rng)), [tail, 100 - tail])
        count += low <= levels.mean() <= high
    return count


def within_games(scores, rng):
    return [aggregates._resample(game, 300, rng) for game in scores]


def across_games(scores, rng):
    pooled = np.concatenate(scores)
    return [aggregates._resample(pooled, 300, rng)[:, : len(game)] for game in scores]


def is_refused(count, num_sets=1_000):
    """A percentile bootstrap of 25 runs with 300 resamples covers in 93 to 95 cases of 100; chance may add to either side."""
    return stats.binom.cdf(count, num_sets, 0.93) < P_REJECT or stats.binom.sf(count - 1, num_sets, 0.95) < P_REJECT


def test_intervals_cover_the_truth_as_often_as_they_say():
    assert not is_refused(covered(within_games))


def test_the_coverage_test_has_power():
    """It refuses intervals of 85 % and a bootstrap across games."""
    assert is_refused(covered(within_games, confidence=0.85))
    assert is_refused(covered(across_games))


def test_a_mean_curve_covers_what_all_runs_cover_and_prolongs_none():
    first = (np.array([0.0, 10.0]), np.array([0.0, 10.0]))
    second = (np.array([5.0, 20.0]), np.array([1.0, 16.0]))
    curve = mean_curve([first, second], np.random.default_rng(0), num_points=2)
    assert curve.x.tolist() == [5, 10]
    assert curve.mean.tolist() == [(5 + 1) / 2, (10 + 6) / 2]
    assert curve.low.tolist() == [1, 6] and curve.high.tolist() == [
        5,
        10,
    ]  # Two seeds: the outer resamples are one of them twice.


def test_a_mean_curve_of_one_run_is_itself_and_of_runs_apart_is_none():
    x, y = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    alone = mean_curve([(x, y)], np.random.default_rng(0))
    assert (alone.x is x, alone.mean is y, alone.low, alone.high) == (True, True, None, None)
    assert mean_curve([(x, y), (x + 5, y)], np.random.default_rng(0)) is None
    assert mean_curve([], np.random.default_rng(0)) is None
