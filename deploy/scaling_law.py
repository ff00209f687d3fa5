"""The Universal Scalability Law, fitted to measured throughputs: numbers in, numbers out.

    X(N) = lambda N / (1 + sigma (N - 1) + kappa N (N - 1))

X is the throughput of N workers, lambda that of one alone, sigma the part of the work that is serial (or waits for what is), kappa what
each pair of workers costs by agreeing with one another. With sigma alone it is Amdahl's law. Source: Gunther 2007, "Guerrilla Capacity
Planning", chapters 4 to 6; https://arxiv.org/abs/0808.1431.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEAST_FOR_SIGMA = 3  # Different N, so that its two parameters leave something to judge the fit by;
LEAST_FOR_KAPPA = 4  # and with it there are three.
NUM_RESAMPLES = 2_000
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with its 95 % interval, None where the measurements do not tell their spread."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """A fitted law. `kappa` and `peak` are None where there were too few N for them: then it is Amdahl's law."""

    rate: Interval
    """lambda, the throughput of one worker alone."""
    sigma: Interval
    kappa: Interval | None
    peak: Interval | None
    """N with the greatest throughput, at least 1; infinite where kappa is 0."""
    residual: float
    """Root mean square of what is left, as a part of the throughput."""
    resamples: Floats
    """f64[R, 3]: (1, sigma, kappa) / lambda of each resample; R is 0 where there is no interval."""


def throughput(n: Floats, coefficients: Floats) -> Floats:
    """Returns X(N), f64[R, P], for N f64[P] and (1, sigma, kappa) / lambda f64[R, 3]."""
    result: Floats = n / (coefficients @ _basis(n).T)
    return result


def band(law: Law, n: Floats) -> tuple[Floats, Floats, Floats]:
    """Returns the law at N f64[P] and the edges of its 95 % band; without an interval all three are the same."""
    fitted = throughput(n, _coefficients(law)[None])[0]
    if not len(law.resamples):
        return fitted, fitted, fitted
    low, high = _quantiles(throughput(n, law.resamples))
    return fitted, low, high


def fit(n: Sequence[float], x: Sequence[float], rng: np.random.Generator, *, num_resamples: int = NUM_RESAMPLES) -> Law | None:
    """Fits the law to throughputs `x` measured at `n`, several rounds of each in any order; None where there are fewer than three
    different N, which tell no law.

    Errors are relative: the fit minimizes the sum of (1 - X / X(N))^2, which is linear in (1, sigma, kappa) / lambda, none of which may be
    negative. The least sum over all sets of nonzero coefficients is found exactly. It leans upward, by about the variance of the errors: by
    0.1 % where they are 3 %, by a fifth where they are a half, and then nothing that is fitted means much.

    Intervals are percentiles of a bootstrap of residuals: X(N) exp(e), with e drawn from the residuals of all N together. Resampling the
    two or three rounds within each N would make half of all resamples alike, and see nothing of how the law itself misses the points. Residuals
    are enlarged for the parameters that were fitted, and in each resample by sqrt(df / chi2(df)), since few measurements tell their own
    spread badly: without that the intervals of a few points would be as short as if it were known.

    Raises:
      ValueError: where a throughput or an N is not positive and finite.
    """
    workers, rates = np.asarray(n, np.float64), np.asarray(x, np.float64)
    if not (np.isfinite(workers).all() and np.isfinite(rates).all() and (workers > 0).all() and (rates > 0).all()):
        raise ValueError("throughputs and numbers of workers must be positive and finite")
    num_distinct = len(np.unique(workers))
    if num_distinct < LEAST_FOR_SIGMA:
        return None
    num_params = 3 if num_distinct >= LEAST_FOR_KAPPA else 2
    best = _least_squares(workers, rates[None], num_params)
    fitted = throughput(workers, best)[0]
    errors = np.log(rates / fitted)
    freedom = len(rates) - num_params
    resamples = np.empty((0, 3))
    if freedom > 0:
        scale = math.sqrt(len(rates) / freedom) * np.sqrt(freedom / rng.chisquare(freedom, (num_resamples, 1)))
        drawn = errors[rng.integers(len(errors), size=(num_resamples, len(errors)))]
        resamples = _least_squares(workers, fitted * np.exp(np.clip(scale * drawn, -20, 20)), num_params)
    return _law(best[0], resamples, num_params, float(np.sqrt(np.mean((1 - rates / fitted) ** 2))))


def _law(best: Floats, resamples: Floats, num_params: int, residual: float) -> Law:
    values = _parameters(best[None])[0]
    low, high = _quantiles(_parameters(resamples)) if len(resamples) else (None, None)
    rate, sigma, kappa, peak = (
        Interval(
            value=float(values[i]),
            low=None if low is None else float(low[i]),
            high=None if high is None else float(high[i]),
        )
        for i in range(4)
    )
    has_kappa = num_params == 3
    return Law(
        rate=rate,
        sigma=sigma,
        kappa=kappa if has_kappa else None,
        peak=peak if has_kappa else None,
        residual=residual,
        resamples=resamples,
    )


def _coefficients(law: Law) -> Floats:
    kappa = law.kappa.value if law.kappa is not None else 0.0
    return np.array([1.0, law.sigma.value, kappa]) / law.rate.value


def _parameters(coefficients: Floats) -> Floats:
    """Returns (lambda, sigma, kappa, peak) f64[R, 4] of (1, sigma, kappa) / lambda."""
    rate = 1 / coefficients[:, 0]
    sigma, kappa = coefficients[:, 1] * rate, coefficients[:, 2] * rate
    room = np.maximum(1 - sigma, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = np.where(kappa > 0, np.sqrt(room / kappa), np.where(room > 0, np.inf, 1.0))
    return np.stack([rate, sigma, kappa, np.maximum(peak, 1.0)], axis=1)


def _basis(n: Floats) -> Floats:
    """Returns f64[P, 3], what (1, sigma, kappa) / lambda are multiplied with to give N / X(N)."""
    return np.stack([np.ones_like(n), n - 1, n * (n - 1)], axis=1)


def _least_squares(n: Floats, x: Floats, num_params: int) -> Floats:
    """Returns f64[R, 3] coefficients that minimize the relative errors of each row of x, f64[R, P], with none negative and the first
    positive.
    """
    matrix = (x / n)[:, :, None] * _basis(n)  # [R, P, 3]
    found = np.zeros((len(x), 3))
    least = np.full(len(x), np.inf)
    for others in itertools.chain.from_iterable(itertools.combinations(range(1, num_params), k) for k in range(num_params)):
        columns = [0, *others]
        q, r = np.linalg.qr(matrix[:, :, columns])
        solved = np.linalg.solve(r, q.sum(axis=1)[:, :, None])[:, :, 0]  # q^T of a vector of ones.
        candidate = np.zeros_like(found)
        candidate[:, columns] = solved
        left = ((1 - np.einsum("rpk,rk->rp", matrix, candidate)) ** 2).sum(axis=1)
        is_better = (solved >= 0).all(axis=1) & (solved[:, 0] > 0) & (left < least)
        found[is_better], least[is_better] = candidate[is_better], left[is_better]
    return found


def _quantiles(values: Floats) -> tuple[Floats, Floats]:
    """Returns the percentiles of axis 0 between which 95 % lie, each one of the values: a peak may be infinite."""
    tail = 50 * (1 - _CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0, method="nearest")
    return low, high
