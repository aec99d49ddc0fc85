"""Test errors of the system by every library that writes, and files that are whole or absent."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from anyflow.utils.writing import (
    hidden,
    system_error,
    whole_file,
    whole_folder,
    write_bytes,
    write_text,
    writing,
)

VALUES = torch.zeros(10_000)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let no file of this process grow beyond 4096 bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _torch(path: Path) -> None:
    with path.open("wb") as file:
        torch.save(VALUES, file)


def _arrow(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    batch = pa.record_batch([pa.array(VALUES.numpy())], names=["a"])
    with pa.ipc.new_stream(str(path), batch.schema) as stream:
        stream.write_batch(batch)


def _video(path: Path) -> None:
    from anyflow.pipelines.video import write_video

    pytest.importorskip("av")
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)
    write_video(noise, path.with_suffix(".mp4"))


WRITERS = {
    "torch": _torch,
    "safetensors": lambda path: save_file({"a": VALUES}, path),
    "pyarrow": _arrow,
    "av": _video,
    "python": lambda path: write_bytes(path, bytes(10_000)),
}


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_library_s_failure_is_the_system_s_error_with_a_path(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    with pytest.raises(OSError, match="File too large") as caught, writing(tmp_path / "file"):
        write(tmp_path / "file")
    assert caught.value.errno == errno.EFBIG
    assert str(tmp_path) in caught.value.filename


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writing(tmp_path):
        try:
            os.stat(tmp_path / "none")
        except FileNotFoundError:
            {}["a bug that happened while an error was handled"]
    assert system_error(RuntimeError("size mismatch")) is None
    assert system_error(OSError("a text of a library, without a number")) is None
    found = system_error(MemoryError())
    assert found is not None and found.errno == errno.ENOMEM
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    found = system_error(caught.value)
    assert found is not None and found.errno == errno.ENOMEM


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_text(file, "é")
    assert file.read_bytes() == "é".encode()
    with pytest.raises(KeyboardInterrupt), whole_file(file) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "é" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(OSError, match="Not a directory"):
        write_text(file / "below", "")
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_text(file, "")
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_is_whole_or_as_before(tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "folder"
    with whole_folder(folder) as partial:
        write_text(partial / "file", "one")
    with (
        pytest.raises(KeyboardInterrupt),
        whole_folder(folder, replace=True) as partial,
    ):
        write_text(partial / "file", "half")
        raise KeyboardInterrupt
    assert (folder / "file").read_text() == "one" and list(folder.parent.iterdir()) == [folder]
    with pytest.raises(ValueError, match="not an empty folder"), whole_folder(folder):
        pass
    with whole_folder(folder, replace=True) as partial:
        write_text(partial / "other", "two")
    assert [file.name for file in folder.iterdir()] == ["other"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_replacement_that_was_killed_is_undone_or_ended(tmp_path: Path, replaced: bool) -> None:
    folder, old = tmp_path / "folder", hidden(tmp_path / "folder", "old")
    for place in (old, folder) if replaced else (old,):
        place.mkdir()
        write_text(place / "file", place.name)
    with pytest.raises(KeyError), whole_folder(folder, replace=True):
        raise KeyError
    assert not old.exists()
    assert (folder / "file").read_text() == (folder if replaced else old).name
