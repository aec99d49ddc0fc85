"""Log a run by accelerate's trackers: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from PIL import Image

from anyflow.utils.documents import read_text, shortened
from anyflow.utils.packages import is_missing, missing
from anyflow.utils.validation import brief
from anyflow.utils.writing import write_text

RUN_ID_FILE = "run_id"
Logger = Literal["tensorboard", "wandb", "trackio"]
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
# They make accelerate's state join or open a process group, or set a device; None takes a variable
# away.
_ONE_PROCESS = {"LOCAL_RANK": None, "ACCELERATE_TORCH_DEVICE": "cpu"}


def check_loggers(loggers: Sequence[Logger]) -> None:
    """Raise a ValueError if a package that a logger needs is not installed."""
    for logger in loggers:
        for package in ("accelerate", logger):  # the loggers' packages have their names
            if is_missing(package):
                raise ValueError(missing(f"loggers: {logger}", package))


def run_id(folder: Path) -> str:
    """Return the name under which a run's loggers know it.

    The name is drawn once and kept in the run's folder.

    Raises:
        ValueError: the file holds something else than 1 to 64 letters, digits, ``_`` and ``-``.
        OSError: the file cannot be written.
    """
    file = folder / RUN_ID_FILE
    if not os.path.lexists(file):
        write_text(file, f"{secrets.token_hex(4)}\n")
    name = read_text(file, max_bytes=1024).strip()
    if not _RUN_ID.fullmatch(name):
        raise ValueError(
            f"{file} must hold 1 to 64 letters, digits, '_' and '-', got {brief(name)}; delete it"
        )
    return name


class Trackers:
    """Log one run in one process of all, in a context.

    A resumed run is the same run in the loggers: Weights & Biases and trackio know it by the
    id in its folder, and TensorBoard drops what the folder has of steps after ``start``.

    Args:
        loggers: which ones; their packages are installed.
        folder: folder of the run. TensorBoard's files go into ``tensorboard``, those of Weights &
            Biases into ``wandb``.
        project: project that Weights & Biases and trackio sort the run into.
        config: the recipe's values by dotted name.
        start: updates done before.

    Raises:
        ValueError: a logger does not start, such as Weights & Biases without a login.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        folder: Path,
        project: str,
        config: Mapping[str, Any],
        start: int,
    ) -> None:
        self._trackers: dict[Logger, Any] = {}
        self._open = ExitStack()
        if not loggers:
            return
        values = {name: _plain(value) for name, value in config.items()}
        with ExitStack() as opened:
            opened.enter_context(_accelerate_in_one_process())
            for logger in dict.fromkeys(loggers):
                self._trackers[logger] = _start(logger, folder, project, values, start)
                opened.callback(self._trackers[logger].finish)
            self._open = opened.pop_all()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._open.close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers of update ``step`` (from 1)."""
        for tracker in self._trackers.values():
            tracker.log(dict(values), step=step)

    def add_charts(self, curves: Mapping[str, Sequence[str]]) -> None:
        """Give TensorBoard a chart of these curves for each entry, under Custom Scalars.

        Weights & Biases and trackio draw such charts by their users' choice.

        Args:
            curves: names of numbers, by the chart's title.
        """
        if "tensorboard" in self._trackers and curves:
            charts = {
                title: ["Multiline", [f"^{re.escape(name)}$" for name in names]]
                for title, names in curves.items()
            }
            self._trackers["tensorboard"].tracker.add_custom_scalars({"metrics": charts})

    def log_video(self, step: int, name: str, file: Path) -> None:
        """Log a GIF or MP4 file; TensorBoard, which shows no MP4, gets the frame in its middle."""
        for logger, tracker in self._trackers.items():
            if logger != "tensorboard":
                video = importlib.import_module(logger).Video
                tracker.log({name: video(str(file), caption=f"step {step}")}, step=step)
            elif file.suffix == ".gif":
                tracker.tracker.file_writer.add_summary(_gif_summary(name, file), step)
            else:
                tracker.log_images({name: _middle_frame(file)[None]}, step=step, dataformats="NHWC")


def _start(logger: Logger, folder: Path, project: str, config: dict[str, Any], start: int) -> Any:
    from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

    if logger == "tensorboard":
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=start + 1)
    elif logger == "wandb":
        tracker = WandBTracker(
            *(project,),
            **{
                "id": run_id(folder),
                "name": folder.resolve().name,
                "resume": "allow",
                "dir": str(folder),
            },
            **{"config": config, "allow_val_change": True},
        )
    else:
        name = f"{folder.resolve().name}-{run_id(folder)}"
        tracker = TrackioTracker(project, name=name, resume="allow", config=config)
    try:
        tracker.start()
    except Exception as error:  # of any kind: a login, a server, a setting in the environment
        reason = shortened(" ".join(str(error).split()), 300)
        raise ValueError(f"loggers: {logger} does not start: {reason}") from error
    if logger == "tensorboard" and not list((folder / "tensorboard").glob("*/hparams.yml")):
        tracker.store_init_configuration(config)  # adds files at every call
    return tracker


def _plain(value: Any) -> Any:
    """Return a value that loggers take as a setting: lists become text."""
    return (
        value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
    )


@contextmanager
def _accelerate_in_one_process() -> Iterator[None]:
    """Give accelerate's trackers the state of a single process, without which they do not log.

    The process groups are this library's. With torchrun's variables accelerate would open one of
    its own where there is none (one process on one GPU), and it would set the device. A state that
    the caller's program has is left alone.
    """
    from accelerate.state import PartialState

    if PartialState._shared_state != {}:
        yield
        return
    before = {name: os.environ.get(name) for name in _ONE_PROCESS}
    _set_environment(_ONE_PROCESS)
    try:
        PartialState()
    finally:
        _set_environment(before)
    try:
        yield
    finally:
        PartialState._reset_state()


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _gif_summary(name: str, file: Path) -> Any:
    """Make of a GIF file what ``SummaryWriter.add_video`` makes of frames, without moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped,unused-ignore]

    with Image.open(file) as image:
        width, height = image.size
    content = Summary.Image(
        height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes()
    )
    return Summary(value=[Summary.Value(tag=name, image=content)])


def _middle_frame(file: Path) -> np.ndarray:
    """Read the frame in the middle of an MP4 file, ``[H, W, 3]`` uint8."""
    import av

    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        middle = next(islice(container.decode(stream), stream.frames // 2, None))
        return middle.to_ndarray(format="rgb24")
