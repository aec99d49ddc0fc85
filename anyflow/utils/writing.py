"""Writing files completely or not at all, and the operating system's errors that writers report in
their own ways.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def system_error(error: BaseException) -> OSError | None:
    """Find the error of the operating system that an exception stands for.

    ``torch.save`` reports a failed write as a RuntimeError of its zip writer that follows the
    OSError, safetensors as an error of its own with the number in the text, and torch's allocator
    as a RuntimeError. Besides these only an explicit ``raise ... from`` is followed: an exception
    that merely happened while an OSError was handled is another.

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
    """Yield a hidden path beside ``path`` to write to, which takes its name when the block has
    ended well.

    Whatever was at ``path`` is there until then; after an error, nothing of the block is left.

    Raises:
        OSError: as :func:`writing`.
    """
    partial = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield partial
            publish(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; OSError that names it."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8 completely or not at all; OSError that names it."""
    write_bytes(path, content.encode())


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder, with its content on the disk before and its name after."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
