"""Test kinds of samples over the global batch, ranges of times, determinism, and TimePairs."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow.methods import TimePairs, sample_time_pairs

_RATIOS = st.one_of(
    st.sampled_from(
        [(0.0, 0.0), (0.5, 0.25), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.25, 0.75), (0.75, 0.0)]
    ),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda p: (p[0], (1 - p[0]) * p[1])),
)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _all_ranks(
    batch: int, world: int, ratios: tuple[float, float], seed: int = 0, offset: int = 0
) -> list[TimePairs]:
    return [
        sample_time_pairs(
            batch,
            diffusion_ratio=ratios[0],
            consistency_ratio=ratios[1],
            rank=rank,
            world_size=world,
            generator=_generator(1000 * seed + rank),
            offset=offset,
        )
        for rank in range(world)
    ]


def _kinds(pairs: list[TimePairs]) -> list[str]:
    """List the kind of every sample by global index ``i = b * world + rank``."""
    kinds = []
    for b in range(len(pairs[0].t)):
        for p in pairs:
            if p.is_diffusion[b]:
                kinds.append("diffusion")
            else:
                kinds.append("consistency" if p.r[b] == 0 else "free")
    return kinds


@settings(max_examples=200)
@given(batch=st.integers(1, 9), world=st.integers(1, 6), ratios=_RATIOS, seed=st.integers(0, 99))
def test_exact_share_of_each_kind_interleaved_over_ranks(
    batch: int, world: int, ratios: tuple[float, float], seed: int
) -> None:
    pairs = _all_ranks(batch, world, ratios, seed)
    total = batch * world
    diffusion = round(ratios[0] * total)
    # both may round up where they share everything
    consistency = min(round(ratios[1] * total), total - diffusion)
    want = (
        ["diffusion"] * diffusion
        + ["consistency"] * consistency
        + ["free"] * (total - diffusion - consistency)
    )
    assert _kinds(pairs) == want
    for p in pairs:
        assert p.t.shape == p.r.shape == p.is_diffusion.shape == (batch,)
        assert bool(((p.r >= 0) & (p.r <= p.t) & (p.t < 1)).all())
        assert torch.equal(p.t == p.r, p.is_diffusion)
        assert p.flow_map_indices().tolist() == (~p.is_diffusion).nonzero().flatten().tolist()


def test_rounding_is_pythons() -> None:
    """Round half to even: 0.5 of five is two, 0.5 of three is two, 0.25 of ten is two."""
    assert _kinds(_all_ranks(5, 1, (0.5, 0.0))).count("diffusion") == 2
    assert _kinds(_all_ranks(3, 1, (0.5, 0.0))).count("diffusion") == 2
    assert _kinds(_all_ranks(5, 2, (0.5, 0.25))).count("consistency") == 2


@pytest.mark.parametrize("world", [4, 8])
def test_one_sample_per_rank_gets_the_global_share(world: int) -> None:
    """Share kinds over ranks; peers take int(ratio * 1) = 0 per rank: no diffusion sample."""
    kinds = _kinds(_all_ranks(1, world, (0.5, 0.25)))
    assert (kinds.count("diffusion"), kinds.count("consistency")) == (world // 2, world // 4)


def test_offset_rotates_the_kinds_over_the_ranks() -> None:
    """Rotate: fixed ranks would see one kind for the whole training."""
    world = 8
    seen: list[list[str]] = [[] for _ in range(world)]
    for step in range(world):
        kinds = _kinds(_all_ranks(1, world, (0.5, 0.25), seed=step, offset=step))
        assert kinds.count("diffusion") == 4 and kinds.count("consistency") == 2
        for rank, kind in enumerate(kinds):
            seen[rank].append(kind)
    for history in seen:
        assert (
            history.count("diffusion"),
            history.count("consistency"),
            history.count("free"),
        ) == (4, 2, 2)
    assert len({tuple(history) for history in seen}) == world


@settings(max_examples=50)
@given(batch=st.integers(1, 6), world=st.integers(1, 4), offset=st.integers(0, 100))
def test_offset_keeps_the_counts(batch: int, world: int, offset: int) -> None:
    rotated = _kinds(_all_ranks(batch, world, (0.5, 0.25), offset=offset))
    plain = _kinds(_all_ranks(batch, world, (0.5, 0.25)))
    shift = offset % len(plain)
    assert rotated == plain[shift:] + plain[:shift]


def test_times_are_the_larger_and_the_smaller_of_two_uniforms() -> None:
    pairs = sample_time_pairs(
        20_000, diffusion_ratio=0.0, consistency_ratio=0.0, generator=_generator(0)
    )
    assert pairs.t.mean().item() == pytest.approx(2 / 3, abs=0.01)
    assert pairs.r.mean().item() == pytest.approx(1 / 3, abs=0.01)
    assert pairs.t.square().mean().item() == pytest.approx(1 / 2, abs=0.01)


def test_an_explicit_zero_ratio_stays_zero() -> None:
    pairs = sample_time_pairs(
        64, diffusion_ratio=0.0, consistency_ratio=0.0, generator=_generator(1)
    )
    assert not pairs.is_diffusion.any() and bool((pairs.r > 0).all())
    pairs = sample_time_pairs(64, diffusion_ratio=0.0, generator=_generator(1))
    assert _kinds([pairs]).count("consistency") == 16


@pytest.mark.parametrize(
    ("ratios", "name"),
    [
        ((1.5, 0.0), "diffusion_ratio"),
        ((-0.1, 0.0), "diffusion_ratio"),
        ((0.0, 1.01), "consistency_ratio"),
        ((0.0, -1e-3), "consistency_ratio"),
        ((float("nan"), 0.0), "diffusion_ratio"),
        ((0.7, 0.4), "must not exceed 1"),
    ],
)
def test_impossible_ratios(ratios: tuple[float, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        sample_time_pairs(4, diffusion_ratio=ratios[0], consistency_ratio=ratios[1])


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"batch_size": 4, "world_size": 0},
     {"batch_size": 4, "rank": 2, "world_size": 2},
     {"batch_size": 4, "rank": -1}],
)  # fmt: skip
def test_impossible_sizes(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        sample_time_pairs(**arguments)


def test_the_generator_decides_and_the_global_one_is_left_alone() -> None:
    before = torch.get_rng_state()
    a = sample_time_pairs(16, generator=_generator(5))
    b = sample_time_pairs(16, generator=_generator(5))
    c = sample_time_pairs(16, generator=_generator(6))
    d, e = sample_time_pairs(16), sample_time_pairs(16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.t, b.t) and torch.equal(a.r, b.r)
    assert not torch.equal(a.t, c.t)
    assert not torch.equal(d.t, e.t)  # seeded by the operating system, not by a constant


def test_rows_of_pairs_made_by_hand_and_of_edited_ones() -> None:
    t = torch.tensor([0.9, 0.5, 0.2])
    pairs = TimePairs(t, torch.tensor([0.1, 0.5, 0.0]), torch.tensor([False, True, False]))
    assert pairs.flow_map_indices().tolist() == [0, 2]
    drawn = sample_time_pairs(4, generator=_generator(0))
    edited = replace(drawn, r=drawn.t, is_diffusion=torch.ones(4, dtype=torch.bool))
    assert edited.flow_map_indices().tolist() == []


@pytest.mark.parametrize(
    ("t", "r", "is_diffusion", "message"),
    [
        ([0.2], [0.3], [False], "r <= t"),
        ([1.1], [0.3], [False], "t <= 1"),
        ([0.5], [-0.1], [False], "0 <= r"),
        ([float("nan")], [0.1], [False], "0 <= r <= t <= 1"),
        ([0.5], [float("nan")], [False], "0 <= r <= t <= 1"),
        ([0.5], [0.1], [True], "diffusion samples must have r = t"),
        ([0.5, 0.5], [0.1], [False, False], r"must all be \[B\]"),
        ([0.5], [0.1], [False, False], r"must all be \[B\]"),
        ([[0.5]], [[0.1]], [[False]], r"must all be \[B\]"),
        ([0.5], [0.1], [0.0], "boolean"),
    ],
)
def test_inconsistent_pairs(
    t: list[float], r: list[float], is_diffusion: list[bool], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TimePairs(torch.tensor(t), torch.tensor(r), torch.tensor(is_diffusion))
