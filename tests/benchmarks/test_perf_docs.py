"""Test that docs/performance.md says what results say, and why where they are lacking."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import perf_docs
import pytest
from gpu.state import SCHEMA
from page import tables, targets
from page.results import RunResults, load

TOKENS, DIM = 32760, 5120


def results(device: str, data: dict[str, dict[str, Any]]) -> RunResults:
    """Return a run of made-up numbers."""
    done = {"status": "done", "reason": None}
    sections = {name: {**done, "data": entries} for name, entries in data.items()}
    head = {"schema": SCHEMA, "device": device, "kind": "cuda", "tiny": False, "environment": {}}
    runs = [{"started": "2026-01-01"}]
    return RunResults(device, {**head, "runs": runs, "sections": sections})


def timed(seconds: float, gib: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"ms": 1e3 * seconds, "peak_bytes": gib * 2**30 if gib else None, **more}


def cut_short() -> RunResults:
    """Return a run in which 14B was out of memory for diffusers, and training never started."""
    forward = {"triton": 0.25, "eager": 1.0, "compile": 0.5}
    operator = {
        "op": "layer_norm_modulate",
        "bytes": {"forward": 2**30, "backward": 2**30},
        "forward": {"ms": forward, "not_timed": {"native": "no native CUDA kernel"}},
        "backward": {"ms": forward | {"triton": 0.5}},
    }
    forward_1_3b = {
        "attention": {"ours": "cudnn", "torch": "flash"},
        "ours": timed(0.5, 4.0),
        "diffusers": timed(1.0, 8.0),
        "ours, beside diffusers + compile": timed(0.55),
        "diffusers + compile": timed(0.66),
    }
    out_of_memory = {"error": "OutOfMemoryError: CUDA out of memory"}
    sampling = {"ours NFE 4": timed(10.0, 30.0), "ours NFE 50": timed(125.0, extrapolated=True)}
    native = {"forward": {"ms": {"triton": 0.3, "native": 0.2}}}
    found = results(
        "Test GPU",
        {
            "limits": {"matmul_flops": 700e12, "copy_bytes_per_s": 5e12},
            "forward_1.3b": forward_1_3b,
            "forward_14b": {"ours": timed(2.5), "diffusers": out_of_memory},
            "sampling_14b": sampling,
            "native": {"rms_norm_rope[rotary]": native},
            "ops": {"layer_norm_modulate[bf16] L=32760 D=1536 R=1": operator},
        },
    )
    reason = "budget: about 50 s are needed, 7 s left"
    found.data["sections"]["pretrain_1.3b"] = {"status": "skipped", "reason": reason}
    return found


def line_of(page: str, start: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| {start}"))


def test_the_committed_page_is_up_to_date() -> None:
    assert perf_docs.main(["--check"]) == 0


def test_tiny_and_cpu_runs_are_no_evidence(tmp_path: Path) -> None:
    for name, changed in (("a", {"tiny": True}), ("b", {"kind": "cpu"}), ("c", {"schema": "x"})):
        (tmp_path / f"{name}.json").write_text(json.dumps(cut_short().data | changed))
    assert load(tmp_path) == []


def test_cells_hold_what_was_measured() -> None:
    page = perf_docs.page([cut_short()])
    assert "Measured so far on: Test GPU." in page
    goals = page[page.index("## Targets") : page.index("### Anchors")].splitlines()
    assert sum(bool(re.match(r"\| .*(≤|≥)", line)) for line in goals) == 15
    ends = {
        "1.3B, one forward": "0.500 s, **missed**",
        "1.3B, diffusers eager / ours": "2.00x, reached",
        "1.3B, diffusers + compile / ours": "1.20x, **missed**",  # beside each other
        "14B, one forward": "2.500 s, **missed**",
        "14B, one forward / its floor": "not measured yet",  # no attention in this run
        "14B, 50 steps": "125.000 s (extrapolated), reached",
        "14B, peak memory": "32.2 GB (30.0 GiB), reached",
        "1.3B pretrain step": "budget: about 50 s are needed, 7 s left",
        # 2^30 bytes in 0.25 ms of 5 TB/s
        "fused operators, forward": "86%, reached",
        "fused operators, backward": "43%, **missed**",
    }
    for start, end in ends.items():
        assert line_of(page, start).endswith(f"| {end} |"), start
    operator = "| layer_norm_modulate[bf16] L=32760 D=1536 R=1"
    assert f"{operator} | forward | 0.2500 | 4295 | 86% | 4.00x | 2.00x | none |" in page
    assert f"{operator} | backward | 0.5000 | 2147 | 43% | 2.00x | 1.00x |  |" in page
    assert "| rms_norm_rope[rotary] | 0.2000 | 0.3000 | 1.50x |" in page
    assert "| 14B | 2.500 s | out of memory | out of memory |" in page
    assert "ours runs attention on `cudnn`, diffusers on torch's choice, `flash`" in page
    # the floor at the limits of that run
    assert line_of(page, "1.3B | 0.500 s").split("|")[7].strip() == "0.416 s"


def test_a_causal_run_is_listed_where_there_is_one() -> None:
    """Test a chunk of the two steps' video by hand: 12 frames in 40 + 80 ms; floors of the run."""
    chunks = [{"encode_ms": 0.0, "evaluate_ms": 20.0}, {"encode_ms": 40.0, "evaluate_ms": 80.0}]
    step = "step of the last chunk"
    data = {
        "limits": {"matmul_flops": 700e12, "copy_bytes_per_s": 5e12},
        "causal_1.3b": {
            "ours NFE 1": timed(1.62, 7.0, fps=50.0),
            "ours NFE 2": timed(2.7, 7.5, fps=30.0, chunks=chunks),
            "ours NFE 4": {"error": "OutOfMemoryError: CUDA out of memory"},
            "caches on the host NFE 2": timed(3.24, 5.0, fps=25.0),
            "caches on the host: the same bits": True,
            "cache": {
                "predicted_bytes": 2**31,
                "kept_bytes": 2**31,
                "allocated_bytes": 3 * 2**30,
            },
            "with decoding, chunk by chunk NFE 2": timed(5.4, fps=15.0),
            "ours, compiled blocks NFE 2": {"skipped": "not in the short plan"},
            f"{step}: launched": {"ms": 110.0},
            f"{step}: until enqueued": {"ms": 105.0},
            f"{step}: CUDA graph": {"ms": 45.0},
        },
    }
    page = perf_docs.page([results("Test GPU", data)])
    what = "1.3B causal, 2 steps for each chunk: frames in a second of transformer time"
    assert line_of(page, what).endswith("| 30.0/s, reached |")
    resident = line_of(page, "caches resident | 2")
    assert resident.startswith("| caches resident | 2 | 2.700 s | 30.0 | 0.8")
    assert resident.endswith("x | 7.5 GiB |")
    assert "| caches resident | 4 | out of memory | out of memory |" in page
    assert "| compiled blocks | 2 | not in the short plan |" in page
    assert line_of(page, "with decoding, chunk by chunk").startswith(
        "| with decoding, chunk by chunk | 2 | 5.400 s | 15.0 |  |  |"
    )
    assert "| 1 | 3 | 1560 | 40.0 | 80.0 | 39.9 | 100.0 |" in page
    assert "- Caches: 2.00 GiB predicted, 2.00 GiB kept, 3.00 GiB allocated with all else." in page
    assert f"- One {step}: launched 110.0 ms, until enqueued 105.0 ms, CUDA graph 45.0 ms." in page
    assert "- Caches on the host: the same video to the bit, in 1.20 times the time." in page
    assert "caches resident" not in perf_docs.page([cut_short()])


def test_causal_training_is_listed_where_it_was_measured() -> None:
    compiled = "peers' formulation + compile"
    data = {
        "pretrain_causal_1.3b": {
            "ours": timed(2.0, 20.0),
            "peers' formulation": timed(5.0, 50.0),
            compiled: timed(3.0, 25.0),
            f"ours, beside {compiled}": timed(2.5, 20.0),
        },
    }
    page = perf_docs.page([results("Test GPU", data)])
    assert line_of(page, "peers' formulation, dense mask").endswith(
        "| 5.000 s | 2.50x | 50.0 GiB | 0.40x |"
    )
    assert line_of(page, "the same, compiled flex attention").endswith(
        "| 3.000 s | 1.20x | 25.0 GiB | 0.80x |"
    )
    assert "causal pretrain step" not in perf_docs.page([cut_short()])


def test_a_page_that_is_not_the_results_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(cut_short().data))
    page, image = tmp_path / "performance.md", tmp_path / "images" / "performance_test_gpu.png"
    command = ["--results", str(tmp_path), "--docs", str(tmp_path)]
    assert perf_docs.main([*command, "--check"]) == 1
    assert perf_docs.main(command) == 0 and image.exists()
    assert perf_docs.main([*command, "--check"]) == 0
    page.write_text(page.read_text().replace("0.500 s", "0.400 s"))
    capsys.readouterr()
    assert perf_docs.main([*command, "--check"]) == 1
    assert capsys.readouterr().out == f"out of date: {page}; run `make perf-docs`\n"


# Floors -------------------------------------------------------------------------------------------


def card(limits: tuple[float, float], rates: dict[str, float], seconds: float) -> RunResults:
    """Return a run with a forward at 14B and the rates of its fastest attention kernels."""
    data: dict[str, dict[str, Any]] = {
        "limits": {"matmul_flops": limits[0], "copy_bytes_per_s": limits[1]},
        "forward_14b": {"ours": {"ms": 1e3 * seconds}},
        "attention": {},
    }
    for name, rate in rates.items():
        flops = 4.0 * TOKENS * {"self": TOKENS, "text": 512}[name] * DIM
        times = {"slow": 2e3 * flops / rate, "fast": 1e3 * flops / rate}
        data["attention"][f"14B {name} forward"] = {"flops": flops, "ms": times}
    return results("NVIDIA H200", data)


def cell(device: RunResults, start: str) -> str:
    line = line_of("\n".join(targets.table_of([device])), f"{start} |")
    return line.split(" | ")[2].removesuffix(" |")


def test_the_second_form_of_a_target_counts_where_the_first_is_impossible() -> None:
    """Test the floor by measured rates; the text's attention has a product's where it has none.

    By hand: 879.2 TFLOP of self-attention, 13.7 of the text's, 785.5 of products, 258 GB.
    """
    slow = card((750e12, 2.5e12), {"self": 500e12}, 3.1)
    fast = card((790e12, 4.3e12), {"self": 700e12, "text": 400e12}, 2.4)
    near = "14B, one forward / its floor by the rates measured in the run"
    floor = 879.2 / 500 + (13.7 + 785.5) / 750 + 257.7 / 2500
    assert targets.measured_floor_s(slow, "14B") == pytest.approx(floor, abs=2e-3)
    assert targets.measured_floor_s(slow, "1.3B") is None
    reason = "(impossible at the measured rates, whose floor is 2.928 s: the next row counts)"
    assert cell(slow, "14B, one forward") == f"3.100 s, **missed** {reason}"
    assert cell(slow, near) == "1.06x, reached (floor 2.928 s)"
    assert cell(fast, "14B, one forward") == "2.400 s, **missed**"
    assert cell(fast, near).endswith("(floor 2.345 s: 2.35 s is possible, the row before counts)")


def test_the_limit_of_memory_is_the_fastest_large_copy() -> None:
    """Test that copies that fit into a cache, and slower ones of as many bytes, are no limit."""
    large = {"copy: 320 MiB, by a kernel": {"bytes": 6e8, "ms": 0.15}}
    others = {
        "copy: 32 MiB": {"bytes": 6e7, "ms": 0.01},
        "copy: 320 MiB": {"bytes": 6e8, "ms": 0.2},
    }
    data = {"limits": {"matmul_flops": 7e14, **large}, "probes": others}
    limits = results("NVIDIA H200", data).limits
    assert limits is not None and limits.bandwidth == pytest.approx(4e12)


def test_checks_and_their_alarm() -> None:
    wrong = {"ok": False, "limit": 4e-3}
    outcomes = {
        "layer_norm_modulate": {"ok": True, "error": 1e-3, "limit": 4e-3, "problem": None},
        "gated_residual": wrong | {"error": 8e-3, "problem": None},
        "a network, bf16": wrong | {"error": None, "problem": "NaN | in\nthe output"},
    }
    device = results("NVIDIA H200", {"checks": {"outcomes": outcomes}})
    lines = tables.checks(device)
    assert lines[0] == "1 of 3 checks passed." and lines[4:] == [
        "| gated_residual | **failed**: over its limit | 8.0e-03 | 4.0e-03 | 2.00 |",
        "| a network, bf16 | **failed**: NaN / in the output |  | 4.0e-03 |  |",
        "| layer_norm_modulate | ok | 1.0e-03 | 4.0e-03 | 0.25 |",
    ]
    page = perf_docs.page([device])
    top = page[page.index("## NVIDIA H200") :].splitlines()[2]
    assert top.startswith("> **WRONG: a network computed something else on this device (a network")
    assert "> **Failed checks of kernels: gated_residual." in page
    right = results("NVIDIA H200", {})
    assert tables.alarms(right) == []
    right.data["warnings"] = ["gradients of a network: NaN"]  # of an earlier run of the section
    assert "else on this device (gradients of a network: NaN).**" in tables.alarms(right)[0]
