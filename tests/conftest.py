"""Give every test two threads, a seeded generator, no network, and the same random examples."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is imported
# by OpenMP: idle threads of one worker leave the cores to another
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if os.environ.get("ANYFLOW_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when a kernel is defined

import hypothesis
import pytest
import torch

import anyflow

SEED = 20260513

torch.set_num_threads(2)
hypothesis.settings.register_profile("anyflow", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("anyflow")


def _patch_the_language_once_a_launch() -> None:
    """Let Triton's interpreter change its language once a launch, with the same results.

    It does so at every call of a function inside a kernel too, which takes 60 % of its time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # in Triton 3.7
        return
    change = interpreter._patch_lang

    def change_once(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        unchanged = tl.core.is_builtin(tl.tensor.to) or any(
            tl.core.is_builtin(language.load) for language in seen
        )
        return change(fn) if unchanged else interpreter._LangPatchScope()

    interpreter._patch_lang = change_once


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    _patch_the_language_once_a_launch()


def pytest_report_header() -> list[str]:
    """Say which build is tested, and what cannot be tested here.

    The build is an installed one, this checkout's, or that of ``make sanitize``.
    """
    spec = importlib.util.find_spec("anyflow._C")
    lines = [f"anyflow._C: {'not built' if spec is None else spec.origin}"]
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
        if _minor(triton) < (3, 7) and _minor(numpy) >= (2, 4):
            lines.append(
                f"triton {triton} interprets no kernel with numpy {numpy}: install numpy < 2.4 or "
                "triton >= 3.7"
            )
    return lines


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put modules with slow tests first, so that no worker is busy alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def generator() -> torch.Generator:
    """Return a CPU generator in the same state at the start of every test."""
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(autouse=True)
def _seed_weights() -> None:
    """Seed PyTorch's global generator, from which weights and nothing else are drawn."""
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return a port that nobody listens on."""

    def find() -> int:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def process_environment(free_port: Callable[[], int]) -> Callable[[], dict[str, str]]:
    """Return the environment of processes that meet on this machine.

    They have one thread each, this checkout, and a port of their own.
    """
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return lambda: {
        **os.environ,
        **own,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Return ``run_python(code, **environment)``: what a new process with this anyflow prints.

    Its parts are where they are here: in a checkout that is not installed, not beside the package.
    The variables that choose a backend are set only if they are given.
    """

    def run(code: str, **environment: str) -> str:
        inherited = {
            k: v
            for k, v in os.environ.items()
            if k not in ("TRITON_INTERPRET", "ANYFLOW_BACKEND", "CC")
        }
        inherited["PYTHONPATH"] = str(Path(anyflow.__file__).parents[1])
        code = f"import anyflow; anyflow.__path__[:] = {list(anyflow.__path__)!r}\n{code}"
        process = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env=inherited | environment,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout.strip()

    return run


@pytest.fixture(scope="session")
def torchrun(
    process_environment: Callable[[], dict[str, str]],
) -> Callable[..., subprocess.Popen[str]]:
    """Return ``torchrun(processes, script, *arguments)``, which starts processes under torchrun.

    The result is for ``communicate()``.
    """

    def start(processes: int, script: Path, *arguments: object) -> subprocess.Popen[str]:
        env = process_environment()
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        address = ["--master-addr", env["MASTER_ADDR"], "--master-port", env["MASTER_PORT"]]
        command = [*launch, *address, str(script), *map(str, arguments)]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


@pytest.fixture(scope="session")
def fork_ranks(
    process_environment: Callable[[], dict[str, str]],
) -> Callable[..., subprocess.Popen[str]]:
    """Return ``fork_ranks(processes, script, *arguments)``: torchrun's processes at one import.

    The result is for ``communicate()``.
    """

    def start(processes: int, script: Path, *arguments: object) -> subprocess.Popen[str]:
        launch = [sys.executable, str(Path(__file__).with_name("fork_ranks.py")), str(processes)]
        return subprocess.Popen(
            [*launch, str(script), *map(str, arguments)],
            env=process_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


_WORDS = [
    "a",
    "red",
    "blue",
    "disc",
    "cross",
    "moves",
    "slowly",
    "to",
    "the",
    "right",
    "&",
    "bad",
    "quality",
]


@pytest.fixture(scope="session")
def wan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a diffusers folder with ``vae``, ``text_encoder`` and ``tokenizer``."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    vae.save_pretrained(folder / "vae")
    config = UMT5Config(
        vocab_size=3 + len(_WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def relative() -> Callable[[torch.Tensor, torch.Tensor], float]:
    """Return ``relative(a, b)``: |a - b| / |b| in fp64."""
    return lambda a, b: ((a.double() - b.double()).norm() / b.double().norm()).item()


@dataclasses.dataclass(frozen=True)
class CausalReference:
    """Hold numbers of the reference trainers for the causal model.

    Attributes:
        variant: config, partition and settings of the run, by name.
        tensors: inputs, weights and results, by name.
    """

    variant: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def model(self, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
        """Build the causal model with the reference's weights."""
        from anyflow.models import AnyFlowFARTransformer3DModel

        config = {
            **self.variant["config"],
            "gate_value": self.variant["gate"],
            "deltatime_type": self.variant["dt"],
        }
        model = AnyFlowFARTransformer3DModel(**{**config, **settings})
        weights = {k[8:]: v for k, v in self.tensors.items() if k.startswith("student.")}
        model.load_state_dict(weights)
        return model.to(dtype)


@pytest.fixture(scope="session")
def causal_reference() -> CausalReference:
    """Read the reference numbers of the causal model."""
    from safetensors import safe_open

    path = Path(__file__).parent / "data" / "anyflow_far_reference_c.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return CausalReference(json.loads(file.metadata()["variant"]), tensors)


@pytest.fixture(scope="session")
def shapes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small untrained model of moving shapes, in a folder like the demo's."""
    from anyflow.models import AnyFlowTransformer3DModel
    from anyflow.schedulers import FlowMapEulerDiscreteScheduler

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("shapes") / "student"
    sizes = {
        "num_attention_heads": 1,
        "attention_head_dim": 12,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    transformer = AnyFlowTransformer3DModel(
        **sizes,
        in_channels=8,
        out_channels=8,
        text_dim=32,
        freq_dim=16,
        ffn_dim=16,
        r_embedder=True,
    )
    transformer.save_pretrained(folder / "transformer")
    FlowMapEulerDiscreteScheduler(100, shift=3.0).save_pretrained(folder / "scheduler")
    return folder
