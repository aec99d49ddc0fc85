"""Write files and folders whole or not at all, and report refusals of the system as OSError."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anyflow.utils.documents import shortened


def system_error(error: BaseException) -> OSError | None:
    """Find the error of the operating system that an exception stands for.

    ``torch.save`` reports a failed write as a RuntimeError of its zip writer that follows the
    OSError, safetensors as an error of its own with the number in the text, and torch's allocator
    as a RuntimeError. Besides these only an explicit ``raise ... from`` is followed: an exception
    that merely happened while an OSError was handled has a cause of its own.

    Args:
        error: any exception.

    Returns:
        An OSError with ``errno`` set, or None if the exception is of another kind.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        text = str(current)
        if isinstance(current, OSError) and current.errno is not None:
            return current
        if isinstance(current, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in text:
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if type(current).__name__ == "SafetensorError" and (
            number := re.search(r"\(os error (\d+)\)", text)
        ):
            return OSError(int(number[1]), os.strerror(int(number[1])))
        in_zip_writer = isinstance(current, RuntimeError) and "inline_container.cc" in text
        current = current.__cause__ or (current.__context__ if in_zip_writer else None)
    return None


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Make every error of the operating system in the block an OSError that names a file.

    Args:
        path: named where the error names none itself.

    Raises:
        OSError: the block met such an error, whatever library reported it; other exceptions pass as
            they are.
    """
    try:
        yield
    except Exception as error:
        found = system_error(error)
        if found is None or (found is error and found.filename is not None):
            raise
        assert found.errno is not None
        name = path if found.filename is None else found.filename
        raise OSError(found.errno, os.strerror(found.errno), str(name)) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside ``path`` to write to, which is renamed when the block has ended.

    Whatever was at ``path`` stays until then; after an error, nothing of the block is left.

    Raises:
        OSError: see :func:`writing`.
    """
    partial = hidden(path)
    with writing(path):
        try:
            yield partial
            publish(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write to, which is renamed to ``path`` when the block has ended.

    A folder at ``path`` stays until then; after an error, nothing of the block is left.

    Args:
        path: the folder; missing parents are made.
        replace: a folder with content at ``path``; else it is an error.

    Raises:
        ValueError: ``path`` is not empty and is not to be replaced.
        OSError: see :func:`writing`.
    """
    if not replace:
        require_empty(path)
    target = Path(os.path.realpath(path))  # a link to an empty folder stays a link
    partial = hidden(target)
    with writing(path):
        take_back(target)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    sync(file)
            publish(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # half a model would keep a full disk full
            raise


def require_empty(path: Path) -> None:
    """Raise a ValueError unless nothing but perhaps an empty folder is at ``path``."""
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{shortened(path)} is a link to nothing; name another folder")
    try:
        occupied = any(path.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError:
        occupied = path.exists()  # a parent may be the file, which the writer reports
    if occupied:
        raise ValueError(f"{path} exists and is not an empty folder; name another one")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raise an OSError that names the file."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8 whole or not at all; raise an OSError that names the file."""
    write_bytes(path, content.encode())


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its name, in place of what has the name.

    The content of a file, or the names in a folder, are on the disk before, and the new name
    after. A folder that is replaced is hidden first, because the system renames onto empty
    folders only; :func:`take_back` undoes what a kill has interrupted there.
    """
    sync(temporary)
    replaced = hidden(path, "old")
    if temporary.is_dir() and path.is_dir():
        os.rename(path, replaced)
    os.replace(temporary, path)
    sync(path.parent)
    if replaced.is_dir():
        shutil.rmtree(replaced)


def take_back(path: Path) -> None:
    """Give a folder its name again if :func:`publish` hid it and was killed, or delete it."""
    replaced = hidden(path, "old")
    if not replaced.is_dir():
        return
    if path.exists():
        shutil.rmtree(replaced)
    else:
        os.rename(replaced, path)


def hidden(path: Path, suffix: str = "tmp") -> Path:
    """Return the hidden name beside ``path`` for content that is unfinished or replaced."""
    return path.with_name(f".{path.name}.{suffix}")


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
