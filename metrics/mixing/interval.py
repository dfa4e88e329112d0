"""Estimates with their intervals.

Theory.  Two ways to an interval are used here. *Replicates* (few, each a whole comparison) get a trimmed mean with
the Tukey-McLaughlin standard error: a burst of host noise that spoils one replicate moves neither the estimate nor the
interval much. *Linear combinations* of such means, with weights that do not depend on the data, get the sum of their
variances and the Welch-Satterthwaite degrees of freedom. Both use Student's t, so that few replicates are told as few.

Sources: Tukey and McLaughlin, Sankhya A 25, 1963; Satterthwaite, Biometrics Bulletin 2, 1946.
Units: whatever the values have. Where it is poor: fewer than three values after trimming have no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

__all__ = ["CONFIDENCE", "Estimate", "combine", "trimmed_mean"]

CONFIDENCE: Final = 0.95
TRIM: Final = 0.1                # of the values at each end
FEWEST: Final = 3                # values left, for an interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value, its standard error and the degrees of freedom of that."""

    value: float
    error: float
    df: float
    n: int                       # what it was made from: slices, replicates

    def half_width(self, confidence: float = CONFIDENCE) -> float:
        return float(stdtrit(self.df, 0.5 + confidence / 2)) * self.error

    def bounds(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        half = self.half_width(confidence)
        return self.value - half, self.value + half

    def includes(self, value: float, confidence: float = CONFIDENCE) -> bool:
        return abs(self.value - value) <= self.half_width(confidence)

    def p_value(self) -> float:
        """Two-sided, of being zero."""
        if self.error == 0.0:
            return 1.0 if self.value == 0.0 else 0.0
        return float(2 * stdtr(self.df, -abs(self.value / self.error)))

    def scaled(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.error * abs(factor), self.df, self.n)


def trimmed_mean(values: Sequence[float] | npt.NDArray[np.float64], trim: float = TRIM) -> Estimate | None:
    """The trimmed mean of replicates; None where there are too few."""
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    cut = int(trim * n)
    kept = n - 2 * cut
    if kept < FEWEST:
        return None
    inner = ordered[cut:n - cut]
    winsorised = np.clip(ordered, inner[0], inner[-1])
    error = np.sqrt(np.sum((winsorised - winsorised.mean()) ** 2) / (kept * (kept - 1)))
    return Estimate(float(inner.mean()), float(error), kept - 1, n)


def combine(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The sum of weight times estimate, of independent estimates."""
    if not parts:
        raise ValueError("nothing to combine")
    variances = [(weight * part.error) ** 2 for weight, part in parts]
    variance = sum(variances)
    below = sum(v ** 2 / part.df for v, (_weight, part) in zip(variances, parts, strict=True))
    df = variance ** 2 / below if below > 0 else min(part.df for _weight, part in parts)
    return Estimate(sum(weight * part.value for weight, part in parts), variance ** 0.5, df,
                    sum(part.n for _weight, part in parts))
