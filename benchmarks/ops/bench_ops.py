"""Every operator: backend, dtype and direction, against its eager reference and torch.compile of
that reference.

On the CPU at [1, 1280, 384] and [1, 8192, 1536], the sizes of a small model and of a layer of the
1.3B one; on a GPU at the shapes of the 1.3B and 14B models at 480 x 832 x 81.
"""

from __future__ import annotations

from functools import partial

import op_cases
import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from interleave import OURS, Step
from op_cases import Call, Case
from workloads import COMPILED, Contest, Line, Setting, Workload

from anyflow.ops import use_backend

SMALL, LARGE = (1280, 384), (8192, 1536)
GOALS = {"forward": 2.5, "backward": 1.8}
# One product and one sum per element, which the reference (torch.addcmul) does in one pass too:
# nothing to win forward.
WITHOUT_FORWARD_GOAL = ("gated_residual",)
# Bound by products, which the reference leaves to a library: measured, but not what the goals are
# about.
PRODUCTS = ("linear", "attention")
# those with a native CUDA kernel
CUDA_FORWARD = ("layer_norm_modulate", "residual_layer_norm", "rms_norm_rope")
TORCH_ATTENTION = "torch"


def _cpu_cases(tokens: int, dim: int) -> list[Case]:
    cases = op_cases.row_cases(tokens, dim, 1)
    cases += [op_cases.embedding_case(tokens, dim), op_cases.gelu_case(tokens, dim)]
    cases += op_cases.flow_map_cases(2, (tokens // 256, 16, dim // 12, 96))  # as many elements
    cases.append(op_cases.linear_case(tokens, dim, 4 * dim))
    if (tokens, dim) == SMALL:  # the reference keeps L x L scores of every head
        cases.append(op_cases.attention_case(tokens, dim, 64))
    return cases


def _workloads(
    case: Case, device: str, backend: str, dtype: torch.dtype, quick: bool
) -> list[Workload]:
    directions = (
        ("forward",) if device == "cuda" and backend == "native" else ("forward", "backward")
    )
    variant = "" if case.variant in ("bf16", "fp32") else f".{case.variant}"
    rows = (
        f"x{case.rows}"
        if case.rows not in (1, case.tokens) and not case.op.startswith("flow_map")
        else ""
    )
    shape = f"{case.tokens}x{case.dim}{rows}"
    peers = ["eager", COMPILED]
    peers += [TORCH_ATTENTION] if case.op == "attention" else []
    peers += ["triton"] if device == "cuda" and backend == "native" else []
    found = []
    for direction in directions:
        exempt = case.op in PRODUCTS or (case.op in WITHOUT_FORWARD_GOAL and direction == "forward")
        goals = (
            {}
            if exempt or dtype != torch.float32 or device != "cpu"
            else {"eager": GOALS[direction]}
        )
        name = "/".join((f"ops/{case.op}{variant}", shape, _DTYPES[dtype], direction, backend))
        build = partial(_contest, case, backend, tuple(peers), direction, dtype)
        found.append(Workload(name, tuple(peers), build, device, dtype, quick, goals))
    return found


_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def _contest(
    case: Case,
    backend: str,
    peers: tuple[str, ...],
    direction: str,
    dtype: torch.dtype,
    setting: Setting,
) -> Contest:
    call = case.build(setting.device, dtype)
    make = _forward if direction == "forward" else _backward
    steps = {OURS: make(call, backend), "eager": make(call, "eager")}
    if setting.compile:
        # a compiled backward that runs many times keeps what it reads
        torch._functorch.config.donated_buffer = False
        torch._dynamo.reset()
        compiled = torch.compile(call.function, fullgraph=True)
        steps[COMPILED] = make(Call(compiled, call.inputs, call.wanted, call.training), "eager")
    if TORCH_ATTENTION in peers:
        steps[TORCH_ATTENTION] = make(Call(_torch_attention, call.inputs, call.wanted), "eager")
    if "triton" in peers:
        steps["triton"] = make(call, "triton")
    work = case.forward if direction == "forward" else case.backward
    return Contest(steps, work.bytes(dtype), work.flops)


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _forward(call: Call, backend: str) -> Step:
    def step() -> object:
        with use_backend(backend), torch.set_grad_enabled(call.training):
            return call.outputs()

    return step


def _backward(call: Call, backend: str) -> Step:
    with use_backend(backend):
        outputs = call.outputs()
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs
    ]

    def step() -> object:
        with use_backend(backend):
            return torch.autograd.grad(outputs, call.wanted, cotangents, retain_graph=True)

    return step


def _all() -> list[Workload]:
    found = []
    for size in (SMALL, LARGE):
        for case in _cpu_cases(*size):
            found += _workloads(case, "cpu", "native", torch.float32, quick=size == SMALL)
            # of fp32 alone: in any model, or where a choice is made
            if not case.op.startswith(("flow_map", "linear")):
                found += _workloads(case, "cpu", "native", torch.bfloat16, quick=False)
    for case in op_cases.model_cases():
        found += _workloads(case, "cuda", "triton", case.dtype, quick=False)
        if case.op in CUDA_FORWARD:
            found += _workloads(case, "cuda", "native", case.dtype, quick=False)
    return found


WORKLOADS = _all()


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_operator(workload: Workload, measured: Line) -> None:
    """One operator in one direction."""
