"""Test which implementation runs: the automatic choice, the ways to force one, the errors."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from anyflow import ops
from anyflow.ops import backend_report, use_backend
from anyflow.ops.backend import BACKENDS, LEFT_TO_TORCH, OPERATORS, assume_capability

WITHOUT_TRITON = {"attention", "gelu", "linear"}
OP = "layer_norm_modulate"
X, ROW = torch.zeros(1, 2, 8), torch.zeros(1, 1, 8)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ANYFLOW_BACKEND", raising=False)
    yield
    use_backend(None)


@pytest.fixture
def missing_backend(monkeypatch: pytest.MonkeyPatch) -> str:
    """A real backend name that cannot run here: Triton on CPU tensors, without its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return "triton"


def run() -> torch.Tensor:
    return ops.layer_norm_modulate(X, ROW, ROW)


def chosen(device: str | None = None) -> dict[str, str]:
    return {op: choice.backend for op, choice in backend_report(device).items()}


def reasons() -> set[str]:
    return {choice.reason for choice in backend_report().values()}


def test_report_covers_every_operator() -> None:
    report = backend_report()
    assert set(report) == set(OPERATORS) and set(ops.__all__) >= set(report)
    assert all(choice.backend in BACKENDS and choice.reason for choice in report.values())
    assert {op for op, kernels in OPERATORS.items() if "triton" not in kernels} == WITHOUT_TRITON


def test_forcing_ends_with_its_block_also_after_an_error(missing_backend) -> None:
    use_backend("eager")
    assert reasons() == {"forced by use_backend()"}
    with use_backend(None):
        assert not any("forced" in reason for reason in reasons())
        with use_backend(missing_backend):
            assert chosen()[OP] == "unavailable"
        assert not any("forced" in reason for reason in reasons())
    refusal = f"{OP}: backend '{missing_backend}' .*not available.*eager"
    with pytest.raises(RuntimeError, match=refusal), use_backend(missing_backend):
        run()  # an error, never a fallback
    assert reasons() == {"forced by use_backend()"}
    use_backend(None)
    assert not any("forced" in reason for reason in reasons())
    run()


def test_environment_forces(missing_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_BACKEND", missing_backend)
    assert chosen()[OP] == "unavailable"
    with pytest.raises(RuntimeError, match="forced by ANYFLOW_BACKEND"):
        run()
    with use_backend("eager"):  # the nearer choice wins
        run()
    monkeypatch.setenv("ANYFLOW_BACKEND", "eager")
    assert backend_report()[OP].reason == "forced by ANYFLOW_BACKEND"
    monkeypatch.setenv("ANYFLOW_BACKEND", "")  # as if it were not set
    run()
    monkeypatch.setenv("ANYFLOW_BACKEND", "fast")
    with pytest.raises(ValueError, match="ANYFLOW_BACKEND: unknown backend 'fast'"):
        run()


@pytest.mark.parametrize("name", ["Eager", "cuda", ""])
def test_unknown_names_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="unknown backend .*eager, triton, native"):
        use_backend(name)
    assert not any("forced" in reason for reason in reasons())


def test_ops_load_neither_diffusers_nor_triton(run_python) -> None:
    heavy = "('diffusers', 'transformers', 'triton')"
    code = f"import sys, anyflow.ops; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code) == "[]"


# Triton, as seen from the CPU ---------------------------------------------------------------------

FORCE_TRITON = """
import torch, warnings, anyflow.ops as ops
print({c.backend for c in ops.backend_report('cpu').values()})
ops.use_backend('triton')
print(ops.backend_report('cpu')['rms_norm_rope'])
x = torch.ones(1, 2, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    ops.gelu(x), ops.gelu(x), ops.linear(x, x[0])
print([str(w.message) for w in caught if 'kernel' in str(w.message)])
try: ops.layer_norm_modulate(x, x[:, :1], x[:, :1])
except RuntimeError as e: print(e)
"""


@pytest.mark.slow
@needs_triton
def test_triton_needs_a_gpu_or_the_interpreter(run_python) -> None:
    """Automatic on a CPU it is never, and an operator without a kernel warns once."""
    out, interpreted = run_python(FORCE_TRITON), run_python(FORCE_TRITON, TRITON_INTERPRET="1")
    assert "backend='unavailable'" in out
    assert "'triton' (forced by use_backend()) is not available" in out
    assert "TRITON_INTERPRET=1" in out and "use 'eager'" in out
    assert "not available" not in interpreted and "backend='triton'" in interpreted
    for text in (out, interpreted):
        assert "triton" not in text.splitlines()[0]
        for op in ("gelu", "linear"):
            said = f"anyflow.ops.{op}: backend 'triton' (forced by use_backend()) has no kernel"
            assert text.count(said) == 1


@needs_triton
def test_triton_needs_a_c_compiler(tmp_path, run_python) -> None:
    """Without one, launching would fail inside Triton at the first call."""
    code = (
        "import torch; from anyflow.ops.backend import missing\n"
        "print(missing('triton', torch.device('cuda'), 'rms_norm_rope'))"
    )
    assert "needs a C compiler" in run_python(code, PATH=str(tmp_path))


@needs_triton
def test_environment_reaches_the_kernels(monkeypatch) -> None:
    monkeypatch.setenv("ANYFLOW_BACKEND", "triton")
    from anyflow.kernels.launch import record  # triton is an optional dependency

    with record() as launched:
        run()
    assert [entry.kernel.fn.__name__ for entry in launched] == [f"{OP}_forward_kernel"]


def test_operators_without_a_triton_kernel(missing_backend) -> None:
    """They are eager where Triton is forced, whether or not Triton could run."""
    assert {chosen("meta")[op] for op in WITHOUT_TRITON} == {"eager"}
    with use_backend("triton"):
        report = backend_report("cpu")
        assert ops.gelu(X).equal(X)
    for op, choice in report.items():
        assert choice.backend == ("eager" if op in WITHOUT_TRITON else "unavailable")
        assert op not in WITHOUT_TRITON or f"{op} has no Triton kernel" in choice.reason


# The native kernels -------------------------------------------------------------------------------


def test_native_kernels_are_automatic_on_a_cpu() -> None:
    """The bits are those of the native kernels, not those of the reference."""
    expected = dict.fromkeys(OPERATORS, "native") | dict.fromkeys(LEFT_TO_TORCH, "eager")
    assert chosen("cpu") == expected
    report = backend_report("cpu")
    assert set(LEFT_TO_TORCH) <= {"linear"}
    assert all(report[op].reason == why for op, why in LEFT_TO_TORCH.items())
    x, row = torch.randn(1, 2, 1536), torch.randn(1, 1, 1536)
    automatic = ops.layer_norm_modulate(x, row, row)
    for name, same in (("native", True), ("eager", False)):
        with use_backend(name):
            assert torch.equal(ops.layer_norm_modulate(x, row, row), automatic) == same


def test_what_native_kernels_do_not_take_falls_back_visibly() -> None:
    assert ops.layer_norm_modulate(X.double(), ROW, ROW).dtype == torch.float64
    assert any("float64" in reason for reason in backend_report("cpu")[OP].fallbacks)
    missing = f"{OP}: backend 'native' .*no native kernel of {OP} for meta"
    with use_backend("native"), pytest.raises(RuntimeError, match=missing):
        ops.layer_norm_modulate(X.to("meta"), ROW.to("meta"), ROW.to("meta"))


# CUDA ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_is_automatic_on_cuda() -> None:
    report = backend_report("cuda")
    for op, choice in report.items():
        assert choice.backend == ("eager" if op in WITHOUT_TRITON else "triton")
        assert op not in WITHOUT_TRITON or "the eager reference runs" in choice.reason
    x, row = torch.zeros(1, 2, 12, device="cuda"), torch.zeros(1, 1, 12, device="cuda")
    assert ops.layer_norm_modulate(x, row, row).shape == x.shape
    assert any("D=12" in reason for reason in backend_report("cuda")[OP].fallbacks)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_choice_of_an_assumed_device() -> None:
    """Fake CUDA tensors are traced on machines without a GPU, where nothing is chosen otherwise."""

    def rotary() -> tuple[str, str]:
        choice = backend_report("cuda")["rms_norm_rope"]
        return choice.backend, choice.reason

    assert set(chosen("cuda").values()) == {"eager"}
    assert rotary()[1] == "torch finds no CUDA device"
    with assume_capability(9, 0):
        assert {b for op, b in chosen("cuda").items() if op not in WITHOUT_TRITON} == {"triton"}
        with assume_capability(7, 5):
            assert "(7, 5), the Triton kernels need (8, 0)" in rotary()[1]
        assert rotary()[0] == "triton"
    assert rotary()[0] == "eager"
