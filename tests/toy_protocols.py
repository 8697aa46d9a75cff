"""Protocols without training, importable by worker processes: what tests/test_experiment.py sweeps over."""
import os
import time
from pathlib import Path

from promptbook.experiment import Experiment, protocol, sweep, unknown_name

METHODS = ("good", "bad", "sleepy", "breaks", "dies")


def known(experiment):
    if experiment.method not in METHODS:
        raise unknown_name("method", experiment.method, METHODS)


@protocol("test-toy", check=known)
def measured(experiment, progress=None):
    """Writes one file per call (so that repeated work shows), then returns numbers that depend on the seed."""
    if "calls" in experiment.settings:
        Path(experiment.settings["calls"], f"{experiment.key}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if experiment.method == "sleepy":
        time.sleep(experiment.settings["seconds"])
    if experiment.method == "breaks" and experiment.seed == 2:
        raise RuntimeError("seed 2 does not work")
    if experiment.method == "dies" and experiment.seed == 2:
        os._exit(9)
    gain = 5 if experiment.method == "good" else 0
    return {"base": 60.0 + gain + experiment.seed, "new": 50.0 - gain + experiment.seed, "pid": os.getpid(), "loss": float("nan"),
            "val_base": float(experiment.settings.get("lr", 0)), "curve": [1.0, 2.5], "trainable": 7}


def plan(folder, seconds=0.25, count=12):
    """The sweep that is killed in mid-run."""
    return [Experiment("sleepy", "none", "numbers", "test-toy", seed, {"calls": str(folder), "seconds": seconds}) for seed in range(count)]


if __name__ == "__main__":
    import sys

    from toy_protocols import plan as importable_plan  # registered under its module's name, as workers know it

    calls, rows, workers = sys.argv[1:]
    sweep(importable_plan(calls), rows, workers=int(workers), progress=False)
