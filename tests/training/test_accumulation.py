"""Test that an update is a function of its global batch, whatever its layout over ranks."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layout_updates as layouts
import pytest
import torch

from anyflow.methods import TimePairs
from anyflow.training.distributed import Mesh

SCRIPT = Path(layouts.__file__)
CPU = Mesh(torch.device("cpu"))


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Any]]:
    """Update with all samples in one micro-step of one process."""
    return {case: layouts.updates(case, CPU, *layouts.LAYOUTS[1]["8"]) for case in layouts.CASES}


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (layout, case)
        for layout in ("2", "1")
        for case in layouts.CASES
        if layout == "2" or not case.startswith("causal")
    ],
)
def test_micro_steps_are_the_batch(
    layout: str, case: str, reference: dict[str, dict[str, Any]]
) -> None:
    """Compare every metric, norm, parameter, optimizer state and average to 1e-9 in fp64."""
    layouts.same(layouts.updates(case, CPU, *layouts.LAYOUTS[1][layout]), reference[case])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_and_their_micro_steps_are_the_batch(
    world: int,
    tmp_path: Path,
    reference: dict[str, dict[str, Any]],
    fork_ranks: Callable[..., subprocess.Popen[str]],
    free_port: Callable[[], int],
) -> None:
    """Shard over real processes and share samples; every rank makes as many network calls."""
    job = fork_ranks(world, SCRIPT, tmp_path, *(free_port() for _ in layouts.LAYOUTS[world]))
    output, _ = job.communicate(timeout=800)
    assert job.returncode == 0, output[-4000:]
    ranks = [
        torch.load(tmp_path / f"rank{rank}-of-{world}.pt", weights_only=True)
        for rank in range(world)
    ]
    for layout in layouts.LAYOUTS[world]:
        for case in layouts.ON_RANKS:
            for results in ranks:
                layouts.same(results[layout][case], reference[case])
                assert results[layout][case]["calls"] == ranks[0][layout][case]["calls"]
            assert len(ranks[0][layout][case]["tensors"]) > 50


def test_the_updates_are_worth_comparing(reference: dict[str, dict[str, Any]]) -> None:
    """Make updates that differ, whose balance and clipping matter, of the kinds asked for."""
    first, *others = reference["pretrain"]["metrics"]
    assert all(
        metrics["grad_norm"] > 0.05 for case in reference.values() for metrics in case["metrics"]
    )
    assert all(abs(metrics["loss"] / first["loss"] - 1) > 1e-3 for metrics in others)
    added = ["loss_bidirectional" in m for m in reference["causal_pretrain"]["metrics"]]
    assert added == [True, False]
    for metrics in (
        m for case in ("pretrain", "few_diffusion") for m in reference[case]["metrics"]
    ):
        # what balancing means
        assert metrics["loss"] == pytest.approx(metrics["loss_diffusion"], rel=1e-3)
        assert abs(metrics["loss_flow_map"] / metrics["loss_diffusion"] - 1) > 0.05
    for metrics in reference["no_diffusion"]["metrics"]:
        assert (
            metrics["loss"] == pytest.approx(metrics["loss_flow_map"], rel=1e-9)
            and metrics["loss_diffusion"] == 0
        )


def test_explicit_draws_in_any_order_are_the_batch() -> None:
    """Take the draws of each micro-step from a list; flow-map samples that come first go last."""
    batches = [layouts.Batch(x.double(), y.double(), (i,)) for i, (x, y) in enumerate(_samples(4))]
    whole = layouts.Batch(
        torch.cat([b.latents for b in batches]),
        torch.cat([b.prompt_embeds for b in batches]),
        (0, 1, 2, 3),
    )
    noise = torch.randn(
        whole.latents.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    t, kinds = torch.tensor([0.9, 0.5, 0.7, 0.3]), torch.tensor([False, True, False, True])
    r = torch.where(kinds, t, t / 2)
    once, apart = (
        layouts.make_step(
            layouts.make_recipe("pretrain", layouts.ParallelConfig(), size, count), CPU
        )
        for size, count in ((4, 1), (1, 4))
    )
    draws = {"image_to_video": False, "dropped_prompts": torch.zeros(4, dtype=torch.bool)}
    want = once.update([whole], 0, noise=noise, time_pairs=TimePairs(t, r, kinds), **draws)
    pairs = [TimePairs(*part) for part in zip(t.split(1), r.split(1), kinds.split(1), strict=True)]
    got = apart.update(
        batches,
        0,
        noise=list(noise.split(1)),
        time_pairs=pairs,
        image_to_video=False,
        dropped_prompts=torch.zeros(1, dtype=torch.bool),
    )
    assert {k: float(v) for k, v in got.items()} == pytest.approx(
        {k: float(v) for k, v in want.items()}, rel=1e-9
    )
    for name, tensor in apart.tensors().items():
        torch.testing.assert_close(tensor, once.tensors()[name], rtol=1e-9, atol=1e-11, msg=name)


def _samples(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = layouts.SyntheticVideos()
    return [(data[i].latents[None], data[i].prompt_embeds[None]) for i in range(count)]
