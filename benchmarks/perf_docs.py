"""Write ``docs/performance.md`` and its plots from ``benchmarks/results/``: ``make perf-docs``.

The prose is that of ``page/template.md``. ``--check`` writes nothing and ends with exit status 1
where the page is not what the results give.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).resolve().parent))

from page import causal, floors, tables, targets
from page.results import RunResults, load

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).resolve().parent / "page" / "template.md"


def page(devices: list[RunResults]) -> str:
    """Write the whole page."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        devices=", ".join(results.name for results in devices),
        targets="\n".join(targets.table_of(devices)),
        cards="\n".join(floors.cards()),
        components="\n\n".join("\n".join(table) for table in floors.components()),
        by_card="\n".join(floors.by_card()),
        causal_counts="\n".join(causal.counts()),
        causal_floors="\n".join(causal.floors()),
        runs="\n\n".join("\n".join(_device(results)) for results in devices),
    )


def _device(results: RunResults) -> list[str]:
    """Write a device's part."""
    lines = [f"## {results.name}", "", *tables.alarms(results), *tables.run_of(results), ""]
    lines += [f"![Times of one forward](images/{_plot_name(results)})"]
    for part in (*tables.PARTS[:2], causal.tables_of, *tables.PARTS[2:]):
        found = part(results)
        lines += ["", *found] if found else []
    return lines


def _plot_name(results: RunResults) -> str:
    return f"performance_{results.name.lower().replace(' ', '_')}.png"


def main(arguments: list[str] | None = None) -> int:
    """Write, or check, and return 1 where something is out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status as above")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    devices, target = load(options.results), options.docs / "performance.md"
    text = page(devices)
    if options.check:
        stale = not target.exists() or target.read_text() != text
        print(f"out of date: {target}; run `make perf-docs`" if stale else "up to date")
        return int(stale)
    from page import plots

    plots.floor(options.docs / "images" / "performance_floor.png")
    for results in devices:
        plots.device(results, options.docs / "images" / _plot_name(results))
    target.write_text(text)
    print(f"{target} and its plots, {len(devices)} devices")
    return 0


if __name__ == "__main__":
    sys.exit(main())
