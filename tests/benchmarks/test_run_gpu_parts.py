"""Test the parts of benchmarks/run_gpu.py: isolation, budgets, networks, what a file keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import networks
from causal.bench_causal import sampled
from gpu import causal, kernels, models, supervisor, worker
from gpu.run import DeviceRun, RunSection, Skip
from gpu.state import RunFile, commit, slug
from methods.bench_methods import FORMULATION, on_gpu, on_policy, pretrain
from model.bench_model import forward
from sizes import TINY, TINY_CAUSAL
from timing import OURS, difference
from workloads import TOLERANCES, Contest

CPU, SMALL = torch.device("cpu"), TINY["1.3B"]
DIRECTIONS = ("forward", "backward")


def fail(*_: Any) -> None:
    raise ValueError("the kernel\nis gone")


def half(run: DeviceRun) -> None:
    run.put("first", {"ms": 1.0})
    raise Skip("no second one here")


def test_an_exception_is_recorded_and_the_next_section_runs(device_run: DeviceRun) -> None:
    for name, function in (("bad", fail), ("half", half), ("good", lambda r: r.put("x", 1))):
        worker._run(RunSection(name, name, 1.0, function), device_run)
    on_disk = json.loads(device_run.file.path.read_text())["sections"]
    found = {name: (section["status"], section["reason"]) for name, section in on_disk.items()}
    assert found == {
        "bad": ("failed", "ValueError: the kernel"),
        "half": ("skipped", "no second one here"),
        "good": ("done", None),
    }
    assert on_disk["half"]["data"] == {"first": {"ms": 1.0}}  # what it had is kept


def test_a_variant_that_raises_costs_no_other_one(
    device_run: DeviceRun, on_backend: Callable[..., Any]
) -> None:
    """Test that a section fails for a kernel of ours alone."""
    for backend in ("eager", "triton"):
        example = on_backend(kernels.on_device(device_run)[3], backend, fail)
        kernels._measure_examples(device_run, [example], ("triton", "eager"), DIRECTIONS, rounds=1)
        entry, problem = device_run.get(backend), "ValueError: the kernel"
        for direction in DIRECTIONS:
            assert entry[direction]["not_timed"] == {backend: problem}
            assert set(entry[direction]["ms"]) == {"triton", "eager"} - {backend}
        failed = device_run.file.section("section").get("problem")
        assert failed is None if backend == "eager" else f"triton: {problem}" in failed


def test_a_peer_that_raises_or_differs_costs_ours_nothing(device_run: DeviceRun) -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    makers = {OURS: lambda: lambda: one, "raises": lambda: fail, "differs": lambda: lambda: two}
    record = models.ContestRecord(device_run, Contest(makers), rounds=2, alone=1, reserve_s=0.0)
    record.add("raises")
    record.add("differs")
    record.end()
    assert len(device_run.get(OURS)["samples_ms"]) == 2
    assert device_run.get("raises") == {"error": "ValueError: the kernel"}
    problem = device_run.file.section("section")["problem"]
    assert problem == "raises: ValueError: the kernel; differs: differs from ours by 5.0e-01"


def test_cases_that_an_earlier_run_measured_are_not_measured_again(device_run: DeviceRun) -> None:
    first, second, third, *_ = kernels.on_device(device_run)
    measured = {"op": first.op, **{d: {"ms": {"native": 1.0}} for d in DIRECTIONS}}
    device_run.put(first.name, measured)
    kernels._measure_examples(device_run, [first, second], ("eager",), DIRECTIONS, 1)
    assert device_run.get(first.name) == measured
    assert set(device_run.get(second.name)["forward"]["ms"]) == {"eager"}
    device_run.tiny, device_run.deadline = False, time.monotonic()
    with pytest.raises(Skip, match="budget: 1 of 3 cases"):
        kernels._measure_examples(device_run, [first, second, third], ("eager",), DIRECTIONS, 1)


def test_fifty_steps_are_extrapolated_from_measured_ones_and_labelled(
    device_run: DeviceRun,
) -> None:
    device_run.put("ours NFE 4", {"ms": 43.0, "extrapolated": False})
    assert models.extrapolated(device_run, 50) == {"skipped": "budget"}
    device_run.put("ours NFE 8", {"ms": 83.0, "extrapolated": False})
    entry = models.extrapolated(device_run, 50)
    assert entry["ms"] == 503.0 and entry["extrapolated"] and "4 and 8 steps" in entry["source"]


def test_a_section_starts_only_while_it_fits(device_run: DeviceRun) -> None:
    device_run.tiny, device_run.deadline = False, time.monotonic() + 10.2
    worker._run(RunSection("long", "long", 40.0, fail), device_run)
    assert device_run.file.status("long") == "skipped"
    reason = device_run.file.section("long")["reason"]
    assert reason == "budget: about 40 s are needed, 10 s left"
    assert device_run.affords(5) and not device_run.affords(20)


# The file of a run --------------------------------------------------------------------------------


@pytest.fixture
def open_file(tmp_path: Path) -> Callable[..., RunFile]:
    """Open the file of a run in ``tmp_path``, with the runner's own copy there too."""

    def open_(names: list[str], only: str = "", **machine: Any) -> RunFile:
        out, copies = tmp_path / "out", tmp_path / "runner"
        options = supervisor.Options(out, "cpu", True, 10.0, only, copies=copies)
        return supervisor._open(options, {"device": "cpu", "torch": "2.9.0", **machine}, names)

    return open_


def test_only_what_the_same_sources_measured_is_kept(open_file: Callable[..., RunFile]) -> None:
    names = ["build", "limits", "ops", "native", "tests"]
    file = open_file(names)
    file.mark("build", "failed", "no compiler")
    file.mark("limits", "done")
    file.mark("ops", "failed", "of something", data={"case": 1})
    again = open_file(names)
    kept = {"build": "failed", "limits": "done"}  # a build fails once for the same sources
    assert {name: again.status(name) for name in names} == dict.fromkeys(names) | kept
    # what failed, after what never ran
    assert supervisor._order(again, names) == ["limits", "native", "ops", "tests"]
    # its data stays until it runs again
    assert again.get("ops", "case") == 1 and len(again.data["runs"]) == 2
    assert open_file(["limits"], only="limits").status("limits") is None  # asked for by name
    assert open_file(names, torch="2.10.0").data["sections"] == {}


def test_a_run_continues_from_the_runners_own_copy(open_file: Callable[..., RunFile]) -> None:
    file = open_file(["limits"])
    file.mark("limits", "done")
    assert file.copy is not None and file.copy.read_text() == file.path.read_text()
    file.path.unlink()  # the folder of --out is emptied between two calls
    assert open_file(["limits"]).status("limits") == "done" and file.path.exists()
    for damaged in (file.path, file.copy):
        damaged.write_text('{"half a')
        assert open_file(["limits"]).status("limits") == "done"
    file.path.unlink()
    file.copy.unlink()
    assert open_file(["limits"]).status("limits") is None


def test_the_named_commit_comes_before_the_one_checked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test a copy of a checkout, which may have the metadata of another commit."""
    monkeypatch.setenv("ANYFLOW_COMMIT", "0123abc")
    assert commit() == {"commit": "0123abc", "clean": None}


def test_names_of_files() -> None:
    assert slug("NVIDIA H200", False) == "nvidia-h200"
    assert slug("NVIDIA H100 80GB HBM3", True) == "nvidia-h100-80gb-hbm3-tiny"


# Networks -----------------------------------------------------------------------------------------


def test_peers_have_the_memory_of_our_weights() -> None:
    from diffusers import AnyFlowTransformer3DModel as Peer

    size = replace(SMALL, dtype=torch.bfloat16)
    with networks._without_parameters():  # made without a second copy, not even for a moment
        empty = Peer(**size.config())
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    ours = networks.ours(size, CPU)
    theirs = dict(networks.peer(size, ours).named_parameters())
    others = {n for n, p in ours.named_parameters() if theirs[n].data_ptr() != p.data_ptr()}
    name = "condition_embedder.delta_embedder.linear_{}.{}"
    assert others == {name.format(i, n) for i in (1, 2) for n in ("weight", "bias")}
    wide = {name for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert {"scale_shift_table", "blocks.0.norm2.weight"} <= wide
    assert "blocks.0.attn1.to_q.weight" not in wide


def test_steps_agree_in_bf16(device_run: DeviceRun) -> None:
    """Test a forward in bf16, and training steps of frozen bf16 weights with fp32 adapters."""
    size = replace(SMALL, dtype=torch.bfloat16)
    contest, plan = forward(size, device_run.place), on_gpu(size)
    found = difference(*(contest.makers[who]()() for who in (OURS, "diffusers")))
    assert 0 < found < TOLERANCES[torch.bfloat16]
    for build in (pretrain, lambda *a: on_policy(("generator", "critic"), *a)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            makers = build(replace(plan), device_run.place).makers
            losses = [makers[who]()() for who in (OURS, FORMULATION)]
        torch.testing.assert_close(*losses, rtol=2e-2, atol=0)


def test_calls_of_a_causal_video_are_told_apart() -> None:
    """Test encodings and evaluations of 3 steps for the first chunk and 2 for the others, twice."""
    size = TINY_CAUSAL["1.3B"]
    model, data = networks.ours(size, CPU), networks.videos(size, CPU)
    clock, chunks = causal.ChunkClock(CPU), len(size.chunk_partition)
    step = sampled(model, size, data, [3] + [2] * (chunks - 1))
    for _ in range(2):
        clock.clear()
        with clock.listening(model):
            step()
        found = clock.chunks()
        assert [chunk["encode_ms"] > 0 for chunk in found] == [False] + [True] * (chunks - 1)
        assert all(chunk["evaluate_ms"] > 0 for chunk in found)
    assert [encodes for encodes, *_ in clock._calls].count(False) == 3 + 2 * (chunks - 1)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_causal_section_of_the_short_plan(device_run: DeviceRun) -> None:
    device_run.short = True
    causal.run_causal(device_run, "1.3B")
    assert "problem" not in device_run.file.section("section")
    for key in (causal.key_of(OURS, 4), causal.key_of(causal.DECODED)):
        assert device_run.get(key)["fps"] > 0
        assert len(device_run.get(key)["chunks"]) == len(TINY_CAUSAL["1.3B"].chunk_partition)
    assert device_run.get(causal.key_of(causal.COMPILED)) == {"skipped": "not in the short plan"}
    assert device_run.get(f"{causal.ON_HOST}: the same bits") is True
    cache = device_run.get("cache")
    assert cache["predicted_bytes"] == cache["kept_bytes"] == cache["counted_bytes"]


def test_adapters_are_the_published_ones() -> None:
    model = networks.add_adapters(networks.ours(SMALL, CPU), SMALL)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (6 * SMALL.layers + 4)
    assert all(name.endswith((".a", ".b")) for name in trained)
    data = networks.videos(SMALL, CPU)
    networks.evaluation(model, SMALL, data, per_frame=False)().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_categories_of_kernels() -> None:
    names = {
        "void flash_fwd_kernel<...>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN": "matrix products",
        "_residual_layer_norm_forward": "norms, rotary, residuals",
        "vectorized_elementwise_kernel<8, CUDAFunctor_add>": "element-wise, copies",
        "something": "other",
    }
    assert {name: models.categorize(name) for name in names} == names
