"""Share one context among rows of a batch, and compare with a context for each row."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

# rows of three contexts: of two samples, the first of them with two texts
ROWS = [0, 1, 0, 1, 4]


def arguments(reference: Any, chunks: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return five rows on the first chunks of videos, with equal contexts where rows share one."""
    g, sizes = torch.Generator().manual_seed(1), reference.variant["partition"][:chunks]
    first, frames = sum(sizes[: max(0, chunks - 3)]), sum(sizes)
    x, clean = torch.randn(2, 5, frames, 16, 4, 8, dtype=dtype, generator=g)
    x[:, :first] = x[[0, 1, 0, 1, 0], :first]
    prompts = reference["prompt_embeds"][:2].to(dtype)
    text = torch.cat([prompts, prompts, -prompts[:1]])
    t = torch.tensor([900.0, 500.0, 895.0, 495.0, 900.0])
    return {
        "hidden_states": x,
        "timestep": t,
        "r_timestep": t / 2,
        "encoder_hidden_states": text,
        "chunk_partition": sizes,
        "clean_hidden_states": clean[[0, 1, 0, 1, 0], first:],
        "clean_timestep": torch.tensor([100.0, 0.0, 100.0, 0.0, 100.0]),
    }


def run(model: nn.Module, given: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Return the velocity, and the gradients of parameters."""
    model.zero_grad()
    velocity = model(**given).sample
    velocity.square().mean().backward()
    return velocity.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("chunks", "limit"), [(1, 3), (2, 3), (6, 3), (4, 1), (6, 2)])
def test_velocities_and_gradients_are_those_of_separate_contexts(
    chunks, limit, checkpointing, causal_reference, relative
) -> None:
    """Compare in fp64, with and without compressed frames and clean copies in the context."""
    model = causal_reference.model(torch.float64, full_chunk_limit=limit)
    given = arguments(causal_reference, chunks)
    first = sum(given["chunk_partition"][: max(0, chunks - limit)])
    full = given["hidden_states"].shape[1] - first
    given["hidden_states"][:, :first] = given["hidden_states"][[0, 1, 0, 1, 0], :first]
    given["clean_hidden_states"] = torch.randn(2, full, 16, 4, 8).double()[[0, 1, 0, 1, 0]]
    expected, gradients = run(model, given)
    if checkpointing:
        model.enable_gradient_checkpointing()
    velocity, shared = run(model, given | {"context_rows": ROWS})
    assert relative(velocity, expected) <= 1e-12
    assert len(shared) == len(gradients) > 50
    for gradient, one in zip(shared, gradients, strict=True):
        torch.testing.assert_close(gradient, one, rtol=1e-11, atol=1e-12 * one.abs().max().item())


@torch.no_grad()
def test_the_context_of_the_named_row_is_read_and_no_other(causal_reference) -> None:
    """Change the context of a row that shares another's: nothing changes. Then the other's."""
    model, given = causal_reference.model(), arguments(causal_reference, 6, torch.float32)
    given["context_rows"] = ROWS
    velocity = model(**given).sample
    for row, changes in ((2, ()), (0, (0, 2))):
        for name, frames in (("hidden_states", slice(0, 4)), ("clean_hidden_states", slice(0, 3))):
            changed = given[name].clone()
            changed[row, frames] += 1
            after = model(**given | {name: changed}).sample
            differs = [bool((after[i] != velocity[i]).any()) for i in range(5)]
            assert differs == [i in changes for i in range(5)], (row, name)


@torch.no_grad()
def test_a_context_is_computed_once_in_one_call_of_each_block(causal_reference) -> None:
    """Count tokens that linear layers of a block see: three contexts for five rows."""
    model, counts, calls = causal_reference.model(), [], []
    model.blocks[0].attn1.to_k.register_forward_hook(
        lambda _, inputs, out: counts.append(inputs[0].shape[:2].numel())
    )
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(True))
    given = arguments(causal_reference, 6, torch.float32)
    model(**given)
    model(**given | {"context_rows": ROWS})
    context, noisy = 5 * 2 + 3 * 8, 4 * 8
    assert counts == [5 * (context + noisy), 3 * context, 5 * noisy]
    assert len(calls) == 2 * len(model.blocks)


@torch.no_grad()
def test_precisions_and_adapters_change_nothing(causal_reference, relative) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    model, given = causal_reference.model(), arguments(causal_reference, 6, torch.float32)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "net.2"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    shared = given | {"context_rows": ROWS}
    assert relative(model(**shared).sample, model(**given).sample) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(model(**shared).sample, model(**given).sample) <= 1e-2


@torch.no_grad()
@pytest.mark.slow
def test_a_block_with_a_shared_context_compiles_without_a_graph_break(
    causal_reference, relative
) -> None:
    torch._dynamo.reset()
    model = causal_reference.model(full_chunk_limit=1)
    model.blocks = model.blocks[:1]
    given = arguments(causal_reference, 4, torch.float32) | {"context_rows": ROWS}
    given["chunk_partition"] = [4, 2]
    given["clean_hidden_states"] = given["clean_hidden_states"][:, :2]
    expected = model(**given).sample
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative(model(**given).sample, expected) <= 1e-6
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"context_rows": [0, 1, 0, 1]}, "must be B=5 integers in \\[0, 5\\)"),
        ({"context_rows": [0, 1, 0, 1, 5]}, "must be B=5 integers in \\[0, 5\\)"),
        ({"context_rows": [0, 1, 0, 1, 4.0]}, "must be B=5 integers in \\[0, 5\\)"),
        ({"clean_hidden_states": None}, "context_rows needs clean_hidden_states"),
        ({"is_causal": False}, "context_rows is of the causal path without a cache"),
    ],
)
def test_rows_that_cannot_be_are_refused(change, match, causal_reference) -> None:
    given = arguments(causal_reference, 6, torch.float32) | {"context_rows": ROWS}
    with pytest.raises(ValueError, match=match):
        causal_reference.model()(**given | change)
