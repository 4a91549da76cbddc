"""What a measured difference is worth: intervals of ratios, over repeats, and of shares.

Samples of one repeat share its noise (what else the machine did in these seconds), so repeats, not samples, say how far
a ratio can be trusted: intervals come from a bootstrap over repeats. With one repeat, a quantile's interval is made of
that repeat's samples and holds chance within it only, and that of a rate has no bounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from mtgr.errors import ConfigurationError

CONFIDENCE = 0.95
RESAMPLES = 4000

Array: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds that hold the true value with the given confidence.

    Attributes:
        estimate: What was measured.
        low: Lower bound.
        high: Upper bound.
        repeats: Independent measurements behind it, the fewer of both sides.
    """

    estimate: float
    low: float
    high: float
    repeats: int

    @property
    def bounded(self) -> bool:
        """Whether anything is known of how far the estimate may be off."""
        return math.isfinite(self.high)

    def overlaps(self, other: Interval) -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class LogRatio:
    """A ratio's logarithm as the bootstrap sees it, so that ratios of ratios can be made of it.

    Attributes:
        estimate: Natural logarithm of the ratio.
        deviations: Of ``RESAMPLES`` resamples from the estimate.
        repeats: Behind it, the fewer of both sides.
        freedom: Degrees of freedom of its spread over repeats; 0 if there is one repeat.
    """

    estimate: float
    deviations: Array
    repeats: int
    freedom: int

    def __sub__(self, other: LogRatio) -> LogRatio:
        """The logarithm of a ratio of two independent ratios, such as of two runs.

        It has no bounds unless both have repeats: what scatters from run to run does so between repeats, not within.
        """
        estimate = self.estimate - other.estimate
        if not (self.freedom and other.freedom):
            return _unbounded(estimate)
        # Resamples of the same seed drew the same repeats: they are made independent again.
        others = np.random.default_rng(len(self.deviations)).permutation(other.deviations)
        return LogRatio(
            estimate, self.deviations - others, min(self.repeats, other.repeats), self.freedom + other.freedom
        )

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """The ratio with its bounds.

        The plain percentile bootstrap over few repeats is too narrow: it takes the spread's maximum-likelihood estimate
        (n in place of n - 1) and the normal distribution's quantiles in place of Student's. Both are put right as in
        Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), section 4.1, but by widening the bounds
        rather than by more extreme percentiles, which a bootstrap over three repeats does not have.
        """
        tail = (1 - confidence) / 2
        low, high = np.quantile(self.deviations, (tail, 1 - tail), method="nearest")
        widen = 1.0
        if self.freedom:
            widen = math.sqrt(self.repeats / (self.repeats - 1))
            widen *= student_quantile(1 - tail, self.freedom) / NormalDist().inv_cdf(1 - tail)
        bounds = (float(self.estimate + widen * low), float(self.estimate + widen * high))
        return Interval(math.exp(self.estimate), math.exp(bounds[0]), math.exp(bounds[1]), self.repeats)


def quantile_ratio(
    new: Sequence[npt.ArrayLike], old: Sequence[npt.ArrayLike], quantile: float, *, seed: int = 0
) -> LogRatio:
    """How a quantile of ``new`` stands to that of ``old``: the geometric mean over repeats.

    Repeats of the same number that were measured in turn belong together: what slowed the machine then slowed both.

    Args:
        new: Positive samples of each repeat, such as latencies in milliseconds, in the order of time.
        old: The same of what is compared with.
        quantile: Such as 0.99.
        seed: Of the resamples.

    Raises:
        ConfigurationError: If a side has no repeat, or a repeat no samples or one that is not positive.
    """
    sides = [[_positive(samples) for samples in side] for side in (new, old)]
    # Where one side has fewer repeats, what the other has more of has nothing to be compared with.
    pairs = list(zip(*sides, strict=False))
    if not pairs:
        raise ConfigurationError("a ratio needs at least one repeat on both sides; measure them in one run.")
    logs = np.array([math.log(np.quantile(a, quantile) / np.quantile(b, quantile)) for a, b in pairs])
    generator = np.random.default_rng(seed)
    if len(pairs) > 1:
        return _over_repeats(logs, generator)
    ((a, b),) = pairs
    resampled = np.log(_resampled_quantile(a, quantile, generator) / _resampled_quantile(b, quantile, generator))
    return LogRatio(float(logs[0]), resampled - logs[0], 1, 0)


def mean_ratio(new: Sequence[float], old: Sequence[float], *, seed: int = 0) -> LogRatio:
    """How values of ``new``, one a repeat, stand to those of ``old``: the geometric mean over repeats.

    Of a single repeat's value nothing more is known: its interval has no bounds.

    Raises:
        ConfigurationError: If a side has no repeat, or a value is not positive.
    """
    logs = np.array([math.log(a / b) for a, b in zip(_positive(new), _positive(old), strict=False)])
    if len(logs) == 1:
        return _unbounded(float(logs[0]))
    return _over_repeats(logs, np.random.default_rng(seed))


def wilson_interval(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of a share, such as that of failed requests (Wilson, 1927); they stay apart where nothing failed.

    Raises:
        ConfigurationError: If the counts are no share.
    """
    if not 0 <= hits <= trials or trials == 0:
        raise ConfigurationError(f"{hits} of {trials} is no share; there must be trials, and no more hits than these.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # Where none or all are hits, the bound is 0 or 1 but for rounding.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == trials else middle + half)


def effective_size(samples: npt.ArrayLike, quantile: float) -> float:
    """How many independent samples say as much of a quantile as these, which follow one another in time.

    Requests that share a batch or a queue are slow together. What the quantile depends on is whether each sample lies
    below it; the number is divided by that series' integrated autocorrelation time, cut off where pairs of neighbouring
    lags stop being positive (Geyer, 1992).
    """
    array = np.asarray(samples, dtype=np.float64)
    below = (array <= np.quantile(array, quantile)).astype(np.float64)
    below -= below.mean()
    variance = float(below @ below)
    if variance == 0:
        return float(len(array))
    padded = 1 << (2 * len(array) - 1).bit_length()
    spectrum = np.fft.rfft(below, padded)
    correlation = np.fft.irfft(spectrum * np.conj(spectrum), padded)[: len(array)] / variance
    pairs = correlation[: len(array) // 2 * 2].reshape(-1, 2).sum(1)
    stop = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else len(pairs)
    time = max(2.0 * float(pairs[:stop].sum()) - 1.0, 1.0)
    return max(len(array) / time, 1.0)


@cache
def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, found on its density's integral; 1e-6 exact from 0.5 to 0.9999."""
    if freedom < 1 or not 0.5 <= probability < 1:
        raise ConfigurationError("Student's quantile needs a degree of freedom and a probability from 0.5 up to 1.")
    # With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), on a bounded interval.
    angles = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    angle = float(np.interp((2 * probability - 1) * mass[-1], mass, angles))
    return math.sqrt(freedom) * math.tan(angle)


def _unbounded(estimate: float) -> LogRatio:
    return LogRatio(estimate, np.tile([-np.inf, np.inf], RESAMPLES // 2), 1, 0)


def _over_repeats(logs: Array, generator: np.random.Generator) -> LogRatio:
    """Bootstrap over the log ratios of repeats; what scatters within a repeat is part of what scatters between them."""
    means = generator.choice(logs, size=(RESAMPLES, len(logs))).mean(axis=1)
    return LogRatio(float(logs.mean()), means - logs.mean(), len(logs), len(logs) - 1)


def _resampled_quantile(samples: Array, quantile: float, generator: np.random.Generator) -> Array:
    """The quantile of ``RESAMPLES`` bootstrap resamples, without making them.

    The k-th smallest of n uniform draws is distributed as Beta(k, n - k + 1): a resample's quantile is the sample's
    quantile there.
    """
    size = effective_size(samples, quantile)
    where = generator.beta(quantile * (size + 1), (1 - quantile) * (size + 1), RESAMPLES)
    return np.asarray(np.quantile(samples, where), dtype=np.float64)


def _positive(values: npt.ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not array.size or not (np.isfinite(array).all() and (array > 0).all()):
        raise ConfigurationError("a ratio needs samples, all of them positive; a point without answers has none.")
    return array
