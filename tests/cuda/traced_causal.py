"""Run the causal model on fake CUDA tensors: cached steps, encodings, the layout of training."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.models.causal_cache import encode_chunks
from anyflow.models.network import evaluate
from anyflow.ops import backend_report
from anyflow.sampling import ChunkSampler, sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

BF16, CUDA = torch.bfloat16, torch.device("cuda", 0)
HEADS, HEAD_DIM, LAYERS = 12, 128, 2  # of the 1.3B model, but for the layers
DIM, FULL, COMPRESSED = HEADS * HEAD_DIM, 30 * 52, 15 * 26  # tokens of a frame at 480 x 832
SIZES = (1, 3, 3, 3, 3, 3, 3, 2)
# of a block, beside the norm and the keys, which come first; and of the last block of an encoding
PER_BLOCK = {
    "layer_norm_modulate": 1,
    "rms_norm_rope": 4,
    "residual_layer_norm": 2,
    "gated_residual": 1,
}
KEYS_ALONE = {"layer_norm_modulate": 1, "rms_norm_rope": 1}
# of a sampling: whether all was finite is read once, after the last step
END = ["utils/validation.py:first"]


class Attentions(TorchFunctionMode):
    """Run cuDNN's attention, and keep the (queries, keys) of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[tuple[int, int]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return function(*args, **({} if kwargs is None else kwargs))
        query, key, value = args
        assert query.dtype == key.dtype == value.dtype == BF16
        self.lengths.append((query.shape[2], key.shape[2]))
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in args)
        return torch.ops.aten._scaled_dot_product_cudnn_attention(
            *args, None, gradient, 0.0, False, False
        )[0]


@pytest.fixture
def model(device: Any) -> AnyFlowFARTransformer3DModel:
    with torch.device("meta"), device.fakes:
        model = AnyFlowFARTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=8960, num_layers=LAYERS
        )
    return device.parameters(model, BF16)


def latents(frames: int) -> Tensor:
    return torch.empty(1, frames, 16, 60, 104, dtype=BF16, device=CUDA)


def text() -> Tensor:
    return torch.empty(1, 512, 4096, dtype=BF16, device=CUDA)


def test_encodings_and_cached_steps_are_kernels_without_a_wait(model: Any, device: Any) -> None:
    """Trace chunk 7, with 5070 compressed and 9360 full keys, and the encoding before it."""
    cache, t = model.new_cache(), torch.empty(1, device=CUDA)
    with torch.no_grad():
        encode_chunks(model, cache, 6, dict(enumerate(map(latents, SIZES))), text())
        device.clear()
        with Attentions() as attention:
            encode_chunks(model, cache, 7, {c: latents(SIZES[c]) for c in (4, 5, 6)}, text())
    counts = Counter({op: n * (LAYERS - 1) for op, n in PER_BLOCK.items()}) + Counter(KEYS_ALONE)
    assert device.counts() == counts + Counter({"dual_timestep_embedding": 1})
    own, before = 3 * COMPRESSED, 10 * COMPRESSED
    of_text, full = (own + 6 * FULL, 512), 3 * FULL
    assert attention.lengths == [
        (own, before + own),
        (full, before + own + full),
        (full, before + own + 2 * full),
        of_text,
    ]
    assert cache.num_bytes == 2 * 2 * LAYERS * DIM * (13 * COMPRESSED + 6 * FULL)
    assert device.waits == []

    device.clear()
    with torch.no_grad(), Attentions() as attention:
        out = evaluate(
            model, latents(2), timestep=t, r_timestep=t, encoder_hidden_states=text(), cache=cache
        )
    assert out.shape == (1, 2, 16, 60, 104) and out.dtype == BF16
    counts = Counter({op: n * LAYERS for op, n in PER_BLOCK.items()})
    ends = Counter({"dual_timestep_embedding": 1, "layer_norm_modulate": 1})
    assert device.counts() == counts + ends
    keys = 13 * COMPRESSED + 8 * FULL
    assert attention.lengths == [(2 * FULL, keys), (2 * FULL, 512)] * LAYERS
    assert device.waits == []
    assert not any(choice.fallbacks for choice in backend_report("cuda").values())


@pytest.mark.parametrize("autocast", [False, True])
def test_the_layout_of_training_is_kernels_without_a_wait(
    autocast: bool, model: Any, device: Any
) -> None:
    """Trace a loss on the last three of eight chunks, with checkpointing under autocast."""
    if autocast:
        device.parameters(model, torch.float32)
        model.enable_gradient_checkpointing()
    t = torch.empty(1, device=CUDA)
    device.clear()
    with Attentions() as attention:
        with torch.autocast("cuda", BF16, enabled=autocast, cache_enabled=False):
            out = model(latents(21), t, t, text(), clean_hidden_states=latents(8)).sample
        engine, gradient = torch.autograd.Variable._execution_engine, torch.empty_like(out)
        engine.run_backward(
            (out,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    assert out.shape[1] == 8 and device.waits == []
    # five compressed chunks, two clean copies and three noisy chunks; the last layer computes noisy
    # ones alone
    compressed, full = 13 * COMPRESSED, 3 * FULL
    noisy = [(full, compressed + full), (full, compressed + 2 * full)]
    noisy += [(2 * FULL, compressed + 2 * full + 2 * FULL)]
    groups = [(SIZES[c] * COMPRESSED, sum(SIZES[: c + 1]) * COMPRESSED) for c in range(5)]
    groups += [(full, compressed + full), (full, compressed + 2 * full)]
    first = [*groups, *noisy, (compressed + 2 * full + 8 * FULL, 512)]
    last = [*noisy, (8 * FULL, 512)]
    forward = first + last
    # checkpointed blocks run again, the last one first
    assert attention.lengths == (forward + last + first if autocast else forward)
    forward_ops = Counter({op: n * LAYERS for op, n in PER_BLOCK.items()})
    again = forward_ops if autocast else Counter()
    ends = Counter({"dual_timestep_embedding": 1, "layer_norm_modulate": 1})
    backward = Counter({f"{op}_backward": n for op, n in (forward_ops + ends).items()})
    assert device.counts() == forward_ops + ends + backward + again
    assert not any(choice.fallbacks for choice in backend_report("cuda").values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 2.0},
        {"context_latents": True},
        {"cache_window": 1},
        {"use_cache": False},
        {"prompt_switches": True},
    ],
    ids=str,
)
def test_the_sampler_waits_once_at_its_end(
    options: dict[str, Any], model: Any, device: Any
) -> None:
    """Give the context in host memory."""
    noise, prompt = torch.empty(1, 9, 16, 8, 8, dtype=BF16, device=CUDA), text()
    options = dict(options)
    if options.pop("context_latents", False):
        options["context_latents"] = torch.zeros(1, 3, 16, 8, 8)
    if options.pop("prompt_switches", False):
        options["prompt_switches"] = {3: text()}
    if "guidance_scale" in options:
        options["negative_prompt_embeds"] = prompt
    device.clear()
    sample_causal(
        model,
        FlowMapEulerDiscreteScheduler(),
        noise,
        prompt,
        chunk_partition=(1, 2, 2, 2, 2),
        num_inference_steps=2,
        **options,
    )
    assert [wait.where for wait in device.waits] == END


def test_a_chunk_is_delivered_without_a_wait(model: Any, device: Any) -> None:
    noise = torch.empty(1, 9, 16, 8, 8, dtype=BF16, device=CUDA)
    chunks = ChunkSampler(
        *(model, FlowMapEulerDiscreteScheduler(), noise, text()),
        chunk_partition=(1, 2, 2, 2, 2),
        num_inference_steps=2,
    )
    device.clear()
    assert [chunk for chunk, _ in chunks] == [0, 1, 2, 3, 4] and device.calls
    assert device.waits == []
