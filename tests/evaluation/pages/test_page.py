"""Write the page of real videos in files, measured, and read the page back."""

import base64
import io
import re
from pathlib import Path

import pytest
import torch

from anyflow.data import MovingShapes
from anyflow.evaluation.pages import write_evaluation_report
from anyflow.evaluation.pages.clips import clip_grid
from anyflow.evaluation.runs.record import EvaluationRecord, MetricRecord, ModelRecord
from anyflow.evaluation.video_metrics import flicker, motion
from anyflow.pipelines.video import write_video

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

STEPS = (1, 4)
PROMPTS = ("a disc <right>", "a disc down", "a cross right")

Clips = dict[str, dict[int, list[Path]]]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> tuple[EvaluationRecord, Clips]:
    """Make two models' videos, two for each prompt; the first model is frozen at one step."""
    folder, shapes = tmp_path_factory.mktemp("clips"), MovingShapes()
    labels = torch.arange(3).repeat_interleave(2)
    videos, clips = {}, {"first": {}, "second": {}}
    for i, model in enumerate(clips):
        for n in STEPS:
            real, _ = shapes.sample(6, torch.Generator().manual_seed(10 * i + n), labels)
            frames = shapes.to_uint8(real[:, :1].expand_as(real) if (i, n) == (0, 1) else real)
            big = (
                frames.repeat_interleave(8, 2)
                .repeat_interleave(8, 3)[:, :, None]
                .expand(-1, -1, 3, -1, -1)
            )
            videos[model, n] = big
            clips[model][n] = [folder / f"{model}-{n}-{k}.mp4" for k in range(6)]
            for file, video in zip(clips[model][n], big, strict=True):
                write_video(video.permute(0, 2, 3, 1).numpy(), file, fps=8)

    def table(measure) -> dict:
        return {m: {n: measure(videos[m, n]).tolist() for n in STEPS} for m in clips}

    moves, flickers = table(lambda v: motion(v) / 96), table(flicker)
    record = EvaluationRecord(
        models={
            m: ModelRecord(f"/models/{m} & more", {"guidance_scale": 1.0, "shift": 5})
            for m in clips
        },
        prompts=PROMPTS,
        step_counts=STEPS,
        num_samples=2,
        seed=7,
        metrics={
            "flicker": MetricRecord("Flicker", "change", "lower"),
            "motion": MetricRecord("Motion (mean speed)", "shorter sides per frame"),
            "clip": MetricRecord("CLIP similarity", "", "higher", "the folder clip is missing"),
            "fvd": MetricRecord("Fréchet video distance", "", "lower"),
        },
        values={m: {"flicker": flickers[m], "motion": moves[m]} for m in clips},
        sets={"first": {"fvd": {1: 30.0, 4: 0.5}}, "second": {"fvd": {4: 0.25}}},
        references={"motion": moves["second"][4]},
    )
    return record, clips


@pytest.fixture(scope="module")
def page(evaluation, read_page, tmp_path_factory):
    return _written(tmp_path_factory.mktemp("page"), read_page, *evaluation)


def _written(folder: Path, read_page, record: EvaluationRecord, clips: Clips):
    path = write_evaluation_report(folder / "report.html", record, clips)
    return read_page(path.read_text("utf-8"))


def test_page_says_what_was_measured_and_what_was_not(page, evaluation) -> None:
    page.require_alone(least_loaded=24)
    assert page.source.count("var(--c0)") > 2
    record, _ = evaluation
    seen = page.seen
    for wanted in (
        "3 prompts · 2 videos of each · seed 7",
        "first and second, by number of steps",
        "first: The videos move 0 % as much as real ones at 1 step",
        "and are frozen at 1 step",
        "real videos (dashed): ",
        "The folder clip is missing.",
        "Fréchet video distance: not measured of second at 1 step.",
        "first: Best at 1 step (0); worse at 4 (",
        "/models/first & more",
        "guidance scale: 1 · shift: 5",
        "a disc <right>",
    ):
        assert wanted in seen, wanted
    mean = sum(record.values["second"]["flicker"][4]) / 6
    assert f"{mean:#.3g}" in seen
    difference = mean - sum(record.values["first"]["flicker"][4]) / 6
    assert f"{difference:.2g}".replace("-", "−")[:6] in seen
    assert (
        seen.index("The videos")
        < seen.index("Motion (mean speed)")
        < seen.index("Quality by number of steps")
    )


def test_clips_are_the_first_videos_of_the_prompts(page) -> None:
    """Compare blocks of eight pixels of one gray, which went through two lossy codecs."""
    images = [uri.partition(",")[2] for uri in page.values("src")]
    assert len(images) == 2 * 3 * 2
    want, _ = MovingShapes().sample(
        6, torch.Generator().manual_seed(14), torch.arange(3).repeat_interleave(2)
    )
    # the second model's second prompt at four steps
    want = MovingShapes().to_uint8(want)[2].float()
    with Image.open(io.BytesIO(base64.b64decode(images[6 + 2 + 1]))) as image:
        assert image.n_frames == 8 and image.size == (96, 96)
        image.seek(3)
        pixels = torch.tensor(list(image.convert("L").tobytes())).view(96, 96)
    assert (pixels[4::8, 4::8].float() - want[3]).abs().mean() < 8


def test_videos_stop_where_no_more_room_is_left_and_damaged_ones_are_named(
    evaluation, read_page, tmp_path: Path
) -> None:
    record, clips = evaluation
    whole = clip_grid(record, clips)
    assert whole.prompts == [0, 1, 2] and whole.left_out == 0
    size = sum(
        len(base64.b64decode(uri.split(",")[1]))
        for of_model in whole.cells.values()
        for clip in of_model[0].values()
        for uri in (clip.moving, clip.still)
    )
    some = clip_grid(record, clips, max_bytes=size + 1)
    assert some.prompts == [0] and some.left_out == 0
    few = clip_grid(record, clips, max_bytes=size // 2)
    shown = sum(len(of_model[0]) for of_model in few.cells.values() if 0 in of_model)
    assert few.prompts == [0] and 0 < shown < 4 and few.left_out == 4 - shown
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    clips = {"first": {1: [broken, *clips["first"][1][1:]]}}
    bad = clip_grid(record, clips)
    assert (
        bad.cells["first"][0][1].problem.startswith("broken.mp4: ")
        and not bad.cells["first"][0][1].moving
    )
    assert "broken.mp4" in _written(tmp_path, read_page, record, clips).seen


def test_page_of_one_model_one_prompt_one_step_and_no_videos(read_page, tmp_path: Path) -> None:
    record = EvaluationRecord(
        {"m": ModelRecord("/m")},
        ("p",),
        (4,),
        1,
        0,
        {"psnr": MetricRecord("PSNR", "dB", "higher"), "motion": MetricRecord("Motion")},
        {"m": {"psnr": {4: [31.0]}, "motion": {4: [0.0]}}},
    )
    seen = _written(tmp_path, read_page, record, {}).seen
    assert (
        "All videos are frozen" in seen
        and "31 at 4 steps." in seen
        and "so none is given here" in seen
    )
    assert "The videos" not in seen.split("All videos")[0] and "Checkpoints compared" not in seen


def test_page_of_an_evaluation_without_numbers_yet(read_page, tmp_path: Path) -> None:
    record = EvaluationRecord({"m": ModelRecord("/m")}, ("p",), (1, 2), 1, 0)
    seen = _written(tmp_path, read_page, record, {}).seen
    assert "m, by number of steps" in seen and "All the numbers" not in seen


def test_twelve_models_have_colors_and_markers_of_their_own(
    evaluation, read_page, tmp_path: Path
) -> None:
    record, _ = evaluation
    names = [f"a checkpoint with a long name, number {i}" for i in range(12)]
    values = {name: record.values["first" if i % 2 else "second"] for i, name in enumerate(names)}
    many = EvaluationRecord(
        {name: ModelRecord(f"/{name}") for name in names},
        PROMPTS,
        STEPS,
        2,
        7,
        record.metrics,
        values,
    )
    page = _written(tmp_path, read_page, many, {})
    looks = re.findall(r'<strong class="name" style="color: var\(--(c\d)\)">(.) ', page.source)
    assert len(set(looks)) == 12
    assert "12 checkpoints, by number of steps" in page.seen
    assert "95 % intervals of the lines are in the table" in page.seen
