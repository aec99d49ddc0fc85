"""Read the committed results of GPU runs for the page: a number, or why it is lacking."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.state import DONE, SCHEMA
from roofline import DeviceLimits

NOT_MEASURED = "not measured yet"
GIB = 2**30
# Bytes that a copy moves at least to say something of memory: four times the largest L2 (60 MB, of
# an H200).
LARGE_COPY = 256e6


@dataclass(frozen=True)
class RunResults:
    """Hold a device's name and the content of its file."""

    name: str
    data: dict[str, Any]

    def section(self, name: str) -> dict[str, Any]:
        """Return a section, empty where it has not run."""
        found: dict[str, Any] = self.data["sections"].get(name, {})
        return found

    def entries(self, section: str) -> dict[str, Any]:
        """Return all measurements of a section."""
        found: dict[str, Any] = self.section(section).get("data", {})
        return found

    def entry(self, section: str, key: str, default: Any = None) -> Any:
        """Return a measurement, or a default without one."""
        return self.entries(section).get(key, default)

    def number(self, section: str, key: str, field: str = "ms") -> float | None:
        """Return a field of a measurement, or None."""
        entry = self.entry(section, key)
        value = entry.get(field) if isinstance(entry, dict) else None
        return float(value) if isinstance(value, int | float) else None

    def ratio(self, section: str, over: str, under: str, field: str = "ms") -> float | None:
        """Return one measurement over another, or None."""
        a, b = self.number(section, over, field), self.number(section, under, field)
        return None if a is None or b is None else a / b

    def why(self, section: str, key: str = "") -> str:
        """Say why a number is lacking, in a few words."""
        entry = self.entry(section, key)
        if isinstance(entry, dict):
            reason = entry.get("error") or entry.get("skipped")
        else:
            reason = self.entry(section, "peers") if key.startswith("diffusers") else None
        found = self.section(section)
        if reason is None and found.get("status") != DONE:
            reason = found.get("reason")
        if reason is not None and str(reason).startswith("OutOfMemoryError"):
            return "out of memory"
        return NOT_MEASURED if reason is None else short(str(reason).removeprefix("not measured: "))

    # Cells of tables: a number, or why it is lacking.

    def seconds(self, section: str, key: str) -> str:
        """Write ``0.412 s``, with a mark where it is extrapolated."""
        value = self.number(section, key)
        if value is None:
            return self.why(section, key)
        return f"{value / 1e3:.3f} s{self.mark(section, key)}"

    def mark(self, section: str, key: str) -> str:
        """Write that a measurement is extrapolated, or nothing."""
        return " (extrapolated)" if self.entry(section, key, {}).get("extrapolated") else ""

    def times(self, section: str, over: str, under: str, field: str = "ms") -> str:
        """Write ``1.84x``."""
        value = self.ratio(section, over, under, field)
        if value is not None:
            return f"{value:.2f}x"
        lacking = over if self.number(section, over, field) is None else under
        return self.why(section, lacking)

    def gibibytes(self, section: str, key: str) -> str:
        """Write ``31.2 GiB``."""
        value = self.number(section, key, "peak_bytes")
        return self.why(section, key) if value is None else f"{value / GIB:.1f} GiB"

    # What the device reached.

    @property
    def copies(self) -> dict[float, float]:
        """Return the bytes/s of the run's copies by bytes moved, read plus written, smallest first.

        Those of the limits and of the probes; the faster one where two move as many bytes.
        """
        found: dict[float, float] = {}
        limit = self.entry("limits", "copy_bytes_per_s")  # as the first runs wrote it
        if limit:
            moved = float(self.entry("limits", "copy", {}).get("bytes", LARGE_COPY))
            found[moved] = float(limit)
        for key, entry in [*self.entries("limits").items(), *self.entries("probes").items()]:
            if key.startswith("copy: ") and entry.get("ms"):
                moved = float(entry["bytes"])
                found[moved] = max(moved / entry["ms"] * 1e3, found.get(moved, 0.0))
        return dict(sorted(found.items()))

    @property
    def limits(self) -> DeviceLimits | None:
        """Return what the device reached, with the bandwidth of the fastest large copy, or None."""
        flops = self.entry("limits", "matmul_flops")
        rates = [rate for moved, rate in self.copies.items() if moved >= LARGE_COPY]
        if not flops or not rates:
            return None
        return DeviceLimits(self.name, flops, max(rates))


def load(folder: Path) -> list[RunResults]:
    """Read every real GPU's results in a folder; tiny runs, and other files, are not evidence."""
    known = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    wanted = {"schema": SCHEMA, "kind": "cuda", "tiny": False}
    return [
        RunResults(data["device"], data)
        for data in known
        if isinstance(data, dict) and all(data.get(k) == v for k, v in wanted.items())
    ]


def short(text: str, limit: int = 70) -> str:
    """Cut a reason to what a cell of a table takes."""
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"
