"""Test the memory plans and speed options: what they give, leave behind and refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from typer.testing import CliRunner

import anyflow
from anyflow.cli import app
from anyflow.formats import load_transformer
from anyflow.models.network import has_hooks
from anyflow.pipelines import AnyFlowPipeline
from anyflow.pipelines.memory import stop_streaming, stream
from anyflow.pipelines.wan import encode_prompt, load_text_encoder, load_tokenizer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CALL: dict[str, Any] = {
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 12,
    "seed": 1,
    "num_inference_steps": 4,
}
PROMPT = "a red disc moves slowly"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "graph": ({"cuda_graph": True}, "cuda_graph needs a CUDA device, but the device is cpu"),
    "graph-low": (
        {"cuda_graph": True, "memory": "low"},
        "cuda_graph needs a CUDA device, but the device is cpu",
    ),
    "stream": (
        {"memory": "stream"},
        "memory='stream' copies weights to a CUDA device, but the device is cpu",
    ),
    "plan": ({"memory": "tiny"}, "memory must be one of auto, fast, low, stream, got 'tiny'"),
}


@pytest.fixture
def no_weights(model: Path, tmp_path: Path) -> Path:
    """Copy the model without its weights: loading them would be another error."""
    shutil.copytree(model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def load(model: Path, memory: str, device: str = "cpu", **options: Any) -> AnyFlowPipeline:
    return AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device=device, memory=memory, **options
    )


def video(pipe: AnyFlowPipeline, **call: Any) -> Tensor:
    return pipe(PROMPT, **{**CALL, "output_type": "pt", **call}).frames


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_cpu_cannot_do_is_refused_before_anything_is_loaded(
    options, message, no_weights: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        AnyFlowPipeline.from_pretrained(no_weights, device="cpu", **options)


@pytest.mark.parametrize("arguments", [["--cuda-graph"], ["--memory", "stream"]], ids=" ".join)
def test_the_command_refuses_it_too(arguments: list[str], no_weights: Path, tmp_path: Path) -> None:
    size = ["--height", "16", "--width", "32", "--num-frames", "5", "--device", "cpu"]
    command = [
        "sample",
        "--model",
        str(no_weights),
        "--out",
        str(tmp_path / "out"),
        "--prompt",
        PROMPT,
        *size,
    ]
    result = CliRunner().invoke(app, [*command, *arguments])
    assert (
        result.exit_code == 2
        and result.output.startswith("anyflow: ")
        and result.output.count("\n") == 1
    )
    assert arguments[0].strip("-").replace("-", "_") in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["compile", "cuda_graph"])
def test_weights_that_stream_are_not_compiled_or_recorded(option: str, no_weights: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with pytest.raises(ValueError, match="needs weights that stay|copies weights to a CUDA device"):
        AnyFlowPipeline.from_pretrained(
            no_weights, device=device, memory="stream", **{option: True}
        )


@pytest.mark.parametrize("memory", ["fast", "low", pytest.param("stream", marks=needs_cuda)])
def test_a_pipeline_first_used_in_inference_mode_can_be_trained(memory: str, model: Path) -> None:
    """Use inference mode, in which "low" even loads the transformer."""
    pipe = load(model, memory, "cuda" if memory == "stream" else "cpu")
    with torch.inference_mode():
        before = video(pipe)
    pipe._turns.release(pipe.transformer)  # weights that stream are the device's otherwise
    network = pipe.transformer.train()
    x, t = torch.randn(1, 2, 16, 2, 4), torch.tensor([700.0])
    network(x, t, t / 2, torch.randn(1, 12, 16)).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    after = video(pipe)
    assert after.isfinite().all() and not torch.equal(before, after)
    with torch.inference_mode():
        assert torch.equal(video(pipe), after)


@pytest.mark.parametrize("made_by", ["from_pretrained", "load_transformer", "accelerate"])
def test_a_transformer_made_in_inference_mode_can_be_trained(
    made_by: str, model: Path, generator
) -> None:
    theirs = diffusers.AnyFlowTransformer3DModel.from_pretrained(model, subfolder="transformer")
    with torch.inference_mode():
        if made_by == "from_pretrained":
            network = load(model, "fast").transformer
        else:
            network = (
                load_transformer(model)
                if made_by == "load_transformer"
                else anyflow.accelerate(theirs)
            )
        x, text = (
            torch.randn(1, 2, 16, 2, 4, generator=generator),
            torch.randn(1, 12, 16, generator=generator),
        )
        t = torch.full((1, 2), 700.0)
        before = network(x, t, t / 2, text).sample
    after = network(*(tensor.clone() for tensor in (x, t, t / 2, text))).sample
    after.square().mean().backward()
    assert torch.equal(before, after) and all(p.grad is not None for p in network.parameters())


def adapter(model: Path, folder: Path) -> Path:
    """Write a LoRA file that changes the transformer."""
    torch.manual_seed(1)
    transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        model, subfolder="transformer"
    )
    transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "net.2"], init_lora_weights=False)
    )
    diffusers.loaders.WanLoraLoaderMixin.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(transformer)
    )
    return folder


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_the_command_merges_a_lora(memory: str, model: Path, tmp_path: Path) -> None:
    size = [
        "--height",
        "16",
        "--width",
        "32",
        "--num-frames",
        "5",
        "--device",
        "cpu",
        "--memory",
        memory,
    ]
    command = [
        "sample",
        "--model",
        str(model),
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        "--dtype",
        "float32",
        *size,
    ]
    for out, more in (
        ("plain", []),
        ("merged", ["--lora", str(adapter(model, tmp_path / "lora"))]),
    ):
        result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / out), *more])
        assert result.exit_code == 0, result.output
    plain, merged = (
        next((tmp_path / out).rglob("steps-02-seed-0.mp4")).read_bytes()
        for out in ("plain", "merged")
    )
    assert plain != merged
    assert json.loads((tmp_path / "merged" / "results.json").read_text())["settings"][
        "lora"
    ] == str(tmp_path / "lora")


PLANS: dict[str, dict[str, Any]] = {
    "low": {"memory": "low"},
    "stream": {"memory": "stream"},
    "fast-graph": {"memory": "fast", "cuda_graph": True},
    "low-graph": {"memory": "low", "cuda_graph": True},
    "fast-compile-graph": {"memory": "fast", "cuda_graph": True, "compile": True},
}


@needs_cuda
@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_every_plan_gives_the_same_on_a_gpu(
    options: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """Run twice, as graphs and streams learn in the first run, with a LoRA merged in between."""
    expected, actual = load(model, "fast", "cuda"), load(model, device="cuda", **options)
    for call in ({"num_inference_steps": 4}, {"num_inference_steps": 2, "seed": 2}):
        torch.testing.assert_close(
            video(actual, **call), video(expected, **call), rtol=0, atol=1e-4
        )
    before = video(actual)
    for pipe in (expected, actual):
        pipe.load_lora(adapter(model, tmp_path))
    torch.testing.assert_close(video(actual), video(expected), rtol=0, atol=1e-4)
    assert not torch.allclose(video(actual), before, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("memory", ["low", "stream"])
def test_the_transformer_leaves_the_gpu(memory: str, model: Path) -> None:
    """Check that with "stream" it is never there as a whole, and waits in pinned memory."""
    pipe = load(model, memory, "cuda")
    there: list[int] = []

    def count(index: int, timestep: float, latents: Tensor) -> None:
        there.append(sum(p.is_cuda for p in pipe.transformer.parameters()))

    video(pipe, callback=count)
    total = len(list(pipe.transformer.parameters()))
    assert there == ([total] * 4 if memory == "low" else [0] * 4)
    assert not any(p.is_cuda for p in pipe.transformer.parameters())
    if memory == "stream":
        assert has_hooks(pipe.transformer)
        assert all(p.is_pinned() for block in pipe.transformer.blocks for p in block.parameters())


@needs_cuda
def test_a_transformer_of_40_blocks_streams_in_the_memory_of_a_few(model: Path) -> None:
    """Stream blocks of 31 MB, 1.3 GB in all."""
    pipe = load(model, "stream", "cuda")
    sizes = dict(pipe.transformer.config) | {
        "num_layers": 40,
        "num_attention_heads": 64,
        "ffn_dim": 2048,
    }
    pipe.transformer = type(pipe.transformer)(
        **{k: v for k, v in sizes.items() if not k.startswith("_")}
    ).eval()
    block = sum(p.nbytes for p in pipe.transformer.blocks[0].parameters())
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    video(pipe, output_type="latent", num_inference_steps=1)
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    video(pipe, output_type="latent", num_inference_steps=2)
    assert weights > 40 * block
    assert torch.cuda.max_memory_allocated() - start < weights - 40 * block + 4 * block + 100e6


@needs_cuda
def test_a_text_encoder_streams_layer_by_layer(model: Path) -> None:
    text_encoder, tokenizer = load_text_encoder(model, torch.float32), load_tokenizer(model)
    expected = encode_prompt(text_encoder, tokenizer, PROMPT, 12)
    stream(text_encoder, torch.device("cuda"))
    for _ in range(2):
        torch.testing.assert_close(
            encode_prompt(text_encoder, tokenizer, PROMPT, 12), expected, rtol=0, atol=1e-4
        )
        assert not any(p.is_cuda for p in text_encoder.parameters())
    stop_streaming(text_encoder)
    assert not has_hooks(text_encoder)
    torch.testing.assert_close(
        encode_prompt(text_encoder, tokenizer, PROMPT, 12), expected, rtol=0, atol=1e-5
    )


def test_hooks_come_off_and_leave_the_weights(model: Path, tmp_path: Path) -> None:
    """Offload the weights to a disk, as a CPU has no streams."""
    transformer = load_transformer(model)
    names, weights = (
        list(transformer.state_dict()),
        [p.detach().clone() for p in transformer.parameters()],
    )
    buffers = [b.clone() for b in transformer.buffers()]
    x, t, text = torch.zeros(1, 2, 16, 2, 4), torch.full((1,), 700.0), torch.zeros(1, 12, 16)
    with torch.no_grad():
        expected = transformer(x, t, t / 2, text).sample
        cpu = torch.device("cpu")
        apply_group_offloading(
            transformer, cpu, cpu, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
        )
        assert has_hooks(transformer)
        torch.testing.assert_close(
            transformer(x, t, t / 2, text).sample, expected, rtol=0, atol=1e-5
        )
        stop_streaming(transformer)
        for parameter, weight in zip(transformer.parameters(), weights, strict=True):
            parameter.copy_(2 * weight)
        # which wait on the disk, too
        for buffer, value in zip(transformer.buffers(), buffers, strict=True):
            buffer.copy_(value)
    assert not has_hooks(transformer) and list(transformer.state_dict()) == names
    with torch.no_grad():
        assert (transformer(x, t, t / 2, text).sample - expected).abs().max() > 0.1
    with pytest.raises(ValueError, match="streams"):
        stream(transformer, cpu)


def test_a_transformer_put_in_place_of_the_own_is_used(model: Path) -> None:
    pipe = load(model, "low")
    before = video(pipe)
    other = type(pipe.transformer)(
        **{k: v for k, v in pipe.transformer.config.items() if not k.startswith("_")}
    )
    pipe.transformer = other.eval()
    assert isinstance(pipe.transformer, nn.Module) and not torch.equal(video(pipe), before)
