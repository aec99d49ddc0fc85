"""benchmarks/gpu/probes.py on a CPU and tiny shapes: every probe runs, each is recorded, an error
is a result.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import probes
from gpu.context import Context, Skip
from gpu.probes import Probe
from gpu.sizes import TINY
from gpu.state import RunFile


@pytest.fixture
def context(tmp_path: Path) -> Context:
    file = RunFile(tmp_path / "cpu-tiny.json", {"runs": [{}], "sections": {}})
    return Context(torch.device("cpu"), True, file, time.monotonic() + 1000, "probes")


def test_every_probe_is_recorded(context: Context) -> None:
    probes.run_probes(context)
    found = json.loads(context.file.path.read_text())["sections"]["probes"]["data"]
    without = {name: entry for name, entry in found.items() if "ms" not in entry}
    assert without == {"host 1.3B, one frame: CUDA graph": {"skipped": "needs a GPU"}}
    assert all(entry["ms"] > 0 for name, entry in found.items() if name not in without)
    assert all(entry["against"] in found for entry in found.values() if "against" in entry)
    families = {"attention": 12, "feed-forward": 12, "q, k, v": 8, "copy": 2, "host": 3}
    assert {
        family: sum(name.startswith(family) for name in found) for family in families
    } == families
    plain, padded = (
        f"attention 14B: flash, {tokens} tokens, [B, L, H, Dh] in memory" for tokens in (72, 128)
    )
    assert found[padded]["against"] == plain and (
        found[plain]["tokens"],
        found[padded]["tokens"],
    ) == (72, 128)
    assert found[plain]["flops"] == 4 * 72 * 72 * 3 * 32
    size = TINY["1.3B"]
    assert found["q, k, v 1.3B: in one, 72 rows"]["flops"] == 3 * 2 * 72 * size.dim**2
    assert (
        found["feed-forward 1.3B: product, 128 rows"]["flops"] == 2 * 128 * size.dim * size.ffn_dim
    )


def test_layouts_are_those_of_their_names(context: Context) -> None:
    for layout, strides in {"[B, L, H, Dh]": (32, 96), "[B, H, L, Dh]": (72 * 32, 32)}.items():
        for tensor in probes._attention_inputs(context, TINY["14B"], 72, layout):
            assert tensor.shape == (1, 3, 72, 32) and tensor.stride()[1:3] == strides


def test_products_compute_the_same(context: Context) -> None:
    apart, joined, *_ = (
        probe.step() for probe in probes._queries_keys_values(context, TINY["1.3B"])
    )
    torch.testing.assert_close(torch.cat(apart, dim=-1), joined, rtol=1e-4, atol=1e-5)
    product, gelu, *_ = (probe.step() for probe in probes._feed_forward(context, TINY["1.3B"]))
    torch.testing.assert_close(F.gelu(product, approximate="tanh"), gelu)


def test_an_error_is_a_result(context: Context) -> None:
    """A shape that does not fit takes nothing from the probe beside it."""
    x = torch.ones(2, 3)
    bad = Probe("bad", lambda: F.linear(x, torch.ones(4, 5)), flops=1.0, against="good")
    probes._measure(
        context, [bad, Probe("good", lambda: F.linear(x, torch.ones(4, 3)))], graphs=False
    )
    found = context.file.section("probes")["data"]
    assert found["bad"]["error"].startswith("RuntimeError") and found["bad"]["against"] == "good"
    assert found["good"]["ms"] > 0 and len(found["good"]["samples_ms"]) == probes.ROUNDS


def test_what_the_budget_does_not_allow_is_skipped(context: Context) -> None:
    context.deadline = time.monotonic() - 1
    with pytest.raises(Skip, match="budget"):
        probes.run_probes(context)
    assert all(
        entry == {"skipped": "budget"} for entry in context.file.section("probes")["data"].values()
    )
    assert len(context.file.section("probes")["data"]) == 8  # groups


def test_a_wrong_kernel_is_not_timed(context: Context) -> None:
    wrong = {"gated_residual": ["native"], "rms_norm_rope": ["triton"]}
    for section in ("tests", "checks"):
        context.file.section(section)["data"] = {"wrong": wrong, "wrong_numbers": wrong}
    probes._host(context)
    reason = "a wrong kernel is not timed: gated_residual"
    assert context.file.section("probes")["data"] == {"host 1.3B, one frame": {"skipped": reason}}
