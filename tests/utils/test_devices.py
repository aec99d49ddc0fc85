"""Test the names of devices, and the check that one can be used."""

import pytest
import torch

from anyflow.utils.devices import (
    default_device,
    known_device,
    local_gpu,
    resolve_device,
    widest_float,
)


def test_a_device_is_resolved_as_its_tensors_name_it() -> None:
    assert resolve_device("cpu", computes=True) == torch.device("cpu")
    assert resolve_device(None).type == default_device().type
    assert resolve_device("meta") == torch.device("meta")
    assert known_device("cuda:77") == torch.device("cuda", 77)


@pytest.mark.parametrize(
    ("name", "computes"), [("cuda:99", False), ("banana", False), ("meta", True)]
)
def test_a_device_that_cannot_be_used_is_named_with_the_setting(name: str, computes: bool) -> None:
    with pytest.raises(ValueError, match=f"^--device '{name}' cannot be used here: ."):
        resolve_device(name, "--device", computes=computes)


@pytest.mark.parametrize("name", ["banana", 1.5])
def test_an_unknown_device_is_named(name: object) -> None:
    with pytest.raises(ValueError, match=f"^device {name!r} is unknown to PyTorch$"):
        known_device(name)  # type: ignore[arg-type]


def test_devices_without_fp64() -> None:
    assert widest_float("mps") == torch.float32
    assert widest_float("cpu") == widest_float("cuda") == torch.float64


def test_a_gpu_that_is_not_there_is_an_error_that_counts_those_that_are() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"needs GPU {count}, and torch finds {count} here"):
        local_gpu(count)
