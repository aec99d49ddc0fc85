"""Compare the exponential moving average with a plain loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from anyflow.training.ema import EMA


def _module(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2))).to(dtype)


def _train(module: nn.Module, generator: torch.Generator, size: float = 0.1) -> None:
    """Make one step of some optimizer."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_((size * torch.randn(p.shape, generator=generator)).to(p.dtype))


def _loop(values: list[Tensor], decay: Callable[[int], float]) -> Tensor:
    average = values[0].double()
    for k, value in enumerate(values[1:]):
        average = decay(k) * average + (1 - decay(k)) * value.double()
    return average


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("warmup", [False, True])
def test_against_a_plain_loop(decay: float, warmup: bool, generator: torch.Generator) -> None:
    module = _module()
    ema = EMA(module, decay, warmup=warmup)
    history = {name: [p.detach().clone()] for name, p in module.named_parameters()}
    for _ in range(25):
        _train(module, generator)
        ema.update(module)
        for name, p in module.named_parameters():
            history[name].append(p.detach().clone())
    assert ema.updates == 25
    for name, average in ema.state_dict().items():
        want = _loop(history[name], lambda k: min(decay, (1 + k) / (10 + k)) if warmup else decay)
        torch.testing.assert_close(average.double(), want, rtol=1e-5, atol=1e-6)


def test_names_are_the_parameters_own() -> None:
    """Keep the dots: underscores in their place would let two names collide."""
    module = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(1, 1)}), "a_b": nn.Linear(1, 1)})
    ema = EMA(module, 0.9)
    assert set(ema.state_dict()) == {"a.b.weight", "a.b.bias", "a_b.weight", "a_b.bias"}
    module.load_state_dict(ema.state_dict())


def test_only_trainable_parameters_are_averaged() -> None:
    module = _module()
    module[0].requires_grad_(False)
    assert set(EMA(module, 0.9).state_dict()) == {
        "1.0.weight",
        "1.0.bias",
        "1.1.weight",
        "1.1.bias",
    }


def test_bf16_parameters_have_an_fp32_average(generator: torch.Generator) -> None:
    """Average in fp32: in bf16, 0.999 a + 0.001 p rounds to a."""
    module = _module(torch.bfloat16)
    ema = EMA(module, 0.999, warmup=False)
    first = {name: average.clone() for name, average in ema.state_dict().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.5)
    for _ in range(100):
        ema.update(module)
    for (name, average), p in zip(ema.state_dict().items(), module.parameters(), strict=True):
        assert average.dtype == torch.float32
        want = first[name] + (1 - 0.999**100) * (p.detach().float() - first[name])
        torch.testing.assert_close(average, want, rtol=1e-4, atol=1e-5)
    ema.copy_to(module)
    for average, p in zip(ema.state_dict().values(), module.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(p, average.bfloat16())


def test_fp64_parameters_keep_their_precision() -> None:
    assert all(
        a.dtype == torch.float64 for a in EMA(_module(torch.float64), 0.9).state_dict().values()
    )


def test_the_average_is_a_copy(generator: torch.Generator) -> None:
    module = _module()
    ema = EMA(module, 0.9)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    _train(module, generator)
    for name, average in ema.state_dict().items():
        assert torch.equal(average, start[name]) and not average.requires_grad
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}
    ema.update(module)
    assert all(torch.equal(p, trained[name]) for name, p in module.named_parameters())


def test_copy_to_another_module(generator: torch.Generator) -> None:
    module, other = _module(), _module()
    ema = EMA(module, 0.5)
    _train(module, generator)
    ema.update(module)
    ema.copy_to(other)
    for name, p in other.named_parameters():
        assert torch.equal(p, ema.state_dict()[name]) and p.requires_grad


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_impossible_decay(decay: float) -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        EMA(_module(), decay)


def test_another_module_is_refused() -> None:
    ema = EMA(_module(), 0.9)
    for call in (ema.update, ema.copy_to):
        with pytest.raises(ValueError, match=r"lacks the averaged parameters 1\.0\.weight"):
            call(nn.Sequential(nn.Linear(3, 4)))


def test_up_to_the_start_step_the_average_is_a_copy(generator: torch.Generator) -> None:
    module = _module()
    ema = EMA(module, 0.9, warmup=False, start_step=3)
    for update in range(1, 6):
        _train(module, generator)
        before = {name: average.clone() for name, average in ema.state_dict().items()}
        ema.update(module)
        for name, p in module.named_parameters():
            want = p.detach() if update <= 3 else before[name].lerp(p.detach(), 1 - 0.9)
            assert torch.equal(ema.state_dict()[name], want)


def test_an_average_resumes_bit_for_bit(generator: torch.Generator) -> None:
    module = _module()
    ema = EMA(module, 0.9, start_step=2)
    for _ in range(4):
        _train(module, generator)
        ema.update(module)
    again = EMA(module, 0.9, start_step=2)
    for name, average in again.state_dict().items():
        average.copy_(ema.state_dict()[name])
    again.updates = 4
    _train(module, generator)
    for each in (ema, again):
        each.update(module)
    assert all(
        torch.equal(average, again.state_dict()[name]) for name, average in ema.state_dict().items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_for_a_while_and_the_parameters_come_back_bit_for_bit(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    module = _module(dtype)
    ema = EMA(module, 0.5)
    _train(module, generator)
    ema.update(module)
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}
    averages = {name: average.clone() for name, average in ema.state_dict().items()}
    with pytest.raises(KeyError), ema.applied(module):  # also when what is done with it fails
        assert all(
            torch.equal(p, averages[name].to(dtype)) for name, p in module.named_parameters()
        )
        raise KeyError
    assert all(
        torch.equal(p, trained[name]) and p.requires_grad for name, p in module.named_parameters()
    )
    assert all(torch.equal(average, averages[name]) for name, average in ema.state_dict().items())


def test_impossible_start_step() -> None:
    with pytest.raises(ValueError, match="start_step must be >= 0"):
        EMA(_module(), 0.9, start_step=-1)
