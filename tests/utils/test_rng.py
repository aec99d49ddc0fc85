"""Test that draws come from the generator given, or from a new one, never from the global one."""

import pytest
import torch

from anyflow.utils.rng import rand, randn_like, resolve_generator


def test_a_generator_given_is_used_as_it_is(generator: torch.Generator) -> None:
    assert resolve_generator(generator) is generator
    assert resolve_generator(generator, "cpu") is generator


def test_fresh_generators_differ() -> None:
    seeds = {resolve_generator(None).initial_seed() for _ in range(4)}
    assert len(seeds) == 4
    assert resolve_generator(None, torch.device("cpu")).device == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_randn_like(dtype: torch.dtype) -> None:
    like = torch.empty(100, 50, dtype=dtype)
    x = randn_like(like, torch.Generator().manual_seed(0))
    assert x.shape == like.shape and x.dtype == dtype and x.device == like.device
    assert torch.equal(
        x, torch.randn(100, 50, generator=torch.Generator().manual_seed(0), dtype=dtype)
    )
    assert abs(x.double().mean()) < 0.05 and abs(x.double().std() - 1) < 0.05


def test_rand() -> None:
    x = rand((3, 400), torch.Generator().manual_seed(0))
    assert x.shape == (3, 400) and x.dtype == torch.float32
    assert bool(((x >= 0) & (x < 1)).all()) and x.std() > 0.25
    assert torch.equal(x, torch.rand(3, 400, generator=torch.Generator().manual_seed(0)))
    assert rand([2], None, "cpu").shape == (2,)


def test_a_generator_moves_on(generator: torch.Generator) -> None:
    like = torch.empty(8)
    assert not torch.equal(randn_like(like, generator), randn_like(like, generator))
    assert not torch.equal(rand((8,), generator), rand((8,), generator))


def test_the_global_generator_is_neither_read_nor_written(generator: torch.Generator) -> None:
    like = torch.empty(8)
    before = torch.get_rng_state()
    drawn = []
    for source in (generator, None):
        drawn.append(randn_like(like, source))
        rand((8,), source)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    a = randn_like(like, None)
    torch.manual_seed(0)
    assert not torch.equal(a, randn_like(like, None))
