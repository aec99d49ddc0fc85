"""Test the balance of an update: one formula over all micro-steps."""

import pytest
import torch

from anyflow.methods import DiffusionBalance, TimePairs, sample_time_pairs

LOSSES = torch.tensor([2.0, 6.0, 1.0, 0.5, 8.0], dtype=torch.float64)
KINDS = torch.tensor([True, True, False, False, False])


@pytest.mark.parametrize("sizes", [(5,), (1, 1, 1, 1, 1), (2, 3), (3, 2)])
def test_flow_map_losses_are_scaled_to_the_mean_of_all_diffusion_losses(
    sizes: tuple[int, ...],
) -> None:
    balance = DiffusionBalance()
    scales = [
        balance.scales(*part) for part in zip(LOSSES.split(sizes), KINDS.split(sizes), strict=True)
    ]
    want = torch.where(KINDS, 1.0, 4.0 / (LOSSES + 1e-5))
    torch.testing.assert_close(torch.cat(scales), want, rtol=1e-12, atol=0)
    assert balance.metrics()["loss_diffusion"].item() == 4.0
    assert balance.metrics()["loss_flow_map"].item() == pytest.approx(9.5 / 3, rel=1e-12)


def test_without_a_diffusion_sample_nothing_is_scaled() -> None:
    balance = DiffusionBalance()
    for loss in LOSSES.split(1):
        assert balance.scales(loss, torch.tensor([False])).item() == 1
    assert balance.metrics() == {
        "loss_diffusion": torch.tensor(0.0),
        "loss_flow_map": LOSSES.mean(),
    }


def test_a_loss_of_one_kind_that_is_infinite_does_not_spoil_the_mean_of_the_other() -> None:
    balance = DiffusionBalance()
    balance.scales(torch.tensor([2.0, torch.inf]), torch.tensor([True, False]))
    assert balance.metrics()["loss_diffusion"].item() == 2.0


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize(
    ("world", "micros", "size"), [(1, 8, 1), (2, 4, 1), (3, 3, 1), (2, 2, 3), (4, 1, 2)]
)
def test_ranks_that_put_diffusion_first_never_need_a_mean_that_is_not_whole(
    world: int, micros: int, size: int, offset: int
) -> None:
    """Put no micro-step with diffusion after the first with another kind, at any share."""
    count = micros * size
    for diffusion in range(world * count + 1):
        last, first, found = -1, micros, 0
        for rank in range(world):
            pairs = sample_time_pairs(
                count,
                diffusion_ratio=diffusion / (world * count),
                consistency_ratio=0,
                rank=rank,
                world_size=world,
                offset=offset,
            )
            kinds = pairs.select(pairs.diffusion_first(), "cpu").is_diffusion.view(micros, size)
            found += int(kinds.sum())
            last = max([last, *kinds.any(1).nonzero().flatten().tolist()])
            first = min([first, *(~kinds).any(1).nonzero().flatten().tolist()])
        assert found == diffusion and last <= first


def test_selected_pairs_keep_their_order_and_rows() -> None:
    t = torch.tensor([0.9, 0.5, 0.7, 0.3])
    kinds = torch.tensor([False, True, False, True])
    pairs = TimePairs(t, torch.where(kinds, t, t / 2), kinds)
    assert pairs.diffusion_first() == [1, 3, 0, 2]
    chosen = pairs.select([2, 3, 0], "cpu")
    assert (
        chosen.t.tolist() == t[[2, 3, 0]].tolist()
        and chosen.r.tolist() == pairs.r[[2, 3, 0]].tolist()
    )
    assert chosen.flow_map_indices().tolist() == [0, 2]


def test_times_come_from_the_uniforms_given() -> None:
    uniforms = torch.tensor([[0.2, 0.8], [0.6, 0.1]])
    pairs = sample_time_pairs(2, diffusion_ratio=0.5, consistency_ratio=0, uniforms=uniforms)
    assert torch.equal(pairs.t, torch.tensor([0.6, 0.8])) and torch.equal(
        pairs.r, torch.tensor([0.6, 0.1])
    )
