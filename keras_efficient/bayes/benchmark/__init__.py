"""Methods compared: suites of cells, run into a folder, and a report of it."""

from keras_efficient.bayes.benchmark.results import Outcome, Results
from keras_efficient.bayes.benchmark.running import Benchmark, in_process, run_cell
from keras_efficient.bayes.benchmark.suites import Cell, Suite, bundled, load_suite
from keras_efficient.bayes.benchmark.tuning import Tune, Tuned

__all__ = [
    "Benchmark",
    "Cell",
    "Outcome",
    "Results",
    "Suite",
    "Tune",
    "Tuned",
    "bundled",
    "in_process",
    "load_suite",
    "run_cell",
]
