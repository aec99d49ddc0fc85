"""Read small files that a user wrote or downloaded, bounded and with errors that name the file."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 64


def require_regular_file(path: Path | str) -> Path:
    """Return ``path`` if it is a regular file or a link to one, without opening it.

    Opening a FIFO waits for a writer and reading ``/dev/zero`` never ends, so the kind of the file
    is looked at first.

    Args:
        path: path of the file.

    Raises:
        ValueError: the file does not exist or cannot be looked up, or it is a folder, device,
            FIFO or socket.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        what = f"is a link to {shortened(os.readlink(path))}, which" if path.is_symlink() else ""
        raise ValueError(
            " ".join(filter(None, (shortened(path), what, "does not exist")))
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ValueError(f"{shortened(path)} cannot be read: {system_reason(error)}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{shortened(path)} is {kind_of_file(mode)}, not a regular file")
    return path


def require_content(path: Path | str) -> Path:
    """Return ``path`` if it is a regular file that does not begin as a placeholder of one.

    Raises:
        ValueError: see :func:`require_regular_file`; or the file cannot be read, is empty, or is
            what an incomplete download leaves in its place: a pointer of git-lfs, or a web page.
    """
    path = require_regular_file(path)
    if (placeholder := _placeholder(_first_bytes(path, 256))) is not None:
        raise ValueError(f"{shortened(path)} is {placeholder}")
    return path


def _first_bytes(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise ValueError(f"{shortened(path)} cannot be read: {system_reason(error)}") from error


def _placeholder(start: bytes) -> str | None:
    """Say what stands in a file in place of its content, by its first bytes."""
    if not start:
        return "an empty file; download it again"
    if start.startswith(b"version https://git-lfs"):
        return (
            "a pointer of git-lfs, not the file itself; run `git lfs pull` in its folder, or "
            "download it again"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (HTML) saved under this name; download the file itself"
    return None


def read_bytes(path: Path | str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole regular file of at most ``max_bytes`` bytes.

    Raises:
        ValueError: the file is not a regular file, cannot be read, or is larger.
    """
    path = require_regular_file(path)
    content = _first_bytes(path, max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(
            f"{shortened(path)} is larger than the {max_bytes} bytes allowed for such a file"
        )
    return content


def read_text(path: Path | str, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a text file in UTF-8, without the byte order mark that spreadsheets write.

    Raises:
        ValueError: see :func:`read_bytes`; or the file is not UTF-8, which is said with the line.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{shortened(path)}, line {line}: byte {content[error.start]:#04x} is not UTF-8; save "
            "the file as UTF-8"
        ) from error


def read_json(path: Path | str, *, max_bytes: int = MAX_BYTES, finite: bool = False) -> Any:
    """Read a JSON file; ``finite`` is that of :func:`parse_json`.

    Raises:
        ValueError: see :func:`read_text`, :func:`require_content` and :func:`parse_json`.
    """
    require_content(path)
    return parse_json(read_text(path, max_bytes=max_bytes), shortened(path), finite=finite)


def parse_json(text: str, where: str, *, finite: bool = False) -> Any:
    """Parse a JSON document of bounded depth, whose keys occur once in an object.

    At most ``MAX_DEPTH`` levels are allowed.

    Args:
        text: the document.
        where: names the document in errors, such as a file and a line.
        finite: refuse NaN and infinity, which JSON does not have and Python reads and writes.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, names a key twice, has a lone
            surrogate or, with ``finite``, a number that is not finite.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        _require_depth(value)
        text.encode()
        json.dumps(value, ensure_ascii=False, allow_nan=not finite).encode()
    except RecursionError:
        raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} has a lone surrogate, which is no character") from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error
    return value


def text_problem(text: str, *, max_characters: int) -> str | None:
    """Say why a text cannot be a prompt, a caption or a name, or return None where it can.

    Args:
        text: the text.
        max_characters: the most characters that are allowed.
    """
    if len(text) > max_characters:
        return f"has {len(text)} characters, at most {max_characters} are allowed"
    if "\0" in text:
        return "has a null character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "has a lone surrogate, which is no character"
    return None


def system_reason(error: BaseException) -> str:
    """Say the operating system's reason of an error without the path, which the caller names."""
    return getattr(error, "strerror", None) or str(error)


def shortened(path: Path | str, length: int = 200) -> str:
    """Return a path for a message, without the middle if it is longer than ``length``."""
    text = (
        str(path)
        .encode("utf-8", "backslashreplace")
        .decode()
        .replace("\0", "\\0")
        .replace("\n", "\\n")
    )
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-length // 2 :]}"


def is_no_folder(path: Path | str) -> bool:
    """Tell if something that is not a folder is at ``path``; nothing there is no such thing.

    The path is looked at once: between two looks, ``exists() and not is_dir()``, another process
    may remove a folder, which then looks like a file.
    """
    try:
        return not stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def kind_of_file(mode: int) -> str:
    """Name the kind of a file by the mode that ``os.stat`` tells."""
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((kind for test, kind in kinds.items() if test(mode)), "a regular file")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"the keys {twice} occur more than once in one object")
    return value


def _require_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = [
            x for outer in level for x in (outer.values() if isinstance(outer, dict) else outer)
        ]
        level = [x for x in inner if isinstance(x, (dict, list))]
    if level:
        raise RecursionError
