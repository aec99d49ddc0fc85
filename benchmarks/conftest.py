"""Running the benchmarks: ``make bench``, ``make bench-quick``, or ``pytest benchmarks`` with the
options below.

Exit status 1: a ratio is below its gate, a gated benchmark did not run, or a benchmark failed. Exit
status 4: an option, or ``gates.toml``, is not understood; nothing has been run.
"""

from __future__ import annotations

from pathlib import Path

import gates
import pytest
import report
import torch
from interleave import Budget, keep_freed_memory
from limits import Limits
from workloads import Line, Setting, Workload, catalogue, measure

QUICK_SECONDS, SECONDS = 1.0, 4.0  # about so long are the rounds of one benchmark
THREADS = 2  # on a CPU; the gates are ratios at this number


class Run:
    """One run of the benchmarks: where, against which gates, and what has been measured so far."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.device = _device(option.device)
        if self.device.type == "cpu":
            torch.set_num_threads(option.threads)
            keep_freed_memory()
        self.quick, self.compile = option.quick, not (option.quick or option.no_compile)
        seconds = (
            option.seconds
            if option.seconds is not None
            else QUICK_SECONDS
            if option.quick
            else SECONDS
        )
        self.budget = Budget(seconds)
        self.path: Path = option.gates
        self.raises: bool = option.raise_gates
        self.device_class = gates.device_class(self.device)
        self.limits = Limits(self.device)
        self.lines: list[Line] = []
        self.selected: list[Workload] = []
        try:
            self.gates = gates.Gates.load(self.path)
            self.gates.require_known(name for w in catalogue() for name in w.figures())
        except (OSError, gates.GatesError) as error:
            raise pytest.UsageError(str(error)) from None

    def takes(self, workload: Workload) -> bool:
        """Whether a benchmark belongs to this run."""
        return workload.device == self.device.type and (workload.quick or not self.quick)

    def judge(self) -> tuple[list[gates.Judgment], list[str]]:
        """Every ratio beside its gate, and the gated figures that should have been measured and
        were not.
        """
        judgments = self.gates.judge(self.device_class, self.lines)
        selected = [name for w in self.selected for name in w.figures(self.compile)]
        return judgments, self.gates.not_run(self.device_class, selected, judgments)


_RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the benchmarks."""
    group = parser.getgroup("anyflow benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption(
        "--quick",
        action="store_true",
        help="short shapes, no compiled peers: the gates that CI checks",
    )
    group.addoption(
        "--seconds",
        type=float,
        help=f"of rounds per benchmark ({SECONDS:g}; quick: {QUICK_SECONDS:g})",
    )
    group.addoption(
        "--threads", type=int, default=THREADS, help="of torch on a CPU; the gates are for 2"
    )
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile's peers")
    group.addoption("--gates", type=Path, default=gates.FILE, help="file of gates")
    group.addoption(
        "--raise",
        dest="raise_gates",
        action="store_true",
        help="set gates to 90 %% of what is measured, never lower",
    )


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    return torch.device(
        name if name is not None else "cuda" if torch.cuda.is_available() else "cpu"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Wrong options and unknown gates end the run before anything is measured."""
    config.stash[_RUN] = Run(config)


def pytest_report_header(config: pytest.Config) -> str:
    """On what is measured."""
    run = config.stash[_RUN]
    return (
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {run.device}, class "
        f"{run.device_class}"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the benchmarks of other devices, and in a quick run the long ones."""
    run = config.stash[_RUN]
    kept = [item for item in items if run.takes(_workload(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is left after ``-k`` too has to run."""
    session.config.stash[_RUN].selected = [_workload(item) for item in session.items]


def _workload(item: pytest.Item) -> Workload:
    return item.callspec.params["workload"]


@pytest.fixture
def measured(
    workload: Workload, request: pytest.FixtureRequest, tmp_path: Path, benchmark: object
) -> Line:
    """The workload's line, which becomes part of the table."""
    run = request.config.stash[_RUN]

    def once(name: str, recorder: object) -> Line:
        folder = tmp_path / name
        folder.mkdir()
        setting = Setting(run.device, run.compile, folder)
        return measure(
            workload, setting, run.limits, run.budget, run.gates.of(run.device_class), recorder
        )

    line = once("first", benchmark)
    # what becomes a gate for good is what two measurements agree on, each with memory of its own
    if run.raises:
        line = line.lower(once("second", None))
    run.lines.append(line)
    return line


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A missed gate, or one that was not checked, fails the run."""
    judgments, not_run = session.config.stash[_RUN].judge()
    if not_run or any(j.missed for j in judgments):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table, the gates, and with ``--raise`` what has become of them."""
    run = config.stash[_RUN]
    if not run.selected:
        return
    judgments, not_run = run.judge()
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(report.table(run.lines, judgments))
    terminalreporter.write_line("")
    terminalreporter.write_line(report.summary(run.device_class, judgments, not_run, run.lines))
    if run.raises:
        changes = run.gates.raise_to(run.device_class, judgments)
        run.gates.save(run.path)
        terminalreporter.write_line(f"raised in {run.path}: {len(changes)}")
        for change in changes:
            terminalreporter.write_line(f"  {change}")
