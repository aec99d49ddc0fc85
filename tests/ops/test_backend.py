"""Which implementation runs: the automatic choice, the two ways to force one, and the errors."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from anyflow import ops
from anyflow.ops import backend_report, use_backend
from anyflow.ops.backend import BACKENDS

OPS = {
    "dual_timestep_embedding",
    "flow_map_inputs",
    "flow_map_loss",
    "layer_norm_modulate",
    "residual_layer_norm",
    "rms_norm_rope",
}
X, ROW = torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ANYFLOW_BACKEND", raising=False)
    yield
    use_backend(None)


def missing_backend() -> str:
    """A real backend name without a layer_norm_modulate in this build."""
    for name in BACKENDS:
        with use_backend(name):
            if backend_report()["layer_norm_modulate"].backend == "unavailable":
                return name
    pytest.skip("every backend is built")


def test_report_covers_every_operator() -> None:
    report = backend_report()
    assert set(report) == OPS and set(ops.__all__) >= OPS
    assert all(choice.backend in BACKENDS and choice.reason for choice in report.values())


def test_setter_stays_and_none_returns_to_automatic() -> None:
    use_backend("eager")
    assert {c.reason for c in backend_report().values()} == {"forced by use_backend()"}
    use_backend(None)
    assert all("forced" not in c.reason for c in backend_report().values())


def test_context_manager_restores_also_after_an_error() -> None:
    with use_backend("eager"), pytest.raises(RuntimeError, match="not available"), use_backend(missing_backend()):
        ops.layer_norm_modulate(X, ROW, ROW)
    assert all("forced" not in c.reason for c in backend_report().values())


def test_contexts_nest() -> None:
    use_backend("eager")
    with use_backend(None):
        assert all("forced" not in c.reason for c in backend_report().values())
        with use_backend(missing_backend()):
            assert backend_report()["layer_norm_modulate"].backend == "unavailable"
        assert all("forced" not in c.reason for c in backend_report().values())
    assert backend_report()["layer_norm_modulate"].reason == "forced by use_backend()"


def test_forced_missing_backend_is_an_error_never_a_fallback() -> None:
    name = missing_backend()
    with (
        use_backend(name),
        pytest.raises(RuntimeError, match=rf"layer_norm_modulate: backend '{name}' .*not available.*eager"),
    ):
        ops.layer_norm_modulate(X, ROW, ROW)
    ops.layer_norm_modulate(X, ROW, ROW)


def test_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_BACKEND", missing_backend())
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


def test_ops_load_neither_diffusers_nor_triton() -> None:
    code = "import sys, anyflow.ops; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
