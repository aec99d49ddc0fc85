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
    text = report.summary("cpu-avx512-intel", [ungated], [])
    assert "0 of 0 gates hold" in text and "1 ratios have no gate" in text
    assert "no gate" in report.table([missed], [ungated])


def test_a_busy_machine_tells_nothing_of_time(tmp_path: Path) -> None:
    """Test that ``--raise`` takes what two measurements reached, and memory in any case."""
    line = replace(measure(tmp_path, {}), ratios={"p": 1.0, "p, memory": 3.0}, busy=True)
    line = line.lower(replace(line, ratios={"p": 3.0, "p, memory": 1.0}, busy=False))
    judgments = Gates({CLASS: {f"{NAME} vs p": 2.0}}).judge(CLASS, [line])
    assert [j.busy for j in judgments] == [True, False]
    assert "run it again" in report.summary(CLASS, judgments, [])
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
    found = Gates({CLASS: {"gone": 1.0, "a": 2.0, "left out": 1.0}})
    not_run = found.not_run(CLASS, ["a", "gone", "ungated"], judgments)
    lines = report.summary(CLASS, judgments, not_run).splitlines()
    assert lines[0] == f"{CLASS}: 3 of 5 gates hold"
    assert "NOT RUN, though it has a gate: gone" in lines
    assert "MISSED: b is 1.00x, the gate is 2.00x" in lines
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
    ("content", "message"),
    [
        ('[cpu-avx2-amd]\n"a vs b" = 1.0', "which no benchmark gives"),
        ('[cpu-avx2-amd]\n"x/y vs diffuser" = 1.0', "did you mean 'x/y vs diffusers'"),
        ('[cpu-avx22-amd]\n"x/y vs diffusers" = 1.0', "no class of devices"),
        ('[cpu-avx2-amd]\n"x/y vs diffusers" = "fast"', "must be a positive number"),
        ('[cpu-avx2-amd]\n"x/y vs diffusers" = nan', "must be a positive number"),
        ("[cpu-avx2-amd", "gates.toml"),
    ],
)
def test_bad_gates(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(content)
    with pytest.raises(GatesError, match=message):
        Gates.load(path).require_known(["x/y vs diffusers"])


def test_the_committed_gates_are_of_benchmarks_that_exist() -> None:
    catalogue = workloads.catalogue()
    assert {w.name.split("/")[0] for w in catalogue} == set(workloads.LAYERS)
    assert {w.device for w in catalogue} == {"cpu", "cuda"}
    Gates.load(gates.FILE).require_known(name for w in catalogue for name in w.figures())
    assert gates._DEVICE_CLASS.fullmatch(gates.device_class(CPU))


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    """Run one operator for a moment with each kind of gate: checked is the exit status."""
    path, device_class = tmp_path / "gates.toml", gates.device_class(CPU)
    name = "ops/gelu.tanh/1280x384/fp32/forward/native vs eager"
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks" / "ops")]
    command += ["-k", "gelu and forward", "--device", "cpu", "--quick", "--seconds", "0.02"]
    for text, status, said in (
        ("# none\n", 0, "0 of 0 gates hold"),
        (f'[{device_class}]\n"{name}" = 1e-3\n', 0, "1 of 1 gates hold"),
        (f'[{device_class}]\n"{name}" = 1e6\n', 1, f"MISSED: {name}"),
        (f'[{device_class}]\n"{name}s" = 1.0\n', 4, f"did you mean '{name}'"),
    ):
        path.write_text(text)
        gated = [*command, "--gates", str(path)]
        done = subprocess.run(gated, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status and said in done.stdout + done.stderr, done
