"""Trains for ever: ``parallel_endless.py FOLDER SEQUENCE TIMEOUT_S`` writes its process id to
``rank<i>``.
"""

import os
import sys
from pathlib import Path

import torch

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import ParallelConfig
from anyflow.training.distributed import clip_gradients, setup, shard_network


def main(folder: Path, sequence: int, timeout_s: int) -> None:
    torch.set_num_threads(1)
    mesh = setup(ParallelConfig(sequence=sequence, timeout_s=timeout_s), "cpu")
    torch.manual_seed(0)
    network = AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    shard_network(network, mesh, trains=True)
    x, text, t = torch.ones(1, 2, 16, 4, 4), torch.ones(1, 3, 8), torch.full((1,), 500.0)
    while True:
        network(x, t, t, text).sample.square().mean().backward()
        clip_gradients(network.parameters(), 1.0)
        (folder / f"rank{mesh.rank}").write_text(str(os.getpid()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
