"""Count the memory of each stage of the 14B model at 480 x 832 x 81 in bf16.

The tensors have sizes but no memory.

`python tests/pipelines/test_memory_budget.py` prints the table of docs/sampling.md. Counted is what
is allocated, as torch.cuda.max_memory_allocated() does; not the workspaces of libraries, nor what
an allocator loses between blocks.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from live_tensors import Peak
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import UMT5Config, UMT5EncoderModel

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.pipelines.frames import uint8_pixels
from anyflow.pipelines.memory import TEXT_WORKSPACE, WORKSPACE, Sizes, choose_plan
from anyflow.pipelines.wan import decode_latents, encode_video

DOCS = Path(__file__).parents[2] / "docs" / "sampling.md"
GB = 1e9
SEED_PEAK = 57 * GB  # of the published 14B script, on an H200
UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
MODELS = {
    "1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14B": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
LATENTS = (1, 21, 16, 60, 104)


def test_a_peak_is_what_lives_at_once() -> None:
    weight = torch.ones(1000)
    with Peak([weight]) as peak:
        a = torch.ones(1000) + weight[:10].sum()  # two of 4000 bytes and a number
        del a
        for _ in range(3):
            b = torch.ones(500)
            assert b[:3].t().shape == (3,)
    assert 8000 <= peak.bytes < 8100


@dataclass(frozen=True)
class Budget:
    """Hold the bytes of weights, and of what the stages allocate beside them."""

    transformer: int
    block: int
    num_blocks: int
    text_encoder: int
    vae: int
    encoding: int
    first_frames: int
    sampling: int
    guided: int
    decoding: int

    def stages(self, plan: str) -> dict[str, float]:
        """Return GB on the device in each stage of a plan; a text encoder that fits is whole."""
        resident = self.transformer + self.text_encoder if plan == "fast" else 0
        network = {"fast": 0, "low": self.transformer, "stream": self.streamed}[plan]
        text = 0 if plan == "fast" else self.text_encoder
        stages = {
            "text encoder": text + self.encoding,
            "transformer": network + self.sampling,
            "transformer, guided": network + self.guided,
            "VAE": self.decoding,
        }
        return {name: (resident + self.vae + stage) / GB for name, stage in stages.items()}

    @property
    def streamed(self) -> int:
        """Return the bytes of two blocks and of everything that is no block."""
        return self.transformer - (self.num_blocks - 2) * self.block


def count(tiled: bool, architecture: Mapping[str, int] = MODELS["14B"]) -> Budget:
    """Count all stages at true size, with the VAE in tiles or not."""
    with torch.device("meta"):
        transformer = AnyFlowTransformer3DModel(**architecture).eval()
        few = of_few_blocks(architecture)
        text_encoder = (
            UMT5EncoderModel(UMT5Config(**UMT5_XXL, feed_forward_proj="gated-gelu"))
            .bfloat16()
            .eval()
        )
        vae = AutoencoderKLWan().eval()
    with torch.no_grad(), torch.device("meta"):
        vae.use_slicing, vae.use_tiling = True, tiled
        with Peak(weights(vae)) as decoding:
            latents = torch.empty(LATENTS)
            uint8_pixels(decode_latents(vae, latents))
        with Peak(weights(vae)) as first_frames:
            encode_video(vae, torch.empty(1, 5, 3, 480, 832))
    return Budget(
        transformer=sizes(in_bf16(transformer)),
        block=sizes(transformer.blocks[0]),
        num_blocks=len(transformer.blocks),
        text_encoder=sizes(text_encoder),
        vae=sizes(vae),
        encoding=prompt(text_encoder),
        first_frames=first_frames.bytes,
        sampling=step(few, guided=False),
        guided=step(few, guided=True),
        decoding=decoding.bytes,
    )


def of_few_blocks(architecture: Mapping[str, int]) -> AnyFlowTransformer3DModel:
    """Make a transformer in bf16 whose step takes no more memory with more blocks."""
    return in_bf16(AnyFlowTransformer3DModel(**{**architecture, "num_layers": 3}).eval())


def prompt(text_encoder: nn.Module) -> int:
    """Count the encoding of one prompt."""
    # not on the meta device, as the mask's values are asked for
    with FakeTensorMode(), torch.no_grad():
        faked(text_encoder)
        with Peak(weights(text_encoder)) as peak:
            tokens = torch.zeros(1, 512, dtype=torch.long)
            text_encoder(tokens, torch.ones_like(tokens))
    return peak.bytes


def step(transformer: AnyFlowTransformer3DModel, guided: bool) -> int:
    """Count a step as the sampler makes it, with fp32 latents."""
    samples = 2 if guided else 1
    with FakeTensorMode(), torch.no_grad():  # not on the meta device, which autocast does not know
        faked(transformer)
        transformer.rope = copy.deepcopy(transformer.rope)  # without the tables of another mode
        with Peak(weights(transformer)) as peak:
            latents = torch.empty(LATENTS)
            text, t = torch.empty(samples, 512, 4096), torch.empty(samples)
            x = torch.cat([latents] * samples) if guided else latents
            velocity = transformer(x, t, t, text).sample
            if guided:
                negative, positive = velocity.chunk(2)
                velocity = negative + 2.0 * (positive - negative)
            latents = latents - 0.1 * velocity
    return peak.bytes


def faked(module: nn.Module) -> None:
    """Replace its tensors by those of the fake mode that is on; what is tied stays tied."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = made.setdefault(id(tensor), fake(tensor))


def fake(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def in_bf16(transformer: AnyFlowTransformer3DModel) -> AnyFlowTransformer3DModel:
    """Convert as loading does: what the model keeps in fp32 stays."""
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.bfloat16()
    return transformer


def weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def sizes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


@pytest.fixture(scope="module")
def budget() -> Budget:
    return count(tiled=False)


@pytest.mark.slow
def test_the_parts_have_their_true_sizes(budget: Budget) -> None:
    """Check 14B, UMT5-XXL's 5.7B and the Wan VAE's 127M."""
    assert budget.transformer == pytest.approx(28.75 * GB, rel=0.01)
    assert budget.text_encoder == pytest.approx(11.36 * GB, rel=0.01)
    assert budget.vae == pytest.approx(0.508 * GB, rel=0.01)


def test_14b_fits_well_under_what_the_published_script_took(budget: Budget) -> None:
    peaks = {plan: max(budget.stages(plan).values()) for plan in ("fast", "low", "stream")}
    assert peaks["low"] < 40 < SEED_PEAK / GB
    assert peaks["fast"] < 50
    assert peaks["stream"] < 13


def test_the_workspaces_of_the_plans_are_enough(budget: Budget) -> None:
    """Check that they are enough, and not more than twice what is needed."""
    most = max(budget.sampling, budget.guided, budget.decoding, budget.first_frames)
    assert most < WORKSPACE < 2 * most
    assert budget.encoding < TEXT_WORKSPACE


@pytest.mark.parametrize(
    ("card", "plan"), [(80, "fast"), (48, "low"), (40, "stream"), (24, "stream"), (16, "stream")]
)
def test_the_plan_of_14b_on_a_card(card: int, plan: str, budget: Budget) -> None:
    model = Sizes(budget.transformer, budget.text_encoder, budget.vae)
    free = int(0.97 * card * 2**30)
    assert choose_plan("auto", model, free) == plan
    assert choose_plan("low", model, free) == ("low" if plan == "fast" else plan)
    assert (
        choose_plan("fast", model, free) == "fast"
        and choose_plan("stream", model, free) == "stream"
    )
    if plan == "stream":
        for option in ("compile", "cuda_graph"):
            with pytest.raises(ValueError, match=f"{option} needs weights that stay.*GB are free"):
                choose_plan("auto", model, free, **{option: True})


def test_everything_fits_where_nothing_is_known_of_the_memory() -> None:
    huge = Sizes(10**15, 10**15, 10**15)
    assert [choose_plan(memory, huge, None) for memory in ("auto", "fast", "low")] == [
        "fast",
        "fast",
        "low",
    ]


def table(untiled: Budget, tiled: Budget) -> str:
    """Write the table in Markdown, in GB."""
    plans = {
        "fast": untiled.stages("fast"),
        "low": tiled.stages("low"),
        "stream": tiled.stages("stream"),
    }
    lines = ["| GB on the device | `fast` | `low` | `stream` |", "|---|---|---|---|"]
    for stage in plans["low"]:
        lines.append(
            f"| {stage} | " + " | ".join(f"{plans[plan][stage]:.1f}" for plan in plans) + " |"
        )
    return "\n".join(
        [
            *lines,
            "| **peak** | "
            + " | ".join(f"**{max(p.values()):.1f}**" for p in plans.values())
            + " |",
        ]
    )


def test_the_table_of_the_docs_is_this_one(budget: Budget) -> None:
    """Compare but for two cells, the VAE in tiles, which take half a minute to count."""
    row = next(line for line in table(budget, budget).splitlines() if line.startswith("| VAE"))
    text = DOCS.read_text()
    documented = next(line for line in text.splitlines() if line.startswith("| VAE"))
    tiles = {cell.strip() for cell in documented.split("|")[3:5]}
    assert row.split("|")[:3] == documented.split("|")[:3] and tiles == {"2.3"}
    assert table(budget, budget).replace(row, documented) in text


def test_the_table_of_published_checkpoints_is_this_one(budget: Budget) -> None:
    with torch.device("meta"):
        small = AnyFlowTransformer3DModel(**MODELS["1.3B"]).eval()
        few = of_few_blocks(MODELS["1.3B"])
    parts = {
        "transformer": sizes(in_bf16(small)),
        "block": sizes(small.blocks[0]),
        "num_blocks": 30,
    }
    steps = {"sampling": step(few, guided=False), "guided": step(few, guided=True)}
    for name, counted in (("1.3B", replace(budget, **parts, **steps)), ("14B", budget)):
        peaks = [max(counted.stages(plan).values()) for plan in ("fast", "low", "stream")]
        start = f"| `nvidia/AnyFlow-Wan2.1-T2V-{name}-"
        row = next(line for line in DOCS.read_text().splitlines() if line.startswith(start))
        assert row.split("|")[3].split(" / ") == [
            f" {peaks[0]:.1f}",
            f"{peaks[1]:.1f}",
            f"{peaks[2]:.1f} ",
        ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, architecture in MODELS.items():
        print(f"\n{name}\n\n{table(count(False, architecture), count(True, architecture))}")
