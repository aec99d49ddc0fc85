"""benchmarks/perf_docs.py: the page says what the results say, and nothing where there are none."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import perf_docs  # noqa: E402
from gpu.state import SCHEMA  # noqa: E402
from gpu.targets import FORWARD_GOAL_S  # noqa: E402


def timed(seconds: float, gib: float | None = None) -> dict[str, Any]:
    return {
        "ms": 1e3 * seconds,
        "peak_bytes": None if gib is None else gib * 2**30,
        "samples_ms": [1e3 * seconds],
    }


def results() -> dict[str, Any]:
    """A run that was cut short: 14B out of memory for diffusers, training never started."""
    beside = "ours, beside diffusers + compile"
    operator = {
        "op": "layer_norm_modulate",
        "bytes": {"forward": 2**30, "backward": 2**30},
        "forward": {
            "ms": {"triton": 0.25, "eager": 1.0, "compile": 0.5},
            "not_timed": {"native": "no native CUDA kernel"},
        },
        "backward": {"ms": {"triton": 0.5, "eager": 1.0, "compile": 0.5}},
    }
    data = {
        "limits": {"matmul_flops": 700e12, "copy_bytes_per_s": 5e12},
        "forward_1.3b": {
            "attention": {"ours": "cudnn", "torch": "flash"},
            "ours": timed(0.5, 4.0),
            "diffusers": timed(1.0, 8.0),
            beside: timed(0.55),
            "diffusers + compile": timed(0.66),
        },
        "forward_14b": {
            "ours": timed(2.5),
            "diffusers": {"error": "OutOfMemoryError: CUDA out of memory"},
        },
        "sampling_14b": {
            "ours NFE 4": timed(10.0, 30.0),
            "ours NFE 50": {**timed(125.0), "extrapolated": True, "source": "8 steps"},
        },
        "native": {
            "rms_norm_rope[rotary] L=32760": {"forward": {"ms": {"triton": 0.3, "native": 0.2}}}
        },
        "ops": {"layer_norm_modulate[bf16] L=32760 D=1536 R=1": operator},
    }
    sections = {
        name: {"status": "done", "reason": None, "data": entries} for name, entries in data.items()
    }
    sections["pretrain_1.3b"] = {
        "status": "skipped",
        "reason": "budget: about 50 s are needed, 7 s left",
    }
    head = {
        "schema": SCHEMA,
        "device": "Test GPU",
        "kind": "cuda",
        "tiny": False,
        "runs": [{"started": "2026-01-01"}],
    }
    return {**head, "environment": {"commit": "abc", "clean": True}, "sections": sections}


def write(folder: Path, data: dict[str, Any], name: str = "test-gpu.json") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(data))
    return folder


def row(page: str, start: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {start}"))


def make(folder: Path, tmp_path: Path, *more: str) -> int:
    return perf_docs.main(["--results", str(folder), "--docs", str(tmp_path / "docs"), *more])


def test_the_committed_page_is_up_to_date() -> None:
    assert perf_docs.main(["--check"]) == 0


def test_without_results_there_is_no_number(tmp_path: Path) -> None:
    assert make(tmp_path / "none", tmp_path) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "No GPU has been available to this project so far" in page
    targets = page[page.index("## Targets") : page.index("## The floor")]
    cells = [
        line.split("|")[3].strip() for line in targets.splitlines() if re.match(r"\| .*(≤|≥)", line)
    ]
    assert len(cells) == 14 and set(cells[:-1]) == {"not measured yet"} and cells[-1] == "not built"
    devices = page[page.index("## H100 SXM 80 GB") :]
    assert "## H200" in devices
    numbers = re.findall(r"\d+\.\d+ (?:s|GiB)|\d+\.\d+x", devices)
    floors = re.findall(r"\| (\d+\.\d+ s) \| not measured yet", devices)
    assert numbers == floors and len(floors) == 24  # nothing but floors


def test_limits_and_floors_of_both_cards_are_on_the_page(tmp_path: Path) -> None:
    """14B: 1678 TFLOP at 800 or 790 TFLOP/s, and 258 GB at 3.0 or 4.3 TB/s beside them."""
    assert make(tmp_path / "none", tmp_path) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert row(
        page,
        "H100 SXM 80 GB | 800 TFLOP/s | 3.0 TB/s | measured on one H100 SXM 80 GB with driver 580",
    )
    assert row(page, "H200 | 790 TFLOP/s | 4.3 TB/s | measured on H200s")
    norms = (
        40 * (19 * 32760 * 5120 * 2 + 4 * 32760 * 64 * 4 + 4 * 512 * 5120) + 3 * 32760 * 5120 * 2
    )
    cells = row(page[page.index("| 14B (14.32 B") :], "norms, rotary, residuals").split(" | ")
    assert cells[3:] == [
        f"{norms / 3e9:.2f}",
        "3.9%",
        "memory",
        f"{norms / 4.3e9:.2f}",
        "2.7%",
        "memory |",
    ]
    assert row(page, "14B, one forward | 2.184 s").endswith("| 2.184 s | 2.185 s |")
    assert row(page, "14B, the target of 2.35 s / the floor").endswith("| 1.08x | 1.08x |")
    # (2.35 s - everything but self-attention) of 879 TFLOP
    needed = [879.18 / (2.35 - floor) for floor in (2.1843 - 1.0990, 2.1847 - 1.1129)]
    assert row(page, "14B, self-attention").endswith(
        "".join(f"| {rate:.0f} TFLOP/s " for rate in needed) + "|"
    )


def test_others_figures_are_called_theirs(tmp_path: Path) -> None:
    make(tmp_path / "none", tmp_path)
    page = (tmp_path / "docs" / "performance.md").read_text()
    anchors = page[
        page.index("### Anchors: others' published figures") : page.index("## The floor")
    ]
    assert "nothing in\nthis project measured them" in anchors
    rows = [line.split(" | ") for line in anchors.splitlines() if re.match(r"\| (14B|1.3B) ", line)]
    assert [cells[1:4] for cells in rows] == [
        ["2.57 s", "H200", "SGLang"],
        ["2.59 s", "H100", "LightX2V"],
        ["0.48 s", "not given", "SGLang"],
        ["0.52 s", "H100", "FlashDreams"],
    ]
    assert min(2.57, 2.59) > FORWARD_GOAL_S["14B"] and min(0.48, 0.52) > FORWARD_GOAL_S["1.3B"]


def test_tiny_and_cpu_runs_are_no_evidence(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", results() | {"tiny": True}, "a.json")
    write(folder, results() | {"kind": "cpu"}, "b.json")
    write(folder, {"schema": "of something else"}, "c.json")
    assert perf_docs.load(folder) == []


def test_cells_hold_what_was_measured(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", results())
    assert make(folder, tmp_path) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert "No GPU has been available" not in page and "Measured so far on: Test GPU." in page
    assert row(page, "1.3B, one forward").endswith("| 0.500 s, **missed** |")
    assert row(page, "1.3B, diffusers eager / ours").endswith("| 2.00x, reached |")
    # beside each other
    assert row(page, "1.3B, diffusers + compile / ours").endswith("| 1.20x, **missed** |")
    assert row(page, "14B, one forward").endswith("| 2.500 s, **missed** |")
    # no attention in this run
    assert row(page, "14B, one forward / its floor").endswith("| not measured yet |")
    assert row(page, "14B, 50 steps").endswith("| 125.000 s (extrapolated), reached |")
    assert row(page, "14B, peak memory").endswith("| 32.2 GB (30.0 GiB), reached |")
    assert row(page, "1.3B pretrain step").endswith("| budget: about 50 s are needed, 7 s left |")
    # 2^30 bytes in 0.25 ms of 5 TB/s
    assert row(page, "fused operators, forward").endswith("| 86%, reached |")
    assert row(page, "fused operators, backward").endswith("| 43%, **missed** |")
    operator = "| layer_norm_modulate[bf16] L=32760 D=1536 R=1"
    assert f"{operator} | forward | 0.2500 | 4295 | 86% | 4.00x | 2.00x | none |" in page
    assert f"{operator} | backward | 0.5000 | 2147 | 43% | 2.00x | 1.00x |  |" in page
    assert "| rms_norm_rope[rotary] L=32760 | 0.2000 | 0.3000 | 1.50x |" in page
    assert "| 14B | 2.500 s | out of memory | out of memory |" in page
    assert "ours runs attention on `cudnn`, diffusers on torch's choice, `flash`" in page
    assert "700 TFLOP/s" in page and "5.00 TB/s" in page
    floor = row(page, "1.3B | 0.500 s").split("|")[7].strip()
    assert floor == "0.416 s"  # at the limits of that run


def test_a_page_or_a_plot_that_is_not_the_results_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, docs = write(tmp_path / "r", results()), tmp_path / "docs"
    assert make(folder, tmp_path, "--check") == 1
    make(folder, tmp_path)
    assert make(folder, tmp_path, "--check") == 0
    page = docs / "performance.md"
    page.write_text(page.read_text().replace("0.500 s", "0.400 s"))
    capsys.readouterr()
    assert make(folder, tmp_path, "--check") == 1
    assert capsys.readouterr().out == f"out of date: {page}; run `make perf-docs`\n"
    make(folder, tmp_path)
    changed = results()
    # in no cell, but a plot might show it
    changed["sections"]["forward_14b"]["data"]["ours"]["samples_ms"] = [2499.0]
    write(folder, changed)
    assert (
        make(folder, tmp_path, "--check") == 1
        and "performance_test_gpu.png" in capsys.readouterr().out
    )
