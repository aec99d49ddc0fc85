"""The gate of a pretrain step on the CPU: ``python benchmarks/train_gates.py``, exit status 1 if it is missed.

Ours against the peers' formulation on diffusers' model with the same weights and the same batch, fp32, guidance fused
with g = 3: the trainers of NVlabs and FastVideo evaluate the network four times on the whole batch (with gradient,
unconditionally, at t + and at t -), with one modulation row per token; here two calls evaluate it for what has a factor
other than 0. Ratios of minima of steps that alternate, and of the peak memory of a step in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig, TimePairs
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

GATE = 1.5
GUIDANCE, EPSILON, TIMESTEPS = 3.0, 5.0, 1000
SIZES = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 4, "ffn_dim": 1536, "text_dim": 128}
LATENTS = (4, 3, 16, 32, 32)  # 768 tokens a sample
# The kinds of samples in the published proportions: half r = t, a quarter r = 0, a quarter between.
T = torch.tensor([0.7, 0.4, 0.8, 0.6])
R = torch.tensor([0.7, 0.4, 0.0, 0.3])

Step = Callable[[], None]


def batch() -> dict[str, Tensor]:
    """Latents, noise and prompts; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"latents": LATENTS, "noise": LATENTS, "prompt": (LATENTS[0], 32, 128), "negative": (1, 32, 128)}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def scheduler() -> FlowMapEulerDiscreteScheduler:
    """Of the published recipe, without the shift: the times above are meant as they are."""
    return FlowMapEulerDiscreteScheduler(TIMESTEPS, shift=1.0)


def our_step(model: Any) -> Callable[[], Tensor]:
    """The library's pretrain loss; what it returns has been through backward."""
    config = PretrainConfig(epsilon=EPSILON, fuse_guidance_scale=GUIDANCE, boundary="extrapolate")
    method, data = AnyFlowPretrainMethod(model, scheduler(), config), batch()
    pairs = TimePairs(T, R, T == R)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        output = method.loss(data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=pairs)
        output.loss.backward()
        return output.loss.detach()

    return step


def peers_step(model: Any) -> Callable[[], Tensor]:
    """SPEC B as the peers write it: four evaluations of the whole batch, the difference multiplied by t - r = 0."""
    data, weights = batch(), scheduler().get_train_weight(T * TIMESTEPS)
    frames, is_diffusion = LATENTS[1], T == R
    negative = data["negative"].expand(LATENTS[0], -1, -1)

    def network(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        times = [(TIMESTEPS * u)[:, None].expand(-1, frames) for u in (t, R)]
        return model(x, *times, text, return_dict=False)[0]

    def lead(u: Tensor) -> Tensor:
        return u.reshape(-1, 1, 1, 1, 1)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        x0, noise, text, e = data["latents"], data["noise"], data["prompt"], EPSILON / TIMESTEPS
        v = noise - x0
        x_t = lead(1 - T) * x0 + lead(T) * noise
        cond = network(x_t, T, text)
        with torch.no_grad():
            uncond = network(x_t, T, negative)
            slope = network(x_t + e * v, T + e, text) - network(x_t - e * v, T - e, text)
            target = v - lead(T - R) * slope / (2 * e * GUIDANCE)
        pred = (cond - (1 - GUIDANCE) * uncond) / GUIDANCE
        loss = weights * (pred - target).square().flatten(1).mean(1)
        mean = loss.detach()[is_diffusion].mean()
        loss = (loss * torch.where(is_diffusion, torch.ones(()), mean / (loss.detach() + 1e-5))).mean()
        loss.backward()
        return loss.detach()

    return step


def steps() -> dict[str, Callable[[], Tensor]]:
    """Both steps on the same weights."""
    from diffusers import AnyFlowTransformer3DModel as Peer

    torch.manual_seed(0)
    peer, ours = Peer(**SIZES), AnyFlowTransformer3DModel(**SIZES)
    ours.load_state_dict(peer.state_dict())
    return {"peers": peers_step(peer), "ours": our_step(ours)}


def interleaved(both: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, float]:
    """Minimum of each step's times, the two alternating for about so many seconds."""
    best = dict.fromkeys(both, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, step in both.items():
            start = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


def _peak_memory(name: str, queue: Any) -> None:
    torch.set_num_threads(2)
    step = steps()[name]
    step()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present size
    step()
    queue.put(_status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def peak_memory(name: str) -> int:
    """Bytes that a step needs beyond the weights, the data and the gradients, in a fresh process (Linux)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_memory, args=(name, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process that measures {name} ended with exit status {process.exitcode}")
    return int(queue.get())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=40.0, help="of timing")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    both = steps()
    losses = {name: step() for name, step in both.items()}
    torch.testing.assert_close(losses["ours"], losses["peers"], rtol=1e-4, atol=0)  # the same mathematics
    best = interleaved(both, arguments.seconds)
    memory = {name: peak_memory(name) for name in both}
    speed, saved = best["peers"] / best["ours"], memory["peers"] / memory["ours"]
    verdict = "ok" if speed >= GATE else "MISSED"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, batch {LATENTS[0]}")
    print(f"pretrain step, peers' formulation on diffusers' model / ours   time {speed:5.2f}x  gate {GATE}  {verdict}")
    print(f"                                                      peak memory {saved:5.2f}x")
    if arguments.output is not None:
        results = {"torch": torch.__version__, "speed": speed, "peak_memory": saved, "bytes": memory}
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if speed >= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
