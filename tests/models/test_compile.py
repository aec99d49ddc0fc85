"""Compile a block and the model: one graph, the same numbers, under every backend."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.blocks import AnyFlowTransformerBlock
from anyflow.ops import use_backend

DIM, LENGTH, HEADS = 32, 6, 2


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def arguments(g: torch.Generator, rows: int, dtype: torch.dtype) -> tuple[Any, ...]:
    x, text = (torch.randn(2, n, DIM, generator=g).to(dtype).requires_grad_() for n in (LENGTH, 5))
    angle = torch.rand(LENGTH, DIM // HEADS // 2, generator=g)
    modulation = torch.randn(2, rows, 6, DIM, generator=g).to(dtype).requires_grad_()
    return x, text, modulation, (angle.cos(), angle.sin())


def run(block: Any, inputs: tuple[Any, ...], parameters: list[Tensor]) -> list[Tensor]:
    """Return the output and all gradients."""
    out = block(*inputs)
    return [out, *torch.autograd.grad(out.float().square().mean(), [*inputs[:3], *parameters])]


@pytest.mark.parametrize(
    ("compiler", "dtype"),
    [
        # the C++ compiler takes its time
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
        ("aot_eager", torch.bfloat16),
    ],
)
# the interpreter takes its time as well
@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=pytest.mark.slow)])
def test_block_compiles_in_one_graph(backend, compiler, dtype, generator) -> None:
    """Compare output and gradients with those of the block."""
    if backend == "triton":
        pytest.importorskip("triton")
    block = AnyFlowTransformerBlock(DIM, 2 * DIM, HEADS, cross_attn_norm=True, eps=1e-6).to(dtype)
    parameters = list(block.parameters())
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    inputs = arguments(generator, 3, dtype)
    with use_backend(backend):
        expected, actual = run(block, inputs, parameters), run(compiled, inputs, parameters)
    scale = max(e.abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6 * scale)


def test_a_change_of_backend_recompiles(generator) -> None:
    """Force another backend, which must not reuse the first graph: tracing makes the choice."""
    pytest.importorskip("triton")
    block = AnyFlowTransformerBlock(DIM, 2 * DIM, HEADS, cross_attn_norm=True, eps=1e-6)
    inputs = arguments(generator, 3, torch.float32)
    graphs = []

    def keep(module: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append({str(n.target) for n in module.graph.nodes if n.op == "call_function"})
        return module

    compiled = torch.compile(block, fullgraph=True, backend=keep)
    for backend in ("eager", "triton", "eager"):
        with use_backend(backend), torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), block(*inputs), rtol=1e-5, atol=1e-5)
    assert [any("anyflow." in target for target in graph) for graph in graphs] == [False, True]


def test_model_compiles_in_one_graph(tiny, make_inputs) -> None:
    model = AnyFlowTransformer3DModel(**tiny | {"num_layers": 1})
    i = make_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(*i.tuple()).sample, model(*i.tuple()).sample, rtol=1e-5, atol=1e-5
        )


def test_repeated_blocks_compile_once(tiny, make_inputs) -> None:
    """Share one graph among all blocks by diffusers' ``compile_repeated_blocks``."""
    model = AnyFlowTransformer3DModel(**tiny)
    i = make_inputs()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        expected = model(*i.tuple()).sample
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        torch.testing.assert_close(model(*i.tuple()).sample, expected, rtol=1e-5, atol=1e-5)
    assert len(model.blocks) == 2 and counter.frame_count == 1
