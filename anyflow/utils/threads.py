"""Set how torch's CPU threads wait, and how many the processor has room for.

OpenMP, which runs the threads, reads its settings from the environment when torch is loaded. By
default a thread that waits for the others of an operator spins on its core: on a machine that does
other work too, each operator then waits for the scheduler's next slot, and small networks train
about ten times slower.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_limited = False  # OMP_NUM_THREADS is not the user's but that of configure_openmp


def configure_openmp() -> None:
    """Let idle threads sleep, and use no more than this process has cores, before torch is loaded.

    Sets ``OMP_WAIT_POLICY=passive``, and ``OMP_NUM_THREADS`` where a quota of CPU time allows fewer
    cores than OpenMP finds, for this process and those that it starts. What the user has set stays:
    a way of waiting in ``OMP_WAIT_POLICY``, ``GOMP_SPINCOUNT`` or ``KMP_BLOCKTIME``; a number in
    ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS``. Where torch is loaded already, nothing changes.
    """
    global _limited
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    cores = usable_cores()
    # OpenMP counts the cores of the affinity and knows no quota
    if not user_chose_threads() and cores < _cores_of_affinity():
        os.environ["OMP_NUM_THREADS"] = str(cores)
        _limited = True


def user_chose_threads() -> bool:
    """Tell whether the user's environment, or torchrun, sets the number of threads."""
    return not _limited and any(name in os.environ for name in _COUNTS)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads, at most :func:`usable_cores`, and restore the number after.

    A small network is fastest with one: its operators are shorter than what it costs to share them
    out. None, or a number that the user has set in the environment (:func:`user_chose_threads`),
    leaves the threads as they are.
    """
    if count is None or user_chose_threads():
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(count, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_cores(root: Path = Path("/")) -> int:
    """Count the cores that this process may keep busy, by its affinity and its quota of CPU time.

    A quota of 2.5 cores, such as a container's, counts as 2; one of less than a core as 1.

    Args:
        root: root of the file system with ``proc/self/cgroup`` and ``sys/fs/cgroup``.
    """
    return max(1, min([_cores_of_affinity(), *(int(quota) for quota in _quotas(root))]))


def _cores_of_affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    count = os.cpu_count()
    return 1 if count is None else count


def _quotas(root: Path) -> Iterator[float]:
    """Yield the quotas, in cores, of this process's control groups and of those around them."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            mounts = ["sys/fs/cgroup"]
        elif "cpu" in controllers.split(","):
            mounts = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu"]
        else:
            continue
        # A container may see a path that exists outside only; its own group is the mount itself.
        group = Path(path.lstrip("/"))
        for mount in mounts:
            for parent in (group, *group.parents):
                quota = _quota(root / mount / parent)
                if quota is not None:
                    yield quota


def _quota(folder: Path) -> float | None:
    """Return the quota of a control group in cores; None where it has none."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        cores = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such group, or "max"
        return None
    return cores if cores > 0 else None  # version 1 writes -1 for none
