"""Run the bare model on ranks that share its tokens, and write ``rank<i>-of-<n>.pt``.

``parallel_forward.py FOLDER``: every rank runs the whole model first, then its part of it.
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny_model
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel

# F, H, W; 9, 8 and 1 tokens a frame
SHAPES = {"odd": (3, 6, 6), "even": (2, 4, 8), "one_token": (5, 2, 2)}


def inputs(shape: tuple[int, int, int], per_frame: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    frames, height, width = shape
    t = 1000 * torch.rand((2, frames) if per_frame else (2,), generator=g)
    return {
        "hidden_states": torch.randn(2, frames, 3, height, width, generator=g, dtype=torch.float64),
        "timestep": t,
        "r_timestep": t / 2,
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=g, dtype=torch.float64),
    }


def run(model: AnyFlowTransformer3DModel, arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and mean gradients of a loss that chains two calls, as a rollout does.

    The first gradient is that of the latents.
    """
    model.zero_grad()
    x = arguments["hidden_states"].clone().requires_grad_()
    out = model(**{**arguments, "hidden_states": x}, return_dict=False)[0]
    again = model(**{**arguments, "hidden_states": x - 0.5 * out}, return_dict=False)[0]
    (out.square().mean() + again.pow(3).mean()).backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return {
        "out": out.detach(),
        "gradient": torch.cat([mean(g).flatten() for g in grads if g is not None]),
    }


def mean(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def cases() -> dict[tuple[str, bool, bool], tuple[dict[str, Tensor], bool]]:
    names = [
        (shape, per_frame, checkpointing) for shape in SHAPES for per_frame, checkpointing in FLAGS
    ]
    return {name: (inputs(SHAPES[name[0]], name[1]), name[2]) for name in names}


FLAGS = ((False, False), (True, False), (True, True))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=240))
    group, world = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    results: dict[str, Any] = {"whole": {}, "shared": {}}
    model, shared = tiny_model().double(), tiny_model().double()
    before = set(shared.state_dict()), dict(shared.config)
    shared.set_sequence_parallel(group)
    results["unchanged"] = (set(shared.state_dict()), dict(shared.config)) == before
    for name, (arguments, checkpointing) in cases().items():
        for m in (model, shared):
            (
                m.enable_gradient_checkpointing
                if checkpointing
                else m.disable_gradient_checkpointing
            )()
        results["whole"][name] = run(model, arguments)
        results["shared"][name] = run(shared, arguments)
    model.disable_gradient_checkpointing()
    shared.disable_gradient_checkpointing()

    arguments = inputs(SHAPES["odd"], True)
    whole = model(**arguments)[0].detach()
    results["copied"] = copy.deepcopy(shared)(**arguments)[0].detach(), whole

    if world == 2:  # tracing takes long, and is the same on any number of ranks
        one, compiled = tiny_model().double(), tiny_model().double()
        one.blocks, compiled.blocks = one.blocks[:1], compiled.blocks[:1]
        compiled.set_sequence_parallel(group)
        # the trace; the code of inductor is not ours
        compiled.blocks[0].compile(backend="aot_eager", fullgraph=True)
        results["whole"]["compiled"], results["shared"]["compiled"] = (
            run(one, arguments),
            run(compiled, arguments),
        )

    results["float32"] = tuple(m.float()(**narrow(arguments))[0].detach() for m in (shared, model))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        results["bfloat16"] = shared(**narrow(arguments))[0], model(**narrow(arguments))[0]
    shared.set_sequence_parallel(None)
    results["off"] = shared(**narrow(arguments))[0].detach(), model(**narrow(arguments))[0].detach()
    try:
        tiny_model(num_heads=world + 1).set_sequence_parallel(group)
    except ValueError as error:
        results["error"] = str(error)
    torch.save(results, folder / f"rank{dist.get_rank()}-of-{world}.pt")
    dist.destroy_process_group()


def narrow(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in arguments.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
