"""How long the gate's paired bootstrap takes, and how far it is from scipy's on the same messages.

    python benchmarks/gate.py                 # every figure, one JSON line each: a few seconds
    python benchmarks/gate.py --rows 60000    # at another size

The rows are synthetic: half the messages are toxic, two thirds have known types, and two models err on the same 6 % of
the labels and each on 4 % of its own. Both sides resample as often as configs/gate says, and measure F1 toxic and F1
types. scipy.stats.bootstrap (paired, percentile) is given what each row adds to the counts behind F1 and need not count
anew. The ends are compared at more resamples, where chance leaves less between them.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import json_line  # noqa: E402
from tasks import config, metrics  # noqa: E402

FIGURES = ("f1_toxic", "f1_types")
MANY = 20_000  # resamples for the comparison of ends
REPEATS = 5  # of what is timed; the median counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=6000)
    rows = parser.parse_args().rows
    resamples = config.load(config_path=config.SHIPPED).gate.bootstrap
    truth, ours, theirs = models(rows)

    seconds = timed(lambda: metrics.gain(truth, ours, theirs, resamples, seed=0))
    json_line.of_host("paired_bootstrap_seconds", round(seconds, 3), "s", rows=rows, resamples=resamples)
    seconds = timed(lambda: [by_scipy(truth, ours, theirs, name, resamples) for name in FIGURES])
    json_line.of_host("paired_bootstrap_scipy_seconds", round(seconds, 3), "s", rows=rows, resamples=resamples)

    found = metrics.gain(truth, ours, theirs, MANY, seed=0)
    for name in FIGURES:
        scipys = by_scipy(truth, ours, theirs, name, MANY)
        apart = np.abs(np.subtract(found[name]["interval"], list(scipys.confidence_interval))).max()
        json_line.of_host(
            f"{name}_gain_standard_error", round(float(scipys.standard_error), 5), "F1", rows=rows, resamples=MANY
        )
        json_line.of_host(f"{name}_gain_ends_apart", round(float(apart), 5), "F1", rows=rows, resamples=MANY)


def models(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, int [N, 6], and the decisions of two models, bool [N, 6]."""
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, size=(rows, 6))
    position = generator.random(truth.shape)
    ours = (truth == 1) ^ (position < 0.10)
    theirs = (truth == 1) ^ ((position < 0.06) | (position > 0.96))
    truth[: rows // 3, 1:] = metrics.UNKNOWN
    return truth, ours, theirs


def by_scipy(truth: np.ndarray, ours: np.ndarray, theirs: np.ndarray, figure: str, resamples: int):
    samples = [column for of in (ours, theirs) for column in metrics.tallies(truth, of)[figure].T]
    generator = np.random.default_rng(1)
    return stats.bootstrap(
        samples, difference, paired=True, n_resamples=resamples, method="percentile", batch=100, rng=generator
    )


def difference(hits, misses, their_hits, their_misses, axis):
    def f1(hits, misses):
        return 2 * hits.sum(axis) / (2 * hits.sum(axis) + misses.sum(axis))

    return f1(hits, misses) - f1(their_hits, their_misses)


def timed(call) -> float:
    """The median of the seconds that REPEATS calls take."""
    took = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        took.append(time.perf_counter() - started)
    return float(np.median(took))


if __name__ == "__main__":
    main()
