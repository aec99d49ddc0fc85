"""Devices that are there, and those that are refused."""

import pytest
import torch

from anyflow.utils.devices import default_device, local_gpu, parse_device, resolve_device


def test_a_device_is_named_as_its_tensors_name_it() -> None:
    assert resolve_device(None) == torch.empty(0, device=default_device()).device
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert parse_device(None) == default_device() and parse_device("cuda:7").index == 7


def test_a_device_that_is_not_there_is_an_error_that_names_it() -> None:
    last = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"^device 'cuda:{last}' cannot be used here: "):
        resolve_device(torch.device("cuda", last))
    with pytest.raises(ValueError, match="^--device 'nonsense' cannot be used here: "):
        resolve_device("nonsense", argument="--device")
    with pytest.raises(ValueError, match="'meta' cannot be used here: its tensors have no values"):
        resolve_device("meta", meta=False)
    with pytest.raises(ValueError, match="device 'nonsense' is unknown to PyTorch"):
        parse_device("nonsense")
    with pytest.raises(ValueError, match=f"needs GPU {last}, and torch finds {last} here"):
        local_gpu(last)
