"""Print the page of ``anyflow doctor``: plain text, with colors on a terminal only."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anyflow.doctor.environment import Environment, NativeExtension
from anyflow.doctor.requirements import Hub, Package, VideoCodec
from anyflow.utils.progress import counted

if TYPE_CHECKING:
    from anyflow.doctor.self_check import Check, Skipped
    from anyflow.models import AttentionChoice
    from anyflow.ops import BackendChoice

_PROGRAMS = {"c": "C compiler", "c++": "C++ compiler"}
_NEEDED_FOR = {"c": "Triton needs one at run time", "nvcc": "CUDA kernels cannot be built"}
_STYLES = {"ok": "green", "FAIL": "bold red", "taken": "green", "unavailable": "bold red"}
_CODECS = {"h264": "H.264", "mpeg4": "MPEG-4 part 2"}
_SHOWN_PROBLEMS = 10


class Page:
    """Print one section per method, in the order of the methods.

    Args:
        file: stream to print to.
        quiet: print nothing.
    """

    def __init__(self, file: TextIO, *, quiet: bool = False) -> None:
        self._console = Console(file=file, quiet=quiet, highlight=False, markup=False, emoji=False)

    def environment(self, found: Environment) -> None:
        """Print versions, devices and compilers."""
        gpus = [f"{gpu.name}, capability {gpu.capability}, {gpu.memory} GiB" for gpu in found.gpus]
        if found.driver is not None:
            gpus.append(f"driver {found.driver}")
        lines = [
            ("anyflow", f"{found.anyflow} in {found.location}"),
            *([] if found.commit is None else [("commit", found.commit)]),
            ("python", f"{found.python} on {found.platform}"),
            ("torch", f"{found.torch}, built for {found.torch_built_for}"),
            ("threads", f"{found.threads} on {counted(found.cores, 'core')}"),
            ("triton", "missing" if found.triton is None else found.triton),
            ("CUDA", "\n".join([*([] if found.gpus else ["no CUDA device"]), *gpus])),
        ]
        for name, program in found.programs.items():
            if program is None:
                text = f"missing{': ' + _NEEDED_FOR[name] if name in _NEEDED_FOR else ''}"
            else:
                text = f"{program.path}{'' if program.version is None else ' ' + program.version}"
            lines.append((_PROGRAMS.get(name, name), text))
        lines += [(name, value) for name, value in found.settings.items()]
        self._section("Environment", lines)

    def packages(self, found: Sequence[Package], commands: Mapping[str, str]) -> None:
        """Print the packages by what needs them, and how to install what a group lacks."""
        lines: list[tuple[str, str, str]] = []
        for group, members in itertools.groupby(found, key=lambda package: package.group):
            for i, package in enumerate(members):
                text = "missing" if package.version is None else package.version
                if package.version is not None and package.problem is not None:
                    text = f"{text}: {package.problem}"
                lines.append(("" if i else group, package.name, text))
            if group in commands:
                lines.append(("", "", commands[group]))
        self._section("Packages, by what needs them", lines)

    def sources(self, encoder: VideoCodec, hub: Hub) -> None:
        """Print what videos are written with and where models come from."""
        size = "" if hub.gigabytes is None else f", {hub.gigabytes} GB"
        lines = [
            (
                "MP4 files",
                f"{_CODECS.get(str(encoder.codec), encoder.codec)} by {encoder.name}"
                if encoder.problem is None
                else encoder.problem,
            ),
            *([] if encoder.warning is None else [("WARNING", encoder.warning)]),
            ("hub cache", f"{hub.cache}: {counted(hub.models, 'model')}{size}"),
            (
                "hub",
                "offline: models come from the cache only"
                if hub.offline
                else "online: HF_HUB_OFFLINE is not set",
            ),
        ]
        self._section("Videos and models", lines)

    def extension(self, extension: NativeExtension) -> None:
        """Print what was built, and what does not fit."""
        if extension.problem is None:
            info = dict(extension.build_info)
            info["instruction set here"] = str(extension.instruction_set)
            lines = [(name.replace("_", " "), text) for name, text in info.items() if text]
        else:
            lines = [("problem", extension.problem)]
        lines = [("file", "not built" if extension.file is None else extension.file), *lines]
        self._section(
            "Native extension", [*lines, *(("WARNING", text) for text in extension.warnings)]
        )

    def attention(
        self, device: torch.device, report: Mapping[str, AttentionChoice], problem: str | None
    ) -> None:
        """Print which attention backends are usable, and of the others why they are not."""
        lines = [
            (
                choice.name,
                "taken" if choice.chosen else "usable" if choice.available else "no",
                choice.reason,
            )
            for choice in report.values()
        ]
        title = f"Attention on {device} (bfloat16, heads of 128)"
        self._section(title, lines if problem is None else [("problem", problem)])

    def operators(
        self, device: torch.device, report: Mapping[str, BackendChoice], extension: NativeExtension
    ) -> None:
        """Print which backend each operator takes, and why."""
        title = f"Operators on {device}"
        if extension.problem is not None:
            title += " with ANYFLOW_BACKEND=eager, without which anyflow.ops does not import"
        self._section(title, [(op, choice.backend, choice.reason) for op, choice in report.items()])

    def begin_self_check(self, device: torch.device) -> None:
        """Print the heading, before what takes a while."""
        self._heading(
            f"Self-check on {device}: largest relative error against the reference in fp64"
        )

    def self_check(self, checks: Sequence[Check], skipped: Sequence[Skipped]) -> None:
        """Print a line for each operator and backend, then tolerances, failures and omissions."""
        from anyflow.doctor.self_check import TOLERANCE, tolerance

        dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
        lines: dict[tuple[str, str], list[str]] = {}
        for check in checks:
            lines.setdefault((check.op, check.backend), []).extend(
                [_number(check.forward_error), _number(check.backward_error)]
            )
        failed = {(check.op, check.backend) for check in checks if check.problem is not None}
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
        for header in ("", "", *(h for name in dtypes for h in (name, "gradients")), ""):
            table.add_column(header, justify="right" if header else "left", overflow="fold")
        limits = (
            _number(tolerance(dtype, backward))
            for dtype in dtypes.values()
            for backward in (False, True)
        )
        table.add_row("tolerance", "", *limits, "")
        for key, numbers in lines.items():
            table.add_row(*key, *numbers, _styled("FAIL" if key in failed else "ok"))
        self._console.print(table)
        for check in checks:
            if check.problem is not None:
                self._line(f"FAIL {check.op} on {check.backend} in {check.dtype}: {check.problem}")
        reasons: dict[tuple[str, str], list[str]] = {}
        for entry in skipped:
            reasons.setdefault((entry.backend, entry.reason), []).append(entry.op)
        for (backend, reason), operators in reasons.items():
            which = ", ".join(operators) if len(operators) < 4 else f"{len(operators)} operators"
            self._line(f"{backend} not run for {which}: {reason}")

    def verdict(self, problems: Sequence[str], warnings: int, commands: Mapping[str, str]) -> None:
        """Print the problems, an item each, and a last line that says whether all is well.

        Args:
            problems: sentences on what is wrong.
            warnings: how many were printed.
            commands: commands that install the packages that a group lacks.
        """
        if problems:
            self._heading("Problems")
            for problem in problems[:_SHOWN_PROBLEMS]:
                self._item(problem)
            if len(problems) > _SHOWN_PROBLEMS:
                self._item(f"and {len(problems) - _SHOWN_PROBLEMS} more")
            text, style = f"{counted(len(problems), 'problem')}.", "bold red"
        else:
            lacking = ", ".join(
                f"anyflow {group} needs more: {command}" for group, command in commands.items()
            )
            well = f"All is well{' but for this: ' + lacking if lacking else ''}"
            text, style = (
                f"{well}{', with ' + counted(warnings, 'warning') if warnings else ''}.",
                "green",
            )
        self._console.print()
        self._console.print(Text(text, style=style))

    def _section(self, title: str, lines: Iterable[Sequence[str]]) -> None:
        """Print columns of text, of which the last one wraps."""
        lines = list(lines)
        self._heading(title)
        table = Table.grid(padding=(0, 2, 0, 0))
        for column in range(len(lines[0])):
            table.add_column(no_wrap=column < len(lines[0]) - 1, overflow="fold")
        for line in lines:
            table.add_row(*map(_styled, line))
        self._console.print(table)

    def _heading(self, title: str) -> None:
        self._console.print()
        self._console.print(Text(title, style="bold"))

    def _line(self, text: str) -> None:
        self._console.print(Text(text))

    def _item(self, text: str) -> None:
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_row("-", Text(" ".join(text.split()), overflow="fold"))
        self._console.print(table)


def _styled(text: str) -> Text:
    return Text(text, style=_STYLES.get(text, "yellow" if text == "WARNING" else ""))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
