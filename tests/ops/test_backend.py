"""Test which implementation runs: the automatic choice, the ways to force one, the errors."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from anyflow import ops
from anyflow.ops import backend_report, use_backend
from anyflow.ops.backend import BACKENDS, LEFT_TO_TORCH, assume_capability

OPS = {
    "attention",
    "dual_timestep_embedding",
    "flow_map_inputs",
    "flow_map_loss",
    "gated_residual",
    "gelu",
    "layer_norm_modulate",
    "linear",
    "residual_layer_norm",
    "rms_norm_rope",
}
WITHOUT_TRITON = ("attention", "gelu", "linear")
X, ROW = torch.zeros(1, 2, 8), torch.zeros(1, 1, 8)


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


def test_report_covers_every_operator() -> None:
    report = backend_report()
    assert set(report) == OPS and set(ops.__all__) >= OPS
    assert all(choice.backend in BACKENDS and choice.reason for choice in report.values())


def test_setter_stays_and_none_returns_to_automatic() -> None:
    use_backend("eager")
    assert {c.reason for c in backend_report().values()} == {"forced by use_backend()"}
    use_backend(None)
    assert all("forced" not in c.reason for c in backend_report().values())


def test_context_manager_restores_also_after_an_error(missing_backend) -> None:
    with (
        use_backend("eager"),
        pytest.raises(RuntimeError, match="not available"),
        use_backend(missing_backend),
    ):
        ops.layer_norm_modulate(X, ROW, ROW)
    assert all("forced" not in c.reason for c in backend_report().values())


def test_contexts_nest(missing_backend) -> None:
    use_backend("eager")
    with use_backend(None):
        assert all("forced" not in c.reason for c in backend_report().values())
        with use_backend(missing_backend):
            assert backend_report()["layer_norm_modulate"].backend == "unavailable"
        assert all("forced" not in c.reason for c in backend_report().values())
    assert backend_report()["layer_norm_modulate"].reason == "forced by use_backend()"


def test_forced_missing_backend_is_an_error_never_a_fallback(missing_backend) -> None:
    expected = f"layer_norm_modulate: backend '{missing_backend}' .*not available.*eager"
    with use_backend(missing_backend), pytest.raises(RuntimeError, match=expected):
        ops.layer_norm_modulate(X, ROW, ROW)
    ops.layer_norm_modulate(X, ROW, ROW)


def test_environment_forces(missing_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_BACKEND", missing_backend)
    assert backend_report()["layer_norm_modulate"].backend == "unavailable"
    with pytest.raises(RuntimeError, match="forced by ANYFLOW_BACKEND"):
        ops.layer_norm_modulate(X, ROW, ROW)
    with use_backend("eager"):  # the nearer choice wins
        ops.layer_norm_modulate(X, ROW, ROW)
    monkeypatch.setenv("ANYFLOW_BACKEND", "eager")
    assert backend_report()["layer_norm_modulate"].reason == "forced by ANYFLOW_BACKEND"
    ops.layer_norm_modulate(X, ROW, ROW)
    monkeypatch.setenv("ANYFLOW_BACKEND", "")  # as if it were not set
    ops.layer_norm_modulate(X, ROW, ROW)


@pytest.mark.parametrize("name", ["Eager", "cuda", ""])
def test_unknown_names_are_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="unknown backend .*eager, triton, native"):
        use_backend(name)
    assert all("forced" not in c.reason for c in backend_report().values())


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_BACKEND", "fast")
    with pytest.raises(ValueError, match="ANYFLOW_BACKEND: unknown backend 'fast'"):
        ops.layer_norm_modulate(X, ROW, ROW)


def test_ops_load_neither_diffusers_nor_triton(run_python) -> None:
    code = (
        "import sys, anyflow.ops; print([m for m in ('diffusers', 'transformers', 'triton') if m "
        "in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
class TestTriton:
    """The Triton backend as seen from the CPU, and what it refuses."""

    def test_is_never_automatic_on_a_cpu(self, run_python) -> None:
        """Not even where its interpreter is on."""
        code = (
            "from anyflow.ops import backend_report; print({c.backend for c in "
            "backend_report('cpu').values()})"
        )
        assert "triton" not in run_python(code, TRITON_INTERPRET="1")

    def test_needs_a_gpu_or_the_interpreter(self, run_python) -> None:
        code = (
            "import torch, anyflow.ops as ops\n"
            "ops.use_backend('triton')\n"
            "print(ops.backend_report('cpu')['rms_norm_rope'])\n"
            "try: ops.layer_norm_modulate(torch.zeros(1, 2, 8), torch.zeros(1, 1, 8), "
            "torch.zeros(1, 1, 8))\n"
            "except RuntimeError as e: print(e)"
        )
        out = run_python(code)
        assert (
            "backend='unavailable'" in out
            and "'triton' (forced by use_backend()) is not available" in out
        )
        assert "TRITON_INTERPRET=1" in out and "use 'eager'" in out
        assert "not available" not in run_python(code, TRITON_INTERPRET="1")

    def test_needs_a_c_compiler(self, tmp_path, run_python) -> None:
        """Without one, launching would fail inside Triton at the first call."""
        code = (
            "import torch; from anyflow.ops.backend import missing\n"
            "print(missing('triton', torch.device('cuda'), 'rms_norm_rope'))"
        )
        assert "needs a C compiler" in run_python(code, PATH=str(tmp_path))

    def test_environment_reaches_the_kernels(self, monkeypatch, device) -> None:
        monkeypatch.setenv("ANYFLOW_BACKEND", "triton")
        from anyflow.kernels.launch import record  # triton is an optional dependency

        with record() as launched:
            ops.layer_norm_modulate(X.to(device), ROW.to(device), ROW.to(device))
        assert [entry.kernel.fn.__name__ for entry in launched] == [
            "layer_norm_modulate_forward_kernel"
        ]


class TestNative:
    """The native kernels as seen from the CPU."""

    def test_are_automatic_on_a_cpu(self) -> None:
        expected = dict.fromkeys(OPS, "native") | dict.fromkeys(LEFT_TO_TORCH, "eager")
        report = backend_report("cpu")
        assert {op: c.backend for op, c in report.items()} == expected
        assert set(LEFT_TO_TORCH) <= {"linear"} and all(
            report[op].reason == why for op, why in LEFT_TO_TORCH.items()
        )

    def test_run_by_default(self) -> None:
        """The bits are those of the native kernels, not those of the reference."""
        x, row = torch.randn(1, 2, 1536), torch.randn(1, 1, 1536)
        automatic = ops.layer_norm_modulate(x, row, row)
        with use_backend("native"):
            assert torch.equal(ops.layer_norm_modulate(x, row, row), automatic)
        with use_backend("eager"):
            assert not torch.equal(ops.layer_norm_modulate(x, row, row), automatic)

    def test_what_they_do_not_take_falls_back_visibly(self) -> None:
        assert ops.layer_norm_modulate(X.double(), ROW, ROW).dtype == torch.float64
        assert any(
            "float64" in reason for reason in backend_report("cpu")["layer_norm_modulate"].fallbacks
        )

    def test_forced_on_another_device_is_an_error(self) -> None:
        x, row = X.to("meta"), ROW.to("meta")
        expected = (
            "layer_norm_modulate: backend 'native' .*no native kernel of layer_norm_modulate for "
            "meta"
        )
        with use_backend("native"), pytest.raises(RuntimeError, match=expected):
            ops.layer_norm_modulate(x, row, row)


def test_operators_without_a_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are eager where Triton is forced, whether or not Triton could run."""
    without = WITHOUT_TRITON
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert {backend_report("meta")[op].backend for op in without} == {"eager"}
    with use_backend("triton"):
        report = backend_report("cpu")
        assert ops.gelu(X).equal(X)
    assert all(
        report[op].backend == "eager" and f"{op} has no Triton kernel" in report[op].reason
        for op in without
    )
    assert {c.backend for op, c in report.items() if op not in without} == {"unavailable"}


def test_an_operator_without_a_triton_kernel_warns_once(run_python) -> None:
    """Forcing Triton on a model is no error, and what runs eagerly is said."""
    code = (
        "import torch, warnings, anyflow.ops as ops\n"
        "ops.use_backend('triton')\n"
        "x = torch.ones(2, 8)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    ops.gelu(x), ops.gelu(x), ops.linear(x, x)\n"
        "print([str(w.message) for w in caught if 'kernel' in str(w.message)])"
    )
    out = run_python(code)
    for op in ("gelu", "linear"):
        said = f"anyflow.ops.{op}: backend 'triton' (forced by use_backend()) has no kernel"
        assert out.count(said) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestAutomaticOnCuda:
    def test_kernels_run_by_default(self) -> None:
        report = backend_report("cuda")
        assert {c.backend for op, c in report.items() if op not in WITHOUT_TRITON} == {"triton"}
        for op in WITHOUT_TRITON:
            assert report[op].backend == "eager" and "the eager reference runs" in report[op].reason

    def test_unsupported_shapes_fall_back_visibly(self) -> None:
        x, row = torch.zeros(1, 2, 12, device="cuda"), torch.zeros(1, 1, 12, device="cuda")
        assert ops.layer_norm_modulate(x, row, row).shape == x.shape
        assert any(
            "D=12" in reason for reason in backend_report("cuda")["layer_norm_modulate"].fallbacks
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
class TestWithoutADevice:
    """Fake CUDA tensors are traced on machines without a GPU."""

    def test_nothing_is_chosen(self) -> None:
        report = backend_report("cuda")
        assert {choice.backend for choice in report.values()} == {"eager"}
        assert report["rms_norm_rope"].reason == "torch finds no CUDA device"

    @pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    )
    def test_the_choice_of_an_assumed_one(self) -> None:
        with assume_capability(9, 0):
            assert {
                c.backend for op, c in backend_report("cuda").items() if op not in WITHOUT_TRITON
            } == {"triton"}
            with assume_capability(7, 5):
                assert (
                    "(7, 5), the Triton kernels need (8, 0)"
                    in backend_report("cuda")["rms_norm_rope"].reason
                )
            assert backend_report("cuda")["rms_norm_rope"].backend == "triton"
        assert backend_report("cuda")["rms_norm_rope"].backend == "eager"
