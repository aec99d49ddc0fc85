"""Compare the losses and rollouts of the causal model with numbers of the reference trainers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    CausalConfig,
    DMD2Config,
    DMD2Method,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample, sample_causal, sample_consistency
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

ROLLOUTS = ("n4.g0", "n4.g2", "n4.g3", "n8.g5")
UNGUIDED = {"diffusion_ratio": 0.5, "fuse_guidance_scale": 1.0}


@pytest.fixture
def scheduler(causal_reference: Any) -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler(shift=causal_reference.variant["shift"])


@pytest.fixture
def pretrain(causal_reference: Any, scheduler: Any) -> Callable[..., AnyFlowPretrainMethod]:
    """Return a function from changed settings to the reference's pretrain method."""

    def build(student: Any = None, causal: CausalConfig | None = None, **settings: Any) -> Any:
        variant = causal_reference.variant
        given = {
            "epsilon": variant["eps"],
            "fuse_guidance_scale": variant["g"],
            "causal": CausalConfig() if causal is None else causal,
        }
        student = causal_reference.model() if student is None else student
        return AnyFlowPretrainMethod(student, scheduler, PretrainConfig(**given | settings))

    return build


@pytest.fixture
def on_policy(causal_reference: Any, scheduler: Any) -> Callable[..., AnyFlowOnPolicyMethod]:
    """Return a function from a student to its rollouts' method."""

    def build(student: Any, **settings: Any) -> AnyFlowOnPolicyMethod:
        score = _bidirectional(causal_reference)
        config = OnPolicyConfig(**{"causal": CausalConfig(), **settings})
        return AnyFlowOnPolicyMethod(student, score, copy.deepcopy(score), scheduler, config)

    return build


def _bidirectional(reference: Any) -> AnyFlowTransformer3DModel:
    config = dict(reference.variant["config"])
    for name in ("compressed_patch_size", "full_chunk_limit", "chunk_partition"):
        config.pop(name)
    return AnyFlowTransformer3DModel(**config)


def _batch(reference: Any) -> tuple[Tensor, Tensor, Tensor]:
    latents = reference["latents_bcfhw"].transpose(1, 2)
    return latents, reference["prompt_embeds"], reference["negative_prompt_embeds"]


def _pairs(reference: Any) -> TimePairs:
    return TimePairs(*(reference[f"pre.{name}"] for name in ("t_unit", "r_unit", "is_diffusion")))


def _gradients(reference: Any, prefix: str) -> dict[str, Tensor]:
    found = {k[len(prefix) :]: v for k, v in reference.tensors.items() if k.startswith(prefix)}
    assert len(found) >= 2
    return found


def _errors(model: Any, expected: dict[str, Tensor], relative: Any) -> dict[str, float]:
    parameters = dict(model.named_parameters())
    return {name: relative(parameters[name].grad, value) for name, value in expected.items()}


@contextmanager
def _calls(model: Any) -> Iterator[list[tuple[bool, int]]]:
    """Collect whether each call of a network records gradients, and its number of samples."""
    calls: list[tuple[bool, int]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        calls.append((torch.is_grad_enabled(), len(kwargs["hidden_states"])))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("boundary", ["one_sided", "extrapolate"])
@pytest.mark.parametrize("length", ["long", "short"])
def test_the_pretrain_loss_and_its_gradients_are_those_of_the_reference(
    length, boundary, causal_reference, pretrain, relative
) -> None:
    method = pretrain(boundary=boundary)
    noise = causal_reference["pre.noise_bfchw"]
    before = {"noise": noise.clone(), "latents": _batch(causal_reference)[0].clone()}
    output = method.loss(
        *_batch(causal_reference),
        noise=noise,
        time_pairs=_pairs(causal_reference),
        num_chunks=causal_reference.variant[f"{length}_chunks"],
        bidirectional=False,
    )
    assert relative(output.loss.detach(), causal_reference[f"pre.{length}.loss"][0]) <= 1e-5
    output.loss.backward()
    expected = _gradients(causal_reference, f"pre.{length}.grad.")
    errors = _errors(method.student, expected, relative)
    assert max(errors.values()) <= 1e-4, errors
    compressed = method.student.far_patch_embedding.weight.grad
    assert (compressed is None) == (length == "short")
    assert torch.equal(noise, before["noise"])
    assert torch.equal(_batch(causal_reference)[0], before["latents"])


def test_the_bidirectional_loss_and_its_gradients_are_those_of_the_reference(
    causal_reference, pretrain, relative
) -> None:
    method = pretrain()
    output = method.bidirectional_loss(
        *_batch(causal_reference),
        t=causal_reference["bidi.t_unit"],
        noise=causal_reference["pre.noise_bfchw"],
    )
    assert relative(output.loss.detach(), causal_reference["bidi.loss"][0]) <= 1e-5
    output.loss.backward()
    errors = _errors(method.student, _gradients(causal_reference, "bidi.grad."), relative)
    assert max(errors.values()) <= 1e-4, errors


def test_the_bidirectional_loss_is_added_with_the_same_texts(causal_reference, pretrain) -> None:
    """Prompts that are dropped are dropped in both losses."""
    method = pretrain(prompt_dropout=0.5)
    latents, text, negative = _batch(causal_reference)
    dropped = torch.tensor([True, False, True, False])
    added = {
        "bidirectional_t": causal_reference["bidi.t_unit"],
        "bidirectional_noise": causal_reference["pre.noise_bfchw"].flip(1),
    }
    given = {
        "noise": causal_reference["pre.noise_bfchw"],
        "time_pairs": _pairs(causal_reference),
        "dropped_prompts": dropped,
        "num_chunks": 4,
    }
    both = method.loss(latents, text, negative, **given, **added, bidirectional=True)
    alone = method.loss(latents, text, negative, **given, bidirectional=False)
    mixed = torch.where(dropped[:, None, None], negative, text)
    second = method.bidirectional_loss(
        latents,
        mixed,
        negative,
        t=added["bidirectional_t"],
        noise=added["bidirectional_noise"],
    )
    torch.testing.assert_close(both.loss, alone.loss + second.loss)
    torch.testing.assert_close(both.metrics["loss_bidirectional"], second.loss.detach())
    assert "loss_bidirectional" not in alone.metrics


@pytest.mark.parametrize(("bidirectional", "calls"), [(False, 2), (True, 4)])
@pytest.mark.parametrize("kinds", ["diffusion", "flow map"])
def test_the_network_is_called_twice_or_four_times_whatever_is_drawn(
    kinds, bidirectional, calls, causal_reference, pretrain
) -> None:
    pairs = _pairs(causal_reference)
    if kinds == "diffusion":
        pairs = TimePairs(pairs.t, pairs.t, torch.ones(4, dtype=torch.bool))
    for guidance in (1.0, 3.0):
        method = pretrain(fuse_guidance_scale=guidance)
        with _calls(method.student) as seen:
            method.loss(
                *_batch(causal_reference),
                time_pairs=pairs,
                num_chunks=5,
                bidirectional=bidirectional,
            )
        # without guidance the second loss has nothing to evaluate without gradient
        assert len(seen) == calls - (guidance == 1.0 and bidirectional)
        assert [grad for grad, _ in seen] == [False, True, False, True][: len(seen)] or (
            guidance == 1.0 and [grad for grad, _ in seen] == [False, True, True]
        )


def test_both_ends_of_the_difference_share_one_context(causal_reference, pretrain) -> None:
    """Count tokens of the first block: without gradient each sample and text has one context."""
    method, pairs, counts = pretrain(fuse_guidance_scale=3.0), _pairs(causal_reference), []
    method.student.blocks[0].attn1.to_k.register_forward_hook(
        lambda _, inputs, out: counts.append(inputs[0].shape[:2].numel())
    )
    method.loss(*_batch(causal_reference), time_pairs=pairs, num_chunks=5, bidirectional=False)
    picked = len(pairs.flow_map_indices())
    context, noisy = 3 * 2 + 3 * 8, 5 * 8
    assert 0 < picked < 4
    assert counts == [(picked + 4) * context, (2 * picked + 4) * noisy, 4 * (context + noisy)]


def test_frames_and_noise_that_a_loss_does_not_see_change_nothing(
    causal_reference, pretrain
) -> None:
    method = pretrain()
    latents, *texts = _batch(causal_reference)
    noise = causal_reference["pre.noise_bfchw"]
    given = {"time_pairs": _pairs(causal_reference), "num_chunks": 5, "bidirectional": False}
    partition = causal_reference.variant["partition"]
    loss = method.loss(latents, *texts, noise=noise, **given).loss
    # of five chunks with L = 3 the first two are compressed, and the sixth is not seen
    compressed, seen = sum(partition[:2]), sum(partition[:5])
    others = latents.clone(), noise.clone()
    others[0][:, seen:] = 7
    others[1][:, seen:] = 7
    others[1][:, :compressed] = 7
    assert torch.equal(method.loss(others[0], *texts, noise=others[1], **given).loss, loss)
    others[0][:, :compressed] += 0.1
    assert not torch.equal(method.loss(others[0], *texts, noise=others[1], **given).loss, loss)


def test_the_exact_derivative_is_what_the_central_difference_comes_to(
    causal_reference, pretrain, relative
) -> None:
    student = causal_reference.model(torch.float64)
    latents, *texts = (x.double() for x in _batch(causal_reference))
    given = {
        "noise": causal_reference["pre.noise_bfchw"].double(),
        "time_pairs": _pairs(causal_reference),
        "num_chunks": 6,
        "bidirectional": False,
    }
    exact = pretrain(student, derivative="jvp").loss(latents, *texts, **given).loss
    near = pretrain(student, epsilon=0.05).loss(latents, *texts, **given).loss
    assert relative(near.detach(), exact.detach()) <= 1e-4


@pytest.mark.parametrize("long_context_ratio", [0.0, 0.5, 1.0])
def test_the_number_of_chunks_has_the_published_distribution(
    long_context_ratio, pretrain, generator
) -> None:
    method = pretrain(causal=CausalConfig(long_context_ratio=long_context_ratio))
    draws = 4000
    drawn = torch.tensor([method.draw_num_chunks(generator) for _ in range(draws)])
    least, most = 3, 6
    share = long_context_ratio / (most - least + 1)
    expected = {n: share + (1 - long_context_ratio) * (n == least) for n in range(least, most + 1)}
    for n, probability in expected.items():
        spread = 5 * (probability * (1 - probability) / draws) ** 0.5
        assert abs((drawn == n).double().mean().item() - probability) <= spread
    assert least <= drawn.min() and drawn.max() <= most


def test_a_video_of_fewer_chunks_than_the_limit_is_seen_whole(causal_reference, pretrain) -> None:
    method = pretrain(causal=CausalConfig(chunk_partition=(4, 5)))
    assert {method.draw_num_chunks() for _ in range(20)} == {2}
    assert torch.isfinite(method.loss(*_batch(causal_reference)).loss)


@pytest.mark.parametrize("key", ROLLOUTS)
def test_rollouts_are_those_of_the_reference(key, causal_reference, on_policy, relative) -> None:
    n, g = (int(part[1:]) for part in key.split("."))
    noise = causal_reference["roll.noise_bfchw"]
    text = causal_reference["prompt_embeds"][: len(noise)]
    with torch.no_grad():
        x = on_policy(causal_reference.model()).rollout(noise, text, num_steps=n, grad_step=g)
    assert relative(x, causal_reference[f"roll.{key}"]) <= 2e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_rollouts_are_those_of_the_reference(
    checkpointing, causal_reference, on_policy, relative
) -> None:
    student = causal_reference.model()
    if checkpointing:
        student.enable_gradient_checkpointing()
    noise = causal_reference["roll.noise_bfchw"]
    text = causal_reference["prompt_embeds"][: len(noise)]
    x = on_policy(student).rollout(noise, text, num_steps=4, grad_step=1)
    x.square().mean().backward()
    errors = _errors(student, _rollout_gradients(causal_reference), relative)
    assert max(errors.values()) <= 1e-4, errors
    assert student.far_patch_embedding.weight.grad is None


def _rollout_gradients(reference: Any) -> dict[str, Tensor]:
    found = _gradients(reference, "roll.grad.")
    found.pop("loss")
    return found


def test_gradients_are_exact_under_checkpointing_for_a_loss_on_each_chunk(
    causal_reference, on_policy, relative
) -> None:
    """Recomputation must read the keys that the forward pass of its own chunk has read."""
    noise = causal_reference["roll.noise_bfchw"].double()
    text = causal_reference["prompt_embeds"][: len(noise)].double()
    partition = causal_reference.variant["partition"]
    found: dict[bool, list[Tensor]] = {}
    for checkpointing in (False, True):
        student = causal_reference.model(torch.float64)
        if checkpointing:
            student.enable_gradient_checkpointing(
                partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            )
        x = on_policy(student).rollout(noise, text, num_steps=4, grad_step=1)
        used = [p for n, p in student.named_parameters() if not n.startswith("far_patch")]
        gradients = []
        for chunk in x.split(partition, dim=1):
            parts = torch.autograd.grad(chunk.square().mean(), used, retain_graph=True)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        found[checkpointing] = gradients
    distances = [relative(a, b) for a, b in zip(*found.values(), strict=True)]
    assert max(distances) <= 1e-12, distances
    norms = [gradient.norm() for gradient in found[False]]
    assert min(norms) > 0 and relative(found[False][1], found[False][2]) > 0.1


def test_a_rollout_whose_gradient_step_is_anywhere_equals_sampling(
    causal_reference, on_policy, scheduler, relative
) -> None:
    """Take every step of two: the rollout is then the sampler's own result."""
    student = causal_reference.model()
    noise = causal_reference["roll.noise_bfchw"]
    text = causal_reference["prompt_embeds"][: len(noise)]
    with torch.no_grad():
        x = on_policy(student, rollout="euler").rollout(noise, text, num_steps=2, grad_step=1)
    sampled = sample_causal(student, scheduler, noise, text, num_inference_steps=2)
    assert relative(x, sampled) <= 1e-6


def test_only_the_gradient_step_of_an_euler_rollout_has_a_gradient(
    causal_reference, on_policy
) -> None:
    student = causal_reference.model()
    noise = causal_reference["roll.noise_bfchw"]
    text = causal_reference["prompt_embeds"][: len(noise)]
    with _calls(student) as calls:
        on_policy(student, rollout="euler").rollout(noise, text, num_steps=3, grad_step=1)
    chunks = len(causal_reference.variant["partition"])
    step = [False, True, False]
    assert [grad for grad, _ in calls] == [*[*step, False] * (chunks - 1), *step]


def test_student_losses_train_on_rollouts_and_on_chunks_of_data(
    causal_reference, scheduler, generator
) -> None:
    score = _bidirectional(causal_reference)
    config = OnPolicyConfig(cotrain_pretrain=True, causal=CausalConfig(bidirectional_prob=0))
    student = causal_reference.model()
    method = AnyFlowOnPolicyMethod(student, score, copy.deepcopy(score), scheduler, config)
    latents, text, negative = _batch(causal_reference)
    output = method.student_loss(
        causal_reference["roll.noise_bfchw"],
        text[:2],
        negative,
        latents=latents,
        data_prompt_embeds=text,
        num_chunks=6,
        rollout_draw=(2, 0),
        generator=generator,
    )
    torch.testing.assert_close(
        output.loss.detach(), output.metrics["loss_dmd"] + output.metrics["loss_data"]
    )
    output.loss.backward()
    assert student.far_patch_embedding.weight.grad.norm() > 0  # by the loss on data alone
    with torch.no_grad():
        samples = method.rollout(
            causal_reference["roll.noise_bfchw"], text[:2], num_steps=2, grad_step=0
        )
    assert samples.shape == causal_reference["roll.noise_bfchw"].shape
    method.critic_loss(samples, text[:2], generator=generator).loss.backward()
    assert method.critic.proj_out.weight.grad.norm() > 0


def test_settings_and_networks_must_agree(causal_reference, scheduler, pretrain) -> None:
    causal, plain = causal_reference.model(), _bidirectional(causal_reference)
    with pytest.raises(ValueError, match=r"needs causal=CausalConfig\(\)"):
        AnyFlowPretrainMethod(causal, scheduler, PretrainConfig())
    with pytest.raises(ValueError, match="need the causal model as the student"):
        pretrain(plain)
    with pytest.raises(ValueError, match="need the causal model as the student"):
        AnyFlowOnPolicyMethod(plain, plain, plain, scheduler, OnPolicyConfig(causal=CausalConfig()))
    for method, config in (
        (AnyFlowOnPolicyMethod, OnPolicyConfig()),
        (DMD2Method, DMD2Config()),
    ):
        with pytest.raises(ValueError, match=r"needs causal=CausalConfig\(\)"):
            method(causal, plain, plain, scheduler, config)
    for role in ("teacher", "critic"):
        networks = {"teacher": plain, "critic": plain} | {role: causal}
        with pytest.raises(ValueError, match=f"the {role} must be a bidirectional model"):
            AnyFlowOnPolicyMethod(
                causal,
                networks["teacher"],
                networks["critic"],
                scheduler,
                OnPolicyConfig(causal=CausalConfig()),
            )


def test_a_causal_model_where_a_bidirectional_one_is_called_is_refused(
    causal_reference, scheduler
) -> None:
    causal, plain = causal_reference.model(), _bidirectional(causal_reference)
    with pytest.raises(ValueError, match="the teacher must be a bidirectional model"):
        settings = PretrainConfig(velocity_target="teacher")
        AnyFlowPretrainMethod(plain, scheduler, settings, teacher=causal)
    noise, text = causal_reference["roll.noise_bfchw"], causal_reference["prompt_embeds"][:2]
    for sampler in (sample, sample_consistency):
        with pytest.raises(ValueError, match="the model must be .*: sample_causal samples it"):
            sampler(causal, scheduler, noise, text)


def test_the_loss_on_data_of_stage_2_must_be_causal_too(causal_reference, scheduler) -> None:
    plain = _bidirectional(causal_reference)
    with pytest.raises(ValueError, match=r"needs causal=CausalConfig\(\)"):
        AnyFlowOnPolicyMethod(
            causal_reference.model(),
            plain,
            plain,
            scheduler,
            OnPolicyConfig(causal=CausalConfig(), cotrain_pretrain=True),
            pretrain=PretrainConfig(),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_partition": (1, 0)}, r"chunk_partition chunk 1: must be|chunk_partition"),
        ({"long_context_ratio": 1.5}, r"long_context_ratio must be in \[0, 1\], got 1.5"),
        ({"bidirectional_prob": -0.1}, r"bidirectional_prob must be in \[0, 1\], got -0.1"),
        ({"bidirectional_prob": "often"}, "bidirectional_prob must be a number"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        CausalConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"velocity_target": "teacher"}, "velocity_target must be 'data' with causal settings"),
        ({"i2v_prob": 0.1}, "i2v_prob must be 0 with causal settings"),
    ],
)
def test_settings_that_chunks_do_not_have_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(causal=CausalConfig(), **settings)


def test_videos_of_other_lengths_and_chunks_are_refused(causal_reference, pretrain) -> None:
    method = pretrain()
    latents, *texts = _batch(causal_reference)
    with pytest.raises(ValueError, match="must have the 9 frames of the chunks"):
        method.loss(latents[:, :8], *texts)
    for count in (0, 7):
        with pytest.raises(ValueError, match=rf"num_chunks must be in \[1, 6\], got {count}"):
            method.loss(latents, *texts, num_chunks=count)
    with pytest.raises(ValueError, match="has 9 latent frames, and the video has 8"):
        method_of = OnPolicyConfig(causal=CausalConfig())
        plain = _bidirectional(causal_reference)
        AnyFlowOnPolicyMethod(method.student, plain, plain, method.scheduler, method_of).rollout(
            latents[:, :8], texts[0], num_steps=1
        )


def test_requests_for_chunks_of_a_bidirectional_student_are_refused(
    causal_reference, scheduler
) -> None:
    method = AnyFlowPretrainMethod(_bidirectional(causal_reference), scheduler, PretrainConfig())
    latents, *texts = _batch(causal_reference)
    for arguments in ({"num_chunks": 3}, {"bidirectional": True}):
        with pytest.raises(ValueError, match="is of the causal model: it needs config.causal"):
            method.loss(latents, *texts, **arguments)
    for call in (
        lambda: method.bidirectional_loss(latents, *texts),
        method.draw_num_chunks,
        method.draw_bidirectional,
    ):
        with pytest.raises(ValueError, match="is of the causal model: it needs config.causal"):
            call()
