"""Write MP4 files of which the second part is cut, by processes that the system kills meanwhile.

Run as ``python cut_videos.py FOLDER LENGTH ...``: each ``LENGTH.mp4`` has that many bytes of the
second part.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from grow_video import moving_frames

from anyflow.pipelines.video_writer import VideoWriter


def write_until_killed(path: Path, length: int) -> None:
    """Write two parts with a limit on the size of the file, beyond which the process is killed."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    writer = VideoWriter(path, fps=8)
    writer.write(moving_frames(0, 9))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + length, hard))
    writer.write(moving_frames(9, 6))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for length in map(int, sys.argv[2:]):
        child = os.fork()
        if child == 0:
            write_until_killed(Path(sys.argv[1], f"{length}.mp4"), length)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXFSZ):
            raise SystemExit(f"the process for {length} bytes ended with status {status}")


if __name__ == "__main__":
    main()
