"""Make checkpoints of some 350 MB, or load one and print the growth of memory in MB.

``test_memory.py`` runs this script.
"""

import sys
from pathlib import Path

import torch

from anyflow.formats import load_transformer
from anyflow.models import AnyFlowTransformer3DModel

SIZES = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "ffn_dim": 4096,
    "num_layers": 4,
    "text_dim": 64,
}
MB = 1e6


def make(folder: Path) -> None:
    model = AnyFlowTransformer3DModel(**SIZES)
    state = model.state_dict()
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "several", max_shard_size="40MB")
    torch.save(
        {"ema": state, "model_state_dict_g": {n: t + 1 for n, t in state.items()}},
        folder / "training.pt",
    )
    lora = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith("ffn.net.2"):
            lora[f"{layer}.base_layer.{leaf}"] = tensor
            lora[f"{layer}.lora_A.real.weight"] = torch.randn(16, 4096)
            lora[f"{layer}.lora_B.real.weight"] = torch.randn(1024, 16)
        else:
            lora[name] = tensor
    torch.save({"ema": lora}, folder / "lora.pt")
    print(sum(t.nbytes for t in state.values()) / MB)


def load(path: Path, dtype: str) -> None:
    # whatever loads on first use
    AnyFlowTransformer3DModel(**(SIZES | {"num_layers": 1, "num_attention_heads": 1}))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    model = load_transformer(
        path, dtype=getattr(torch, dtype), lora_alpha=16.0 if "lora" in path.name else None
    )
    print((status("VmHWM") - before) / MB, (status("VmRSS") - before) / MB)
    assert model is not None


def status(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * float(lines[field].split()[0])


if __name__ == "__main__":
    make(Path(sys.argv[2])) if sys.argv[1] == "make" else load(Path(sys.argv[2]), sys.argv[3])
