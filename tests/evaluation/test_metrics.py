"""Test metrics against closed forms, independent formulas, and sets of known quality."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.data import MovingShapes
from anyflow.evaluation import (
    Evaluator,
    Metrics,
    RandomConv3dFeatures,
    coverage_tv,
    frechet_distance,
    nearest_template,
    nearest_template_mse,
    per_class_frechet_distance,
)

GRID = (12, 12)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _with_moments(n: int, mean: Tensor, root: Tensor, seed: int) -> Tensor:
    """Make ``n`` points of sample mean ``mean`` and covariance ``root @ root.T``, exactly."""
    x = torch.randn(n, mean.numel(), generator=_generator(seed), dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0)).Q
    return (x - x.mean(0)) * math.sqrt(n - 1) @ root.T + mean


def _by_eigenvalues(a: Tensor, b: Tensor) -> float:
    """Compute tr((AB)^1/2) by the textbook: the sum of the roots of the eigenvalues of A B."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (
        (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots
    ).item()


def test_frechet_closed_form_for_commuting_covariances() -> None:
    dim = 5
    rotation = torch.linalg.qr(
        torch.randn(dim, dim, generator=_generator(3), dtype=torch.float64)
    ).Q
    sd_a, sd_b = (
        torch.tensor([1.0, 2, 0.5, 3, 0.1]).double(),
        torch.tensor([2.0, 2, 1.5, 0.2, 0.1]).double(),
    )
    mean_a, mean_b = torch.zeros(dim).double(), torch.tensor([1.0, -1, 0, 2, 0.5]).double()
    a = _with_moments(50, mean_a, rotation @ sd_a.diag(), 1)
    b = _with_moments(80, mean_b, rotation @ sd_b.diag(), 2)
    want = (mean_a - mean_b).square().sum() + (sd_a - sd_b).square().sum()
    assert frechet_distance(a, b) == pytest.approx(want.item(), rel=1e-10)


@given(
    seed=st.integers(0, 10_000),
    dim=st.integers(1, 12),
    n=st.integers(20, 60),
    m=st.integers(20, 60),
)
@settings(max_examples=15, deadline=None)
def test_frechet_agrees_with_the_textbook_formula(seed: int, dim: int, n: int, m: int) -> None:
    g = _generator(seed)
    a = torch.randn(n, dim, generator=g) @ torch.randn(dim, dim, generator=g)
    b = torch.randn(m, dim, generator=g) @ torch.randn(dim, dim, generator=g) + torch.randn(
        dim, generator=g
    )
    assert frechet_distance(a, b) == pytest.approx(_by_eigenvalues(a, b), rel=1e-5, abs=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-9)


def test_frechet_of_rank_deficient_and_equal_sets() -> None:
    a = torch.randn(4, 30, generator=_generator(), dtype=torch.float64)
    assert frechet_distance(a, a) < 1e-12 * a.square().sum()
    assert frechet_distance(a, a + 2.0) == pytest.approx(30 * 4.0, rel=1e-9)
    point = torch.ones(6, 3)
    assert frechet_distance(point, point - 1) == pytest.approx(3.0, rel=1e-9)


def test_frechet_errors() -> None:
    a = torch.randn(5, 3, generator=_generator())
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        frechet_distance(a[0], a)
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(a, a[:1])
    with pytest.raises(ValueError, match="equal width"):
        frechet_distance(a, a[:, :2])
    with pytest.raises(ValueError, match="features_b contains NaN"):
        frechet_distance(a, a.clone().index_fill_(0, torch.tensor([1]), math.nan))


def test_per_class_distance_is_the_mean_over_classes() -> None:
    a, b = (
        torch.randn(60, 3, generator=_generator(1)),
        torch.randn(90, 3, generator=_generator(2)) * 2,
    )
    la, lb = torch.arange(60) % 3, torch.arange(90) % 3
    want = sum(frechet_distance(a[la == c], b[lb == c]) for c in range(3)) / 3
    assert per_class_frechet_distance(a, la, b, lb) == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="same classes"):
        per_class_frechet_distance(a, la, b, lb + 1)
    with pytest.raises(ValueError, match="labels_a"):
        per_class_frechet_distance(a, la[:10], b, lb)


def test_features_are_fixed_by_the_seed_alone() -> None:
    before = torch.random.get_rng_state()
    videos = torch.randn(3, 8, 1, 12, 12, generator=_generator())
    first, again, other = (RandomConv3dFeatures(dim=7, seed=s)(videos) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (3, 7) and not first.requires_grad
    assert list(RandomConv3dFeatures().parameters()) == []
    # Each video's features are its own.
    torch.testing.assert_close(
        RandomConv3dFeatures(dim=7, seed=1)(videos[1:2]), first[1:2], rtol=1e-5, atol=1e-6
    )


def test_features_errors() -> None:
    with pytest.raises(ValueError, match=r"\[N, F, 3, H, W\]"):
        RandomConv3dFeatures(in_channels=3)(torch.zeros(1, 8, 1, 12, 12))
    with pytest.raises(ValueError, match=">= 2"):
        RandomConv3dFeatures()(torch.zeros(1, 1, 1, 12, 12))
    with pytest.raises(ValueError, match="dim"):
        RandomConv3dFeatures(dim=0)


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 9),
    classes=st.integers(1, 3),
    bank=st.integers(1, 6),
)
@settings(max_examples=15, deadline=None)
def test_nearest_template_against_a_loop(seed: int, n: int, classes: int, bank: int) -> None:
    g = _generator(seed)
    templates = torch.randn(classes, bank, 2, 1, 3, 3, generator=g)
    videos = torch.randn(n, 2, 1, 3, 3, generator=g)
    labels = torch.randint(classes, (n,), generator=g)
    errors = [
        [(videos[i] - t).square().mean().item() for t in templates[labels[i]]] for i in range(n)
    ]
    assert nearest_template(videos, labels, templates).tolist() == [e.index(min(e)) for e in errors]
    want = sum(min(e) for e in errors) / n
    assert nearest_template_mse(videos, labels, templates) == pytest.approx(want, rel=1e-5)


def test_nearest_template_errors() -> None:
    templates, videos, labels = (
        torch.zeros(2, 4, 2, 1, 3, 3),
        torch.zeros(3, 2, 1, 3, 3),
        torch.tensor([0, 1, 0]),
    )
    with pytest.raises(ValueError, match="templates must be"):
        nearest_template(videos, labels, templates[..., :2])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        nearest_template(videos, labels + 1, templates)
    with pytest.raises(ValueError, match="NaN"):
        nearest_template(videos + math.nan, labels, templates)
    with pytest.raises(ValueError, match="at least one"):
        nearest_template_mse(videos[:0], labels[:0], templates)


def test_coverage_by_hand() -> None:
    # 4 x 4 grid in 2 x 2 cells: indices 0, 1, 4, 5 are the first cell, 2, 3 the second, 8 the
    # third.
    even = torch.tensor([0, 2, 8, 10])
    zeros = torch.zeros(4, dtype=torch.int64)
    assert coverage_tv(even, zeros, (4, 4), bins=2) == pytest.approx(0)
    assert coverage_tv(torch.tensor([0, 1, 4, 5]), zeros, (4, 4), bins=2) == pytest.approx(0.75)
    assert coverage_tv(torch.tensor([0, 5, 3, 2]), zeros, (4, 4), bins=2) == pytest.approx(0.5)
    both = torch.cat([even, torch.tensor([0, 1, 4, 5])])
    assert coverage_tv(both, torch.cat([zeros, zeros + 1]), (4, 4), bins=2) == pytest.approx(0.375)


def test_coverage_errors() -> None:
    index, labels = torch.tensor([0, 1]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match="bins"):
        coverage_tv(index, labels, (4, 4), bins=3)
    with pytest.raises(ValueError, match=r"0\.\.15"):
        coverage_tv(index + 15, labels, (4, 4), bins=2)
    with pytest.raises(ValueError, match="N >= 1"):
        coverage_tv(index[:0], labels[:0], (4, 4), bins=2)


@pytest.fixture(scope="module")
def setting() -> tuple[MovingShapes, Evaluator, Tensor, Metrics]:
    shapes = MovingShapes()
    labels = torch.arange(4).repeat_interleave(128)
    heldout, heldout_labels = shapes.sample(
        1024, _generator(0), torch.arange(4).repeat_interleave(256)
    )
    black_white = (-shapes.mean / shapes.std, (1 - shapes.mean) / shapes.std)
    evaluator = Evaluator.from_videos(
        heldout, heldout_labels, shapes.templates(), GRID, black_white=black_white
    )
    g = _generator(1)
    return (
        shapes,
        evaluator,
        labels,
        evaluator.floor(shapes.sample(512, g, labels) for _ in range(3)),
    )


def test_floor_of_real_data(setting: tuple[MovingShapes, Evaluator, Tensor, Metrics]) -> None:
    shapes, evaluator, labels, floor = setting
    assert 0 < floor.fd < 0.4
    assert floor.template_mse < 1e-9
    assert 0.06 < floor.coverage_tv < 0.14
    for seed in (11, 12, 13):
        real = evaluator.evaluate(*shapes.sample(512, _generator(seed), labels))
        assert real.fd < 3 * floor.fd and real.coverage_tv < 0.17


@pytest.mark.parametrize(
    ("kind", "times_floor"),
    [
        ("class mean", 100),
        ("noise", 100),
        ("ghost", 20),
        ("blurred", 10),
        ("reversed", 20),
        ("frozen", 10),
        ("wrong shape", 20),
        ("wrong direction", 20),
    ],
)
def test_defects_score_far_above_the_floor(
    setting: tuple[MovingShapes, Evaluator, Tensor, Metrics], kind: str, times_floor: float
) -> None:
    shapes, evaluator, labels, floor = setting
    real, _ = shapes.sample(512, _generator(21), labels)
    other, _ = shapes.sample(512, _generator(22), labels)
    broken = {
        "class mean": shapes.templates().mean(1)[labels],
        "noise": torch.randn(real.shape, generator=_generator(23)),
        "ghost": 0.8 * real + 0.2 * other,
        "blurred": sum(torch.roll(real, (i, j), (-2, -1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
        / 9,
        "reversed": real.flip(1),
        "frozen": real[:, :1].expand_as(real),
        "wrong shape": real.roll(256, 0),
        "wrong direction": real.roll(128, 0),
    }[kind]
    assert evaluator.evaluate(broken, labels).fd > times_floor * floor.fd


def test_template_mse_measures_noise_variance(
    setting: tuple[MovingShapes, Evaluator, Tensor, Metrics],
) -> None:
    shapes, evaluator, labels, _ = setting
    real, _ = shapes.sample(512, _generator(31), labels)
    noisy = real + 0.2 * torch.randn(real.shape, generator=_generator(32))
    assert evaluator.evaluate(noisy, labels).template_mse == pytest.approx(0.04, rel=0.02)


def test_collapse_shows_in_coverage_alone(
    setting: tuple[MovingShapes, Evaluator, Tensor, Metrics],
) -> None:
    shapes, evaluator, labels, floor = setting
    collapsed = shapes.templates()[labels, 40]
    score = evaluator.evaluate(collapsed, labels)
    assert score.coverage_tv == pytest.approx(1 - 1 / 9)
    assert score.template_mse < 1e-9
    half = shapes.templates()[labels, torch.randint(0, 72, (512,), generator=_generator(41))]
    assert evaluator.evaluate(half, labels).coverage_tv > 3 * floor.coverage_tv


def test_motion_is_the_speed_of_the_shapes(
    setting: tuple[MovingShapes, Evaluator, Tensor, Metrics],
) -> None:
    shapes, evaluator, labels, floor = setting
    assert floor.motion == pytest.approx(shapes.config.speed, rel=0.02)
    real, _ = shapes.sample(512, _generator(61), labels)
    few = torch.cat([real[labels == c][:16] for c in range(4)])
    others = 0 * real
    others[torch.cat([(labels == c).nonzero()[:16, 0] for c in range(4)])] = few
    # 16 of each class
    assert evaluator.evaluate(others, labels).motion == evaluator.evaluate(real, labels).motion
    assert evaluator.evaluate(real[:, :1].expand_as(real), labels).motion == 0
    # three of the seven changes are left, each twice as far
    jumps = real[:, [0, 0, 2, 2, 4, 4, 6, 6]]
    assert evaluator.evaluate(jumps, labels).motion == pytest.approx(
        6 / 7 * shapes.config.speed, rel=0.02
    )
    assert evaluator.evaluate(0.5 * real, labels).motion == pytest.approx(
        shapes.config.speed, rel=0.02
    )
    assert replace(evaluator, black_white=None).evaluate(real, labels).motion is None


def test_evaluator_errors(setting: tuple[MovingShapes, Evaluator, Tensor, Metrics]) -> None:
    shapes, evaluator, labels, _ = setting
    videos, _ = shapes.sample(512, _generator(51), labels)
    with pytest.raises(ValueError, match="NaN"):
        evaluator.evaluate(videos * math.nan, labels)
    with pytest.raises(ValueError, match="real_sets"):
        evaluator.floor([])
    with pytest.raises(ValueError, match="144"):
        Evaluator.from_videos(videos, labels, shapes.templates()[:, :10], GRID)
    for black_white in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="black below white"):
            Evaluator.from_videos(videos, labels, shapes.templates(), GRID, black_white=black_white)
    with pytest.raises(ValueError, match="must vary"):
        Evaluator.from_videos(videos[:1].expand_as(videos), labels, shapes.templates(), GRID)


@pytest.mark.slow
def test_import_is_light() -> None:
    code = (
        "import sys, torch, anyflow.evaluation; from anyflow.evaluation.video_metrics import "
        "flicker, motion, psnr; "
        "videos = torch.zeros(1, 2, 1, 8, 8); motion(videos), flicker(videos), psnr(videos, "
        "videos); "
        "heavy = ('matplotlib', 'PIL', 'jinja2', 'diffusers', 'transformers', 'cv2', "
        "'torchmetrics', 'torchvision'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
