"""Hold the gates of ``gates.toml``: the least ratios of benchmarks by class of device.

A gate is 90 % of what was measured on that class, and is only ever raised. A figure without a gate
is reported as such and never counts as passed. A gate for a benchmark that does not exist, or that
should have run and did not, is an error.
"""

from __future__ import annotations

import difflib
import math
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from workloads import MEMORY, Line, figure

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

FILE = Path(__file__).resolve().parent / "gates.toml"
SHARE = 0.9  # of what was measured
_DEVICE_CLASS = re.compile(
    r"cpu-(generic|avx2|avx512)-(amd|amd-zen4|amd-zen5|intel|other)|cuda-sm\d{2,3}"
)
_ZEN5_FAMILY = 26


class GatesError(ValueError):
    """Say that ``gates.toml`` is wrong, or that a gate could not be checked."""


@dataclass(frozen=True)
class Judgment:
    """Hold a ratio beside its gate, or None for a figure without one."""

    name: str
    ratio: float
    gate: float | None
    busy: bool = False  # the machine, too much for a ratio of times to become a gate

    @property
    def missed(self) -> bool:
        """Tell whether the ratio is below its gate; NaN is below every gate."""
        return self.gate is not None and not self.ratio >= self.gate

    @property
    def margin(self) -> float:
        """Return the ratio in gates: below 1 is a miss, and NaN is the worst of them."""
        if self.gate is None:
            return math.inf
        return 0.0 if math.isnan(self.ratio) else self.ratio / self.gate


class Gates:
    """Hold the content of a file of gates: least ratios by class and :func:`workloads.figure`."""

    def __init__(self, classes: Mapping[str, Mapping[str, float]], header: str = "") -> None:
        self.classes = {name: dict(gates) for name, gates in classes.items()}
        self.header = header

    @classmethod
    def load(cls, path: Path) -> Gates:
        """Read a file; the comment before the first table is kept.

        Raises:
            GatesError: it is no TOML, a table is no device class, or a gate is no positive number.
        """
        text = path.read_text()
        try:
            classes = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise GatesError(f"{path}: {error}") from None
        for device_class, gates in classes.items():
            if not _DEVICE_CLASS.fullmatch(device_class):
                raise GatesError(
                    f"{path}: [{device_class}] is no class of devices; they look like cpu-avx2-amd"
                )
            for name, gate in gates.items():
                number = isinstance(gate, (int, float)) and not isinstance(gate, bool)
                if not (number and 0 < gate < math.inf):
                    raise GatesError(
                        f"{path}: [{device_class}] {name!r} must be a positive number, got {gate!r}"
                    )
        header = re.split(r"^\[", text, maxsplit=1, flags=re.MULTILINE)[0]
        return cls(classes, header)

    def save(self, path: Path) -> None:
        """Write the file, everything in order."""
        text = self.header
        for device_class in sorted(self.classes):
            gates = self.classes[device_class]
            body = "".join(f'"{name}" = {gates[name]:.2f}\n' for name in sorted(gates))
            text += f"[{device_class}]\n{body}\n"
        path.write_text(text.rstrip("\n") + "\n")

    def of(self, device_class: str) -> Mapping[str, float]:
        """Return the gates of a class of devices, which may be none."""
        return self.classes.get(device_class, {})

    def require_known(self, figures: Iterable[str]) -> None:
        """Raise GatesError for a gate of a figure that no benchmark gives."""
        known = set(figures)
        for device_class, gates in self.classes.items():
            for name in gates:
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise GatesError(
                        f"[{device_class}] has a gate for {name!r}, which no benchmark gives{hint}"
                    )

    def judge(self, device_class: str, lines: Iterable[Line]) -> list[Judgment]:
        """Return every ratio of the lines beside its gate."""
        gates = self.of(device_class)
        judgments = []
        for line in lines:
            for peer, ratio in line.ratios.items():
                name, timed = figure(line.name, peer), not peer.endswith(MEMORY)
                judgments.append(Judgment(name, ratio, gates.get(name), busy=line.busy and timed))
        return judgments

    def not_run(
        self, device_class: str, selected: Iterable[str], judgments: Iterable[Judgment]
    ) -> list[str]:
        """List the gated figures of the selected benchmarks that were not measured."""
        gated = set(selected) & set(self.of(device_class))
        return sorted(gated - {j.name for j in judgments})

    def raise_to(self, device_class: str, judgments: Iterable[Judgment]) -> list[str]:
        """Set each gate to 90 % of what was measured if that is more, and return the changes.

        A ratio of a busy machine raises nothing: it may be too large, and a gate never falls again.
        """
        gates, changes = self.classes.setdefault(device_class, {}), []
        for judgment in judgments:
            if judgment.busy or not math.isfinite(judgment.ratio):
                continue
            new, old = math.floor(100 * SHARE * judgment.ratio) / 100, gates.get(judgment.name)
            if new > (0.0 if old is None else old):
                gates[judgment.name] = new
                before = "no gate" if old is None else f"{old:.2f}"
                changes.append(f"{judgment.name}: {before} -> {new:.2f}")
        return changes


def device_class(device: torch.device) -> str:
    """Name what determines the ratios on a device.

    On a CPU, the instruction set of the native kernels and the vendor of the processor, whose
    libraries differ; on a GPU, its architecture.

    AMD's processors with AVX-512 are two classes: Zen 4 takes two steps for each 512-bit
    instruction, Zen 5 takes one.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"cuda-sm{major}{minor}"
    from anyflow.ops.native import EXTENSION

    isa = "generic" if EXTENSION is None else EXTENSION.cpu_instruction_set()
    vendor, family = _processor()
    if vendor == "amd" and isa == "avx512":
        vendor += "-zen5" if family >= _ZEN5_FAMILY else "-zen4"
    return f"cpu-{isa}-{vendor}"


def _processor() -> tuple[str, int]:
    """Return vendor (amd, intel or other) and family of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    known = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
    vendor = next((vendor for name, vendor in known.items() if name in text), "other")
    family = re.search(r"^cpu family\s*:\s*(\d+)", text, re.MULTILINE)
    return vendor, 0 if family is None else int(family[1])
