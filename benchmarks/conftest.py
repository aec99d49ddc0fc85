"""Run the benchmarks: ``make bench``, ``make bench-quick``, or ``pytest benchmarks``.

Exit status 1: a ratio is below its gate, a gated benchmark did not run, or a benchmark failed. Exit
status 4: an option, or ``gates.toml``, is not understood; nothing has been run.
"""

from __future__ import annotations

from pathlib import Path

import gates
import pytest
import report
import torch
from roofline import LimitMeter
from timing import TimeBudget, keep_freed_memory
from workloads import Line, Place, Workload, catalogue, measure

QUICK_SECONDS, SECONDS = 1.0, 4.0  # that the rounds of one benchmark take, roughly
THREADS = 2  # on a CPU; the gates are ratios at this number


class GatedRun:
    """Hold one run of the benchmarks: where, against which gates, and what it has measured."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.option
        self.device = _device(option.device)
        if self.device.type == "cpu":
            torch.set_num_threads(option.threads)
            keep_freed_memory()
        self.quick, self.compile = option.quick, not (option.quick or option.no_compile)
        seconds = QUICK_SECONDS if option.quick else SECONDS
        self.budget = TimeBudget(seconds if option.seconds is None else option.seconds)
        self.path: Path = option.gates
        self.raises: bool = option.raise_gates
        self.device_class = gates.device_class(self.device)
        self.meter = LimitMeter(self.device)
        self.lines: list[Line] = []
        self.selected: list[Workload] = []
        try:
            self.gates = gates.Gates.load(self.path)
            self.gates.require_known(name for w in catalogue() for name in w.figures())
        except (OSError, gates.GatesError) as error:
            raise pytest.UsageError(str(error)) from None

    def takes(self, workload: Workload) -> bool:
        """Tell whether a benchmark belongs to this run."""
        return workload.device == self.device.type and (workload.quick or not self.quick)

    def judge(self) -> tuple[list[gates.Judgment], list[str]]:
        """Return every ratio beside its gate, and the gated figures that lack a measurement."""
        judgments = self.gates.judge(self.device_class, self.lines)
        selected = [name for w in self.selected for name in w.figures(self.compile)]
        return judgments, self.gates.not_run(self.device_class, selected, judgments)


_RUN = pytest.StashKey[GatedRun]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the benchmarks."""
    add = parser.getgroup("anyflow benchmarks").addoption
    add("--device", choices=("cpu", "cuda"), help="default: cuda if a GPU is found")
    quick = "short shapes, no compiled peers: the gates that CI checks"
    add("--quick", action="store_true", help=quick)
    seconds = f"of rounds per benchmark ({SECONDS:g}; quick: {QUICK_SECONDS:g})"
    add("--seconds", type=float, help=seconds)
    add("--threads", type=int, default=THREADS, help="of torch on a CPU; the gates are for 2")
    add("--no-compile", action="store_true", help="leave out torch.compile's peers")
    add("--gates", type=Path, default=gates.FILE, help="file of gates")
    raises = "set gates to 90 %% of what is measured, never lower"
    add("--raise", dest="raise_gates", action="store_true", help=raises)


def _device(name: str | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(default if name is None else name)


def pytest_configure(config: pytest.Config) -> None:
    """End the run before anything is measured if an option or a gate is wrong."""
    config.stash[_RUN] = GatedRun(config)


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is measured on."""
    run, threads = config.stash[_RUN], torch.get_num_threads()
    return f"torch {torch.__version__}, {threads} threads, {run.device}, class {run.device_class}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each benchmark on its module's workloads; modules do without pytest, as a GPU may."""
    metafunc.parametrize("workload", metafunc.module.WORKLOADS, ids=str)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the benchmarks of other devices, and in a quick run the long ones."""
    run = config.stash[_RUN]
    kept = [item for item in items if run.takes(_workload(item))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """Note what has to run: what is left after ``-k`` too."""
    session.config.stash[_RUN].selected = [_workload(item) for item in session.items]


def _workload(item: pytest.Item) -> Workload:
    return item.callspec.params["workload"]


@pytest.fixture
def measured(
    workload: Workload, request: pytest.FixtureRequest, tmp_path: Path, benchmark: object
) -> Line:
    """Measure the workload; its line becomes part of the table."""
    run = request.config.stash[_RUN]

    def once(name: str, recorder: object) -> Line:
        folder = tmp_path / name
        folder.mkdir()
        known, place = run.gates.of(run.device_class), Place(run.device, folder)
        return measure(workload, place, run.compile, run.meter, run.budget, known, recorder)

    line = once("first", benchmark)
    # what becomes a gate for good is what two measurements agree on, each with memory of its own
    if run.raises:
        line = line.lower(once("second", None))
    run.lines.append(line)
    return line


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run for a missed gate, or for one that was not checked."""
    judgments, not_run = session.config.stash[_RUN].judge()
    if not_run or any(j.missed for j in judgments):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Write the table, the gates, and with ``--raise`` what has become of them."""
    run, write = config.stash[_RUN], terminalreporter.write_line
    if not run.selected:
        return
    judgments, not_run = run.judge()
    terminalreporter.section("benchmarks")
    write(report.table(run.lines, judgments))
    write("")
    write(report.summary(run.device_class, judgments, not_run))
    if run.raises:
        changes = run.gates.raise_to(run.device_class, judgments)
        run.gates.save(run.path)
        write(f"raised in {run.path}: {len(changes)}")
        for change in changes:
            write(f"  {change}")
