"""Time every operator by backend, dtype and direction, against its eager and compiled reference.

On the CPU at [1, 1280, 384] and [1, 8192, 1536], the sizes of a small model and of a layer of the
1.3B one; on a GPU at the shapes of the 1.3B and 14B models at 480 x 832 x 81.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch._functorch.config
import torch.nn.functional as F
from timing import OURS, Step, capture_stream
from workloads import Contest, Line, Place, Workload

from anyflow.ops import examples, use_backend
from anyflow.ops.examples import Example, OperatorCall, as_tuple

SMALL, LARGE = (1280, 384), (8192, 1536)
DIRECTIONS = ("forward", "backward")
# those with a native CUDA kernel
CUDA_FORWARD = ("layer_norm_modulate", "residual_layer_norm", "rms_norm_rope")
BACKENDS, COMPILE, TORCH = ("triton", "native", "eager"), "compile", "torch"
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def on_cpu(tokens: int, dim: int) -> list[Example]:
    """List every operator at a size of the CPU's."""
    found = [*examples.row_examples(tokens, dim, 1), examples.dual_timestep_embedding(tokens, dim)]
    found += [examples.gelu(tokens, dim), examples.linear(tokens, dim, 4 * dim)]
    found += examples.flow_map_examples(2, (tokens // 256, 16, dim // 12, 96))  # as many elements
    if (tokens, dim) == SMALL:  # the reference keeps L x L scores of every head
        found.append(examples.attention(tokens, dim, 64))
    return found


def makers(
    example: Example, direction: str, dtype: torch.dtype, place: Place
) -> dict[str, Callable[[], Step]]:
    """Return what makes the steps of every backend, of the compiled reference and of torch's own.

    The inputs exist at once, and all steps share them.
    """
    call = example.call(place.device, dtype)
    make = partial(_forward if direction == "forward" else _backward, place.device, call)

    def compiled() -> Step:
        # a compiled backward that runs many times keeps what it reads
        torch._functorch.config.donated_buffer = False
        torch._dynamo.reset()
        function = torch.compile(call.function, fullgraph=True, backend=place.compiler)
        return make("eager", function)

    found: dict[str, Callable[[], Step]] = {
        backend: partial(make, backend, call.function) for backend in BACKENDS
    }
    found[COMPILE] = compiled
    if example.op == "attention":
        found[TORCH] = partial(make, "eager", _torch_attention)
    return found


def _torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _forward(
    device: torch.device, call: OperatorCall, backend: str, function: Callable[..., object]
) -> Step:
    def step() -> object:
        with use_backend(backend), torch.set_grad_enabled(call.training):
            return as_tuple(function(*call.inputs))

    return step


def _backward(
    device: torch.device, call: OperatorCall, backend: str, function: Callable[..., object]
) -> Step:
    wanted, generator = list(call.wanted), torch.Generator(device).manual_seed(1)
    with use_backend(backend), capture_stream(device):
        outputs = as_tuple(function(*call.inputs))
        cotangents = [
            torch.randn(o.shape, generator=generator, device=device).to(o.dtype) for o in outputs
        ]
    if device.type == "cuda":
        torch.cuda.synchronize()

    def step() -> object:
        with use_backend(backend):
            return torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    return step


def _contest(
    example: Example, backend: str, direction: str, dtype: torch.dtype, place: Place
) -> Contest:
    found = makers(example, direction, dtype, place)
    work = example.forward if direction == "forward" else example.backward
    return Contest({OURS: found[backend], **found}, work.bytes(dtype), work.flops)


def _workloads(
    example: Example, device: str, backend: str, dtype: torch.dtype, quick: bool
) -> list[Workload]:
    on_gpu = device == "cuda"
    variant = f".{example.variant}" if example.variant else ""
    several = example.rows not in (1, example.tokens) and not example.op.startswith("flow_map")
    shape = f"{example.tokens}x{example.dim}{f'x{example.rows}' if several else ''}"
    peers = ["eager", COMPILE]
    peers += [TORCH] if example.op == "attention" else []
    peers += ["triton"] if on_gpu and backend == "native" else []
    found = []
    for direction in DIRECTIONS[:1] if on_gpu and backend == "native" else DIRECTIONS:
        name = "/".join((f"ops/{example.op}{variant}", shape, _DTYPES[dtype], direction, backend))
        build = partial(_contest, example, backend, direction, dtype)
        found.append(Workload(name, tuple(peers), build, device, dtype, quick, kernels=True))
    return found


def _all() -> list[Workload]:
    found = []
    for size in (SMALL, LARGE):
        for example in on_cpu(*size):
            found += _workloads(example, "cpu", "native", torch.float32, quick=size == SMALL)
            # of fp32 alone: in any model, or where a choice is made
            if not example.op.startswith(("flow_map", "linear")):
                found += _workloads(example, "cpu", "native", torch.bfloat16, quick=False)
    for example in examples.model_examples():
        found += _workloads(example, "cuda", "triton", example.dtype, quick=False)
        if example.op in CUDA_FORWARD:
            found += _workloads(example, "cuda", "native", example.dtype, quick=False)
    return found


WORKLOADS = _all()


def bench_operator(workload: Workload, measured: Line) -> None:
    """Time one operator in one direction."""
