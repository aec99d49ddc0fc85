"""Measure the causal model: videos chunk by chunk, caches on the host, decoding, training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import causal_roofline
import networks
import torch
from causal import bench_causal_training
from causal.bench_causal import SHIFT, last_call, sampled
from methods.bench_methods import COMPILED as PEERS_COMPILED
from methods.bench_methods import FORMULATION, on_gpu
from model.bench_model import attention_choices
from sizes import CausalSize
from timing import OURS
from torch import Tensor, nn

from gpu.models import ContestRecord, put_step_and_graph
from gpu.run import DeviceRun

STEPS = (1, 2, 4)
GOAL_STEPS = 2
ON_HOST, DECODED = "caches on the host", "with decoding, chunk by chunk"
COMPILED, STEP = "ours, compiled blocks", "step of the last chunk"
COMPILE_S, DECODE_S = 120.0, 15.0
PIXEL_FRAMES = 4  # of a latent frame; the first one of a video is one frame


def key_of(who: str, steps: int = GOAL_STEPS) -> str:
    """Return the key of a video in the results."""
    return f"{who} NFE {steps}"


class ChunkClock:
    """Record when the calls of a causal model begin and end: encodings and evaluations apart.

    On a GPU these are events of the stream, which the host does not wait for.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._calls: list[tuple[bool, Any, Any]] = []
        self._encodes, self._begin = False, self._now()

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Listen to the calls of a model."""
        handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Forget the calls of an earlier video."""
        self._calls = []

    def chunks(self) -> list[dict[str, float]]:
        """Return ``encode_ms`` and ``evaluate_ms``, of all its steps, for each chunk.

        The first chunk has no encoding, and each of the others begins with one.
        """
        if self._cuda:
            torch.cuda.synchronize()
        found = [{"encode_ms": 0.0, "evaluate_ms": 0.0}]
        for encodes, begin, end in self._calls:
            if encodes:
                found.append({"encode_ms": 0.0, "evaluate_ms": 0.0})
            ms = begin.elapsed_time(end) if self._cuda else 1e3 * (end - begin)
            found[-1]["encode_ms" if encodes else "evaluate_ms"] += ms
        return found

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._encodes, self._begin = kwargs.get("encode") is not None, self._now()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._calls.append((self._encodes, self._begin, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def run_causal(run: DeviceRun, name: str) -> None:
    """Time whole videos of 1, 2 and 4 steps, caches on the host, decoding, compiled blocks.

    The short plan leaves out compiled blocks, which take longer to compile than all else.
    """
    size = run.causal_sizes[name]
    model = networks.ours(size, run.device).requires_grad_(False)
    data = networks.videos(size, run.device)
    run.put("parameters", size.parameters)
    run.put("attention", attention_choices(size, run.device)[0])
    video = _CausalVideo(run, size, model, data)
    video.put_cache()
    problems: dict[str, str] = {}
    for steps in STEPS:
        run.attempt(problems, key_of(OURS, steps), lambda n=steps: video.put(OURS, n))
    run.attempt(problems, key_of(ON_HOST), video.put_on_host)
    call = run.attempt(problems, STEP, lambda: last_call(model, sampled(model, size, data, 1)))
    if call is not None:
        put_step_and_graph(run, call, STEP)
    if run.affords(DECODE_S):
        run.attempt(problems, key_of(DECODED), video.put_decoded)
    else:
        run.put(key_of(DECODED), {"skipped": "budget"})
    if not run.short and run.affords(COMPILE_S):
        run.attempt(problems, key_of(COMPILED), video.put_compiled)
    else:
        reason = "not in the short plan" if run.short else "budget"
        run.put(key_of(COMPILED), {"skipped": reason})
    for key, problem in problems.items():
        run.put(key, {"error": problem})
    if problems:
        run.fail("; ".join(f"{key}: {problem}" for key, problem in problems.items()))


def run_causal_training(run: DeviceRun) -> None:
    """Time a pretrain step on all chunks at 1.3B: ours, and the peers' under a dense mask.

    The full plan adds the peers' with compiled flex attention, which has no backward pass on a CPU.
    """
    contest = bench_causal_training.pretrain(on_gpu(run.causal_sizes["1.3B"]), run.place)
    record = ContestRecord(run, contest, rounds=2, alone=1, reserve_s=25.0)
    problem = networks.peer_problem()
    if problem is not None:
        run.put(FORMULATION, {"skipped": problem})
    else:
        record.add(FORMULATION)
        reason = "not in the short plan" if run.short else "budget"
        if not run.cuda:
            reason = "flex attention has no backward pass on a CPU"
        if run.cuda and not run.short and run.affords(COMPILE_S):
            record.add(PEERS_COMPILED)
        else:
            run.put(PEERS_COMPILED, {"skipped": reason})
    record.end()


class _CausalVideo:
    """Sample the video of a size in several ways, and record the times of its chunks.

    Args:
        run: of the section.
        size: of the network.
        model: ours.
        data: noise and prompt.
    """

    def __init__(self, run: DeviceRun, size: CausalSize, model: Any, data: networks.Videos) -> None:
        self.run, self.size, self.model, self.data = run, size, model, data
        self.frames = PIXEL_FRAMES * (size.frames - 1) + 1

    def put(self, who: str, steps: int, **options: Any) -> Tensor:
        """Record a video of some steps, sampled a second time, and return its latents."""
        step = sampled(self.model, self.size, self.data, steps, **options)
        step()  # compiles, tunes, fills the allocator
        clock = ChunkClock(self.run.device)
        problems: dict[str, str] = {}
        results: list[Tensor] = []

        def once() -> None:
            clock.clear()
            results[:] = [step()]

        with clock.listening(self.model):
            timed = self.run.time({who: once}, 1, problems)
        if problems:
            raise RuntimeError(problems[who])
        seconds = timed.seconds(who)
        entry = {
            "ms": 1e3 * seconds,
            "fps": self.frames / seconds,
            "peak_bytes": timed.peaks.get(who),
            "chunks": clock.chunks(),
        }
        self.run.put(key_of(who, steps), entry)
        return results[0]

    def put_cache(self) -> None:
        """Record the bytes of the caches: predicted, kept, and allocated beside them on a GPU."""
        from anyflow.sampling import ChunkSampler
        from anyflow.schedulers import FlowMapEulerDiscreteScheduler

        _, _, height, width = self.size.latents
        predicted = self.model.cache_bytes(height, width)
        scheduler = FlowMapEulerDiscreteScheduler(shift=SHIFT)
        noise = self.data.noise.to(self.size.dtype)
        sampler = ChunkSampler(
            self.model, scheduler, noise, self.data.prompt, num_inference_steps=1
        )
        before = self._allocated()
        kept = allocated = 0
        for _ in sampler:
            assert sampler.cache is not None
            kept = max(kept, sampler.cache.num_bytes)
            allocated = max(allocated, self._allocated() - before)
        entry = {"predicted_bytes": predicted, "kept_bytes": kept}
        entry |= {"counted_bytes": causal_roofline.cache_bytes(self.size)}
        self.run.put("cache", entry | {"allocated_bytes": allocated if self.run.cuda else None})
        if kept != predicted:
            self.run.fail(f"the cache took {kept} bytes, and {predicted} were predicted")

    def put_on_host(self) -> None:
        """Record a video whose caches wait on the host, which must be the same to the bit."""
        resident = sampled(self.model, self.size, self.data, GOAL_STEPS)()
        latents = self.put(ON_HOST, GOAL_STEPS, cache_device="cpu")
        equal = bool(torch.equal(latents, resident))
        self.run.put(f"{ON_HOST}: the same bits", equal)
        if not equal:
            self.run.fail("caches on the host changed the video")

    def put_decoded(self) -> None:
        """Record a video whose chunks are decoded as soon as they are sampled.

        The VAE is Wan2.1's with random weights.
        """
        from anyflow.pipelines.chunk_decoder import ChunkDecoder

        vae = _vae(self.run)
        decoders: list[Any] = []
        shapes: list[torch.Size] = []

        def decode(chunk: int, latents: Tensor) -> None:
            decoders[:] = [ChunkDecoder(vae)] if chunk == 0 else decoders
            shapes.append(decoders[0].decode(latents).shape)

        self.put(DECODED, GOAL_STEPS, on_chunk=decode)
        decoded = sum(shape[1] for shape in shapes[-len(self.size.chunk_partition) :])
        if decoded != self.frames:
            self.run.fail(f"{decoded} frames were decoded, and the video has {self.frames}")

    def put_compiled(self) -> None:
        """Record a video of compiled blocks, and the seconds until all are compiled."""
        plain = sampled(self.model, self.size, self.data, GOAL_STEPS)()
        started = time.monotonic()
        self.model.compile_repeated_blocks(backend=self.run.place.compiler)
        sampled(self.model, self.size, self.data, GOAL_STEPS)()
        self.run.put(f"{COMPILED}: first video", {"ms": 1e3 * (time.monotonic() - started)})
        latents = self.put(COMPILED, GOAL_STEPS)
        distance = (latents - plain).float().norm() / plain.float().norm()
        self.run.put(f"{COMPILED}: relative difference", float(distance))

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.run.device) if self.run.cuda else 0


def _vae(run: DeviceRun) -> Any:
    """Build Wan2.1's VAE with random weights in the run's dtype; a small one for a tiny run."""
    from diffusers import AutoencoderKLWan

    shape = {"base_dim": 4, "num_res_blocks": 1} if run.tiny else {}
    with torch.device(run.device):
        vae = AutoencoderKLWan(**shape)
    return vae.to(run.dtype).requires_grad_(False).eval()
