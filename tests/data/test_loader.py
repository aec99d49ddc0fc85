"""Test the order of samples at any batch size, number of ranks, position and number of workers."""

import multiprocessing
from dataclasses import FrozenInstanceError
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.data import Sample, SyntheticVideos, TrainingData


class Rows:
    """Hold samples whose latents are their number; sample ``bad`` is an error."""

    latent_shape = (1, 1, 1, 1)
    text_shape = (1, 1)
    negative_prompt_embeds = torch.zeros(1, 1, 1)
    fingerprint = "samples"

    def __init__(self, length: int, bad: int | None = None) -> None:
        self.length = length
        self.bad = bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Sample:
        if index == self.bad:
            raise ValueError(f"sample {index} is bad")
        return Sample(torch.full((1, 1, 1, 1), float(index)), torch.full((1, 1), -float(index)))


def stream(
    length: int, count: int, *, batch: int = 1, world: int = 1, seed: int = 0, consumed: int = 0
) -> list[int]:
    """Return at least ``count`` samples of the global stream, from the batches of all ranks."""
    ranks = [
        TrainingData(
            Rows(length),
            batch_size=batch,
            data_rank=r,
            data_world=world,
            seed=seed,
            consumed=consumed,
        )
        for r in range(world)
    ]
    samples: list[int] = []
    while len(samples) < count:
        batches = [next(rank) for rank in ranks]
        samples += [batches[r].index[b] for b in range(batch) for r in range(world)]
        assert {rank.consumed for rank in ranks} == {consumed + len(samples)}
    return samples


lengths = st.integers(1, 23)
batches = st.integers(1, 5)
worlds = st.integers(1, 4)


@pytest.mark.slow
@given(lengths, batches, worlds, st.integers(0, 3))
def test_all_ranks_together_read_the_stream_whatever_the_batch_and_the_world(
    length: int, batch: int, world: int, seed: int
) -> None:
    samples = stream(length, 3 * length, batch=batch, world=world, seed=seed)
    assert samples == stream(length, len(samples), seed=seed)


@given(lengths, st.integers(0, 3))
def test_every_epoch_holds_every_row_once(length: int, seed: int) -> None:
    samples = stream(length, 4 * length, seed=seed)
    for epoch in range(4):
        assert sorted(samples[epoch * length : (epoch + 1) * length]) == list(range(length))


@given(lengths, batches, worlds, st.integers(0, 60))
def test_a_resume_at_any_position_and_world_size_continues_the_stream(
    length: int, batch: int, world: int, consumed: int
) -> None:
    samples = stream(length, 10, batch=batch, world=world, consumed=consumed)
    assert samples == stream(length, consumed + len(samples))[consumed:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    samples = stream(20, 40)
    assert samples[:20] != samples[20:] and samples[:20] != list(range(20))
    assert stream(20, 40, seed=1) != samples


@settings(max_examples=3)
@given(lengths, batches, worlds)
def test_workers_change_neither_batches_nor_what_counts_as_consumed(
    length: int, batch: int, world: int
) -> None:
    arguments = {
        "batch_size": batch,
        "data_rank": world - 1,
        "data_world": world,
        "seed": 3,
        "consumed": 7,
    }
    here, ahead = (
        TrainingData(Rows(length), num_workers=workers, **arguments) for workers in (0, 2)
    )
    for a, b in islice(zip(here, ahead, strict=True), 8):
        assert a.index == b.index
        assert torch.equal(a.latents, b.latents) and torch.equal(a.prompt_embeds, b.prompt_embeds)
        assert here.consumed == ahead.consumed


def test_a_batch_holds_the_samples_of_its_rows() -> None:
    batch = next(TrainingData(Rows(9), batch_size=4))
    assert batch.latents.shape == (4, 1, 1, 1, 1) and batch.prompt_embeds.shape == (4, 1, 1)
    assert tuple(batch.latents.flatten().tolist()) == batch.index
    with pytest.raises(FrozenInstanceError):
        batch.index = ()  # type: ignore[misc]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_dataset_finds_wrong_arrives_in_its_own_words(workers: int) -> None:
    with pytest.raises(ValueError, match="^sample 3 is bad$"):
        list(islice(TrainingData(Rows(5, bad=3), batch_size=1, num_workers=workers), 5))


@pytest.mark.parametrize("bad", [None, 0])
def test_workers_end_with_an_error_and_when_closed(bad: int | None) -> None:
    before = multiprocessing.active_children()
    data = TrainingData(Rows(1, bad=bad), batch_size=1, num_workers=2)
    assert len(multiprocessing.active_children()) == len(before) + 2
    if bad is None:
        next(data)
        data.close()
    else:
        with pytest.raises(ValueError, match="sample 0"):
            next(data)
    assert multiprocessing.active_children() == before
    assert next(data, None) is None


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generator_alone(workers: int) -> None:
    state = torch.get_rng_state()
    list(islice(TrainingData(Rows(5), batch_size=2, num_workers=workers), 6))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"data_world": 0},
        {"data_rank": 2, "data_world": 2},
        {"data_rank": -1},
        {"num_workers": -1},
        {"consumed": -1},
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}.*-?[0-9]"):
        TrainingData(Rows(3), **{"batch_size": 1} | arguments)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="no videos"):
        TrainingData(Rows(0), batch_size=1)


def test_every_video_of_the_shapes_has_its_sample_and_its_prompt() -> None:
    dataset = SyntheticVideos()
    videos, labels = dataset.shapes.sample(24, torch.Generator().manual_seed(1))
    decoded = dataset.decode(torch.stack([dataset[i].latents for i in range(len(dataset))]))
    for video, label in zip(videos, labels, strict=True):
        (found,) = [i for i in range(len(dataset)) if torch.equal(decoded[i], video)]
        assert found // 144 == label
        assert torch.equal(dataset[found].prompt_embeds, dataset.prompts[label])
    assert len(dataset) == 4 * 144


def test_the_synthetic_dataset_has_the_shapes_it_says() -> None:
    dataset = SyntheticVideos()

    def shape(tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape)

    assert shape(dataset[0].latents) == dataset.latent_shape == (4, 8, 6, 6)
    assert shape(dataset[575].prompt_embeds) == dataset.text_shape == (4, 32)
    assert shape(dataset.negative_prompt_embeds) == (1, 4, 32)
    assert dataset.fingerprint == SyntheticVideos().fingerprint
