"""The parts of benchmarks/run_gpu.py by themselves: isolation, extrapolation, budgets, networks,
what a file keeps.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu import kernels, models, networks, supervisor, training, worker
from gpu.context import Context, Section, Skip
from gpu.sections import SECTIONS
from gpu.sizes import TINY
from gpu.state import RunFile, commit, slug
from op_cases import Call, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.ops.backend import forced_backend

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
    assert (
        on_disk["bad"]["status"] == "failed"
        and on_disk["bad"]["reason"] == "ValueError: the kernel"
    )
    assert (
        on_disk["half"]["status"] == "skipped" and on_disk["half"]["reason"] == "no second one here"
    )
    assert on_disk["half"]["data"] == {"first": {"ms": 1.0}}  # what it had is kept
    assert on_disk["good"]["status"] == "done" and on_disk["good"]["data"] == {"x": 1}


def test_a_variant_that_raises_costs_no_other_one(context: Context) -> None:
    def function(x: Tensor) -> Tensor:
        if forced_backend() == ("native", "forced by use_backend()"):
            raise ValueError("no such kernel\nat all")
        return x * 2

    x = torch.ones(3, requires_grad=True)
    for direction in ("forward", "backward"):
        call = Call(function, [x], [x])
        entry, problems = kernels._measure(context, call, direction, ("native", "eager"), None, 1)
        assert problems == {"native": "ValueError: no such kernel"} and set(entry["ms"]) == {
            "eager"
        }
    steps = {"ours": lambda: None, "diffusers": lambda: fail(context)}
    assert models._record(context, steps, rounds=2) == {"diffusers": "ValueError: the kernel"}
    assert context.file.get("section", "ours")["samples_ms"] and "error" in context.file.get(
        "section", "diffusers"
    )


def test_a_peer_that_raises_fails_no_section(context: Context) -> None:
    """Ours does; either way the reason stands where the time would."""
    case = kernels.cases(context)[0]

    def raises_on(name: str) -> Case:
        def function(x: Tensor, *_: Tensor) -> Tensor:
            if (forced_backend() or ("",))[0] == name:
                raise ValueError("no such kernel")
            return x * 2

        def build(*_: Any) -> Call:
            x = torch.ones(3, requires_grad=True)
            return Call(function, [x], [x])

        return dataclasses.replace(case, build=build, variant=name)

    peer, own = raises_on("eager"), raises_on("triton")
    kernels._measure_cases(context, [peer], ("triton", "eager"), None, rounds=1)
    assert "problem" not in context.file.section("section")
    assert context.file.get("section", peer.name)["forward"]["not_timed"] == {
        "eager": "ValueError: no such kernel"
    }
    kernels._measure_cases(context, [own], ("triton", "eager"), None, rounds=1)
    assert "triton: ValueError: no such kernel" in context.file.section("section")["problem"]


def test_cases_that_an_earlier_run_measured_are_not_measured_again(context: Context) -> None:
    first, second, *_ = kernels.cases(context)
    measured = {
        "op": first.op,
        "forward": {"ms": {"native": 1.0}},
        "backward": {"ms": {"native": 1.0}},
    }
    context.put(first.name, measured)
    kernels._measure_cases(context, [first, second], ("eager",), None)
    assert context.file.get("section", first.name) == measured
    assert set(context.file.get("section", second.name)["forward"]["ms"]) == {"eager"}
    context.tiny, context.deadline = False, time.monotonic()
    with pytest.raises(Skip, match="budget: 1 of 3 cases"):
        kernels._measure_cases(
            context, [first, second, kernels.cases(context)[3]], ("eager",), None
        )


def test_fifty_steps_are_extrapolated_from_measured_ones_and_labelled(context: Context) -> None:
    models._extrapolate(context, 50)
    # nothing to extrapolate from
    assert context.file.get("section", "ours NFE 50") == {"skipped": "budget"}
    models._record_sample(context, "ours NFE 4", [30.0, 40.0, 52.0, 62.0, 63.0], None)
    models._extrapolate(context, 50)
    entry = context.file.get("section", "ours NFE 50")
    assert (
        entry["ms"] == 30 + 49 * 10 + 1
        and entry["extrapolated"]
        and "4 measured steps" in entry["source"]
    )


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


def test_what_still_runs_after_the_budget_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing torch alone takes longer than this budget."""
    monkeypatch.setattr(supervisor, "GRACE_S", 0.0)
    options = supervisor.Options(tmp_path, "cpu", True, 0.2)
    started = time.monotonic()
    file = RunFile(tmp_path / "cpu-tiny.json", {}, tmp_path / "copy.json")
    ended = supervisor._work(options, file, started + 0.2, ["limits"])
    assert ended.startswith("stopped: it still ran") and time.monotonic() - started < 60


@pytest.fixture
def open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunFile]:
    """Open the file of a run in ``tmp_path``, with the runner's folder there too."""
    monkeypatch.setattr(supervisor, "FOLDER", tmp_path / "runner")

    def open_(names: list[str], only: str = "", **machine: Any) -> RunFile:
        options = supervisor.Options(tmp_path / "out", "cpu", True, 10.0, only)
        return supervisor._open(options, {"device": "cpu", "torch": "2.9.0", **machine}, names)

    return open_


def test_only_what_the_same_sources_measured_is_kept(open_file: Callable[..., RunFile]) -> None:
    names = ["build", "limits", "ops", "native", "tests"]
    file = open_file(names)
    file.mark("build", "failed", "no compiler")
    file.mark("limits", "done")
    file.mark("ops", "failed", "of something", data={"case": 1})
    again = open_file(names)
    assert {name: again.status(name) for name in names} == {
        **{"build": "failed", "limits": "done"},  # a build fails once for the same sources
        **{"ops": None, "native": None, "tests": None},
    }
    # what failed, after what never ran
    assert supervisor._order(again, names) == ["limits", "native", "ops", "tests"]
    # its data stays until it runs again
    assert again.get("ops", "case") == 1 and len(again.data["runs"]) == 2
    assert open_file(["limits"], only="limits").status("limits") is None  # asked for by name
    assert open_file(names, torch="2.10.0").data["sections"] == {}


def test_a_run_goes_on_from_the_runners_own_copy(open_file: Callable[..., RunFile]) -> None:
    file = open_file(["limits"])
    file.mark("limits", "done")
    assert file.copy is not None and file.copy.read_text() == file.path.read_text()
    file.path.unlink()  # the folder of --out is emptied between two calls
    assert open_file(["limits"]).status("limits") == "done" and file.path.exists()
    file.path.write_text('{"half a')
    assert open_file(["limits"]).status("limits") == "done"
    file.copy.write_text('{"half a')
    assert open_file(["limits"]).status("limits") == "done"
    file.path.unlink()
    file.copy.unlink()
    assert open_file(["limits"]).status("limits") is None


def test_the_named_commit_comes_before_the_one_checked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of a checkout may have the metadata of another commit."""
    monkeypatch.delenv("ANYFLOW_COMMIT", raising=False)
    here = commit()
    monkeypatch.setenv("ANYFLOW_COMMIT", "0123abc")
    assert commit() == {"commit": "0123abc", "clean": None}
    if here["commit"] != "unknown":  # not a checkout
        monkeypatch.setenv("ANYFLOW_COMMIT", here["commit"])
        assert commit() == here


def test_names_of_files() -> None:
    assert slug("NVIDIA H200", False) == "nvidia-h200"
    assert slug("NVIDIA H100 80GB HBM3", True) == "nvidia-h100-80gb-hbm3-tiny"


def test_peers_have_the_memory_of_our_weights(context: Context) -> None:
    size = TINY["1.3B"]
    ours = networks.build(context, size, torch.bfloat16)
    from diffusers import AnyFlowTransformer3DModel as Peer

    with networks._without_parameters():  # made without a second copy, not even for a moment
        empty = Peer(**size.config())
    assert all(p.is_meta for p in empty.parameters()) and not any(
        b.is_meta for b in empty.buffers()
    )
    peer = networks.build_peer(context, size, ours)
    theirs = dict(peer.named_parameters())
    others = {
        name for name, p in ours.named_parameters() if theirs[name].data_ptr() != p.data_ptr()
    }
    assert others == {
        f"condition_embedder.delta_embedder.linear_{i}.{n}"
        for i in (1, 2)
        for n in ("weight", "bias")
    }
    assert sum(p.numel() for p in ours.parameters()) == size.parameters
    wide = {name for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert (
        "scale_shift_table" in wide
        and "blocks.0.norm2.weight" in wide
        and "blocks.0.attn1.to_q.weight" not in wide
    )


def test_networks_agree_in_bf16(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: forward, and training steps under autocast, where every adapter gets a
    gradient.
    """
    monkeypatch.setattr(Context, "dtype", torch.bfloat16)
    monkeypatch.setattr(
        training, "_autocast", lambda _: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    )
    size, trained = TINY["1.3B"], []
    prepare = networks.prepare_training
    monkeypatch.setattr(
        networks, "prepare_training", lambda *a: trained.append(prepare(*a)) or trained[-1]
    )
    ours, data = networks.build(context, size), networks.inputs(context, size)
    peer = networks.build_peer(context, size, ours)
    with torch.no_grad():
        difference = networks.relative_difference(
            peer(*data.peers()).sample, ours(*data.ours()).sample
        )
    assert 0 < difference < models.TOLERANCE[torch.bfloat16]
    for make in (
        (training._our_pretrain, training._peers_pretrain),
        (training._our_on_policy, training._peers_on_policy),
    ):
        losses = [list(of_whom(context, size)().values()) for of_whom in make]
        torch.testing.assert_close(*losses, rtol=2e-2, atol=0)
    assert len(trained) == 6
    for model in trained:
        assert all(
            p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad
        )


class Operators(TorchDispatchMode):
    """Names of the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "anyflow":
            self.names.add(function._opname.removesuffix("_native").removesuffix("_backward"))
        return function(*args, **(kwargs or {}))


def test_sections_name_the_operators_that_they_run(context: Context) -> None:
    size = TINY["1.3B"]
    ours, data = networks.build(context, size), networks.inputs(context, size)
    steps = {
        "forward_1.3b": lambda: models._forward(ours, data.ours())(),
        "pretrain_1.3b": training._our_pretrain(context, size),
        "on_policy_1.3b": training._our_on_policy(context, size),
    }
    named = {section.name: set(section.operators) for section in SECTIONS}
    for name, step in steps.items():
        with Operators() as found:
            step()
        # For few tokens, and on some processors for all of them, linear layers are torch's.
        assert found.names - {"linear"} == named[name] - {"linear"}, name
    assert (
        named["sampling_14b"]
        == named["profile_1.3b"]
        == named["forward_14b"]
        == named["forward_1.3b"]
    )
    assert not any(
        named[name] for name in ("checks", "limits", "attention", "ops", "native", "tests")
    )


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

    assert without_diffusers.problem() is None and without_diffusers.install() is None
    monkeypatch.setitem(
        sys.modules, "diffusers", SimpleNamespace(_ANYFLOW_STAND_IN="it is not installed")
    )
    assert without_diffusers.problem() == "it is not installed"
    assert networks.peer_problem() == "not measured: it is not installed"
