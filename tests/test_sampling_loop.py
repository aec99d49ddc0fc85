"""Check that the sampler's loop neither waits for the device nor reads weights elsewhere."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.cuda_graph import CudaGraphTransformer
from anyflow.sampling import sample, sample_consistency
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SCHEDULER = FlowMapEulerDiscreteScheduler(shift=5.0)
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


@pytest.fixture
def model() -> AnyFlowTransformer3DModel:
    return AnyFlowTransformer3DModel(**TINY).eval()


@pytest.fixture
def inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """Return the arguments of a guided call with first frames."""
    return {
        "noise": torch.randn(2, 3, 4, 4, 6, generator=generator),
        "prompt_embeds": torch.randn(2, 5, 8, generator=generator),
        "negative_prompt_embeds": torch.randn(1, 5, 8, generator=generator),
        "context_latents": torch.randn(1, 1, 4, 4, 6, generator=generator, dtype=torch.float64),
    }


def guided(model: Any, inputs: dict[str, Tensor], steps: int, **options: Any) -> Tensor:
    return sample(
        model, SCHEDULER, **inputs, num_inference_steps=steps, guidance_scale=2.0, **options
    )


def assert_same(graph: Any, model: Any, inputs: dict[str, Tensor], steps: int) -> None:
    torch.testing.assert_close(
        guided(graph, inputs, steps), guided(model, inputs, steps), rtol=0, atol=1e-5
    )


class Waits(TorchDispatchMode):
    """Count what makes the host wait where tensors are on a GPU.

    These are reads of values, shapes that depend on values, and copies from Python's numbers and
    between devices.
    """

    READS = (
        "_local_scalar_dense",
        "item",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique",
        "lift_fresh",
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        copied = name == "_to_copy" and kwargs.get("device") is not None
        masks = [
            i
            for i in (
                args[1] if name in ("index", "index_put", "index_put_") and len(args) > 1 else ()
            )
            if is_mask(i)
        ]
        if name.startswith(self.READS) or copied or masks:
            self.calls[name] += 1
        return function(*args, **kwargs)


def is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


@pytest.mark.parametrize(
    ("call", "reads"),
    [
        (lambda x: x[0, 0].item(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.tensor([1.0]) + x, 1),
        (torch.sin, 0),
    ],
    ids=["item", "mask", "constant", "none"],
)
def test_waits_are_seen(call: Callable[[Tensor], Any], reads: int) -> None:
    with Waits() as waits:
        call(torch.eye(2))
    assert sum(waits.calls.values()) >= reads and (reads or not waits.calls)


@pytest.mark.parametrize("sampler", ["plain", "guided", "consistency", "offloaded"])
def test_no_step_waits_for_the_device(sampler: str, model, inputs) -> None:
    """Count the waits before the first and after the last step: equal for two steps and six."""
    plain = {name: inputs[name] for name in ("noise", "prompt_embeds")}
    if sampler == "offloaded":
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    counted = []
    for steps in (2, 6):
        with Waits() as waits:
            if sampler in ("guided", "offloaded"):
                guided(model, inputs, steps, callback=lambda i, t, x: x * 0.9)
            elif sampler == "plain":
                sample(model, SCHEDULER, **plain, num_inference_steps=steps)
            else:
                sample_consistency(model, SCHEDULER, **plain, num_inference_steps=steps)
        counted.append(waits.calls)
    assert counted[0] and counted[0] == counted[1]


@needs_cuda
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_no_step_waits_for_a_gpu(graph: bool, model, inputs) -> None:
    """Let CUDA itself raise for a wait from the second step on: the first builds the kernels."""
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    network = CudaGraphTransformer(model.cuda()) if graph else model.cuda()

    def strict(index: int, timestep: float, latents: Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error" if index < 3 else "default")

    try:
        latents = guided(network, on_gpu, 4, callback=strict)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(latents.cpu(), guided(model.cpu(), inputs, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level", "sequential"])
def test_weights_that_come_for_a_call_only_are_used_in_calls_only(
    kind: str, model, inputs, tmp_path: Path
) -> None:
    """Keep weights on a disk, or nowhere, between calls: a step that reads them fails."""
    expected = guided(model, inputs, 3)
    cpu = torch.device("cpu")
    if kind == "sequential":
        accelerate.cpu_offload(model, cpu, offload_buffers=True)
        assert all(p.is_meta for p in model.parameters())
    else:
        blocks = 1 if kind == "block_level" else None
        apply_group_offloading(
            model, cpu, cpu, kind, num_blocks_per_group=blocks, offload_to_disk_path=str(tmp_path)
        )
        with torch.no_grad():  # what an offloaded weight holds is undefined
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(float("nan"))
    torch.testing.assert_close(guided(model, inputs, 3), expected, rtol=0, atol=1e-5)


def test_a_graph_needs_a_gpu(model) -> None:
    with pytest.raises(
        ValueError, match="a CUDA graph needs a transformer on a CUDA device, this one is on cpu"
    ):
        CudaGraphTransformer(model)


@needs_cuda
def test_a_graph_needs_weights_that_stay(model) -> None:
    accelerate.hooks.add_hook_to_module(model.cuda(), accelerate.hooks.ModelHook())
    with pytest.raises(ValueError, match="stay where they are"):
        CudaGraphTransformer(model)


@needs_cuda
def test_a_graph_gives_the_transformers_latents(model, inputs) -> None:
    """Inputs, steps, shapes, weights and inference mode may change between the calls."""
    model.cuda()
    graph = CudaGraphTransformer(model)
    on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
    other = on_gpu | {"noise": -on_gpu["noise"], "prompt_embeds": 2 * on_gpu["prompt_embeds"]}
    short = on_gpu | {name: on_gpu[name][:1] for name in ("noise", "prompt_embeds")}
    with torch.inference_mode():
        assert_same(graph, model, on_gpu, 4)
    for case, steps in ((other, 4), (on_gpu, 7), (short, 2), (on_gpu, 3)):
        assert_same(graph, model, case, steps)
    assert not torch.equal(guided(graph, on_gpu, 4), guided(graph, other, 4))
    for grid in range(1, 10):  # more than the tables that the model keeps
        model.rope((1, 1, grid), torch.device("cuda"), torch.float32)
    assert_same(graph, model, on_gpu, 4)
    with torch.no_grad():
        model.proj_out.weight.mul_(2)  # in place: the graph reads it
        assert_same(graph, model, on_gpu, 4)
        model.proj_out.weight.data = 0.5 * model.proj_out.weight.data  # elsewhere: recorded anew
        assert_same(graph, model, on_gpu, 4)
    graph.reset()
    assert_same(graph, model, on_gpu, 4)


@pytest.mark.parametrize(
    "graph", [False, pytest.param(True, marks=needs_cuda)], ids=["eager", "graph"]
)
def test_what_inference_mode_has_run_can_be_trained(graph: bool, model, inputs, generator) -> None:
    device = "cuda" if graph else "cpu"
    model.to(device)
    placed = {name: tensor.to(device) for name, tensor in inputs.items()}
    network = CudaGraphTransformer(model) if graph else model
    with torch.inference_mode():
        before = guided(network, placed, 2)  # fills every cache
    assert torch.equal(guided(network, placed, 2), before)
    t = torch.full((2,), 700.0, device=device)
    model.train()
    model(placed["noise"], t, t / 2, placed["prompt_embeds"]).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(guided(network, placed, 2), before)


def test_blocks_are_compiled_once_for_all_of_them_and_every_step(model, inputs) -> None:
    """Compile each block as one graph; tests/pipelines/test_pipeline_options.py runs inductor."""
    torch._dynamo.reset()
    counter = CompileCounter()
    expected = guided(model, inputs, 4)
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for case in (inputs, inputs | {"noise": -inputs["noise"]}):
        compiled = guided(model, case, 4)
        assert counter.frame_count == 1
        assert torch.equal(compiled, expected) == (case is inputs)
