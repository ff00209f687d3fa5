"""The Universal Scalability Law: from exact data, against scipy, and by the law that intervals must obey."""

import numpy as np
import pytest
from scipy import optimize

from deploy.scaling_law import LEAST_FOR_KAPPA, LEAST_FOR_SIGMA, band, fit, throughput

N = np.array([1.0, 2, 4, 8, 16])


def usl(n, rate, sigma, kappa):
    return rate * n / (1 + sigma * (n - 1) + kappa * n * (n - 1))


def noisy(rng, n, rate, sigma, kappa, *, rounds, noise):
    n = np.tile(n, rounds)
    return n, usl(n, rate, sigma, kappa) * np.exp(noise * rng.standard_normal(len(n)))


def test_throughput_by_hand():
    """Kills: N (N - 1) / 2 pairs, sigma N, and kappa (N - 1)^2: 8 * 100 / (1 + 0.5 * 7 + 0.25 * 56) = 800 / 18.5."""
    coefficients = np.array([[1, 0.5, 0.25]]) / 100
    np.testing.assert_allclose(throughput(np.array([1.0, 8.0]), coefficients), [[100, 800 / 18.5]])


@pytest.mark.parametrize(
    ("rate", "sigma", "kappa"),
    [(312.0, 0.04, 0.003), (1.5e5, 0.3, 0.0), (0.02, 0.0, 0.01), (50.0, 0.0, 0.0), (10.0, 1.0, 0.0)],
    ids=["both", "amdahl", "only_pairs", "linear", "flat"],
)
def test_exact_data_give_their_parameters(rate, sigma, kappa):
    law = fit(N, usl(N, rate, sigma, kappa), np.random.default_rng(0))
    assert law.rate.value == pytest.approx(rate)
    assert law.sigma.value == pytest.approx(sigma, abs=1e-9) and law.kappa.value == pytest.approx(kappa, abs=1e-9)
    assert law.residual == pytest.approx(0, abs=1e-9)
    assert (law.sigma.low, law.sigma.high) == (pytest.approx(sigma, abs=1e-9), pytest.approx(sigma, abs=1e-9))


def test_peak_is_where_throughput_is_greatest():
    law = fit(N, usl(N, 100, 0.1, 0.009), np.random.default_rng(0))
    assert law.peak.value == pytest.approx(10)  # sqrt(0.9 / 0.009); without the 1 - sigma it would be 10.5.
    around = throughput(np.array([9.9, 10.0, 10.1]), np.array([[1, 0.1, 0.009]]))[0]
    assert around.argmax() == 1
    assert fit(N, usl(N, 100, 0.1, 0.0), np.random.default_rng(0)).peak.value == np.inf
    assert fit(N, usl(N, 100, 1.5, 0.01), np.random.default_rng(0)).peak.value == 1  # Falls from the start.


@pytest.mark.parametrize("seed", range(12))
def test_fit_agrees_with_scipy(seed):
    """scipy minimizes the same sum from several starts, under the same bounds, without knowing that it is linear."""
    rng = np.random.default_rng(seed)
    sigma, kappa = [(0.05, 0.002), (0.0, 0.0), (0.3, 0.0), (0.0, 0.01)][seed % 4]
    n, x = noisy(rng, N[: 4 + seed % 2], 100, sigma, kappa, rounds=3, noise=0.05)

    def errors(values):
        return 1 - x / usl(n, *values)

    starts = [(50, 0.01, 0.001), (150, 0.5, 0.05), (100, 0.1, 0.0)]
    bounds = ([1e-3, 0, 0], [1e4, 10, 10])
    found = min(
        (optimize.least_squares(errors, at, bounds=bounds, x_scale=(100, 0.1, 0.01), ftol=1e-14, xtol=1e-14) for at in starts),
        key=lambda one: one.cost,
    )
    law = fit(n, x, np.random.default_rng(0))
    ours = np.array([law.rate.value, law.sigma.value, law.kappa.value])
    assert np.sum(errors(ours) ** 2) <= 2 * found.cost * (1 + 1e-6)
    np.testing.assert_allclose(ours, found.x, rtol=2e-3, atol=2e-4)


def coverage(sigma, kappa, *, n, rounds, noise=0.03, num_sweeps=300, wrong=1.0):
    """Returns how often the intervals of (rate, sigma, kappa) hold the truth, which is `wrong` times as far for the last two."""
    rng = np.random.default_rng(1)
    hits = np.zeros(3)
    for _ in range(num_sweeps):
        law = fit(*noisy(rng, n, 100, sigma, kappa, rounds=rounds, noise=noise), rng, num_resamples=500)
        truths = (100, wrong * sigma, wrong * kappa)
        intervals = (law.rate, law.sigma, law.kappa)
        hits += [one.low - 1e-12 <= truth <= one.high + 1e-12 for one, truth in zip(intervals, truths, strict=True)]
    return hits / num_sweeps


@pytest.mark.parametrize("rounds", [2, 3])
def test_intervals_cover_the_truth_as_often_as_they_say(rounds):
    """300 sweeps: 95 % nominal; a right interval is below 0.9 once in 5,000."""
    found = coverage(0.2, 0.008, n=N, rounds=rounds)
    assert (found >= 0.9).all() and (found <= 0.99).all(), found


def test_the_coverage_test_has_power():
    assert (coverage(0.2, 0.008, n=N, rounds=3, wrong=1.5)[1:] < 0.5).all()


def test_intervals_of_four_points_hold_the_least_values_that_are_possible():
    """At the border an interval is one-sided and covers more."""
    assert (coverage(0.0, 0.0, n=np.array([1.0, 2, 3, 4]), rounds=2) >= 0.9).all()


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_no_serial_part_is_told_from_a_small_one(shift):
    law = fit(*noisy(np.random.default_rng(3), N, 100, shift, 0.0, rounds=3, noise=0.01), np.random.default_rng(0))
    assert (law.sigma.low == 0) == (shift == 0)
    assert law.kappa.low == 0 and law.sigma.high < shift + 0.05


def test_too_few_points_get_a_smaller_law_or_none():
    """Rounds are no points: twelve measurements at two N tell no law."""
    rng = np.random.default_rng(0)
    assert fit([1, 2] * 6, [100.0, 190] * 6, rng) is None
    amdahl = fit([1, 2, 4], usl(np.array([1.0, 2, 4]), 100, 0.2, 0.0), rng)
    assert amdahl.sigma.value == pytest.approx(0.2) and amdahl.kappa is None and amdahl.peak is None
    assert (LEAST_FOR_SIGMA, LEAST_FOR_KAPPA) == (3, 4) and fit(N[:4], usl(N[:4], 100, 0.2, 0.0), rng).kappa is not None


def test_one_measurement_more_than_parameters_tells_a_spread_and_none_more_does_not():
    x = usl(N[:4], 100, 0.1, 0.0) * [1.02, 0.97, 1.03, 0.99]
    assert fit(N[:4], x, np.random.default_rng(0)).sigma.high is not None
    three = fit(N[[0, 1, 2]], x[:3], np.random.default_rng(0))
    assert three.sigma.high > three.sigma.value  # Two parameters of three measurements.


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_throughputs_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="positive and finite"):
        fit(N, [1, 2, 3, 4, wrong], np.random.default_rng(0))


def test_band_holds_the_law_and_widens_beyond_the_points():
    law = fit(*noisy(np.random.default_rng(2), N, 100, 0.1, 0.003, rounds=3, noise=0.03), np.random.default_rng(0))
    at = np.array([4.0, 16.0, 64.0])
    fitted, low, high = band(law, at)
    np.testing.assert_allclose(fitted, usl(at, law.rate.value, law.sigma.value, law.kappa.value))
    assert (low < fitted).all() and (fitted < high).all()
    assert (high / low)[2] > (high / low)[1] > 1
