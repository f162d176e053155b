"""The measures of quality tell a spoilt image from a good one, and pictures show what they say."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from support.models import inputs as model_inputs
from support.models import one_stage, sdxl
from torch import Tensor, nn

import tome_fx
from bench import (
    documents,
    flops,
    metrics,
    pipelines,
    plots,
    quality,
    quality_tables,
    report,
    shapes,
    suites,
    variants,
    viz,
)
from bench.cases import DEFAULTS, Case, options
from bench.images import AsDenoiser, Images, generate
from bench.shapes import blank
from bench.shapes.scenes import HELD_OUT, SIDE, draw, numbered

mpl.use("agg")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*"),
]


@pytest.fixture(autouse=True)
def small_models_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Savings are not told of models that take seconds to count."""
    monkeypatch.setattr(flops, "BESIDE", {"unet": ("tiny",), "transformer": ()})


def pictures(count: int = 64) -> Images:
    pixels = draw(numbered(HELD_OUT, count), SIDE) / 2 + 0.5
    return Images(pixels[:, :, ::4, ::4], pixels)


def spoilt(images: Images, much: float) -> Images:
    noise = torch.randn(images.pixels.shape, generator=torch.Generator().manual_seed(0))
    pixels = (images.pixels + much * noise).clamp(0, 1)
    return Images(pixels[:, :, ::4, ::4], pixels)


@pytest.mark.slow
def test_every_measure_falls_the_more_an_image_is_spoilt() -> None:
    good = pictures()
    judged = metrics.judging(numbered(HELD_OUT, 64))
    rows = [metrics.compare(image, good) | judged(image) for image in (good, spoilt(good, 0.3), spoilt(good, 0.8))]
    means = {
        name: [quality_tables.interval(row[name])[0] for row in rows] for name in ("ssim", "latent_error", "right")
    }
    assert means["ssim"][0] == pytest.approx(1, abs=1e-3)
    assert means["ssim"] == sorted(means["ssim"], reverse=True)
    assert means["latent_error"][0] == 0
    assert means["latent_error"] == sorted(means["latent_error"])
    assert means["right"][0] >= 0.98
    assert means["right"][2] < 0.5
    assert rows[0]["psnr"] == [None] * 64
    assert fmean(rows[0]["counted"]) >= 0.98
    assert max(rows[2]["psnr"]) < min(rows[1]["psnr"])
    distances = [row["frechet"] for row in rows]
    assert distances == sorted(distances)
    assert distances[2] > 10 * distances[0]


def test_an_interval_holds_the_mean_and_narrows_with_the_count() -> None:
    half = 1.26517  # 1.95996 of the standard deviation over the root of the count
    assert quality_tables.interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-4)
    wilson = (0.9, 0.596, 0.982)  # for 9 of 10
    assert quality_tables.interval([1.0] * 9 + [0.0], yes_or_no=True) == pytest.approx(wilson, abs=1e-3)
    _, low, high = quality_tables.interval([1.0] * 20, yes_or_no=True)
    assert 0.8 < low < high <= 1.0
    assert quality_tables.interval([1.0] * 20) == (1.0, 1.0, 1.0)  # by what is asked for, not by the numbers


def test_a_paired_difference_is_far_narrower_than_what_it_is_the_difference_of() -> None:
    theirs = [float(10 * i) for i in range(8)]
    mine = [value + 1 + (-1) ** i / 10 for i, value in enumerate(theirs)]
    mean, low, high = quality_tables.paired(mine, theirs)
    assert mean == pytest.approx(1)
    assert 0.9 < low < mean < high < 1.1
    assert quality_tables.paired(theirs, mine)[0] == pytest.approx(-1)


def rows_of(*cases: Case) -> list[dict[str, Any]]:
    """Rows of two images each, one more decibel for each row; stock's are like stock's."""
    return [
        {
            "case": case.stored(),
            "psnr": [30.0 + i, 20.0 + i] if i else [None] * 2,
            "latent_error": [0.1 * i, 0.1 * i],
            "flops_saved": {"shapes": i / 10, "sdxl": i / 100},
        }
        for i, case in enumerate(cases)
    ]


def cells_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")]


def test_differences_are_told_where_both_rows_are_there() -> None:
    cases = [Case(), Case("tome_fx", 0.5), Case("tomesd", 0.5), Case("tome_fx", 0.25), suites.LATE, suites.EARLY]
    lines = cells_of(quality_tables.differences({"rows": rows_of(*cases)}))
    alike = "-1.00 (-1.00 to -1.00)", "-0.100 (-0.100 to -0.100)"
    assert lines[2:] == [
        ["keys and values, late - early", "0, 0.75 from 50%", "0.75, 0 from 50%", *alike],
        ["`tome_fx` - `tomesd`", "0.5", "0.5", *alike],
    ]


def test_every_question_has_its_rows_in_the_suite() -> None:
    several = [set(suites.SUITES[name]) for name in ("all", "transformer")]
    assert all(any({*pair} <= cases for cases in several) for _, *pair in suites.QUESTIONS)
    assert {*suites.POINTS.values(), suites.YARDSTICK} <= set(suites.SUITES["all"])
    assert all(first != second for _, first, second in suites.QUESTIONS)
    large = suites.SUITES["large"]
    assert set(large) <= set(suites.SUITES["all"])
    assert any(first in large and second in large for title, first, second in suites.QUESTIONS if "tiles" in title)
    for case in set.union(*several):
        variants.check(case)


def test_the_recorded_rows_are_those_of_the_suite() -> None:
    recorded = documents.read(report.RESULTS / "quality.json")
    assert {Case.read(row["case"]) for row in recorded["rows"]} == set(suites.SUITES["all"])


def test_the_table_tells_a_rows_options_its_savings_and_what_the_yardstick_is_for() -> None:
    case = Case("tome_fx", 0, options(merge_queries=False, tile=None), ((0.5, 0.75),))
    lines = cells_of(quality_tables.table({"rows": rows_of(Case(), case, Case("bf16"))}))
    assert lines[0][:4] == ["variant", "ratio", "options", "FLOPs saved: shapes / sdxl"]
    assert lines[2][:4] == ["`stock`", "", "", ""]
    assert lines[3][:4] == ["`tome_fx`", "0, 0.75 from 50%", "merge_queries=False, tile=None", "10.0% / 1.0%"]
    assert lines[4][:4] == ["`bf16`", "", "a bf16 model is this far from an fp32 one", "20.0% / 2.0%"]


def test_prompts_are_read_from_lines_or_from_the_column_of_a_tsv(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cat\n\na dog\n")
    assert pipelines.read_prompts(lines, 2) == ["a cat", "a dog"]
    table = tmp_path / "parti.tsv"
    table.write_text('Prompt\tCategory\na "big" cat\tAnimals\na dog, left\tAnimals\n')  # as PartiPrompts', unquoted
    assert pipelines.read_prompts(table, 2) == ['a "big" cat', "a dog, left"]
    with pytest.raises(ValueError, match=r"prompts: .* must have at least n=5 prompts, it has 2"):
        pipelines.read_prompts(lines, 5)
    table.write_text("Text\tCategory\na cat\tAnimals\n")
    with pytest.raises(ValueError, match="must have a column Prompt, its columns are Text, Category"):
        pipelines.read_prompts(table, 1)


@pytest.mark.slow
def test_a_run_gives_every_variant_the_same_seeds_and_keeps_all_values(tmp_path: Path) -> None:
    cases = [Case(), Case("tome_fx", 0.5), Case("tome_fx", 0.0)]
    cases += [Case(variant, 0.5) for variant in ("each-step", "tomesd", "v0.1")]
    options: dict[str, Any] = {"count": 3, "steps": 2, "guidance": 3.0, "prompts": None, "batch": 2, "keep": 1}
    document, kept = quality.run("shapes", cases, path=tmp_path / "q.json", **options)
    rows = {row["case"]["variant"] + str(row["case"]["ratio"]): row for row in document["rows"]}
    assert rows["stock0.0"]["latent_error"] == rows["tome_fx0.0"]["latent_error"] == [0.0] * 3
    for name in ("tome_fx0.5", "each-step0.5", "tomesd0.5", "v0.10.5"):
        assert all(0 < error < 0.5 for error in rows[name]["latent_error"])
        assert len(rows[name]["right"]) == 3
    assert len({tuple(row["latent_error"]) for row in document["rows"]}) == 5
    assert fmean(rows["tome_fx0.5"]["latent_error"]) < fmean(rows["v0.10.5"]["latent_error"])
    assert rows["v0.10.5"]["flops_saved"] == rows["tomesd0.5"]["flops_saved"] != rows["tome_fx0.5"]["flops_saved"]
    assert [images.shape for images in kept.values()] == [(1, 3, SIDE, SIDE)] * 6
    assert all(row["argv"] == sys.argv[1:] for row in document["rows"])
    assert document["real"].keys() == {"right", "counted", "frechet"}
    lines = quality_tables.table(document).splitlines()
    assert len(lines) == 3 + len(cases)
    assert [lines[0].count(head) for head in ("captions right", "count right", "Fréchet")] == [1, 1, 1]
    assert [cell.strip() for cell in lines[3].split("|")[1:7]] == ["`stock`", "", "", "", "", ""]
    text = (tmp_path / "q.json").read_text()
    assert "Infinity" not in text
    assert json.loads(text, parse_constant=pytest.fail) == document


def test_the_image_of_a_prompt_has_its_own_seed_whatever_the_batch(tmp_path: Path, monkeypatch: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n" * 3)
    for module in ("torchmetrics.image.lpip", "torchmetrics.multimodal.clip_score"):
        monkeypatch.setitem(sys.modules, module, None)  # nothing is fetched
    images = []
    for batch in (1, 3):
        options: dict[str, Any] = {"count": 3, "steps": 2, "guidance": 3.0, "prompts": prompts, "keep": 3}
        _, kept = quality.run(str(shapes.PIPELINE), [Case()], batch=batch, path=tmp_path / f"{batch}.json", **options)
        images.append(kept[Case()])
    assert torch.allclose(images[0], images[1], atol=1e-4)
    assert (images[0][0] - images[0][1]).abs().max() > 0.01
    assert (images[0][1] - images[0][2]).abs().max() > 0.01


def test_every_case_has_a_title_of_its_own_and_is_read_as_it_was_stored() -> None:
    cases = suites.SUITES["all"]
    titles = {case.title: case for case in cases}
    assert len(titles) == len(set(cases))
    assert [Case().title, Case("tome_fx", 0.5).title] == ["stock, ratio 0", "tome_fx, ratio 0.5"]
    assert titles["tome_fx, ratio 0, 0.75 from 50%, merge_queries=False"] == suites.LATE
    assert "tome_fx, ratio 0.5, max_downsample=8, share_match=False" in titles
    assert [Case.read(json.loads(json.dumps(case.stored()))) for case in cases] == list(cases)


def test_an_options_default_is_left_out_of_a_case() -> None:
    assert options(**DEFAULTS) == ()
    assert options(tile=32, merge_mlp=True, prop_attn=None) == (("merge_mlp", True),)
    assert options(tile=None, merge_mlp=True) == options(merge_mlp=True, tile=None)


def test_what_0_1_did_is_tomesds_mathematics() -> None:
    unet = one_stage()
    found = variants.apply(Case("v0.1", 0.5, options(sx=4)), unet)
    expected = tome_fx.transform(unet, 0.5, **tome_fx.TOMESD, sx=4)
    assert tome_fx.api.transformed(found)[1].plan == tome_fx.api.transformed(expected)[1].plan


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("todo", 0.5), "ratio must be 0.75 for todo, got 0.5"),
        (Case("todo", 0.75, options(merge_mlp=True)), "options must be of none for todo, got merge_mlp=True"),
        (Case("hidiffusion", 0.5), "ratio must be 0.75 for hidiffusion, got 0.5"),
        (Case("tomesd", 0.5, options(tile=None)), "options must be of merge_attn, .* for tomesd, got tile=None"),
        (Case("v0.1", 0.5, options(tile=8)), "options must be of .* for v0.1, got tile=8"),
        (Case("each-step", 0.5, options(seed=1)), "options must be of .* for each-step, got seed=1"),
        (Case("stock", 0.5), "ratio must be 0 for stock, got 0.5"),
        (Case("bf16", 0, (), ((0.5, 0.5),)), "ratio must be 0 for bf16, got 0, 0.5 from 50%"),
        (Case("tome_fx", 0.5, (("tiles", 8),)), "options must be of .* for tome_fx, got tiles=8"),
    ],
)
def test_an_option_that_a_variant_would_pass_over_is_refused(case: Case, message: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"count": 1, "steps": 1, "guidance": 3.0, "prompts": None, "path": tmp_path / "q.json"}
    with pytest.raises(ValueError, match=message):
        quality.run("shapes", [Case(), case], **given)
    assert not (tmp_path / "q.json").exists()


def test_stock_in_half_precision_is_told_from_full_precision_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"count": 1, "steps": 1, "guidance": 3.0, "prompts": None, "path": tmp_path / "q.json"}
    with pytest.raises(ValueError, match="dtype must be fp32 for bf16, which is told from it; got fp16"):
        quality.run("shapes", [Case(), Case("bf16")], dtype="fp16", **given)


@pytest.mark.slow
def test_rows_are_added_to_those_of_the_file_and_timed_in_turns(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    given: dict[str, Any] = {"steps": 1, "guidance": 3.0, "prompts": None, "path": path}
    quality.run("shapes", [Case("tome_fx", 0.5)], count=1, **given)
    first, _ = quality.run("shapes", [Case(), Case("each-step", 0.25)], count=1, **given)
    assert [row["case"]["variant"] for row in first["rows"]] == ["stock", "tome_fx", "each-step"]
    document = quality.add_times(path, 16, rounds=2)
    assert [len(row["ms"]) for row in document["rows"]] == [2, 2, 2]
    assert [{key: value for key, value in row.items() if key != "ms"} for row in document["rows"]] == first["rows"]
    assert document["timed"]["latents"] == 16
    told = "\n".join(report._quality(documents.read(path)))
    assert f"`python -m bench {' '.join(document['timed']['argv'])}`, commit " in told
    (drawn,) = plots.write({"quality": documents.read(path)}, tmp_path, lambda name: True)
    assert drawn.exists()
    with pytest.raises(ValueError, match=r"q.json holds results of another size; give another file"):
        quality.run("shapes", [Case()], count=1, size={"height": 64, "width": 64}, **given)
    with pytest.raises(ValueError, match=r"q.json holds results of another count, prompts; give another file"):
        quality.run("shapes", [Case()], count=2, **given)
    more, _ = quality.run("shapes", [Case("todo", 0.75)], count=1, **given)
    assert "timed" not in more
    assert not any("ms" in row for row in more["rows"])


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def stopped(*args: Any, **how: Any) -> Images:
        made.append(how["title"])
        if len(made) == 3:
            raise KeyboardInterrupt
        return generate(*args, **how)

    monkeypatch.setattr(quality, "judging", lambda scenes: lambda images: {})  # which takes seconds
    monkeypatch.setattr(quality, "generate", stopped)
    given: dict[str, Any] = {"count": 1, "steps": 1, "guidance": 3.0, "prompts": None, "path": tmp_path / "q.json"}
    cases = [Case(), Case("todo", 0.75), Case("hidiffusion", 0.75)]
    with pytest.raises(KeyboardInterrupt):
        quality.run("shapes", cases, **given)
    document, _ = quality.run("shapes", cases, **given)
    assert [row["case"]["variant"] for row in document["rows"]] == ["stock", "todo", "hidiffusion"]
    assert made == [case.title for case in [*cases, Case(), cases[-1]]]
    again, _ = quality.run("shapes", cases, **given)
    assert again == document
    assert len(made) == 5
    _, pictures = quality.run("shapes", cases[:2], keep=1, **given)
    assert list(pictures) == cases[:2]
    assert documents.read(tmp_path / "q.json").keys() == document.keys()


def test_a_speed_up_is_the_median_over_rounds() -> None:
    rows = [
        {"case": {"variant": "stock"}, "ms": [2.0, 2.0, 12.0]},
        {"case": {"variant": "todo"}, "ms": [1.0, 2.0, 4.0]},
    ]
    assert quality_tables.speed_range(rows[1], rows) == (2, 1, 3)


def test_the_frontier_is_what_nothing_else_is_above_of_at_as_much_saved() -> None:
    places = [(0.1, 50.0), (0.2, 40.0), (0.2, 45.0), (0.15, 44.0), (0.3, 30.0), (0.3, 31.0)]
    assert plots.frontier(places) == [(0.1, 50.0), (0.2, 45.0), (0.3, 31.0)]
    assert plots.frontier([]) == []


def test_quality_over_flops_is_drawn_with_peers_advice_and_yardstick() -> None:
    cases = [Case(), Case("bf16"), *suites.POINTS.values(), Case("tomesd", 0.5), Case("v0.1", 0.25)]
    axes: Any
    figure, axes = plt.subplots()
    plots.draw_frontier(axes, rows_of(*cases), "shapes")
    plt.close(figure)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["tome_fx", "v0.1", "tomesd", "a bf16 model is this far from an fp32 one"]
    assert {text.get_text() for text in axes.texts} == {*suites.POINTS, "0.5", "0.25"}
    assert axes.lines[-1].get_ydata()[0] == 26  # the mean of the yardstick's 31 and 21


def test_another_pipeline_needs_prompts_and_is_told_what_cannot_be_measured(tmp_path: Path, monkeypatch: Any) -> None:
    options: dict[str, Any] = {"count": 1, "steps": 1, "guidance": 3.0, "path": tmp_path / "q.json"}
    with pytest.raises(
        ValueError, match="a file of prompts, for any pipeline but shapes and shapes-transformer; got none"
    ):
        quality.run(str(shapes.PIPELINE), [Case()], prompts=None, **options)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    for module in ("torchmetrics.image.lpip", "torchmetrics.multimodal.clip_score"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it could not be had
    document, _ = quality.run(str(shapes.PIPELINE), [Case()], prompts=prompts, **options)
    (row,) = document["rows"]
    assert "right" not in row
    assert row["lpips"].startswith("not measured: ModuleNotFoundError: ")
    assert row["clip_score"].startswith("not measured: ModuleNotFoundError: ")
    assert "not measured" in quality_tables.table(document)


def test_metrics_of_perception_are_built_once_and_see_each_image(monkeypatch: Any) -> None:
    built = []

    class Metric:
        def __init__(self, *args: Any, **options: Any) -> None:
            built.append(self)

        def __call__(self, mine: Tensor, other: Any) -> Tensor:
            return mine.float().mean() + len(other)

    names = {
        "torchmetrics.image.lpip": "LearnedPerceptualImagePatchSimilarity",
        "torchmetrics.multimodal.clip_score": "CLIPScore",
    }
    for module, name in names.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: Metric}))
    images = Images(torch.zeros(2, 1, 1, 1), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4))
    perceived = metrics.perceiving(["a", "abc"])
    for _ in range(2):
        assert perceived(images, images) == {"lpips": [1.0, 2.0], "clip_score": [1.0, 258.0]}
    assert len(built) == 2


def test_a_pipeline_of_sdxl_finds_in_a_variant_what_it_reads_of_its_unet() -> None:
    unet = sdxl()
    variant = AsDenoiser(lambda *args, **inputs: (args, inputs), unet)
    assert variant.add_embedding is unet.add_embedding
    assert (variant.config, variant.dtype, variant.device) == (unet.config, unet.dtype, unet.device)
    assert variant(1, 2, c=3) == ((1,), {"timestep": 2, "c": 3})
    assert variant(hidden_states=1, timestep=2) == ((1,), {"timestep": 2})  # as transformers are called
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = variant.no_such_thing


def test_a_transformer_is_judged_as_a_unet_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = blank.transformer_pipeline(shapes.pipeline())
    for parameter in pipe.transformer.parameters():  # by which no block would do anything yet
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    monkeypatch.setitem(shapes.PIPELINES, "shapes-transformer", lambda: pipe)
    merging = [Case("tome_fx", 0.5), Case("tome_fx", 0.5, options(merge_block=True))]
    document, _ = quality.run(
        "shapes-transformer",
        [Case("bf16"), *merging],
        count=1,
        steps=1,
        guidance=3.0,
        prompts=None,
        path=tmp_path / "q.json",
        size={"height": 64, "width": 64},
    )
    rows = {Case.read(row["case"]): row for row in document["rows"]}
    assert rows[Case()]["latent_error"] == [0]
    for case in (Case("bf16"), *merging):
        assert 0 < rows[case]["latent_error"][0] < 0.5
    attention, blocks = (rows[case]["flops_saved"]["shapes-transformer"] for case in merging)
    assert 0.3 < attention < blocks < 0.7


def test_a_run_on_the_cpu_names_no_gpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="a GPU"))
    monkeypatch.setattr(documents, "_output", lambda *command: "something")
    assert documents.machine("cpu")["gpu"] is None
    assert documents.machine("cuda")["gpu"] == "a GPU"


def test_precision_batch_and_size_are_the_users_and_are_told(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    path = tmp_path / "q.json"
    given = ["--n", "2", "--steps", "1", "--ratio", "0.5", "--variant", "tome_fx", "--json", str(path)]
    given += ["--dtype", "bf16", "--batch", "1"]
    quality.main(parser.parse_args([*given, "--height", "64", "--width", "96"]))
    document = documents.read(path)
    assert document["size"] == {"height": 64, "width": 96}
    assert (document["dtype"], document["device"]) == ("bf16", "cpu")
    assert document["machine"]["gpu"] is None
    timed = quality.add_times(path, 8, 1, dtype="bf16")["timed"]
    assert (timed["dtype"], timed["device"]) == ("bf16", "cpu")


def test_other_destinations_and_windows_in_every_step_come_round_again() -> None:
    unet = one_stage()
    given = model_inputs(unet)
    for case in (Case("each-step", 0.5), Case("hidiffusion", 0.75)):
        with torch.no_grad():
            call = variants.apply(case, unet, 3)
            outputs = [variants.predict(call, given) for _ in range(6)]
        assert not torch.equal(outputs[0], outputs[1])
        assert all(torch.equal(outputs[i], outputs[i + 3]) for i in range(3))


def test_a_schedule_merges_as_the_librarys_own_does() -> None:
    unet = one_stage()
    case = Case("tome_fx", 0, (), ((0.25, 0.25), (0.5, 0.75)))
    schedule = tome_fx.RatioSchedule({0: 0, 0.25: 0.25, 0.5: 0.75}, tome_fx.transform(unet, 0.5))
    for steps in (1, 3, 12):
        assert case.ratios(steps) == [schedule.ratio_at(step, steps) for step in range(steps)]
    given = model_inputs(unet)
    with torch.no_grad():
        predict = partial(variants.predict, inputs=given)
        expected = [predict(variants.apply(Case("tome_fx", ratio), unet)) for ratio in (0, 0.25, 0.75, 0.75)]
        call = variants.apply(case, unet, 4)
        outputs = [predict(call) for _ in range(8)]
    assert all(torch.equal(output, expected[i % 4]) for i, output in enumerate(outputs))
    assert torch.equal(outputs[0], predict(unet))


def test_a_grid_is_written_with_a_column_for_each_title(tmp_path: Path) -> None:
    images = [torch.rand(3, 8, 8) for _ in range(2)]
    viz.grid(tmp_path / "two.png", {"a": images, "b": images}, ["first", "second"])
    viz.grid(tmp_path / "three.png", {"a": images, "b": images, "c": images})
    with Image.open(tmp_path / "two.png") as first, Image.open(tmp_path / "three.png") as second:
        two, three = first.size, second.size
    assert three[0] > two[0]
    assert three[1] == two[1]


def test_the_command_writes_a_map_of_each_site_and_a_grid_of_each_row(tmp_path: Path, monkeypatch: Any) -> None:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    given = ["--steps", "2", "--ratio", "0.5"]
    rows = ["--n", "1", "--variant", "tome_fx", "--json", str(tmp_path / "q.json")]
    monkeypatch.chdir(tmp_path)
    quality.main(parser.parse_args([*given, "--map", str(tmp_path / "map.png")]))
    assert not (tmp_path / "q.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    grid_of = Mock(side_effect=viz.grid)
    monkeypatch.setattr(viz, "grid", grid_of)
    quality.main(parser.parse_args([*given, *rows, "--grid", str(tmp_path / "grid.png")]))
    (_, columns, _) = grid_of.call_args.args
    assert "balanced: tome_fx, ratio 0.5" in columns  # one of those that the pages advise, by its name
    assert (tmp_path / "q.json").exists()
    with Image.open(tmp_path / "map.png") as maps, Image.open(tmp_path / "grid.png") as grid:
        assert maps.size[1] > 2.5 * grid.size[1]  # three sites, one prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "m.png", "--n", "4", "--variant", "tomesd"], "--map goes with .* alone; --n, --variant would do"),
        (["--suite", "large", "--ratio", "0.5"], "--suite goes with .* alone; --ratio would do nothing"),
        (["--map", "m.png", "--ratio", "0.25", "0.5"], "ratio must be one for --map, got 0.25, 0.5"),
        (["--time", "64", "--ratio", "0.5"], "--time goes with --json, --device, --dtype alone; --ratio would do"),
        (["--time", "64", "--map", "m.png"], "--map would do nothing"),
    ],
)
def test_what_a_map_or_times_would_pass_over_is_refused(options: list[str], message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(quality, "load", None)  # nothing is made where it is not
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        quality.main(parser.parse_args(options))
