"""A choice of backend holds in its context: threads, tasks, generators, autograd's threads."""

import asyncio
import contextvars
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anyflow import ops
from anyflow.models import use_attention_backend
from anyflow.models.attention import _forced_backend
from anyflow.ops import use_backend
from anyflow.ops.backend import forced_backend
from anyflow.ops.setting import ATTENTION_BACKEND, OPERATOR_BACKEND, Setting, Use, hold

USES = [use_backend, use_attention_backend]
VALUES = {use_backend: ("eager", "native"), use_attention_backend: ("math", "native")}


def current(use: type[Use]) -> str | None:
    """Return what is forced here, as the operators ask."""
    if use is use_backend:
        forced = forced_backend()
        return None if forced is None else forced[0]
    return _forced_backend(None)[0]


def in_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANYFLOW_BACKEND", raising=False)
    monkeypatch.delenv("ANYFLOW_ATTENTION", raising=False)


@pytest.fixture(params=USES, ids=lambda use: use.__name__)
def use(request: pytest.FixtureRequest) -> Iterator[type[Use]]:
    yield request.param
    request.param(None)


def test_a_block_is_not_seen_by_another_thread(use) -> None:
    one, _ = VALUES[use]
    with use(one):
        assert current(use) == one
        assert in_thread(lambda: current(use)) is None
        assert in_thread(lambda: contextvars.Context().run(current, use)) is None
        copied = contextvars.copy_context()
        assert in_thread(lambda: copied.run(current, use)) == one
    assert current(use) is None


def test_blocks_nest_overlap_and_are_entered_again(use) -> None:
    """A call outside holds until the next one; one inside a block ends with the block."""
    one, two = VALUES[use]
    again = use(one)
    assert current(use) == one
    with again, use(two), again:
        assert current(use) == one
    assert current(use) is None
    first, second = use(one).__enter__(), use(two).__enter__()
    first.__exit__()
    assert current(use) == two
    second.__exit__()
    assert current(use) is None
    use(two)
    with again:
        assert current(use) == one
        use(two)
        assert current(use) == two
        use(None)
        assert current(use) is None
    assert current(use) == two


def test_tasks_do_not_see_each_other(use) -> None:
    one, two = VALUES[use]

    async def run(value: str) -> list[str | None]:
        seen = []
        with use(value):
            for _ in range(3):
                await asyncio.sleep(0)
                seen.append(current(use))
        return [*seen, current(use)]

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(run(one), run(two))

    assert asyncio.run(both()) == [[one] * 3 + [None], [two] * 3 + [None]]
    assert current(use) is None


def test_a_generator_may_end_in_another_thread(use) -> None:
    one, two = VALUES[use]

    def items() -> Iterator[str | None]:
        with use(one):
            yield current(use)

    running = items()
    assert next(running) == one
    with use(two):
        in_thread(running.close)
        assert current(use) == two
    assert current(use) is None
    use(two)  # not inside the block that has ended
    assert current(use) == two


def test_many_threads(use) -> None:
    one, two = VALUES[use]
    wrong: list[object] = []
    shared = use(one)
    use(None)

    def expect(value: str | None) -> None:
        if current(use) != value:
            wrong.append((value, current(use)))

    def run(value: str) -> None:
        for _ in range(300):
            with use(value):
                expect(value)
                with shared:
                    expect(one)
            expect(None)

    threads = [threading.Thread(target=run, args=(value,)) for value in (one, two) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("setting", [OPERATOR_BACKEND, ATTENTION_BACKEND], ids=["ops", "attention"])
def test_an_autograd_thread_reads_that_of_backward(setting) -> None:
    """Backward passes too deep for one stack run in autograd's own threads, as a GPU's do."""
    seen: list[tuple[int, object]] = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, depth: int) -> Tensor:
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
            seen.append((threading.get_ident(), setting.get()))
            if ctx.depth:
                with torch.enable_grad():
                    x = torch.ones(1, requires_grad=True)
                    Nested.apply(x, ctx.depth - 1).sum().backward()
            return grad, None

    x = torch.ones(1, requires_grad=True)
    block = setting.enter("eager")
    Nested.apply(x, 70).sum().backward()
    setting.leave([block])
    assert len({thread for thread, _ in seen}) > 1
    assert {value for _, value in seen} == {"eager"}


def test_a_backward_keeps_the_choice_of_its_forward(generator) -> None:
    """The gradients have the bits of the forward's backend, whatever the backward's forces."""
    x = torch.randn(1, 6, 1536, generator=generator).requires_grad_()
    row = torch.randn(1, 2, 1536, generator=generator)

    def gradient(outer: str, inner: str | None, threaded: bool = False) -> Tensor:
        with use_backend(outer):
            out = torch.ops.anyflow.layer_norm_modulate(x, row, row).square().sum()
        run = in_thread if threaded else lambda function: function()
        with use_backend(inner):
            return run(lambda: torch.autograd.grad(out, x)[0])

    native, eager = (gradient(b, b) for b in ("native", "eager"))
    assert not torch.equal(native, eager)
    for inner in (None, "native", "eager"):
        assert torch.equal(gradient("native", inner), native)
        assert torch.equal(gradient("eager", inner), eager)
        assert torch.equal(gradient("eager", inner, threaded=True), eager)


def test_a_held_function_is_recomputed_as_it_ran(generator) -> None:
    x, row = (torch.randn(1, n, 64, generator=generator).requires_grad_() for n in (6, 2))
    seen: list[object] = []

    def run(x: Tensor) -> Tensor:
        seen.append((forced_backend(), _forced_backend(None)[0]))
        return ops.layer_norm_modulate(x, row, row)

    with use_backend("eager"), use_attention_backend("math"):
        out = checkpoint(hold(run), x, use_reentrant=False)
    with use_backend("native"):
        out.sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1] == (("eager", "forced by use_backend()"), "math")


def test_compiled_code_follows_the_context() -> None:
    """The guards of a compiled function read the context of the caller, of a task too."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: x + {None: 1, "eager": 2, "native": 3}[OPERATOR_BACKEND.get()], backend="eager"
    )
    x = torch.zeros(1)

    async def run(value: str | None) -> list[float]:
        with use_backend(value):
            results = []
            for _ in range(2):
                await asyncio.sleep(0)
                results.append(compiled(x).item())
            return results

    async def both() -> list[list[float]]:
        return await asyncio.gather(run("eager"), run("native"), run(None))

    assert asyncio.run(both()) == [[2.0] * 2, [3.0] * 2, [1.0] * 2]
    with use_backend("native"):
        assert (compiled(x).item(), in_thread(lambda: compiled(x).item())) == (3.0, 1.0)


def test_a_value_that_autograd_reads_is_counted() -> None:
    # torch 2.11 stores an object without a reference of its own and drops one when another object
    # takes its place.
    setting, value = Setting("counted"), [object()]
    before = sys.getrefcount(value)
    for _ in range(100):
        block = [setting.enter(value)]
        assert sys.getrefcount(value) > before
        setting.leave(block)
    assert sys.getrefcount(value) == before
