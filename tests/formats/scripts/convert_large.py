"""Run and killed by test_saving.py: converts a checkpoint of some 100 MB, or makes it."""

import sys
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


def main(folder: Path, action: str, out: str = "") -> None:
    if action == "make":
        torch.save({"ema": AnyFlowTransformer3DModel(**SIZES).state_dict()}, folder / "in.pt")
    else:
        print("starting", flush=True)
        convert(folder / "in.pt", folder / out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
