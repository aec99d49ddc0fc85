"""Note in a run's folder what its settings are and what it has finished, so that it can resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.utils.documents import is_no_folder, read_json
from anyflow.utils.writing import write_text

STATE_FILE = "state.json"


@dataclass(frozen=True)
class RunState:
    """Hold the settings of a run and the seconds of each stage that it has finished.

    Args:
        file: where they are kept.
        settings: of the run, as JSON.
        finished: ``{stage: seconds}``.
    """

    file: Path
    settings: Mapping[str, Any]
    finished: dict[str, float]

    @classmethod
    def load(cls, out: Path, settings: Mapping[str, Any], name: str = STATE_FILE) -> RunState:
        """Read the state of a run in a folder, or begin one.

        Args:
            out: folder of the run.
            settings: what the run depends on.
            name: file of the state in ``out``. A folder without :data:`STATE_FILE` must be empty.

        Raises:
            ValueError: ``out`` is a file, the state there is damaged, or is that of another run.
        """
        if is_no_folder(out):
            raise ValueError(f"--out {out} is a file; name a folder")
        if (file := next((parent for parent in out.parents if parent.is_file()), None)) is not None:
            raise ValueError(f"--out {out} cannot be created: {file} is a file")
        settings, file = json.loads(json.dumps(settings)), out / name
        if not file.exists():
            known = (out / STATE_FILE).exists()
            if not known and out.exists() and any(_visible(out)):
                raise ValueError(
                    f"--out {out} is not empty and holds no demo run; name another folder"
                )
            return cls(file, settings, {})
        try:
            other, finished = _content(file)
        except ValueError as error:
            raise ValueError(
                f"{file} is damaged ({error}); delete {out} or name another --out"
            ) from None
        if other != settings:
            changed = ", ".join(
                sorted(k for k in {**settings, **other} if other.get(k) != settings.get(k))
            )
            raise ValueError(
                f"--out {out} holds a run with other settings ({changed}); name another --out or "
                "delete it"
            )
        return cls(file, settings, finished)

    def finish(self, stage: str, seconds: float) -> None:
        """Note that a stage is finished, on the disk too."""
        self.finished[stage] = seconds
        self.write()

    def write(self) -> None:
        """Write the state, whole or not at all."""
        content = {"config": self.settings, "finished": self.finished}
        write_text(self.file, json.dumps(content, indent=2) + "\n")


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _content(file: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the settings and the finished stages of a file, or raise a ValueError."""
    state = read_json(file, finite=True)
    if not isinstance(state, dict) or set(state) != {"config", "finished"}:
        raise ValueError("it must be an object with 'config' and 'finished'")
    settings, finished = state["config"], state["finished"]
    if not isinstance(settings, dict) or not isinstance(finished, dict):
        raise ValueError("'config' and 'finished' must be objects")
    if not all(type(seconds) in (int, float) and seconds >= 0 for seconds in finished.values()):
        raise ValueError("'finished' must have the seconds of each stage")
    return settings, finished
