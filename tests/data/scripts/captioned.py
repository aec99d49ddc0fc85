"""Name small videos and their captions, and write tables of them."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

WriteVideo = Callable[..., Path]
SIZE: dict[str, Any] = {
    "num_frames": 9,
    "height": 64,
    "width": 64,
    "text_length": 12,
    "dtype": "fp32",
}
CAPTIONS = {
    "0.mp4": "a red disc moves slowly",
    "1.mp4": "the  blue\ncross &amp; a disc",
    "2.mp4": "a cross",
}


def table(path: Path, captions: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("file", "caption"), *captions.items()])
    return path
