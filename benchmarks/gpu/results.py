"""Reads the committed results of GPU runs for the page: a number, or why there is none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.roofline import Limits, card
from gpu.state import DONE, SCHEMA

NOT_MEASURED = "not measured yet"
GIB = 2**30
# Bytes that a copy moves at least to say something of memory: four times the largest L2 (60 MB, of
# an H200).
LARGE_COPY = 256e6


@dataclass(frozen=True)
class Results:
    """Holds a device's file, or nothing at all for a device that nobody has run yet.

    Attributes:
        name: of the device.
        data: content of its file; None where there is none.
    """

    name: str
    data: dict[str, Any] | None = None

    def entry(self, section: str, key: str) -> Any:
        """Return a measurement, or None."""
        if self.data is None:
            return None
        return self.data["sections"].get(section, {}).get("data", {}).get(key)

    def entries(self, section: str) -> dict[str, Any]:
        """Return all measurements of a section."""
        return {} if self.data is None else self.data["sections"].get(section, {}).get("data", {})

    def number(self, section: str, key: str, field: str = "ms") -> float | None:
        """Return a field of a measurement, or None."""
        entry = self.entry(section, key)
        value = entry.get(field) if isinstance(entry, dict) else None
        return float(value) if isinstance(value, int | float) else None

    def ratio(self, section: str, over: str, under: str, field: str = "ms") -> float | None:
        """Return one measurement over another, or None."""
        a, b = self.number(section, over, field), self.number(section, under, field)
        return None if a is None or b is None else a / b

    def why(self, section: str, key: str) -> str:
        """Say why there is no number, in a few words."""
        entry = self.entry(section, key)
        if isinstance(entry, dict):
            reason = entry.get("error") or entry.get("skipped")
        else:
            reason = self.entry(section, "peers") if key.startswith("diffusers") else None
        if reason is None and self.data is not None:
            found = self.data["sections"].get(section, {})
            reason = None if found.get("status") == DONE else found.get("reason")
        if reason is not None and str(reason).startswith("OutOfMemoryError"):
            return "out of memory"
        return NOT_MEASURED if reason is None else short(str(reason).removeprefix("not measured: "))

    @property
    def copies(self) -> dict[float, float]:
        """Return the bytes/s of the run's copies on the device by bytes moved, read plus written,
        smallest first.

        Those of the section of limits and of the probes; the faster one where two move as many
        bytes.
        """
        found: dict[float, float] = {}
        limit = self.entry("limits", "copy_bytes_per_s")
        if limit:
            found[float((self.entry("limits", "copy") or {}).get("bytes", LARGE_COPY))] = float(
                limit
            )
        entries = [(key, self.entry("limits", key)) for key in self.entries("limits")]
        for key, entry in [*entries, *self.entries("probes").items()]:
            milliseconds = (
                entry.get("ms") if isinstance(entry, dict) and key.startswith("copy: ") else None
            )
            if milliseconds:
                moved = float(entry["bytes"])
                found[moved] = max(moved / milliseconds * 1e3, found.get(moved, 0.0))
        return dict(sorted(found.items()))

    @property
    def measured(self) -> Limits | None:
        """Return what the device reached in this run, or None: the bandwidth is that of the fastest
        large copy.
        """
        flops = self.entry("limits", "matmul_flops")
        bandwidth = max(
            (rate for moved, rate in self.copies.items() if moved >= LARGE_COPY), default=None
        )
        return (
            None
            if not flops or not bandwidth
            else Limits(self.name, flops, bandwidth, "measured in this run")
        )

    @property
    def limits(self) -> Limits | None:
        """Return what the run measured, else what its card is known for; None for an unknown card
        without limits.
        """
        return self.measured or card(self.name)

    @property
    def file_name(self) -> str:
        """Return the device's name as a part of file names."""
        return self.name.lower().replace(" ", "_")


def load(folder: Path) -> list[Results]:
    """Read every real GPU's results in a folder; tiny runs, and other files, are not evidence."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if (
            isinstance(data, dict)
            and data.get("schema") == SCHEMA
            and data["kind"] == "cuda"
            and not data["tiny"]
        ):
            found.append(Results(data["device"], data))
    return found


def short(text: str, limit: int = 70) -> str:
    """Cut a reason to what a cell of a table takes."""
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


# Cells --------------------------------------------------------------------------------------------


def seconds(results: Results, section: str, key: str) -> str:
    """Write ``0.412 s``, with a mark where it is extrapolated, or why there is no number."""
    value = results.number(section, key)
    if value is None:
        return results.why(section, key)
    marked = " (extrapolated)" if results.entry(section, key).get("extrapolated") else ""
    return f"{value / 1e3:.3f} s{marked}"


def times(results: Results, section: str, over: str, under: str, field: str = "ms") -> str:
    """Write ``1.84x``, or why there is no number."""
    value = results.ratio(section, over, under, field)
    if value is not None:
        return f"{value:.2f}x"
    missing = over if results.number(section, over, field) is None else under
    return results.why(section, missing)


def gibibytes(results: Results, section: str, key: str) -> str:
    """Write ``31.2 GiB``, or why there is no number."""
    value = results.number(section, key, "peak_bytes")
    return results.why(section, key) if value is None else f"{value / GIB:.1f} GiB"


def table(headings: list[str], rows: list[list[str]], right: int = 1) -> list[str]:
    """Write Markdown; the columns from number ``right`` on are right-aligned."""
    rule = ["---" if i < right else "---:" for i in range(len(headings))]
    return [f"| {' | '.join(row)} |" for row in (headings, rule, *rows)]
