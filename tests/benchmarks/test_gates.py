"""The gates of the benchmarks, on benchmarks that are real and take a moment."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NAME, PEER = "ops/sum/small", "twice"
FIGURE = f"{NAME} vs {PEER}"
CLASS = "cpu-avx2-amd"


def workload(bench: SimpleNamespace, wrong: float = 0.0) -> object:
    """A sum, and a peer that does it eight times over: between 4 and 16 times as slow on any
    machine.
    """
    x = torch.ones(1 << 18)

    def ours() -> Tensor:
        return x.sum()

    def twice() -> Tensor:
        return torch.stack([x.sum() for _ in range(8)]).mean() + wrong

    def build(setting: object) -> object:
        return bench.workloads.Contest({"anyflow": ours, PEER: twice}, bytes=x.numel() * 4, flops=0)

    return bench.workloads.Workload(NAME, (PEER,), build)


def measure(
    bench: SimpleNamespace, tmp_path: Path, gates: dict[str, float], wrong: float = 0.0
) -> object:
    setting = bench.workloads.Setting(CPU, False, tmp_path)
    budget = bench.interleave.Budget(0.05)
    return bench.workloads.measure(
        workload(bench, wrong), setting, bench.limits.Limits(CPU), budget, gates
    )


def test_a_line_reports_what_was_measured(bench: SimpleNamespace, tmp_path: Path) -> None:
    line = measure(bench, tmp_path, {})
    assert 2 < line.ratios[PEER] < 32 and not line.again
    seconds = line.milliseconds / 1e3
    assert line.gigabytes_per_second == pytest.approx((1 << 20) / seconds / 1e9)
    assert line.teraflops_per_second is None and line.of_limit > 0 and line.rounds >= 5


def test_a_miss_is_measured_once_more(bench: SimpleNamespace, tmp_path: Path) -> None:
    held, missed = (measure(bench, tmp_path, {FIGURE: gate}) for gate in (0.01, 1e6))
    assert not held.again and missed.again
    gates = bench.gates.Gates({CLASS: {FIGURE: 1e6}})
    assert [j.missed for j in gates.judge(CLASS, [missed])] == [True]
    # On a machine of another class it has no gate, and neither holds nor misses it.
    (ungated,) = gates.judge("cpu-avx512-intel", [missed])
    assert ungated.gate is None and not ungated.missed
    text = bench.report.summary("cpu-avx512-intel", [ungated], [], [missed])
    assert "0 of 0 gates hold" in text and "1 ratios have no gate" in text
    assert "no gate" in bench.report.table([missed], [ungated])


def test_the_lower_of_two_lines(bench: SimpleNamespace, tmp_path: Path) -> None:
    """What ``--raise`` makes gates of: each ratio is one that both measurements reached."""
    line = measure(bench, tmp_path, {})
    first, second = (
        replace(line, ratios={"p": p, "q": 2.0}, busy=busy)
        for p, busy in ((3.0, False), (1.0, True))
    )
    assert first.lower(second).ratios == {"p": 1.0, "q": 2.0} and first.lower(second).busy
    assert not first.lower(first).busy


def test_a_busy_machine_tells_nothing_of_time(bench: SimpleNamespace, tmp_path: Path) -> None:
    """What is in memory is the same on it, and may become a gate."""
    line = replace(measure(bench, tmp_path, {}), ratios={"p": 1.0, "p, memory": 1.0}, busy=True)
    judgments = bench.gates.Gates({CLASS: {f"{NAME} vs p": 2.0}}).judge(CLASS, [line])
    assert [j.busy for j in judgments] == [True, False]
    assert "run it again" in bench.report.summary(CLASS, judgments, [], [line])
    assert bench.gates.Gates({}).raise_to(CLASS, judgments) == [
        f"{NAME} vs p, memory: no gate -> 0.90"
    ]


def test_what_is_wrong_is_not_timed(bench: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ours and twice differ by"):
        measure(bench, tmp_path, {}, wrong=100.0)
    nan = torch.full((3,), torch.nan)
    assert not bench.interleave.difference([nan], [torch.ones(3)]) <= 1e9


def test_a_summary_names_the_misses_and_the_three_slowest(bench: SimpleNamespace) -> None:
    ratios = {"a": 3.0, "b": 1.0, "c": 2.0, "d": float("nan"), "e": 9.0}
    judgments = [bench.gates.Judgment(name, ratio, 2.0) for name, ratio in ratios.items()]
    # at its gate c holds; NaN never does
    assert [j.name for j in judgments if j.missed] == ["b", "d"]
    lines = bench.report.summary(CLASS, judgments, ["gone"], []).splitlines()
    assert lines[0] == f"{CLASS}: 3 of 5 gates hold"
    assert (
        "NOT RUN, though it has a gate: gone" in lines
        and "MISSED: b is 1.00x, the gate is 2.00x" in lines
    )
    slowest = lines[lines.index("the 3 slowest lines against their gates:") + 1 :]
    assert [line.split(":")[0].strip() for line in slowest] == ["d", "b", "c"]


def test_gates_are_only_ever_raised(bench: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(f'# Why.\n\n[{CLASS}]\n"x vs y" = 2.00\n"z vs y" = 1.00\n')
    gates = bench.gates.Gates.load(path)
    found = {"x vs y": 2.1, "z vs y": 2.0, "new vs y": 1.5, "nan vs y": float("nan")}
    judgments = [
        bench.gates.Judgment(name, ratio, gates.of(CLASS).get(name))
        for name, ratio in found.items()
    ]
    judgments.append(bench.gates.Judgment("busy vs y", 50.0, None, busy=True))
    assert len(gates.raise_to(CLASS, judgments)) == 2
    gates.save(path)
    assert (
        path.read_text()
        == f'# Why.\n\n[{CLASS}]\n"new vs y" = 1.35\n"x vs y" = 2.00\n"z vs y" = 1.80\n'
    )
    assert bench.gates.Gates.load(path).raise_to(CLASS, judgments) == []


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
def test_bad_gates(bench: SimpleNamespace, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(content)
    with pytest.raises(bench.gates.GatesError, match=message):
        bench.gates.Gates.load(path).require_known(["model/forward vs diffusers"])


def test_a_gated_benchmark_that_did_not_run(bench: SimpleNamespace) -> None:
    gates = bench.gates.Gates({CLASS: {"a vs p": 1.0, "b vs p": 1.0, "left out vs p": 1.0}})
    measured = [bench.gates.Judgment("a vs p", 2.0, 1.0)]
    assert gates.not_run(CLASS, ["a vs p", "b vs p", "ungated vs p"], measured) == ["b vs p"]


def test_the_committed_gates_are_of_benchmarks_that_exist(bench: SimpleNamespace) -> None:
    workloads = bench.workloads.catalogue()
    assert {w.name.split("/")[0] for w in workloads} == set(bench.workloads.LAYERS)
    assert {w.device for w in workloads} == {"cpu", "cuda"}
    gates = bench.gates.Gates.load(bench.gates.FILE)
    gates.require_known(name for w in workloads for name in w.figures())
    assert bench.gates._DEVICE_CLASS.fullmatch(bench.gates.device_class(CPU))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One operator, for a moment; what is checked is the exit status, not the time."""
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
def test_from_the_command_line(bench: SimpleNamespace, tmp_path: Path) -> None:
    """A run without gates, one that raises them, one that misses, one with an unknown name."""
    path, device_class = tmp_path / "gates.toml", bench.gates.device_class(CPU)
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
