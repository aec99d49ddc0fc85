"""Load checkpoints of some 240 MB: ``peak_memory.py FOLDER`` prints the growth of memory in MB.

The output is JSON: the size of the weights, and for every load the peak and what it holds at the
end. A child is forked for each load, from a process that has held no weights.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from anyflow.formats import load_transformer
from anyflow.models import AnyFlowTransformer3DModel

SIZES = {
    "num_attention_heads": 8,
    "attention_head_dim": 128,
    "ffn_dim": 4096,
    "num_layers": 3,
    "text_dim": 64,
}
MB = 1e6
LOADS = {"one": "float32", "several": "bfloat16", "training.pt": "float32", "lora.pt": "float32"}


def make(folder: Path) -> float:
    """Write the same weights in four ways, and return their size."""
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
    return sum(t.nbytes for t in state.values()) / MB


def load(path: Path, dtype: str) -> tuple[float, float]:
    """Return the growth of memory at its peak and at the end."""
    # whatever loads on first use
    AnyFlowTransformer3DModel(**(SIZES | {"num_layers": 1, "num_attention_heads": 1}))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    model = load_transformer(
        path, dtype=getattr(torch, dtype), lora_alpha=16.0 if "lora" in path.name else None
    )
    peak, held = (status("VmHWM") - before) / MB, (status("VmRSS") - before) / MB
    assert model is not None
    return peak, held


def status(field: str) -> float:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * float(lines[field].split()[0])


def in_a_child(work: Callable[[], object]) -> object:
    """Return what the work returns in a forked process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {"size": in_a_child(lambda: make(folder))}
    for name, dtype in LOADS.items():
        found[name] = in_a_child(lambda name=name, dtype=dtype: load(folder / name, dtype))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
