"""Test the gates of the benchmarks on benchmarks that are real and take a moment."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gates
import pytest
import report
import torch
import workloads
from gates import Gates, GatesError, Judgment
from roofline import LimitMeter
from timing import TimeBudget, difference
from torch import Tensor
from workloads import Contest, Line, Place, Workload

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NAME, PEER = "ops/sum/small", "twice"
FIGURE = f"{NAME} vs {PEER}"
CLASS = "cpu-avx2-amd"


def workload(wrong: float = 0.0) -> Workload:
    """Return a sum, and a peer that does it eight times over: 4 to 16 times as slow anywhere."""
    x = torch.ones(1 << 18)

    def ours() -> Tensor:
        return x.sum()

    def twice() -> Tensor:
        return torch.stack([x.sum() for _ in range(8)]).mean() + wrong

    def build(place: Place) -> Contest:
        return Contest({"ours": lambda: ours, PEER: lambda: twice}, bytes=x.numel() * 4)

    return Workload(NAME, (PEER,), build)


def measure(tmp_path: Path, known: dict[str, float], wrong: float = 0.0) -> Line:
    return workloads.measure(
        workload(wrong), Place(CPU, tmp_path), False, LimitMeter(CPU), TimeBudget(0.05), known
    )


def test_a_line_reports_what_was_measured(tmp_path: Path) -> None:
    line = measure(tmp_path, {})
    assert 2 < line.ratios[PEER] < 32 and not line.again
    seconds = line.milliseconds / 1e3
    assert line.gigabytes_per_second == pytest.approx((1 << 20) / seconds / 1e9)
    assert line.teraflops_per_second is None and line.of_limit > 0 and line.rounds >= 5


def test_a_miss_is_measured_once_more(tmp_path: Path) -> None:
    held, missed = (measure(tmp_path, {FIGURE: gate}) for gate in (0.01, 1e6))
    assert not held.again and missed.again
    found = Gates({CLASS: {FIGURE: 1e6}})
    assert [j.missed for j in found.judge(CLASS, [missed])] == [True]
    # On a machine of another class it has no gate, and neither holds nor misses it.
    (ungated,) = found.judge("cpu-avx512-intel", [missed])
    assert ungated.gate is None and not ungated.missed
    text = report.summary("cpu-avx512-intel", [ungated], [], [missed])
    assert "0 of 0 gates hold" in text and "1 ratios have no gate" in text
    assert "no gate" in report.table([missed], [ungated])


def test_the_lower_of_two_lines(tmp_path: Path) -> None:
    """Test what ``--raise`` makes gates of: each ratio is one that both measurements reached."""
    line = measure(tmp_path, {})
    first, second = (
        replace(line, ratios={"p": p, "q": 2.0}, busy=busy)
        for p, busy in ((3.0, False), (1.0, True))
    )
    assert first.lower(second).ratios == {"p": 1.0, "q": 2.0} and first.lower(second).busy
    assert not first.lower(first).busy


def test_a_busy_machine_tells_nothing_of_time(tmp_path: Path) -> None:
    """Test that memory, which is the same on a busy machine, may become a gate."""
    line = replace(measure(tmp_path, {}), ratios={"p": 1.0, "p, memory": 1.0}, busy=True)
    judgments = Gates({CLASS: {f"{NAME} vs p": 2.0}}).judge(CLASS, [line])
    assert [j.busy for j in judgments] == [True, False]
    assert "run it again" in report.summary(CLASS, judgments, [], [line])
    assert Gates({}).raise_to(CLASS, judgments) == [f"{NAME} vs p, memory: no gate -> 0.90"]


def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ours and twice differ by"):
        measure(tmp_path, {}, wrong=100.0)
    nan = torch.full((3,), torch.nan)
    assert not difference([nan], [torch.ones(3)]) <= 1e9


def test_a_summary_names_the_misses_and_the_three_slowest() -> None:
    ratios = {"a": 3.0, "b": 1.0, "c": 2.0, "d": float("nan"), "e": 9.0}
    judgments = [Judgment(name, ratio, 2.0) for name, ratio in ratios.items()]
    # at its gate c holds; NaN never does
    assert [j.name for j in judgments if j.missed] == ["b", "d"]
    lines = report.summary(CLASS, judgments, ["gone"], []).splitlines()
    assert lines[0] == f"{CLASS}: 3 of 5 gates hold"
    assert (
        "NOT RUN, though it has a gate: gone" in lines
        and "MISSED: b is 1.00x, the gate is 2.00x" in lines
    )
    slowest = lines[lines.index("the 3 slowest lines against their gates:") + 1 :]
    assert [line.split(":")[0].strip() for line in slowest] == ["d", "b", "c"]


def test_gates_are_only_ever_raised(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(f'# Why.\n\n[{CLASS}]\n"x vs y" = 2.00\n"z vs y" = 1.00\n')
    found, known = Gates.load(path), Gates.load(path).of(CLASS)
    ratios = {"x vs y": 2.1, "z vs y": 2.0, "new vs y": 1.5, "nan vs y": float("nan")}
    judgments = [Judgment(name, ratio, known.get(name)) for name, ratio in ratios.items()]
    judgments.append(Judgment("busy vs y", 50.0, None, busy=True))
    assert len(found.raise_to(CLASS, judgments)) == 2
    found.save(path)
    raised = '"new vs y" = 1.35\n"x vs y" = 2.00\n"z vs y" = 1.80\n'
    assert path.read_text() == f"# Why.\n\n[{CLASS}]\n{raised}"
    assert Gates.load(path).raise_to(CLASS, judgments) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ('[cpu-avx2-amd]\n"a vs b" = 1.0', "which no benchmark gives"),
        (
            '[cpu-avx2-amd]\n"model/forward vs diffuser" = 1.0',
            "did you mean 'model/forward vs diffusers'",
        ),
        ('[cpu-avx22-amd]\n"model/forward vs diffusers" = 1.0', "no class of devices"),
        ('[cpu-avx2-amd]\n"model/forward vs diffusers" = "fast"', "must be a positive number"),
        ('[cpu-avx2-amd]\n"model/forward vs diffusers" = nan', "must be a positive number"),
        ("[cpu-avx2-amd", "gates.toml"),
    ],
)
def test_bad_gates(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(content)
    with pytest.raises(GatesError, match=message):
        Gates.load(path).require_known(["model/forward vs diffusers"])


def test_a_gated_benchmark_that_did_not_run() -> None:
    found = Gates({CLASS: {"a vs p": 1.0, "b vs p": 1.0, "left out vs p": 1.0}})
    measured = [Judgment("a vs p", 2.0, 1.0)]
    assert found.not_run(CLASS, ["a vs p", "b vs p", "ungated vs p"], measured) == ["b vs p"]


def test_the_committed_gates_are_of_benchmarks_that_exist() -> None:
    catalogue = workloads.catalogue()
    assert {w.name.split("/")[0] for w in catalogue} == set(workloads.LAYERS)
    assert {w.device for w in catalogue} == {"cpu", "cuda"}
    Gates.load(gates.FILE).require_known(name for w in catalogue for name in w.figures())
    assert gates._DEVICE_CLASS.fullmatch(gates.device_class(CPU))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one operator for a moment; checked is the exit status, not the time."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "benchmarks" / "ops"),
        "-k",
        "gelu and forward",
    ]
    options = ["--device", "cpu", "--quick", "--seconds", "0.02", *arguments]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    """Run without gates, with one that holds, one that is missed and one of an unknown name."""
    path, device_class = tmp_path / "gates.toml", gates.device_class(CPU)
    name = "ops/gelu.tanh/1280x384/fp32/forward/native vs eager"

    def gated(text: str) -> subprocess.CompletedProcess[str]:
        path.write_text(text)
        return run("--gates", str(path))

    done = gated("# none\n")
    assert (
        done.returncode == 0 and "0 of 0 gates hold" in done.stdout and "no gate" in done.stdout
    ), done.stdout
    done = gated(f'[{device_class}]\n"{name}" = 1e-3\n')
    assert done.returncode == 0 and "1 of 1 gates hold" in done.stdout, done.stdout
    done = gated(f'[{device_class}]\n"{name}" = 1e6\n')
    assert done.returncode == 1 and f"MISSED: {name}" in done.stdout, done.stdout
    assert "the 3 slowest lines against their gates:" in done.stdout
    done = gated(f'[{device_class}]\n"{name}s" = 1.0\n')
    assert done.returncode == 4 and f"did you mean '{name}'" in done.stderr, done.stderr
