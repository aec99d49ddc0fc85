"""Test meshes of real processes: each makes the updates of one process on the global batch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import ParallelConfig
from anyflow.training.distributed import (
    Mesh,
    clip_gradients,
    full_state,
    setup,
    shard_network,
    teardown,
)

pytest.importorskip("peft")
import parallel_updates as updates

SCRIPTS = Path(updates.__file__).parent
WORLD, MESHES = updates.WORLD, list(updates.MESHES)


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory,
    fork_ranks: Callable[..., subprocess.Popen[str]],
    free_port: Callable[[], int],
) -> list[dict[str, Any]]:
    """Return what each rank wrote."""
    folder = tmp_path_factory.mktemp("updates")
    job = fork_ranks(WORLD, SCRIPTS / "parallel_updates.py", folder, *(free_port() for _ in MESHES))
    output, _ = job.communicate(timeout=800)
    assert job.returncode == 0, output[-4000:]
    assert "Warning" not in output, output
    return [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(WORLD)]


@pytest.fixture(scope="module")
def reference() -> dict[str | updates.Case, Any]:
    """Make the updates of all cases in this process."""
    cases = {case for some in updates.CASES.values() for case in some}
    return updates.run_cases(Mesh(torch.device("cpu")), sorted(cases))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "case"), [(mesh, case) for mesh in MESHES for case in updates.CASES[mesh]]
)
def test_a_mesh_makes_the_updates_of_one_process(
    mesh: str, case: updates.Case, ranks: list[dict[str, Any]], reference: dict[Any, Any]
) -> None:
    """Compare losses, norms and parameters of two clipped AdamW steps in fp64; 9 tokens a frame."""
    want = reference[case]
    assert min(want["norms"]) > updates.CLIP
    for results in ranks:
        got = results[mesh][case]
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-9)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-9)
        # as many network calls, in the same order, whatever a rank's samples
        assert got["calls"] == want["calls"]
    parameters = ranks[0][mesh][case]["parameters"]
    assert parameters.keys() == want["parameters"].keys()
    for name, parameter in want["parameters"].items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.slow
def test_the_updates_are_worth_comparing(
    ranks: list[dict[str, Any]], reference: dict[Any, Any]
) -> None:
    """Move the parameters, train little with LoRA, and give each data rank a loss of its own."""
    whole, lora = (reference["pretrain", variant, 1] for variant in ("---", "L-F"))
    first, later = whole["losses"]
    assert first != pytest.approx(later, rel=1e-3)
    assert any("lora_A" in name for name in lora["parameters"])
    assert len(lora["parameters"]) < len(whole["parameters"]) / 2
    for mesh, cases in updates.CASES.items():
        own = [round(results[mesh][cases[0]]["own"][0], 6) for results in ranks]
        each = WORLD // updates.DATA_WORLDS[mesh]  # ranks that share samples are neighbors
        assert len(set(own)) == updates.DATA_WORLDS[mesh]
        assert own == [own[i - i % each] for i in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_network_samples_as_a_whole_one(
    mesh: str, ranks: list[dict[str, Any]], reference: dict[Any, Any]
) -> None:
    """Sample straight after sharding, with the gate, which no checkpoint holds."""
    for results in ranks:
        got = results[mesh]["sample"]
        torch.testing.assert_close(
            got["latents"], reference["sample"]["latents"], rtol=1e-9, atol=1e-11
        )
        assert torch.equal(got["gate"], torch.tensor([0.25]))
        assert all(got["sharded"])  # also after forwards that no backward follows


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_places_in_the_mesh(mesh: str, ranks: list[dict[str, Any]]) -> None:
    data_world = updates.DATA_WORLDS[mesh]
    for rank, results in enumerate(ranks):
        assert results[mesh]["mesh"] == {
            "rank": rank,
            "world_size": WORLD,
            "data_rank": rank * data_world // WORLD,
            "data_world": data_world,
            "sequence_degree": WORLD // data_world,
            "is_main": rank == 0,
        }
    # gathered on rank 0 alone
    assert not ranks[1][mesh][updates.CASES[mesh][0]]["parameters"]


@pytest.mark.slow
def test_a_rank_that_is_gone_does_not_hang_the_others(
    tmp_path: Path,
    process_environment: Callable[[], dict[str, str]],
    free_port: Callable[[], int],
) -> None:
    """Raise at once where a connection closes, and after the timeout of any group in silence."""
    script = SCRIPTS / "parallel_losses.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *(str(free_port()) for _ in range(3))],
        env=process_environment(),
        stdout=subprocess.PIPE,
        text=True,
        timeout=700,
    )
    assert done.returncode == 0
    ended = json.loads(done.stdout)
    assert len(ended) == 3
    for case, (status, error) in ended.items():
        assert status > 0 and "Error" in error, (case, status, error)


# One process --------------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> AnyFlowTransformer3DModel:
    return AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
    )


def test_one_process_is_a_mesh_that_changes_nothing(tiny: AnyFlowTransformer3DModel) -> None:
    before = {name: p.clone() for name, p in tiny.state_dict().items()}
    mesh = setup(ParallelConfig(), "cpu")
    assert mesh == Mesh(torch.device("cpu")) and mesh.is_main and mesh.data_world == 1
    shard_network(tiny, mesh, trains=True)
    after = full_state(tiny.state_dict())
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], p) for name, p in before.items()
    )
    assert all(type(p) is torch.nn.Parameter and p.requires_grad for p in tiny.parameters())
    teardown(mesh)


def test_full_state_is_a_copy(tiny: AnyFlowTransformer3DModel) -> None:
    state = full_state(dict(tiny.named_parameters()))
    state["proj_out.bias"].add_(1)
    assert not torch.equal(state["proj_out.bias"], tiny.proj_out.bias)


def test_a_network_that_does_not_train_is_frozen(tiny: AnyFlowTransformer3DModel) -> None:
    shard_network(tiny, setup(ParallelConfig(), "cpu"), trains=False)
    assert not any(p.requires_grad for p in tiny.parameters())


def test_clipping_is_that_of_torch(generator: torch.Generator) -> None:
    for max_norm in (0.1, 1e6):
        ours = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)]
        theirs = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 2)]
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        torch.testing.assert_close(clip_gradients(ours, max_norm), want)
        for a, b in zip(ours[:2], theirs[:2], strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert clip_gradients([torch.nn.Parameter(torch.zeros(2))], 1.0) == 0


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(sequence=2), "sequence 2 does not make 1,"),
        (
            ParallelConfig(replicate=3),
            "replicate 3 x shard what is left x sequence 1 does not make 1,",
        ),
        (ParallelConfig(shard=4), "shard 4"),
    ],
)
def test_sizes_that_do_not_make_the_world_are_refused(
    parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        setup(parallel, "cpu")


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        setup(ParallelConfig(), "gpu")
    with pytest.raises(ValueError, match=f"torch finds {torch.cuda.device_count()} here"):
        setup(ParallelConfig(), "cuda:99")
