"""What the benchmarks report beside ratios: FLOPs, bytes, peak memory and the limits of the
machine.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyflow.ops import use_backend

CPU = torch.device("cpu")


def counted(step: object) -> int:
    """FLOPs of the matrix products that torch sees in a step of the eager references."""
    # Of torch's attention it counts what is written as products, not the fused kernel for CPUs.
    with (
        FlopCounterMode(display=False) as counter,
        use_backend("eager"),
        sdpa_kernel(SDPBackend.MATH),
    ):
        step()
    return counter.get_total_flops()


def test_flops_of_a_forward(bench: SimpleNamespace) -> None:
    """Counted by torch, but for the embedding of the times, which the formula leaves out."""
    size = bench.peers.Size("tiny", 2, 16, 3, 96, 24, 7, (2, 3, 16, 8, 6))
    _, model = bench.peers.models(size, CPU)
    data, t = bench.peers.batch(size, CPU), torch.full((2,), 500.0)
    with torch.no_grad():
        times = counted(lambda: model.condition_embedder(t, t, torch.float32))
        found = counted(lambda: model(data.noise, t, t, data.prompt))
    assert found - times == 2 * size.forward_flops()  # a batch of two
    block = sum(p.numel() for n, p in model.blocks[0].named_parameters() if p.ndim == 2)
    assert block == size.block_weights()


@pytest.mark.parametrize("name", ["linear_case", "attention_case"])
def test_flops_of_operators(bench: SimpleNamespace, name: str) -> None:
    case = getattr(bench.op_cases, name)(12, 32, 16)
    call = case.build(CPU, torch.float32)
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.extend(call.outputs())

    assert counted(forward) == case.forward.flops
    # torch keeps the weights of attention for its backward, where a kernel forms the scores again:
    # one product more.
    again = case.forward.flops // 2 if name == "attention_case" else 0
    assert (
        counted(lambda: torch.autograd.grad(outputs, call.wanted, outputs)) + again
        == case.backward.flops
    )


def test_bytes_by_dtype(bench: SimpleNamespace) -> None:
    """By hand, [1, 10, 64] with one row of modulation: two passes over x, shift and scale in
    fp32.
    """
    case = next(c for c in bench.op_cases.row_cases(10, 64, 1) if c.op == "layer_norm_modulate")
    assert case.forward.bytes(torch.float32) == 2 * 640 * 4 + 2 * 64 * 4
    assert case.forward_bytes == case.forward.bytes(torch.bfloat16) == 2 * 640 * 2 + 2 * 64 * 4
    linear = bench.op_cases.linear_case(10, 64, 32)
    assert linear.forward_bytes == 2 * (10 * 64 + 64 * 32 + 32 + 10 * 32)


def test_peak_memory(bench: SimpleNamespace) -> None:
    """Two tensors of 32 MiB at once, of which none stays."""

    def step() -> float:
        x = torch.ones(1 << 23)
        return float((x + 1)[0])

    peak = bench.interleave.peak_memory(step, CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert 63 * 2**20 < peak < 80 * 2**20


def test_limits(bench: SimpleNamespace) -> None:
    limits, dtype = bench.limits.Limits(CPU), torch.float32
    moving, computing = (
        limits.shortest_time(1 << 20, 0, dtype),
        limits.shortest_time(0, 10**9, dtype),
    )
    assert moving == (1 << 20) / limits.copy_bandwidth(1 << 20) > 0
    assert computing == 1e9 / limits.product_rate(dtype) > 0
    assert limits.shortest_time(1 << 20, 10**9, dtype) == max(moving, computing)
