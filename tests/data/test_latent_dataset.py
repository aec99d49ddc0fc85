"""Test latents on disk: exact, checked when opened, never half written."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from latent_files import INFO, NEGATIVE, Row, contents, write

from anyflow.data import TrainingData, open_dataset
from anyflow.data.latent_dataset import (
    SCHEMA,
    LatentDataset,
    LatentWriter,
    shards,
    written_samples,
)
from anyflow.data.latent_format import map_shard, read_record, shard_digest, write_record
from anyflow.training.config import DataConfig


def test_everything_written_is_read_back_bit_for_bit(folder: Path, samples: list[Row]) -> None:
    dataset = LatentDataset(folder)
    assert len(dataset) == 7 and dataset.info == INFO
    assert dataset.latent_shape == (3, 4, 2, 2) and dataset.text_shape == (6, 5)
    for i, (file, caption, latents, prompt) in enumerate(samples):
        sample = dataset[i]
        assert (dataset.file(i), dataset.caption(i)) == (file, caption)
        assert torch.equal(sample.latents, latents)
        assert torch.equal(sample.prompt_embeds[: len(prompt)], prompt)
        assert not sample.prompt_embeds[len(prompt) :].any() and sample.prompt_embeds.shape == (
            6,
            5,
        )
    assert torch.equal(dataset.negative_prompt_embeds[0, :2], NEGATIVE)
    assert (
        dataset.negative_prompt_embeds.shape == (1, 6, 5)
        and not dataset.negative_prompt_embeds[0, 2:].any()
    )


def test_a_sample_is_the_callers_to_change(folder: Path, samples: list[Row]) -> None:
    dataset = LatentDataset(folder)
    dataset[0].latents.zero_()
    dataset.negative_prompt_embeds.zero_()
    assert torch.equal(dataset[0].latents, samples[0][2])
    assert torch.equal(dataset.negative_prompt_embeds[0, :2], NEGATIVE)


@pytest.mark.parametrize("index", [-1, 7])
def test_a_sample_that_does_not_exist_is_an_index_error(folder: Path, index: int) -> None:
    with pytest.raises(IndexError, match=r"0\.\.6"):
        LatentDataset(folder)[index]


def test_workers_read_the_dataset_by_its_path(folder: Path) -> None:
    content = pickle.dumps(LatentDataset(folder))
    assert len(content) < 1000 and len(pickle.loads(content)) == 7
    here, ahead = (
        next(TrainingData(open_dataset(DataConfig(path=str(folder))), batch_size=7, num_workers=n))
        for n in (0, 2)
    )
    assert sorted(here.index) == list(range(7)) and torch.equal(here.latents, ahead.latents)


def test_the_datasets_library_reads_a_shard(folder: Path, samples: list[Row]) -> None:
    parts = [datasets.Dataset.from_file(str(path)) for path in shards(folder)]
    table = datasets.concatenate_datasets(parts)
    assert table["caption"][:] == [caption for _, caption, _, _ in samples]
    assert table[5]["latents"] == samples[5][2].flatten().tolist()


def test_the_fingerprint_follows_content_and_order(
    samples: list[Row], folder: Path, tmp_path: Path
) -> None:
    fingerprint = LatentDataset(folder).fingerprint
    changed = [*samples[:6], (*samples[6][:2], samples[6][2] + 1e-6, samples[6][3])]
    assert (
        LatentDataset(write(tmp_path / "same", samples, samples_per_shard=2)).fingerprint
        == fingerprint
    )
    for name, others in (("order", samples[::-1]), ("less", samples[:6]), ("changed", changed)):
        assert LatentDataset(write(tmp_path / name, others)).fingerprint != fingerprint


@pytest.mark.parametrize("shape", [(3, 3, 2, 2), (2, 4, 2, 2), (3, 4, 2, 4)])
def test_a_sample_of_another_shape_is_named_when_the_dataset_is_opened(
    samples: list[Row], tmp_path: Path, shape: tuple[int, int, int, int]
) -> None:
    folder = write(tmp_path / "data", samples[:3])
    odd = replace(INFO, latent_shape=shape)
    shard = shards(
        write(tmp_path / "odd", [("odd.mp4", "odd", torch.ones(shape), torch.ones(1, 5))], odd)
    )[0]
    shard.rename(folder / "shard-000001.arrow")
    record_shards(folder)
    with pytest.raises(ValueError) as caught:
        LatentDataset(folder)
    assert all(
        part in str(caught.value)
        for part in ("sample 3", "odd.mp4", str(folder), str(shape), "(3, 4, 2, 2)")
    )


@pytest.mark.parametrize("tokens", [0, 7])
def test_a_prompt_of_no_or_too_many_tokens_is_named_when_the_dataset_is_opened(
    samples: list[Row], tmp_path: Path, tokens: int
) -> None:
    folder = write(tmp_path, [samples[0], ("odd.mp4", "odd", samples[1][2], torch.ones(tokens, 5))])
    with pytest.raises(ValueError, match=r"sample 1 \(odd\.mp4\).*prompt"):
        LatentDataset(folder)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("column", ["latents", "prompt_embeds"])
def test_a_sample_that_is_not_finite_is_named_when_it_is_read(
    samples: list[Row], tmp_path: Path, column: str, value: float
) -> None:
    file, caption, latents, prompt = samples[4]
    (latents if column == "latents" else prompt).view(-1)[2] = value
    folder = write(tmp_path, [*samples[:4], (file, caption, latents, prompt)])
    dataset = LatentDataset(folder, checked_samples=0)
    assert len([dataset[i] for i in range(4)]) == 4
    # opening reads the last sample, among others
    for read in (lambda: dataset[4], lambda: LatentDataset(folder)):
        with pytest.raises(ValueError, match=rf"sample 4 \(4\.mp4\) of .*{column} hold NaN"):
            read()


def test_the_writer_refuses_another_shape(samples: list[Row], tmp_path: Path) -> None:
    with (
        LatentWriter(tmp_path, INFO, NEGATIVE) as writer,
        pytest.raises(ValueError, match=r"a\.mp4.*\[3, 4, 2, 2\]"),
    ):
        writer.add("a.mp4", "", torch.ones(3, 5, 2, 2), samples[0][3])


def test_a_writer_that_fails_leaves_whole_shards_and_is_resumed(
    samples: list[Row], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    with (
        pytest.raises(KeyboardInterrupt),
        LatentWriter(folder, INFO, NEGATIVE, samples_per_shard=3) as writer,
    ):
        for sample in samples[:5]:
            writer.add(*sample)
        raise KeyboardInterrupt
    assert written_samples(folder) == [sample[:2] for sample in samples[:3]]
    with pytest.raises(ValueError, match="not finished"):
        LatentDataset(folder)
    write(folder, samples[3:])
    assert contents(folder) == contents(write(tmp_path / "at once", samples))


def test_a_writer_refuses_a_folder_of_another_source(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"other settings.*text_length: 6 there, 8 now"):
        LatentWriter(folder, replace(INFO, text_length=8), NEGATIVE)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no latent dataset.*dataset\.json"):
        open_dataset(DataConfig(path=str(tmp_path / "nothing")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "anyflow-latents 1, not anyflow-latents 2"),
        ({"latent_shape": [3, 4, 2]}, "four positive sizes"),
        ({"latent_shape": "3422"}, "four positive sizes"),
        ({"latent_shape": None}, "not usable"),
        ({"text_length": 6.0}, "text_length"),
        ({"text_length": True}, "text_length"),
        ({"source": [1]}, "source must be an object"),
        ({"rows": "7"}, "rows must be a number"),
        ({"extra": 1}, "keys"),
        ({"rows": 0}, "damaged or edited"),
        ({"text_length": 7}, "damaged or edited"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(
    folder: Path, change: dict[str, object], message: str
) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "keys"),
        (b'{"rows": 1, "rows": 2}', "more than once"),
        (b'{"rows": NaN}', "JSON"),
        (b"[" * 1000, "nested"),
        ('{"ü": 1}'.encode("latin-1"), "not UTF-8"),
        (b"", "empty file"),
    ],
)
def test_a_description_that_cannot_be_read_names_the_file(
    folder: Path, content: bytes, message: str
) -> None:
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"dataset\.json.*{message}"):
        LatentDataset(folder)


@pytest.mark.slow
def test_a_missing_package_is_named_with_what_installs_it() -> None:
    program = (
        "import sys; sys.modules.update({'pyarrow': None, 'av': None}); import anyflow.data, "
        "importlib\n"
        "for module in ('latent_dataset', 'video'):\n"
        "    try: importlib.import_module('anyflow.data.' + module)\n"
        "    except ImportError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == (
        "a dataset of latents needs the package pyarrow, which is not installed: pip install "
        "pyarrow\n"
        "decoding a video needs the package av, which is not installed: pip install av\n"
    )


def test_a_shard_of_another_schema_is_refused(folder: Path) -> None:
    table = pa.table({name: [""] for name in SCHEMA.names})
    with pa.ipc.new_stream(str(shards(folder)[0]), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match=r"shard-000000\.arrow has columns"):
        LatentDataset(folder)


def record_shards(folder: Path) -> None:
    """Let dataset.json have the shards that are there, as if they had been written so."""
    digests = {path.name: map_shard(path)["digest"].to_pylist() for path in shards(folder)}
    recorded = {name: shard_digest(samples) for name, samples in digests.items()}
    write_record(
        folder,
        replace(read_record(folder), num_samples=sum(map(len, digests.values())), shards=recorded),
    )
