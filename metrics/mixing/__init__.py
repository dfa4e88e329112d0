"""What mixing software and hardware VMs costs, estimated from raw slice records.

| module | what it is |
|---|---|
| `slices` | the raw records as columns, which of them can be used, and the file that keeps them |
| `design` | the experiment: which VM runs when, in which order of conditions |
| `session` | a measurement while it runs: the design as a script, slices as a recording |
| `interval` | estimates with their intervals; trimmed means and Welch's degrees of freedom |
| `order` | the randomised-order estimator: a regression over single slices |
| `blocks` | distance-matched ABBA blocks with A/A and solo controls |
| `report` | both together: the verdict, in words and as figures |
| `plot` | loss against switches a second, as SVG |
| `online` | the randomised-order estimator, incremental: from a running service's slices; needs no extra |
| `standing` | what the online estimate means, in words and as a result; needs no extra |
| `result` | what is kept of a measurement for warnings, gauges and budgets; needs no extra |

All of it is pure but for the files of `slices` and `result`: arrays in, values out; time and randomness are passed
in. NumPy and SciPy are an optional extra, so nothing here but `result`, `online` and `standing` is imported before
`need_extra` has said that they are there.
"""

from __future__ import annotations

import importlib.util

__all__ = ["ExtraMissing", "need_extra"]


class ExtraMissing(Exception):
    """NumPy or SciPy is not installed; the text says what to do."""


def need_extra() -> None:
    """Raises ExtraMissing where the extra `measure` is not installed."""
    missing = [name for name in ("numpy", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExtraMissing(
            f"measuring needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed; "
            "install the extra: pip install 'mixvisor[measure]' (in a checkout: pip install -e '.[measure]')")
