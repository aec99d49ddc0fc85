"""Let one process at a time write to a folder, by a lock that ends with its holder."""

from __future__ import annotations

import errno
import fcntl
import functools
import inspect
import os
import shlex
import socket
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from anyflow.utils.documents import is_no_folder, kind_of_file, shortened

LOCK_FILE = ".anyflow.lock"

# File systems that have no locks, such as Lustre mounted without them, answer with one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_MAX_HOLDER_BYTES = 4096
_ATTEMPTS = 100

P = ParamSpec("P")
T = TypeVar("T")


class FolderInUseError(ValueError):
    """Say that another command is writing to the folder; nothing was touched."""


@contextmanager
def folder_lock(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Hold the only right to write to ``folder`` during the block.

    The lock is ``flock`` on a small file that says who holds it, and the system ends it with the
    process, however that ends. Two threads of a process exclude each other like two processes. Over
    NFS the server keeps the lock. Where the file system has no locks, the block runs with
    a warning. The file goes when the lock is released, and so do folders that were made for it and
    are still empty.

    Args:
        folder: made if need be.
        beside: the file stands beside the folder, which is not made: for folders that must be new
            or empty.

    Raises:
        FolderInUseError: another process or thread holds the lock; its host, process, start and
            command are named.
        ValueError: ``folder`` is not a folder.
        OSError: the file cannot be made.
    """
    folder = Path(folder)
    if not beside and is_no_folder(folder):
        raise ValueError(f"out: {shortened(folder)} is not a folder")
    if beside:
        place = Path(os.path.realpath(folder))  # every name of a folder gives the same lock
        file = place.with_name(f".{place.name}.lock")
    else:
        file = folder / LOCK_FILE
    made = _missing_folders(file.parent)
    try:
        descriptor = _acquire(folder, file)
        try:
            yield
        finally:
            _release(descriptor, file)
    finally:
        for parent in made:
            with suppress(OSError):  # the folder has content
                parent.rmdir()


def locks_folder(
    argument: str, *, beside: bool = False
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function run under the :func:`folder_lock` of the folder that ``argument`` names."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> T:
            folder = signature.bind(*args, **kwargs).arguments[argument]
            with folder_lock(Path(folder), beside=beside):
                return function(*args, **kwargs)

        return locked

    return decorate


# Descriptors of this process. A forked child shares the lock until it closes its copy: a worker
# that outlives a killed parent would keep it. Closing the copy does not release it, as it would
# with fcntl.lockf.
_held: set[int] = set()


def _close_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _acquire(folder: Path, file: Path) -> int:
    """Open and lock the file.

    The attempt is repeated where the last holder has just removed the file, or the folder made for
    it.
    """
    for attempt in range(_ATTEMPTS):
        try:
            descriptor = _open(file)
        except (FileNotFoundError, FileExistsError) as error:
            # The folder has vanished meanwhile, or none can be made here, such as in /proc.
            if attempt == _ATTEMPTS - 1 or is_no_folder(file.parent):
                if isinstance(error, FileExistsError):
                    reason = os.strerror(errno.ENOTDIR)
                    raise OSError(errno.ENOTDIR, reason, str(file.parent)) from None
                raise
            time.sleep(1e-5 * attempt)  # leaves the rhythm of whoever removes it
            continue
        _held.add(descriptor)
        try:
            if not stat.S_ISREG(mode := os.fstat(descriptor).st_mode):
                raise ValueError(
                    f"{shortened(file)} is {kind_of_file(mode)}, not a lock file; delete it"
                )
            _lock(descriptor, folder, file)
            if _is_at(descriptor, file):
                with suppress(
                    OSError
                ):  # a full disk has no room for the holder's name; the lock holds anyway
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, _holder().encode("utf-8", "backslashreplace"))
                return descriptor
        except BaseException:
            _close(descriptor)
            raise
        _close(descriptor)
    raise FolderInUseError(
        f"{shortened(folder)} is in use by processes that come and go; name another folder"
    )


def _open(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    return os.open(
        file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666
    )


def _lock(descriptor: int, folder: Path, file: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, _MAX_HOLDER_BYTES, 0).decode("utf-8", "replace")
        by = " ".join(holder.split()) or "another process"
        raise FolderInUseError(
            f"{shortened(folder)} is in use by {by}; wait for it or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(file)) from error
        warnings.warn(
            f"the file system of {shortened(folder)} has no locks ({error.strerror}): start no "
            "second command there",
            stacklevel=2,
        )


def _release(descriptor: int, file: Path) -> None:
    if descriptor not in _held:  # a forked child, which does not hold it
        return
    # The file goes while the lock is held, so that nobody loses a file that they have locked.
    if _is_at(descriptor, file):
        with suppress(OSError):
            file.unlink()
    _close(descriptor)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except OSError:
        return False


def _holder() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "python"
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {command[:1000]}\n"


def _missing_folders(folder: Path) -> list[Path]:
    """List the folders that making ``folder`` would make, innermost first."""
    missing = []
    for parent in (folder, *folder.parents):
        if os.path.lexists(parent):
            break
        missing.append(parent)
    return missing
