"""Write an MP4 file part by part for as long as standard input has lines, and say when each is in.

Run as ``python grow_video.py FILE``. Each line read is a number of frames; the frames of the file
so far are printed after each part.
"""

import sys

import numpy as np

from anyflow.pipelines.video_writer import VideoWriter


def moving_frames(start: int, count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Draw frames of a video, ``[count, height, width, 3]``: a bright square moves over a slope."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames += np.linspace(30, 160, width, dtype=np.uint8)[:, None]
    for i, frame in enumerate(frames, start):
        left = 3 * i % (width - 16)
        frame[16:32, left : left + 16] = (230, 40 + 5 * i % 100, 60)
    return frames


def main() -> None:
    written = 0
    with VideoWriter(sys.argv[1], fps=8) as writer:
        for line in sys.stdin:
            writer.write(moving_frames(written, int(line)))
            written += int(line)
            print(written, flush=True)


if __name__ == "__main__":
    main()
