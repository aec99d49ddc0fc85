"""A whole command in a process of its own, alone and beside processes that keep every core busy.

The command trains a small network by a recipe on one thread, as it does for its user. Its peers are
the same command on a machine with nothing else to do, and with two threads: those of
``OMP_NUM_THREADS=2``, which sleep while they wait, and those of OpenMP's default
(``GOMP_SPINCOUNT=300000``), which spin.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
from interleave import OURS
from workloads import Contest, Line, Setting, Workload

import anyflow
from anyflow.utils.threads import usable_cores

ROOT = Path(anyflow.__file__).resolve().parents[1]
RECIPE = "smoke_teacher"
STEPS = 200
QUIET, TWO_THREADS, TWO_SPINNING = "quiet", "two threads", "two spinning threads"
_SLEEPING: Mapping[str, str] = {"OMP_NUM_THREADS": "2"}
_SPINNING: Mapping[str, str] = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"}
_SETTINGS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
)


@contextmanager
def busy_cores() -> Iterator[None]:
    """Run as many busy processes as this one may use cores."""
    processes = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


class Training:
    """The command, each time in a new folder.

    Args:
        folder: for the runs.
        load: whether other processes keep the cores busy.
        settings: of OpenMP in its environment; of the user's own, nothing is left.
    """

    def __init__(self, folder: Path, *, load: bool, settings: Mapping[str, str]) -> None:
        self.folder, self.load = folder, load
        inherited = {name: value for name, value in os.environ.items() if name not in _SETTINGS}
        self.environment = {**inherited, "PYTHONPATH": str(ROOT), **settings}
        self._runs = itertools.count()

    def __call__(self) -> None:
        out = self.folder / str(next(self._runs))
        overrides = [
            f"out={out}",
            f"steps={STEPS}",
            f"checkpoint.every={STEPS}",
            "preview.every=0",
            "log_every=50",
        ]
        command = [sys.executable, "-m", "anyflow", "train", RECIPE, *overrides]
        with busy_cores() if self.load else nullcontext():
            subprocess.run(command, env=self.environment, check=True, capture_output=True)
        shutil.rmtree(out)


def _contest(load: bool, setting: Setting) -> Contest:
    def training(name: str, *, load: bool = load, settings: Mapping[str, str] = {}) -> Training:
        return Training(setting.folder / name.replace(" ", "-"), load=load, settings=settings)

    steps = {OURS: training("ours"), TWO_THREADS: training(TWO_THREADS, settings=_SLEEPING)}
    if load:
        return Contest({**steps, QUIET: training(QUIET, load=False)})
    return Contest({**steps, TWO_SPINNING: training(TWO_SPINNING, settings=_SPINNING)})


WORKLOADS = [
    Workload(
        "commands/train/smoke_teacher/quiet",
        (TWO_THREADS, TWO_SPINNING),
        partial(_contest, False),
        min_rounds=3,
    ),
    Workload(
        "commands/train/smoke_teacher/every core busy",
        (TWO_THREADS, QUIET),
        partial(_contest, True),
        goals={QUIET: 0.4},  # within 2.5 times as long
        min_rounds=3,
    ),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_commands(workload: Workload, measured: Line) -> None:
    """From the shell to the end of the run."""
