"""Test that whatever is damaged in a latent dataset is found, and how it is mended."""

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from latent_files import INFO, NEGATIVE, Row, write
from safetensors.torch import save_file

from anyflow.data.latent_dataset import (
    SCHEMA,
    LatentDataset,
    LatentWriter,
    damages,
    shards,
    written_samples,
)

NUMBERS = ("latents", "prompt_embeds")


def test_a_dataset_of_an_earlier_release_is_read_and_added_to(
    folder: Path, samples: list[Row], tmp_path: Path
) -> None:
    """Read a dataset with digests of the numbers alone; a changed number is still found."""
    for path in shards(folder):
        table = pa.ipc.open_stream(path.read_bytes()).read_all()
        numbers = [
            [np.float32(table[name][i].as_py()).tobytes() for name in NUMBERS]
            for i in range(len(table))
        ]
        digests = [
            hashlib.blake2b(b"".join(sample), digest_size=16).hexdigest() for sample in numbers
        ]
        with pa.ipc.new_stream(str(path), SCHEMA) as stream:
            stream.write_table(
                table.set_column(5, SCHEMA.field("digest"), pa.array(digests)), max_chunksize=1
            )
    facts = json.loads((folder / "dataset.json").read_text())
    old = {
        name: facts[name]
        for name in facts
        if name not in ("packages", "shards", "negative", "digest")
    }
    (folder / "dataset.json").write_text(json.dumps(old))
    assert torch.equal(LatentDataset(folder)[6].latents, samples[6][2]) and damages(folder) == []

    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    flip(shards(damaged)[0], samples[0][2].numpy().tobytes())
    with pytest.raises(ValueError, match=r"sample 0 \(0\.mp4\).*damaged"):
        LatentDataset(damaged)

    with LatentWriter(folder, INFO, NEGATIVE, packages={"ftfy": "6.3.1"}) as writer:
        writer.add("new.mp4", "new", samples[0][2], samples[0][3])
        writer.finish()
    dataset = LatentDataset(folder)
    assert len(dataset) == 8 and dataset.record.packages == {"ftfy": ["6.3.1", None]}


@pytest.mark.parametrize("part", ["latents", "prompt", "file", "caption"])
def test_a_flipped_bit_is_found_when_the_sample_is_read_and_when_all_are_verified(
    folder: Path, samples: list[Row], part: str
) -> None:
    file, caption, latents, prompt = samples[1]
    content = {
        "latents": latents.numpy().tobytes(),
        "prompt": prompt.numpy().tobytes(),
        "file": file.encode(),
        "caption": caption.encode(),
    }[part]
    flip(shards(folder)[0], content)
    dataset = LatentDataset(folder, checked_samples=2)  # the first and the last
    assert torch.equal(dataset[0].latents, samples[0][2])
    with pytest.raises(ValueError, match=r"sample 1 \(.*\) of .* is damaged"):
        dataset[1]
    (damage,) = damages(folder)
    assert "shard-000000.arrow, sample 1 of it" in damage and "is damaged" in damage
    with pytest.raises(ValueError, match="sample 1"):
        LatentDataset(folder, checked_samples=7)


def test_any_flipped_bit_is_an_error_or_changes_nothing(folder: Path, samples: list[Row]) -> None:
    files = [*shards(folder), folder / "negative_prompt.safetensors", folder / "dataset.json"]
    draw, found = random.Random(0), 0
    for _ in range(150):
        path = draw.choice(files)
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            dataset = LatentDataset(folder)
            for i, (file, caption, latents, _) in enumerate(samples):
                assert torch.equal(dataset[i].latents, latents)
                assert (dataset.file(i), dataset.caption(i)) == (file, caption)
            assert (
                torch.equal(dataset.negative_prompt_embeds[0, :2], NEGATIVE)
                and dataset.info == INFO
            )
        except ValueError:
            found += 1
        path.write_bytes(content)
    assert found > 100


def test_shards_that_are_exchanged_missing_or_of_another_dataset_are_found(
    folder: Path, samples: list[Row], tmp_path: Path
) -> None:
    other = write(
        tmp_path / "other", [(f"other {i}", "", *sample[2:]) for i, sample in enumerate(samples)]
    )
    first, second, third = shards(folder)
    contents = {path: path.read_bytes() for path in (first, second, third)}

    def exchange() -> None:
        first.write_bytes(contents[second])
        second.write_bytes(contents[first])

    changes = {
        "exchange": (exchange, "shard-000000.arrow is damaged or of another dataset"),
        "foreign": (
            lambda: shutil.copy(shards(other)[1], second),
            "shard-000001.arrow is damaged or of another",
        ),
        "missing": (second.unlink, "shard-000001.arrow is missing"),
        "more": (
            lambda: shutil.copy(third, folder / "shard-000003.arrow"),
            "shard-000003.arrow is not of this",
        ),
        "cut off": (
            lambda: third.write_bytes(contents[third][:-300]),
            "shard-000002.arrow is damaged",
        ),
    }
    for change, message in changes.values():
        change()
        with pytest.raises(ValueError, match=message):
            LatentDataset(folder)
        assert any(re.search(message, damage) for damage in damages(folder))
        for path, content in contents.items():
            path.write_bytes(content)
        (folder / "shard-000003.arrow").unlink(missing_ok=True)
    assert damages(folder) == [] and len(LatentDataset(folder)) == 7


def test_a_damaged_shard_is_refused_by_a_writer_and_made_anew_when_deleted(
    folder: Path, samples: list[Row]
) -> None:
    first = shards(folder)[0]
    shutil.copy(shards(folder)[1], first)
    with pytest.raises(ValueError, match=r"shard-000000\.arrow is damaged.*delete it"):
        LatentWriter(folder, INFO, NEGATIVE)
    first.unlink()
    assert written_samples(folder) == [sample[:2] for sample in samples[3:]]
    with LatentWriter(folder, INFO, NEGATIVE) as writer:
        for sample in samples[:3]:
            writer.add(*sample)
        writer.finish()
    dataset = LatentDataset(folder)
    assert damages(folder) == [] and sorted(dataset.file(i) for i in range(7)) == [
        sample[0] for sample in samples
    ]


def test_damaged_shards_are_refused(folder: Path) -> None:
    last = shards(folder)[-1]
    content = last.read_bytes()
    for damaged in (content[:-200], content[:100], b"", b"not arrow" * 9):
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match="shard"):
            LatentDataset(folder)
    last.unlink()
    with pytest.raises(
        ValueError, match="should have 7 samples, not 6: shard-000002.arrow is missing"
    ):
        LatentDataset(folder)


def test_a_negative_prompt_that_is_damaged_or_missing_is_refused(folder: Path) -> None:
    path = folder / "negative_prompt.safetensors"
    for embeds in (torch.ones(7, 5), torch.ones(2, 4), torch.ones(5)):
        save_file({"prompt_embeds": embeds}, path)
        with pytest.raises(
            ValueError, match=r"negative_prompt\.safetensors must hold prompt_embeds \[1\.\.6, 5\]"
        ):
            LatentDataset(folder)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"negative_prompt\.safetensors cannot be read"):
        LatentDataset(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"negative_prompt\.safetensors cannot be read"):
        LatentDataset(folder)


def flip(path: Path, part: bytes) -> None:
    """Change a bit of the part of a file that is ``part``."""
    content = bytearray(path.read_bytes())
    at = content.index(part)
    content[at] ^= 1
    path.write_bytes(content)
