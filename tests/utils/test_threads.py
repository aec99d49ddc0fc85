"""Test torch's threads in real processes: how OpenMP waits, and which cores are counted."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import anyflow
from anyflow.utils.threads import torch_threads, usable_cores

SETTINGS = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
)
# What the command line does first, then what torch and OpenMP have made of it.
PROBE = f"""
import json, os, sys
from anyflow.cli import main
sys.argv = ["anyflow", "--version"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
early = "torch" in sys.modules
from anyflow.utils.threads import torch_threads, usable_cores
import torch
threads = torch.get_num_threads()
with torch_threads(1):
    inside = torch.get_num_threads()
settings = {{name: os.environ.get(name) for name in {SETTINGS}}}
print(json.dumps([early, usable_cores(), threads, inside, torch.get_num_threads(), settings]))
"""


def probe(
    prepare: Callable[[], object] | None = None, **settings: str
) -> tuple[int, int, int, dict[str, str | None]]:
    """Return cores, threads and settings of a process that begins with ``prepare``.

    The threads are torch's, and those inside of ``torch_threads(1)``.
    """
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment |= {"PYTHONPATH": str(Path(anyflow.__file__).parents[1]), **settings}
    process = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=prepare,
    )
    assert process.returncode == 0, process.stderr
    early, cores, threads, inside, after, found = json.loads(process.stdout.splitlines()[-1])
    assert not early, "torch is loaded before OpenMP is configured"
    assert after == threads
    return cores, threads, inside, found


@pytest.mark.slow
def test_threads_of_the_command_line_sleep_while_they_wait_and_are_no_more_than_the_cores() -> None:
    cores, threads, inside, found = probe()
    assert cores == len(os.sched_getaffinity(0)) and threads <= cores and inside == 1
    assert found == {**dict.fromkeys(SETTINGS), "OMP_WAIT_POLICY": "passive"}


@pytest.mark.slow
def test_cores_are_those_that_the_process_may_use() -> None:
    one = {min(os.sched_getaffinity(0))}
    assert probe(lambda: os.sched_setaffinity(0, one))[:3] == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"OMP_WAIT_POLICY": "active", "OMP_NUM_THREADS": "2"},
        {"GOMP_SPINCOUNT": "100", "MKL_NUM_THREADS": "2"},
    ],
)
def test_a_users_own_settings_stay(settings: dict[str, str]) -> None:
    cores, threads, inside, found = probe(**settings)
    assert found == {**dict.fromkeys(SETTINGS), **settings}
    assert threads == inside == min(2, cores)  # torch itself takes no more than there are


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/job/step\n", {"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000"}, 1),
        ("0::/host/path\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "99900000 100000"}, None),
        ("0::/\n", {}, None),
        (
            "3:cpu,cpuacct:/a\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000",
             "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            1,
        ),
        ("3:cpuset:/\n1:cpu:/a\n0::/\n",
         {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "50000"}, 1),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("1:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"},
         None),
    ],
)  # fmt: skip
def test_a_quota_of_cpu_time_counts(
    groups: str, files: dict[str, str], cores: int | None, tmp_path: Path
) -> None:
    """Read the tree of a control group of version 2 or 1; None stands for no quota."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    assert usable_cores(tmp_path) == (len(os.sched_getaffinity(0)) if cores is None else cores)


def test_a_quota_of_cpu_time_limits_torch() -> None:
    """Start torch in a real control group of one core, where this process may make one."""
    group = Path("/sys/fs/cgroup/cpu/anyflow-test-threads")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a quota of one core is no limit on one core")
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("100000")
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    try:
        # 0: the writer itself
        cores, threads, inside, found = probe(lambda: (group / "tasks").write_text("0"))
    finally:
        group.rmdir()
    assert (cores, threads, inside) == (1, 1, 1) and found["OMP_NUM_THREADS"] == "1"


def test_threads_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    with torch_threads(10**6):
        assert torch.get_num_threads() == usable_cores()
    with pytest.raises(KeyError), torch_threads(1):
        raise KeyError
    with torch_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before
