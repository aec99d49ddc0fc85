"""Test that ``inspect`` says complete exactly where ``load_transformer`` loads."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow.formats import detect, inspect, load_scheduler, load_transformer, save
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 2, "out_channels": 2,
    "text_dim": 8,
    "freq_dim": 8, "ffn_dim": 16, "num_layers": 1,
}  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 12, 10**9, 2**31, 2**63, 10**400, 1.5, 1e300, float("nan"),
    float("inf"), "", "2",
    "x" * 5000, [], [1], [1, 2, 2], [1] * 1000, {}, {"a": 1}, [2**40] * 3, [True, 2, 2],
]  # fmt: skip
KINDS = ["AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel", "FAR_Wan_Transformer3DModel",
         "WanTransformer3DModel", "WanModel"]  # fmt: skip
OTHER_KEYS = [
    "num_heads", "dim", "in_dim", "qk_norm", "_class_name", "init_far_model", "init_flowmap_model",
    "r_embedder",
    "window_size", "image_dim", "gate_value", "eps", "unknown", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write one model as a folder with a scheduler and as two files of torch.save; a causal one."""
    folder = tmp_path_factory.mktemp("sound")
    torch.manual_seed(0)
    model = AnyFlowTransformer3DModel(**SIZES)
    save(model, folder / "model", scheduler=FlowMapEulerDiscreteScheduler(shift=5.0))
    save(AnyFlowFARTransformer3DModel(**SIZES, chunk_partition=(1, 2)), folder / "causal")
    torch.save(
        {"ema": model.state_dict(), "model_state_dict_g": model.state_dict()},
        folder / "training.pt",
    )
    torch.save(model.state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder


def change_json(file: Path, rng: random.Random) -> None:
    content = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 2])):
        key = rng.choice([*content, *OTHER_KEYS])
        if rng.random() < 0.2:
            content.pop(key, None)
        else:
            content[key] = rng.choice(KINDS) if key == "_class_name" else rng.choice(VALUES)
    file.write_text(json.dumps(content))


def change_bytes(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    kind = rng.random()
    if kind < 0.3:
        content = content[: rng.randrange(len(content))]
    elif kind < 0.5:
        place = rng.randrange(len(content))
        content[place:place] = rng.randbytes(3)
    else:
        near = len(content) if kind < 0.7 else min(len(content), 4000)
        for _ in range(3):
            content[rng.randrange(near)] = rng.randrange(256)
    file.write_bytes(content)


def change_header(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    shapes = ([], [0], [1, -1], [2**62, 4], [10**30], [1.5], None, entry["shape"][::-1])
    offsets = ([0, 0], [0, 2**63], [-1, 4], None, [0], entry["data_offsets"][::-1])
    field = rng.choice(["shape", "dtype", "data_offsets", "length"])
    if field != "length":
        types = ("F16", "I64", "F8_E4M3", "X", 3, None)
        entry[field] = rng.choice({"shape": shapes, "dtype": types, "data_offsets": offsets}[field])
    text = json.dumps(header).encode()
    length = len(text) if field != "length" else rng.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    file.write_bytes(length.to_bytes(8, "little") + text + content[8 + size :])


def change_tensors(file: Path, rng: random.Random) -> None:
    tensors = load_file(file)
    name = rng.choice(sorted(tensors))
    prefix = rng.choice(["module.", "_orig_mod.", "model.diffusion_model.", "ema.", "vae."])
    changes: list[Callable[[], Any]] = [
        lambda: tensors.update({name: tensors[name].half()}),
        lambda: tensors.pop(name),
        lambda: tensors.update({name: torch.full_like(tensors[name], torch.nan)}),
        lambda: tensors.update({"far_patch_embedding.weight": torch.zeros(24, 2, 1, 2, 2)}),
        lambda: tensors.update({"vae.x": torch.zeros(2)}),
        lambda: [tensors.pop(n) for n in list(tensors) if n.startswith("blocks.")],
        lambda: tensors.update(
            {rng.choice(["blocks.9.x", "blocks.\u0663.x", "a" * 3000]): torch.zeros(2)}
        ),
        lambda: [tensors.update({prefix + n: tensors.pop(n)}) for n in list(tensors)],
        lambda: [tensors.update({prefix + n: tensors[n].clone()}) for n in list(tensors)],
    ]
    rng.choice(changes)()
    save_file(tensors, file)


WEIGHTS = "model/transformer/diffusion_pytorch_model.safetensors"
CAUSAL_WEIGHTS = "causal/transformer/diffusion_pytorch_model.safetensors"
CHANGES: list[tuple[str, Callable[[Path, random.Random], None]]] = [
    ("model/transformer/config.json", change_json),
    ("model/scheduler/scheduler_config.json", change_json),
    (WEIGHTS, change_bytes),
    (WEIGHTS, change_header),
    (WEIGHTS, change_tensors),
    ("training.pt", change_bytes),
    ("legacy.pt", change_bytes),
    ("causal/transformer/config.json", change_json),
    (CAUSAL_WEIGHTS, change_tensors),
]


def answer(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or None where it raises a ValueError of a bounded size."""
    try:
        return call()
    except ValueError as error:
        assert 0 < len(str(error)) < 8000
        return None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(135))
def test_inspect_says_complete_where_the_model_loads(seed: int, sound: Path) -> None:
    name, change = CHANGES[seed % len(CHANGES)]
    file, whole = sound / name, (sound / name).read_bytes()
    path = file if file.suffix == ".pt" else sound / name.partition("/")[0]
    options: dict[str, Any] = {"attention_head_dim": 12} if file.suffix == ".pt" else {}
    try:
        change(file, random.Random(seed))
        summary = answer(lambda: inspect(path, **options))
        model = answer(lambda: load_transformer(path, **options))
        answer(lambda: detect(path))
        answer(lambda: load_scheduler(path))
    finally:
        file.write_bytes(whole)
    complete = summary is not None and not summary.problems
    assert complete == (model is not None), summary
    assert summary is None or str(summary).splitlines()
    assert model is None or not any(parameter.is_meta for parameter in model.parameters())
