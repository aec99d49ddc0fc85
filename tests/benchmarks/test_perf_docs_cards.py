"""benchmarks/perf_docs.py on made-up runs of an H100 and an H200: each card's limits, targets and
further tables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import perf_docs
from gpu import device_tables, plots, roofline, tables, targets
from gpu.results import Results
from gpu.sizes import PUBLISHED
from gpu.state import SCHEMA

TOKENS, DIM = 32760, 5120


def results(device: str, data: dict[str, dict[str, Any]]) -> Results:
    """A run of made-up numbers."""
    sections = {
        name: {"status": "done", "reason": None, "data": entries} for name, entries in data.items()
    }
    head = {
        "schema": SCHEMA,
        "device": device,
        "kind": "cuda",
        "tiny": False,
        "runs": [{"started": "2026-01-01"}],
    }
    return Results(device, {**head, "environment": {}, "sections": sections})


def attention(rate: float, keys: int) -> dict[str, Any]:
    """A call at 14B whose fastest kernel runs at a rate."""
    flops = 4.0 * TOKENS * keys * DIM
    return {"flops": flops, "ms": {"slow": 2e3 * flops / rate, "fast": 1e3 * flops / rate}}


def run(
    device: str, limits: tuple[float, float], rates: dict[str, float], seconds: float
) -> Results:
    keys = {"self": TOKENS, "text": 512}
    data = {
        "limits": {"matmul_flops": limits[0], "copy_bytes_per_s": limits[1]},
        "forward_14b": {"ours": {"ms": 1e3 * seconds}},
        "attention": {
            f"14B {name} forward": attention(rate, keys[name]) for name, rate in rates.items()
        },
    }
    return results(device, data)


H100 = run("NVIDIA H100 80GB HBM3", (750e12, 2.5e12), {"self": 500e12}, 3.1)
H200 = run("NVIDIA H200", (790e12, 4.3e12), {"self": 700e12, "text": 400e12}, 2.4)


def cell(device: Results, start: str) -> str:
    lines = tables.targets([device])
    return (
        next(line for line in lines if line.startswith(f"| {start} |"))
        .split(" | ")[2]
        .removesuffix(" |")
    )


def by_hand(limits: tuple[float, float], own: float, text: float) -> float:
    """Seconds of 14B: attention, text's attention, linear layers, norms; the embeddings are less
    than a millisecond.
    """
    products = 40 * 2 * (TOKENS * (6 * DIM**2 + 2 * DIM * 13824) + 2 * 512 * DIM**2)
    block = 19 * TOKENS * DIM * 2 + 4 * TOKENS * 64 * 4 + 4 * 512 * DIM
    norms = 40 * block + 3 * TOKENS * DIM * 2
    both = 40 * 4 * TOKENS * DIM * (TOKENS / own + 512 / text)
    return both + products / limits[0] + norms / limits[1]


def test_the_floor_by_measured_rates() -> None:
    """Without a measurement of the text's attention, it runs at the rate of a product."""
    expected = {
        "H100": by_hand((750e12, 2.5e12), 500e12, 750e12),
        "H200": by_hand((790e12, 4.3e12), 700e12, 400e12),
    }
    assert targets.measured_floor_s(H100, "14B") == pytest.approx(expected["H100"], abs=1e-3)
    assert targets.measured_floor_s(H200, "14B") == pytest.approx(expected["H200"], abs=1e-3)
    assert expected["H100"] == pytest.approx(2.927, abs=1e-3) and expected["H200"] == pytest.approx(
        2.345, abs=1e-3
    )
    assert targets.measured_floor_s(H100, "1.3B") is None


def test_the_second_form_of_a_target_counts_where_the_first_is_impossible() -> None:
    near = "14B, one forward / its floor by the rates measured in the run"
    reason = "(impossible at the measured rates, whose floor is 2.928 s: the next row counts)"
    assert cell(H100, "14B, one forward") == f"3.100 s, **missed** {reason}"
    assert cell(H100, near) == "1.06x, reached (floor 2.928 s)"
    slow = run(H100.name, (750e12, 2.5e12), {"self": 500e12}, 3.2)
    assert cell(slow, near) == "1.09x, **missed** (floor 2.928 s)"
    assert cell(H200, "14B, one forward") == "2.400 s, **missed**"
    assert cell(H200, near).endswith("(floor 2.345 s: 2.35 s is possible, the row before counts)")
    fast = run(H200.name, (790e12, 4.3e12), {"self": 700e12}, 2.349)
    assert cell(fast, "14B, one forward") == "2.349 s, reached"


def test_what_a_run_measured_comes_before_its_cards_limits() -> None:
    measured = H100.limits
    assert measured is not None and (measured.flops, measured.bandwidth) == (750e12, 2.5e12)
    assert results("NVIDIA H100 80GB HBM3", {}).limits is roofline.H100
    assert results("NVIDIA H200", {}).limits is roofline.H200
    unknown = results("NVIDIA H100 PCIe", {"forward_14b": {"ours": {"ms": 5000.0}}})
    assert unknown.limits is None
    row = next(line for line in tables.forwards(unknown) if line.startswith("| 14B |"))
    assert "5.000 s" in row and row.split(" | ")[6:8] == ["not measured yet", ""]
    assert "the card is not known: there are no floors" in tables.run_of(unknown)[0]
    assert "those of an H200 above" in tables.run_of(results("NVIDIA H200", {}))[0]


def test_a_share_of_the_copy_is_of_the_same_runs_copy() -> None:
    entry = {"op": "gelu", "bytes": {"forward": 2**30}, "forward": {"ms": {"triton": 0.5}}}
    assert targets.share_of_copy(results("NVIDIA H200", {}), entry, "forward") is None
    assert targets.share_of_copy(H100, entry, "forward") == pytest.approx(2**30 / 0.5e-3 / 2.5e12)


def test_the_limit_of_memory_is_the_fastest_large_copy() -> None:
    """A copy of GiB may be slow, and one that fits into a cache says nothing of memory."""
    data = {
        "limits": {
            "matmul_flops": 7e14,
            "matmul": {"samples_ms": [1.0, 1.2, 1.2]},
            "copy_bytes_per_s": 2.5e12,
            "copy": {"bytes": 2e9},
            "copy: 320 MiB, by a kernel": {"bytes": 6e8, "ms": 0.15},
        },
        "probes": {
            "copy: 32 MiB": {"bytes": 6e7, "ms": 0.012},
            "copy: 320 MiB": {"bytes": 6e8, "ms": 0.2},
        },
        "ops": {
            "gelu": {
                "op": "gelu",
                "bytes": {"forward": 1e9},
                "forward": {"ms": {"compile": 0.24, "triton": 0.5}},
            }
        },
    }
    device = results("NVIDIA H200", data)
    assert device.copies == pytest.approx({6e7: 5e12, 6e8: 4e12, 2e9: 2.5e12})
    assert device.measured is not None and device.measured.bandwidth == pytest.approx(4e12)
    text = tables.limits_of(device)
    assert "60 MB at 5.00 TB/s, 600 MB at 4.00 TB/s, 2000 MB at 2.50 TB/s." in text
    assert "Smaller copies are slower" not in text
    assert "gelu forward by torch.compile moves its 1000 MB at 4.17 TB/s, 104% of it." in text
    assert "840 TFLOP/s in its fastest round and at 700 in the median one" in text
    data["probes"]["copy: 32 MiB"]["ms"] = 0.02
    assert "Smaller copies are slower" in tables.limits_of(device)


def test_the_whole_page_with_both_cards(tmp_path: Path) -> None:
    """H100's floor at 750 TFLOP/s and 2.5 TB/s, H200's at its own; `--check` agrees with what was
    written.
    """
    folder, docs = tmp_path / "results", tmp_path / "docs"
    folder.mkdir()
    for device in (H100, H200):
        (folder / f"{device.file_name}.json").write_text(json.dumps(device.data))
    assert perf_docs.main(["--results", str(folder), "--docs", str(docs)]) == 0
    assert perf_docs.main(["--results", str(folder), "--docs", str(docs), "--check"]) == 0
    page = (docs / "performance.md").read_text()
    assert "Measured so far on: NVIDIA H100 80GB HBM3, NVIDIA H200." in page
    assert "| what | target | NVIDIA H100 80GB HBM3 | NVIDIA H200 |" in page
    for device in (H100, H200):
        part = page[page.index(f"## {device.name}") :]
        row = next(line for line in part.splitlines() if line.startswith("| 14B | ")).split(" | ")
        assert device.limits is not None
        floor = roofline.forward_floor_s(PUBLISHED["14B"], device.limits)
        assert (
            row[6] == f"{floor:.3f} s"
            and row[7] == f"{device.number('forward_14b', 'ours') / 1e3 / floor:.2f}x"
        )
        assert (docs / "images" / perf_docs.plot_name(device)).exists()


def test_a_plot_without_limits_has_no_floor(tmp_path: Path) -> None:
    plots.device(results("NVIDIA H100 PCIe", {}))(tmp_path / "plot.png", "key")
    assert plots.key_of(tmp_path / "plot.png") == "key"


# Checks, launch options, probes -------------------------------------------------------------------

CHECKS = {
    "layer_norm_modulate 32760x1536 R=1": {
        "ok": True,
        "error": 1e-3,
        "limit": 4e-3,
        "problem": None,
    },
    "gated_residual 32760x5120 R=1": {"ok": False, "error": 8e-3, "limit": 4e-3, "problem": None},
    "a network, bf16 against fp32": {
        "ok": False,
        "error": None,
        "limit": 2e-2,
        "problem": "NaN | in\nthe output",
    },
}


def test_checks_and_their_alarm() -> None:
    device = results(
        "NVIDIA H200", {"checks": {"outcomes": CHECKS, "wrong": {"gated_residual": ["triton"]}}}
    )
    lines = device_tables.checks(device)
    assert lines[0] == "1 of 3 checks passed."
    assert lines[4:] == [
        "| gated_residual 32760x5120 R=1 | **failed**: over its limit | 8.0e-03 | 4.0e-03 | 2.00 |",
        "| a network, bf16 against fp32 | **failed**: NaN / in the output |  | 2.0e-02 |  |",
        "| layer_norm_modulate 32760x1536 R=1 | ok | 1.0e-03 | 4.0e-03 | 0.25 |",
    ]
    page = perf_docs.page([device])
    top = page[page.index("## NVIDIA H200") :].splitlines()[2]
    assert top.startswith(
        "> **WRONG: a network computed something else on this device (a network, bf16"
    )
    assert "> **Failed checks of kernels: gated_residual 32760x5120 R=1." in page
    right = results(
        "NVIDIA H200",
        {"checks": {"outcomes": {"a network": {"ok": True, "error": 0.0, "limit": 1.0}}}},
    )
    assert (
        device_tables.alarms(right) == [] and device_tables.alarms(results("NVIDIA H200", {})) == []
    )
    assert right.data is not None
    right.data["warnings"] = ["gradients of a network: NaN"]  # of an earlier run of the section
    assert (
        "**WRONG: a network computed something else on this device (gradients of a network: NaN).**"
        in (device_tables.alarms(right)[0])
    )


def test_launch_options() -> None:
    task = {
        "bytes": 2**28,
        "today_ms": 0.2,
        "best_ms": 0.16,
        "best": "pair 4 64",
    }
    data = {
        "copy_bytes_per_s": 2.5e12,
        "tasks": {"rms_norm_rope backward": task, "gelu": {"error": "no | launch"}},
    }
    # those of the run, not the tuner's own copy
    limits = {"matmul_flops": 7e14, "copy_bytes_per_s": 2.0e12}
    lines = device_tables.tune_rows(results("NVIDIA H200", {"limits": limits, "tune_rows": data}))
    assert lines == device_tables.tune_rows(
        results("NVIDIA H200", {"limits": limits, "tune_rows": {"tune_rows": data}})
    )
    assert (
        lines[2] == "| rms_norm_rope backward | 0.2000 | 67% | 0.1600 | 84% | 1.25x | pair 4 64 |"
    )
    assert lines[3] == "| gelu | no / launch |  |  |  |  |  |"


def test_probes_and_padding() -> None:
    plain, more = (
        f"attention 14B: cudnn, {tokens} tokens, [B, L, H, Dh] in memory"
        for tokens in (32760, 32768)
    )
    heads_first = plain.replace("[B, L, H, Dh]", "[B, H, L, Dh]")
    data = {
        plain: {"ms": 40.0, "flops": 24e12, "tokens": 32760},
        heads_first: {"ms": 38.0, "flops": 24e12, "tokens": 32760, "against": plain},
        more: {"ms": 39.0, "flops": 24e12, "tokens": 32768, "against": plain},
        "attention 14B: flash, 32760 tokens, [B, L, H, Dh] in memory": {
            "error": "RuntimeError: no kernel"
        },
        "copy: 32 MiB": {"ms": 0.02, "bytes": 2.0**26},
        "feed-forward 14B": {"skipped": "budget"},
    }
    device = results("NVIDIA H200", {"probes": data})
    lines = device_tables.probes(device)
    assert lines[2] == f"| {plain} | 40.0000 | 600 TFLOP/s |  |  |"
    assert lines[3].endswith("| cudnn, 32760 tokens, [B, L, H, Dh] in memory | 0.950x |")
    assert lines[5].endswith("| RuntimeError: no kernel |  |  |  |")
    assert lines[6] == "| copy: 32 MiB | 0.0200 | 3355 GB/s |  |  |"
    assert lines[7] == "| feed-forward 14B | budget |  |  |  |"
    # no other pair differs in tokens
    assert device_tables.padding(device)[2:] == [f"| {more} | 0.0 % | -2.5 % |"]


def test_every_padded_probe_has_a_prediction() -> None:
    for network in PUBLISHED:
        for name in (
            "attention {}: cudnn",
            "feed-forward {}: product",
            "q, k, v {}: apart",
            "q, k, v {}: in one",
        ):
            assert device_tables.predicted(name.format(network)) == "0.0 %"
    assert device_tables.percent(0.0042) == "+0.4 %" and device_tables.percent(-1e-5) == "0.0 %"
