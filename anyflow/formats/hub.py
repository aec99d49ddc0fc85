"""Find folders of models: local ones, and those of the Hugging Face Hub by their names."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

from anyflow.formats.errors import CheckpointFormatError
from anyflow.formats.files import TORCH_SUFFIXES
from anyflow.utils.documents import shortened

TRANSFORMER = "transformer/*"
SCHEDULER = "scheduler/*"  # the only part that may be elsewhere
ENCODERS = ("vae/*", "text_encoder/*", "tokenizer/*")
PIPELINE = ("model_index.json", TRANSFORMER, *ENCODERS, SCHEDULER)
_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII
)
_WEIGHTS = (".safetensors", *TORCH_SUFFIXES)
_LONGEST = 96  # characters of a name on the Hub


@dataclass(frozen=True)
class HubName:
    """Name a model on the Hugging Face Hub.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for ``main``.
    """

    repo: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Parse ``owner/name`` or ``owner/name@revision``; None for what can only be a path."""
        match = _NAME.fullmatch(text)
        if (
            match is None
            or len(match["repo"]) > _LONGEST
            or text.endswith((".json", *_WEIGHTS))
            or ".." in match["repo"]
            or "--" in match["repo"]
        ):
            return None
        return cls(match["repo"], match["revision"])

    @property
    def download_command(self) -> str:
        """Return the command line that downloads the model into a folder of its name."""
        revision = "" if self.revision is None else f" --revision {self.revision}"
        return f"hf download {self.repo}{revision} --local-dir {self.repo.partition('/')[2]}"


def local_folder(path: str | Path, patterns: Sequence[str] | None = None) -> Path:
    """Find a folder of a model, and download a model of the Hub that is not in its cache.

    Without a network, or with ``HF_HUB_OFFLINE=1``, a model that is in the cache is taken from
    there; a hub that does not answer within ``HF_HUB_ETAG_TIMEOUT`` (10) seconds counts as out of
    reach.

    Args:
        path: a local folder, or else ``owner/name`` or ``owner/name@revision`` on the Hub.
        patterns: patterns of the files that are needed, such as ``vae/*``; None takes all of them.

    Returns:
        The folder, or the one in the Hub's cache.

    Raises:
        ValueError: the folder does not exist, and the Hub gave no such model. The message says how
            to download it on another machine.
        OSError: the system refuses to write the download, such as on a full disk.
    """
    if os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path):
        raise ValueError(f"{shortened(path)} is not a folder of a model")
    wanted = ("*",) if patterns is None else tuple(patterns)
    required = tuple(
        pattern for pattern in wanted if pattern.endswith("/*") and pattern != SCHEDULER
    )
    return _of_hub(str(path), _Selection(wanted, required), "folder")


def local_checkpoint(path: str | Path, subfolder: str | None = None) -> Path:
    """Return a local path as it is, and download a transformer that only the Hub has.

    Args:
        path: a local path, or the name of a model on the Hub as for :func:`local_folder`. The
            model's ``transformer`` and ``scheduler`` are downloaded, or the files at its top where
            it has no such folder.
        subfolder: subfolder in place of ``transformer``.

    Raises:
        CheckpointFormatError: no such model could be had from the Hub.
        OSError: as :func:`local_folder`.
    """
    if os.path.lexists(path) or HubName.parse(str(path)) is None:
        return Path(path)
    folder = f"{'transformer' if subfolder is None else subfolder}/*"
    try:
        selection = _Selection((folder, SCHEDULER), (folder,), or_top=subfolder is None)
        return _of_hub(str(path), selection, "file or folder")
    except ValueError as error:
        raise CheckpointFormatError(str(error)) from None


@dataclass(frozen=True)
class _Selection:
    """Select the files of a repository that are needed.

    Args:
        patterns: patterns of the files.
        required: those of the patterns without which the model cannot be used.
        or_top: the weights at the top of the repository serve as well.
    """

    patterns: tuple[str, ...]
    required: tuple[str, ...]
    or_top: bool = False

    def of(self, files: Sequence[str]) -> list[str]:
        """Choose from the files of a repository; none if a required file is missing."""
        if not self.absent(files):
            return [
                file for file in files if any(fnmatch(file, pattern) for pattern in self.patterns)
            ]
        at_top = [file for file in files if "/" not in file]
        weights = [file for file in at_top if file.endswith(_WEIGHTS)]
        if not (self.or_top and weights):
            return []
        safe = any(file.endswith(".safetensors") for file in weights)
        # The original Wan has its text encoder and its VAE beside the transformer, in torch's
        # files.
        return [file for file in at_top if not (safe and file.endswith(TORCH_SUFFIXES))]

    def absent(self, files: Sequence[str]) -> list[str]:
        """Return the required patterns that no file matches."""
        return [
            pattern
            for pattern in self.required
            if not any(fnmatch(file, pattern) for file in files)
        ]


def _of_hub(text: str, selection: _Selection, what: str) -> Path:
    name = HubName.parse(text)
    if name is None:
        is_path = "/" in text or text.startswith((".", "~"))
        hint = "" if is_path else "; a model on the Hugging Face Hub is named owner/name"
        raise ValueError(f"no {what} {shortened(text)}{hint}")
    from huggingface_hub import constants

    try:
        return _snapshot(name, selection, constants.HF_HUB_CACHE, constants.ENDPOINT)
    except ValueError as error:
        raise ValueError(f"no {what} {text} here, and {error}") from None


@lru_cache(maxsize=32)  # without a network, each look-up may wait for it
def _snapshot(name: HubName, selection: _Selection, cache: str, endpoint: str) -> Path:
    """Return the folder of a model in the Hub's cache, with the files of a selection in it.

    Raises:
        ValueError: the model cannot be had; the message is the end of a sentence.
        OSError: of the local system.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    try:
        # snapshot_download alone waits for ever where a connection is taken and nothing is
        # answered.
        seconds = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi(endpoint=endpoint).model_info(
            name.repo, revision=name.revision, timeout=seconds
        )
        siblings = [] if info.siblings is None else info.siblings
        files = selection.of([file.rfilename for file in siblings])
        if files:
            folder = snapshot_download(
                name.repo, revision=name.revision, allow_patterns=files, cache_dir=cache
            )
            return Path(folder)
    except Exception as error:  # of the hub, httpx or requests, by version
        if _is_local(error):
            raise
        cached = _cached(name, Path(cache))
        there = (
            []
            if cached is None
            else [file.relative_to(cached).as_posix() for file in cached.rglob("*")]
        )
        if cached is not None and selection.of(there):
            return cached
        raise ValueError(_reason(name, error, selection.absent(there) if there else [])) from None
    needed = ", ".join(selection.required if selection.required else selection.patterns)
    raise ValueError(
        f"the model {name.repo} on the Hugging Face Hub is of another kind: it has no {needed}"
    )


def _cached(name: HubName, cache: Path) -> Path | None:
    """Return the snapshot of a model that the Hub's cache holds, or None."""
    folder = cache / f"models--{name.repo.replace('/', '--')}"
    revision = "main" if name.revision is None else name.revision
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _is_local(error: BaseException) -> bool:
    """Tell whether an error is of this machine's disk and not of the network."""
    network = (ConnectionError, TimeoutError, socket.gaierror)
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, network)


def _reason(name: HubName, error: Any, absent: Sequence[str]) -> str:
    """Say, as the end of a sentence, why a model could not be had from the Hub and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{name.repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"the model {name.repo} of the Hugging Face Hub has no revision {name.revision}"
    if isinstance(error, GatedRepoError):
        return (
            f"the Hugging Face Hub asks to accept its terms first: do so at {page}, and run `hf "
            "auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the Hugging Face Hub has no model of this name; for a private one, run `hf auth "
            "login` first"
        )
    if isinstance(error, OfflineModeIsEnabled):
        failed = "the Hugging Face Hub is not asked (HF_HUB_OFFLINE is set)"
    elif isinstance(error, HfHubHTTPError) and getattr(error, "response", None) is not None:
        failed = f"the Hugging Face Hub answers with status {error.response.status_code}"
    else:
        failed = "the Hugging Face Hub cannot be reached"
    cache = f"; its copy in the cache lacks {', '.join(absent)}" if absent else ""
    return (
        f"{failed}{cache}: on a machine with a network run `{name.download_command}`, "
        "copy that folder here, and give its path in place of the name"
    )
