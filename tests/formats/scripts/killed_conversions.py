"""Kill conversions of a large file: ``killed_conversions.py FOLDER`` prints what is left, in JSON.

A child is forked for each conversion, at a share of the time that a whole one takes.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from anyflow.formats import convert
from anyflow.models import AnyFlowTransformer3DModel

SIZES = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "ffn_dim": 2048,
    "num_layers": 2,
    "text_dim": 64,
}
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)


def fork(source: Path, out: Path) -> int:
    """Start a child that converts, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        convert(source, out)
        status = 0
    finally:
        os._exit(status)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    source = folder / "in.pt"
    torch.save({"ema": AnyFlowTransformer3DModel(**SIZES).state_dict()}, source)
    begun = time.monotonic()
    whole = [os.waitpid(fork(source, folder / "whole"), 0)[1]]
    seconds = time.monotonic() - begun
    killed = []
    for share in SHARES:
        child = fork(source, folder / f"out-{share}")
        time.sleep(share * seconds)
        os.kill(child, signal.SIGKILL)
        killed.append(os.WIFSIGNALED(os.waitpid(child, 0)[1]))
    left = [(folder / f"out-{share}").exists() for share in SHARES]
    whole.append(os.waitpid(fork(source, folder / f"out-{SHARES[0]}"), 0)[1])
    print(json.dumps({"whole": whole, "killed": killed, "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
