"""The parts of benchmarks/run_gpu.py by themselves: isolation, wrong kernels, extrapolation, what a file keeps."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import checks, kernels, models, networks, supervisor, training, worker
from gpu.context import Context, Section, Skip
from gpu.sizes import TINY
from gpu.state import RunFile, slug

CPU = torch.device("cpu")


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A tiny run that has just begun."""
    file = RunFile(tmp_path / "cpu-tiny.json", {"runs": [{}], "sections": {}})
    return Context(CPU, True, file, time.monotonic() + 1000, "section")


def fail(_: Context) -> None:
    raise ValueError("the kernel\nis gone")


def half(context: Context) -> None:
    context.put("first", {"ms": 1.0})
    raise Skip("no second one here")


def test_an_exception_is_recorded_and_the_next_section_goes_on(context: Context) -> None:
    for name, function in (("bad", fail), ("half", half), ("good", lambda c: c.put("x", 1))):
        worker._run(Section(name, name, 1.0, function), context)
    on_disk = json.loads(context.file.path.read_text())["sections"]
    assert on_disk["bad"]["status"] == "failed" and on_disk["bad"]["reason"] == "ValueError: the kernel"
    assert on_disk["half"]["status"] == "skipped" and on_disk["half"]["reason"] == "no second one here"
    assert on_disk["half"]["data"] == {"first": {"ms": 1.0}}  # what it had is kept
    assert on_disk["good"]["status"] == "done" and on_disk["good"]["data"] == {"x": 1}


def test_a_wrong_kernel_is_not_timed(context: Context) -> None:
    accused = {"gated_residual": ["triton", "native"]}
    context.file.section("tests")["data"] = {"wrong": accused, "wrong_numbers": {}}
    context.require_right_kernels()  # a test failed, but of something else than numbers
    context.file.section("tests")["data"]["wrong_numbers"] = accused
    with pytest.raises(Skip, match="wrong numbers of gated_residual"):
        context.require_right_kernels()
    cases = {case.op: case for case in kernels.cases(context)}
    assert kernels._problem(context, cases["gated_residual"], "triton") == "its tests failed"
    assert kernels._problem(context, cases["layer_norm_modulate"], "native") is None
    context.name = "ops"
    kernels._measure_cases(context, [cases["gated_residual"]], ("native", "eager"), None)
    entry = context.file.get("ops", cases["gated_residual"].name)
    assert entry["forward"]["not_timed"] == {"native": "its tests failed"}
    assert set(entry["forward"]["ms"]) == set(entry["backward"]["ms"]) == {"eager"}


def test_failures_of_pytest_accuse_operators_and_backends() -> None:
    numbers, other = '<failure message="AssertionError: not close"/>', '<failure message="RuntimeError: no compiler"/>'
    cases = [
        ("tests/ops/test_gelu.py", "test_values[native-float32]", numbers),
        ("tests/ops/test_gated_residual.py", "test_compiles", other),  # names no backend
        ("tests/ops/test_rms_norm_rope.py", "test_values[eager-float16]", "<error/>"),  # the reference itself
        ("tests/ops/test_ahead_of_time.py", "test_values[triton]", numbers),  # no operator
        ("tests/ops/test_rms_norm_rope.py", "test_values[triton-float16]", ""),
        ("tests/ops/test_gelu.py", "test_values[triton-float32]", "<skipped/>"),
    ]
    xml = "".join(f'<testcase classname="c" file="{file}" name="{name}">{x}</testcase>' for file, name, x in cases)
    report = checks.read_report(f"<testsuites><testsuite>{xml}</testsuite></testsuites>")
    assert (report["passed"], report["failed"], report["skipped_tests"]) == (1, 4, 1)
    assert report["wrong"] == {"gelu": ["native"], "gated_residual": ["native", "triton"]}
    assert report["wrong_numbers"] == {"gelu": ["native"]}
    assert report["failures"][0] == "c::test_values[native-float32]: AssertionError: not close"


def test_a_wrong_operator_fails_the_section(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tolerance that nothing holds stands for a wrong kernel."""
    from anyflow.doctor import self_check

    monkeypatch.setattr(self_check, "TOLERANCE", {torch.float32: 1e-12})
    wrong, wrong_numbers = checks._self_check(context)
    assert wrong == wrong_numbers and "native" in wrong["layer_norm_modulate"] and "native" in wrong["attention"]


def test_fifty_steps_are_extrapolated_from_measured_ones_and_labelled(context: Context) -> None:
    models._extrapolate(context, 50)
    assert context.file.get("section", "ours NFE 50") == {"skipped": "budget"}  # nothing to extrapolate from
    models._record_sample(context, "ours NFE 4", [30.0, 40.0, 52.0, 62.0, 63.0], None)
    models._extrapolate(context, 50)
    entry = context.file.get("section", "ours NFE 50")
    assert entry["ms"] == 30 + 49 * 10 + 1 and entry["extrapolated"] and "4 measured steps" in entry["source"]


def test_a_section_starts_only_while_it_fits(context: Context) -> None:
    context.tiny = False
    context.deadline = time.monotonic() + 10.2
    worker._run(Section("long", "long", 40.0, fail), context)
    assert context.file.status("long") == "skipped"
    assert context.file.section("long")["reason"] == "budget: about 40 s are needed, 10 s left"
    assert context.affords(5) and not context.affords(20)
    context.file.section("limits")["data"] = {"matmul_flops": 79e12}  # a tenth of an H200
    assert not context.affords(5)
    assert context.affords(0.5)


def test_what_still_runs_after_the_budget_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch alone takes longer than this budget."""
    monkeypatch.setattr(supervisor, "GRACE_S", 0.0)
    options = supervisor.Options(tmp_path, "cpu", True, 0.2, "", False, False)
    started = time.monotonic()
    ended = supervisor._work(options, tmp_path / "cpu-tiny.json", started + 0.2, ["limits"])
    assert ended.startswith("stopped: it still ran") and time.monotonic() - started < 60


def open_file(out: Path, names: list[str], only: str = "", **machine: Any) -> RunFile:
    options = supervisor.Options(out, "cpu", True, 10.0, only, False, False)
    return supervisor._open(options, {"device": "cpu", "torch": "2.9.0", **machine}, names)


def test_only_what_the_same_sources_measured_is_kept(tmp_path: Path) -> None:
    names = ["limits", "ops"]
    file = open_file(tmp_path, names)
    file.mark("limits", "done")
    file.mark("ops", "failed", "of something")
    assert list(open_file(tmp_path, names).data["sections"]) == ["limits"]  # a failed one runs again
    assert len(RunFile.load(file.path).data["runs"]) == 2
    assert list(open_file(tmp_path, ["limits"], only="limits").data["sections"]) == []  # asked for by name
    file.mark("limits", "done")
    assert list(open_file(tmp_path, names, torch="2.10.0").data["sections"]) == []  # another torch
    file.path.write_text('{"half a')
    assert list(open_file(tmp_path, names).data["sections"]) == []


def test_names_of_files() -> None:
    assert slug("NVIDIA H200", False) == "nvidia-h200"
    assert slug("NVIDIA H100 80GB HBM3", True) == "nvidia-h100-80gb-hbm3-tiny"


def test_peers_have_the_memory_of_our_weights(context: Context) -> None:
    size = TINY["1.3B"]
    ours = networks.build(context, size, torch.bfloat16)
    peer = networks.build_peer(context, size, ours)
    theirs = dict(peer.named_parameters())
    others = {name for name, p in ours.named_parameters() if theirs[name].data_ptr() != p.data_ptr()}
    assert others == {f"condition_embedder.delta_embedder.linear_{i}.{n}" for i in (1, 2) for n in ("weight", "bias")}
    assert sum(p.numel() for p in ours.parameters()) == size.parameters
    wide = {name for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert "scale_shift_table" in wide and "blocks.0.norm2.weight" in wide and "blocks.0.attn1.to_q.weight" not in wide


def test_networks_agree_in_bf16(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: forward, and training steps under autocast, where every adapter gets a gradient."""
    monkeypatch.setattr(Context, "dtype", torch.bfloat16)
    monkeypatch.setattr(training, "_autocast", lambda _: torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    size, trained = TINY["1.3B"], []
    prepare = networks.prepare_training
    monkeypatch.setattr(networks, "prepare_training", lambda *a: trained.append(prepare(*a)) or trained[-1])
    ours, data = networks.build(context, size), networks.inputs(context, size)
    peer = networks.build_peer(context, size, ours)
    with torch.no_grad():
        difference = networks.relative_difference(peer(*data.peers()).sample, ours(*data.ours()).sample)
    assert 0 < difference < models.TOLERANCE[torch.bfloat16]
    for make in (
        (training._our_pretrain, training._peers_pretrain),
        (training._our_on_policy, training._peers_on_policy),
    ):
        losses = [list(of_whom(context, size)().values()) for of_whom in make]
        torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
    assert len(trained) == 6
    for model in trained:
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_adapters_are_the_published_ones(context: Context) -> None:
    model = networks.prepare_training(networks.build(context, TINY["1.3B"]), tiny=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (6 * TINY["1.3B"].layers + 4)
    assert all(name.endswith((".a", ".b")) for name in trained)


def test_categories_of_kernels() -> None:
    names = {
        "void flash_fwd_kernel<...>": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_bias_TNN": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "_residual_layer_norm_forward": "norms, rotary, residuals",
        "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add>": "element-wise, copies",
        "something": "other",
    }
    assert {name: models.categorize(name) for name in names} == names


def test_a_stand_in_is_not_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import without_diffusers

    assert without_diffusers.is_installed() and not without_diffusers.install()
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(_ANYFLOW_STAND_IN=True))
    assert not without_diffusers.is_installed()
