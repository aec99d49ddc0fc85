"""The gate of ``anyflow.accelerate``: ``python benchmarks/accelerate_gates.py``, exit status 1 if it is missed.

The call of a diffusers ``AnyFlowPipeline``, from prompt embeddings to latents, in fp32 on two threads: two pipelines
over one transformer, of which one is accelerated, in turns. The figure is the ratio of the minima of their times.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from cpu_gates import ratio
from torch import Tensor

import anyflow

GATE = 1.3
SIZES = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 4, "ffn_dim": 1536, "text_dim": 128}
FRAMES, HEIGHT, WIDTH = 5, 32, 32  # of the latents: 1280 tokens
STEPS, TEXT_LENGTH = 4, 32
TOLERANCE = 1e-5

Step = Callable[[], Tensor]


def pipelines() -> tuple[Step, Step]:
    """The call of diffusers' pipeline, and of one accelerated on the same weights."""
    torch.manual_seed(0)
    transformer = diffusers.AnyFlowTransformer3DModel(**SIZES).eval()
    noise = torch.randn(1, 16, FRAMES, HEIGHT, WIDTH)
    text = torch.randn(1, TEXT_LENGTH, SIZES["text_dim"])

    def call(accelerated: bool) -> Step:
        scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
        pipe = diffusers.AnyFlowPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
        )
        pipe.set_progress_bar_config(disable=True)
        if accelerated:
            anyflow.accelerate(pipe)

        def step() -> Tensor:
            return pipe(
                prompt_embeds=text,
                latents=noise,
                height=8 * HEIGHT,
                width=8 * WIDTH,
                num_frames=4 * (FRAMES - 1) + 1,
                num_inference_steps=STEPS,
                output_type="latent",
            ).frames

        return step

    return call(False), call(True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    baseline, ours = pipelines()
    expected = baseline()
    torch.testing.assert_close(ours(), expected, rtol=0, atol=TOLERANCE)  # warms up as well
    speed = ratio(baseline, ours, arguments.seconds)
    verdict = "ok" if speed >= GATE else "MISSED"
    print(f"torch {torch.__version__}, diffusers {diffusers.__version__}, Python {platform.python_version()}")
    print(f"AnyFlowPipeline, {STEPS} steps, accelerated  {speed:5.2f}x  gate {GATE}  {verdict}")
    if arguments.output is not None:
        results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "speed": speed, "gate": GATE}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if speed >= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
