"""Test whom locks of folders keep out, who is named, and what is left."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from anyflow.utils.documents import is_no_folder
from anyflow.utils.locking import LOCK_FILE, FolderInUseError, folder_lock, locks_folder
from anyflow.utils.writing import require_empty

HOLD = """
import sys, time
from pathlib import Path
from anyflow.utils.locking import folder_lock
with folder_lock(Path(sys.argv[1]), beside=sys.argv[2] == "beside"):
    print("held", flush=True)
    time.sleep(60)
"""


def _holder(folder: Path, where: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, where], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a_second_process_is_told_who_holds_the_folder_until_that_one_is_killed(
    where: str, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "a"
    holder = _holder(folder, where)
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(
            FolderInUseError,
            match=rf"runs/a is in use by process {holder.pid} on .* since 2\d{{3}}-.*: -c ",
        ),
        folder_lock(folder, beside=where == "beside"),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before
    holder.kill()
    holder.wait()
    with folder_lock(folder, beside=where == "beside"):
        assert folder.exists() == (where == "inside")


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), folder_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_FILE).is_file()
        raise KeyError
    with folder_lock(tmp_path / "c" / "d", beside=True):
        assert [p.name for p in (tmp_path / "c").iterdir()] == [".d.lock"]
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "a"):
        (tmp_path / "a" / "result").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["result"]


def test_two_threads_exclude_each_other_and_a_function_is_locked_by_its_argument(
    tmp_path: Path,
) -> None:
    refused: list[str] = []

    @locks_folder("out")
    def write(first: int, out: Path) -> int:
        return first

    def second() -> None:
        try:
            write(2, out=tmp_path)
        except FolderInUseError as error:
            refused.append(str(error))

    with folder_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]
    assert write(3, tmp_path) == 3


def test_a_forked_child_neither_keeps_nor_releases_the_lock(tmp_path: Path) -> None:
    read, write = os.pipe()
    lock = folder_lock(tmp_path)
    lock.__enter__()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)  # outlives the lock of its parent
        lock.__exit__(None, None, None)
        os._exit(0)
    os.close(read)
    with pytest.raises(FolderInUseError), folder_lock(tmp_path):
        pass
    lock.__exit__(None, None, None)
    with folder_lock(tmp_path):  # the child has a copy of every descriptor that was not closed
        os.close(write)
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / LOCK_FILE).is_file()


def test_folders_that_cannot_be_made_are_errors_that_name_them(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for folder, kind, text in (
        (tmp_path / "file", ValueError, "file is not a folder"),
        (tmp_path / "file" / "out", OSError, "Not a directory"),
        (tmp_path / "loop", OSError, "loop"),
        (tmp_path / ("x" * 300), OSError, "File name too long"),
        (Path("/proc/x"), OSError, "/proc/x"),
    ):
        with pytest.raises(kind, match=text), folder_lock(folder):
            pass
    os.mkfifo(tmp_path / LOCK_FILE)
    with pytest.raises(ValueError, match="is a FIFO, not a lock file"), folder_lock(tmp_path):
        pass


@pytest.fixture
def flickering(tmp_path: Path) -> Iterator[Path]:
    """Give a folder that a second thread makes and removes all the time."""
    folder, done = tmp_path / "flickering", threading.Event()

    def flicker() -> None:
        while not done.is_set():
            with suppress(OSError):  # a lock is in it
                folder.mkdir(exist_ok=True)
                folder.rmdir()

    thread = threading.Thread(target=flicker)
    thread.start()
    yield folder
    done.set()
    thread.join()


def test_a_folder_that_is_made_and_removed_meanwhile_is_no_file_and_can_be_locked(
    flickering: Path,
) -> None:
    assert not any(is_no_folder(flickering) for _ in range(5000))
    for _ in range(300):
        require_empty(flickering)
        with folder_lock(flickering):
            assert (flickering / LOCK_FILE).is_file()


def test_many_threads_that_make_and_remove_the_folder_hold_it_one_at_a_time(tmp_path: Path) -> None:
    inside, held, problems = threading.Lock(), [0], []

    def work() -> None:
        for _ in range(100):
            try:
                with folder_lock(tmp_path / "a" / "b"):
                    if not inside.acquire(blocking=False):
                        problems.append("two at once")
                        continue
                    held[0] += 1
                    inside.release()
            except FolderInUseError:
                pass
            except BaseException as error:
                problems.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [] and held[0] >= 1
