"""Shard, offload and wrap the causal model, as trainers and pipelines do."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler


@pytest.mark.slow
def test_sharded_ranks_compute_what_one_process_does(
    fork_ranks: Callable[..., subprocess.Popen[str]],
) -> None:
    """Train and sample on two ranks under FSDP2 with gradient checkpointing."""
    job = fork_ranks(2, Path(__file__).parent / "scripts" / "sharded_causal.py")
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output[-4000:]
    distances = [float(line.split()[1]) for line in output.splitlines() if "distance" in line]
    assert len(distances) == 1 and distances[0] <= 1e-12, output


@pytest.mark.parametrize("kind", ["layer by layer", "block by block", "leaf by leaf"])
def test_offloaded_weights_are_there_when_they_are_needed(kind, causal_reference) -> None:
    """Let accelerate's and diffusers' hooks bring weights around module calls only."""
    from accelerate import cpu_offload
    from diffusers.hooks import apply_group_offloading

    noise = causal_reference["roll.noise_bfchw"]
    arguments = (FlowMapEulerDiscreteScheduler(shift=5.0), noise)
    text = causal_reference["prompt_embeds"][:2]
    expected = sample_causal(causal_reference.model(), *arguments, text)
    model, device = causal_reference.model(), torch.device("cpu")
    if kind == "layer by layer":
        cpu_offload(model, execution_device=device, offload_buffers=True)
        assert all(p.is_meta for p in model.parameters())
    else:
        blocks = kind == "block by block"
        apply_group_offloading(
            model,
            onload_device=device,
            offload_device=device,
            offload_type="block_level" if blocks else "leaf_level",
            num_blocks_per_group=1 if blocks else None,
        )
    assert torch.equal(sample_causal(model, *arguments, text), expected)


def test_a_wrapped_model_samples_and_is_called_as_a_module(causal_reference) -> None:
    """Sample through a wrapper with the model as ``module``, as DistributedDataParallel has it."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args: object, **kwargs: object) -> object:
            self.calls += 1
            return self.module(*args, **kwargs)

    noise, text = causal_reference["roll.noise_bfchw"], causal_reference["prompt_embeds"][:2]
    wrapped = Wrapper(causal_reference.model())
    arguments = (FlowMapEulerDiscreteScheduler(shift=5.0), noise, text)
    video = sample_causal(wrapped, *arguments, num_inference_steps=2)
    assert torch.equal(video, sample_causal(wrapped.module, *arguments, num_inference_steps=2))
    assert wrapped.calls == 12 + 5
