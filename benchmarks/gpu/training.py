"""Training steps at 1.3B, adapters and gradient checkpointing: ours, and the peers' formulation on
diffusers' model.

The peers' trainers evaluate the network four times on the whole batch in a pretrain step, with one
modulation row per token, and each score of an on-policy step in a call of its own. A step is loss
and backward.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import peers
import timing
import torch
from torch import Tensor

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
)
from gpu import networks
from gpu.context import Context, last_line
from gpu.sizes import Size

EPSILON, GUIDANCE, TEACHER_GUIDANCE = 5.0, 3.0, 3.0
# One sample with r = t, one without: the published proportions are a half each.
T, R = (0.7, 0.6), (0.7, 0.2)
ROLLOUT = (8, 3)  # steps, and the one that carries the gradient: three segments
SCORE_T = 0.5

# latents enter in fp32, as under autocast
_PEERS_SIZE = dataclasses.replace(peers.SMALL, dtype=torch.float32)

Losses = Callable[[], dict[str, float]]


def run_pretrain(context: Context) -> None:
    """One pretrain step of a batch of two."""
    size = context.sizes["1.3B"]
    _compare(context, size, {"ours": _our_pretrain, "peers' formulation": _peers_pretrain})


def run_on_policy(context: Context) -> None:
    """A generator step and a critic step of a batch of one, together."""
    size = context.sizes["1.3B"]
    _compare(context, size, {"ours": _our_on_policy, "peers' formulation": _peers_on_policy})


def _compare(
    context: Context, size: Size, makers: dict[str, Callable[[Context, Size], Losses]]
) -> None:
    problem = networks.peer_problem()
    steps: dict[str, timing.Step] = {}
    # bytes that each keeps between its steps: no part of the other's peak
    held: dict[str, int] = {}
    for name, make in makers.items():
        if name != "ours" and problem is not None:
            context.put(name, {"skipped": problem})
            continue
        try:
            before = _allocated(context)
            step = make(context, size)
            context.put(f"{name}: losses", step())  # the first step warms up
            held[name] = _allocated(context) - before
            alone = {name: step}
            _round(context, alone, {}, held)  # before anything of the others can go wrong
            steps |= alone
        except Exception as error:
            _failed(context, name, error)
    beside: dict[str, list[float]] = {}
    for index in range(1 if context.tiny else 3):
        if index and not context.affords(25.0):
            break
        _round(context, steps, beside, held)


def _allocated(context: Context) -> int:
    return torch.cuda.memory_allocated(context.device) if context.cuda else 0


def _failed(context: Context, name: str, error: Exception) -> None:
    """Record why a variant is not measured; of a peer, that it is out of memory is a result."""
    if "ms" not in (context.file.get(context.name, name) or {}):  # else it ran alone, which is kept
        context.put(name, {"error": last_line(error)})
    if name == "ours" or not isinstance(error, torch.OutOfMemoryError):
        context.fail(f"{name}: {last_line(error)}")
    if context.cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _round(
    context: Context,
    steps: dict[str, timing.Step],
    before: dict[str, list[float]],
    held: dict[str, int],
) -> None:
    """Time each step once more, beside each other, and add it to the milliseconds ``before``.

    A peak is without what the other steps hold meanwhile, their networks and gradients.
    """

    def failed(name: str, error: Exception) -> None:
        _failed(context, name, error)
        del steps[name]

    samples, peaks = timing.calls(dict(steps), context.device, rounds=1, on_error=failed)
    for name, values in samples.items():
        before[name] = milliseconds = before.get(name, []) + values
        peak = peaks.get(name)
        if peak is not None:
            peak -= sum(bytes_held for other, bytes_held in held.items() if other != name)
        entry = {
            "ms": statistics.median(milliseconds),
            "peak_bytes": peak,
            "samples_ms": milliseconds,
        }
        context.put(name, entry)


# Data and networks --------------------------------------------------------------------------------


def _generator(context: Context, seed: int) -> torch.Generator:
    return torch.Generator(context.device).manual_seed(seed)


def _data(context: Context, size: Size, batch: int) -> peers.Batch:
    """Latents, noise and prompts; the same for ours and for the peers."""
    generator = _generator(context, 3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=context.device)

    latents, noise = (draw(batch, *size.latents) for _ in range(2))
    prompt, negative = (
        draw(batch, size.text_tokens, size.text_dim),
        draw(1, size.text_tokens, size.text_dim),
    )
    return peers.Batch(latents, noise, prompt, negative.expand(batch, -1, -1))


def _network(context: Context, size: Size, peers: bool, trained: bool = True) -> Any:
    model = networks.build(context, size)
    model = networks.build_peer(context, size, model) if peers else model
    return networks.prepare_training(model, context.tiny) if trained else model


def _autocast(context: Context) -> AbstractContextManager[Any]:
    return torch.autocast(
        context.device.type, torch.bfloat16, enabled=context.cuda, cache_enabled=False
    )


# Pretrain -----------------------------------------------------------------------------------------


def _our_pretrain(context: Context, size: Size) -> Losses:
    model, data = _network(context, size, peers=False), _data(context, size, len(T))
    config = PretrainConfig(epsilon=EPSILON, fuse_guidance_scale=GUIDANCE, boundary="extrapolate")
    method = AnyFlowPretrainMethod(model, peers.scheduler(), config)
    t, r = (torch.tensor(values, device=context.device) for values in (T, R))
    pairs = TimePairs(t, r, t == r)

    def step() -> dict[str, float]:
        model.zero_grad(set_to_none=True)
        with _autocast(context):
            output = method.loss(
                data.latents, data.prompt, data.negative, noise=data.noise, time_pairs=pairs
            )
        output.loss.backward()
        return {"loss": output.loss.item()}

    return step


def _peers_pretrain(context: Context, size: Size) -> Losses:
    model, data = _network(context, size, peers=True), _data(context, size, len(T))
    t, r = (torch.tensor(values, device=context.device) for values in (T, R))
    step = peers.pretrain_step(model, _PEERS_SIZE, data, t, r, GUIDANCE, EPSILON)

    def under_autocast() -> dict[str, float]:
        with _autocast(context):
            return {"loss": step().item()}

    return under_autocast


# On-policy ----------------------------------------------------------------------------------------


def _our_on_policy(context: Context, size: Size) -> Losses:
    student, critic = (_network(context, size, peers=False) for _ in range(2))
    teacher, data = _network(context, size, peers=False, trained=False), _data(context, size, 1)
    config = OnPolicyConfig(real_guidance_scale=TEACHER_GUIDANCE)
    method = AnyFlowOnPolicyMethod(student, teacher, critic, peers.scheduler(), config)
    t, noise, (steps, grad_step) = _score_time(context), _score_noise(context, size), ROLLOUT

    def step() -> dict[str, float]:
        student.zero_grad(set_to_none=True)
        with _autocast(context):
            samples = method.rollout(data.noise, data.prompt, num_steps=steps, grad_step=grad_step)
            generator = method.generator_loss(samples, data.prompt, data.negative, t=t, noise=noise)
        generator.loss.backward()
        del samples
        critic.zero_grad(set_to_none=True)
        with _autocast(context):
            with torch.no_grad():
                samples = method.rollout(
                    data.noise, data.prompt, num_steps=steps, grad_step=grad_step
                )
            critic_output = method.critic_loss(samples, data.prompt, t=t, noise=noise)
        critic_output.loss.backward()
        return {"generator": generator.loss.item(), "critic": critic_output.loss.item()}

    return step


def _segments() -> tuple[float, ...]:
    """The times that the shortcut rollout goes through: from noise, over the step with the
    gradient, to data.
    """
    steps, grad_step = ROLLOUT
    sigmas = peers.scheduler().schedule(steps).tolist()
    return tuple(sigmas[i] for i in (0, grad_step, grad_step + 1, steps))


def _score_time(context: Context) -> Tensor:
    return torch.full((1,), SCORE_T, device=context.device)


def _score_noise(context: Context, size: Size) -> Tensor:
    return torch.randn(1, *size.latents, generator=_generator(context, 4), device=context.device)


def _peers_on_policy(context: Context, size: Size) -> Losses:
    student, critic = (_network(context, size, peers=True) for _ in range(2))
    teacher, data = _network(context, size, peers=True, trained=False), _data(context, size, 1)
    draws = peers.OnPolicy(
        _segments(), _score_time(context), _score_noise(context, size), TEACHER_GUIDANCE
    )
    generator = peers.generator_step(student, teacher, critic, _PEERS_SIZE, data, draws)
    critic_step = peers.critic_step(student, critic, _PEERS_SIZE, data, draws)

    def under_autocast() -> dict[str, float]:
        with _autocast(context):
            return {"generator": generator().item(), "critic": critic_step().item()}

    return under_autocast
