"""Real processes under torchrun (gloo): every mesh makes the updates of one process on the global
batch.
"""

import os
import signal
import subprocess
import sys
import time
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

SCRIPTS = Path(__file__).parent / "scripts"
VARIANTS = ("full", "full_per_frame_checkpointing", "lora_checkpointing", "lora_per_frame")
DATA_WORLDS = {  # data ranks of each mesh, by the number of processes
    2: {"fsdp2": 2, "sequence2": 1},
    4: {"fsdp4": 4, "hsdp2x2": 4, "shard2_sequence2": 2, "replicate2_sequence2": 2, "sequence4": 1},
}
MESHES = [(world, mesh) for world, meshes in DATA_WORLDS.items() for mesh in meshes]
Ranks = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory,
    torchrun: Callable[..., subprocess.Popen[str]],
    free_port: Callable[[], int],
) -> Ranks:
    """Run every world, and return what each rank wrote; the world of one is the reference."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("updates")
    written = {}
    for world, meshes in {1: ("single",), **DATA_WORLDS}.items():
        job = torchrun(
            world, SCRIPTS / "parallel_updates.py", folder, *(free_port() for _ in meshes)
        )
        output, _ = job.communicate(timeout=800)
        assert job.returncode == 0, output[-4000:]
        assert "Warning" not in output, output
        written[world] = [
            torch.load(folder / f"rank{i}-of-{world}.pt", weights_only=True) for i in range(world)
        ]
    return written


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage", ["pretrain", "on_policy"])
@pytest.mark.parametrize(("world", "mesh"), MESHES)
def test_a_mesh_makes_the_updates_of_one_process(
    world: int, mesh: str, stage: str, variant: str, ranks: Ranks
) -> None:
    """Losses, norms and parameters of two clipped AdamW steps in fp64; 9 tokens a frame, 3
    frames.
    """
    case = (stage, variant) if stage == "pretrain" else (stage, variant, DATA_WORLDS[world][mesh])
    want = ranks[1][0]["single"][case]
    assert min(want["norms"]) > 0.05  # so that they were clipped
    for results in ranks[world]:
        got = results[mesh][case]
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-9)
        assert got["norms"] == pytest.approx(want["norms"], rel=1e-9)
        # as many network calls, in the same order, whatever a rank's samples
        assert got["calls"] == want["calls"]
    parameters = ranks[world][0][mesh][case]["parameters"]
    assert parameters.keys() == want["parameters"].keys()
    for name, parameter in want["parameters"].items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.slow
def test_the_updates_are_worth_comparing(ranks: Ranks) -> None:
    """Steps move the parameters, LoRA trains little, and ranks that have samples of their own have
    other losses.
    """
    single = ranks[1][0]["single"]
    first, later = single["pretrain", "full"]["losses"]
    assert first != pytest.approx(later, rel=1e-3)
    assert any("lora_A" in name for name in single["pretrain", "lora_per_frame"]["parameters"])
    assert (
        len(single["pretrain", "lora_per_frame"]["parameters"])
        < len(single["pretrain", "full"]["parameters"]) / 2
    )
    own = [results["fsdp4"]["pretrain", "full"]["own"][0] for results in ranks[4]]
    assert len({round(loss, 6) for loss in own}) == 4
    own = [results["shard2_sequence2"]["pretrain", "full"]["own"][0] for results in ranks[4]]
    assert own[0] == own[1] != own[2] == own[3]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "mesh"), MESHES)
def test_a_sharded_network_samples_as_a_whole_one(world: int, mesh: str, ranks: Ranks) -> None:
    """Straight after sharding, and with its gate, which no checkpoint holds."""
    want = ranks[1][0]["single"]["sample"]
    for results in ranks[world]:
        got = results[mesh]["sample"]
        torch.testing.assert_close(got["latents"], want["latents"], rtol=1e-9, atol=1e-11)
        assert torch.equal(got["gate"], torch.tensor([0.25]))
        assert all(got["sharded"])  # also after forwards that no backward follows


@pytest.mark.slow
@pytest.mark.parametrize(("world", "mesh"), MESHES)
def test_places_in_the_mesh(world: int, mesh: str, ranks: Ranks) -> None:
    data_world = DATA_WORLDS[world][mesh]
    for rank, results in enumerate(ranks[world]):
        assert results[mesh]["mesh"] == {
            "rank": rank,
            "world_size": world,
            "data_rank": rank * data_world // world,
            "data_world": data_world,
            "sequence_degree": world // data_world,
            "is_main": rank == 0,
        }
    assert not ranks[world][1][mesh]["pretrain", "full"]["parameters"]  # gathered on rank 0 alone


def _wait_for(files: list[Path], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not all(f.exists() and f.read_text() for f in files):
        assert time.monotonic() < until, (
            f"{[f.name for f in files if not f.exists()]} have not begun"
        )
        time.sleep(0.2)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(
    tmp_path: Path, torchrun: Callable[..., subprocess.Popen[str]]
) -> None:
    job = torchrun(2, SCRIPTS / "parallel_endless.py", tmp_path, 1, 600)
    _wait_for([tmp_path / "rank0", tmp_path / "rank1"])
    os.kill(int((tmp_path / "rank1").read_text()), signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [1, 2])
@pytest.mark.parametrize(("how", "timeout_s"), [(signal.SIGKILL, 600), (signal.SIGSTOP, 20)])
def test_a_rank_that_is_gone_does_not_hang_the_others(
    how: signal.Signals,
    timeout_s: int,
    sequence: int,
    tmp_path: Path,
    process_environment: Callable[[], dict[str, str]],
) -> None:
    """Without torchrun, which would end them: a closed connection is an error at once, silence
    after the timeout.
    """
    env = process_environment()
    command = [
        sys.executable,
        str(SCRIPTS / "parallel_endless.py"),
        str(tmp_path),
        str(sequence),
        str(timeout_s),
    ]
    jobs = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _wait_for([tmp_path / "rank0", tmp_path / "rank1"])
        jobs[1].send_signal(how)
        _, error = jobs[0].communicate(timeout=60)
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert jobs[0].returncode not in (0, -signal.SIGKILL)
    assert "Error" in error


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
