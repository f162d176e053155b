"""The measures of quality tell a spoilt image from a good one, and pictures show what they say."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from support.models import inputs as model_inputs
from support.models import one_stage, sdxl
from torch import Tensor

import tome_fx
from bench import documents, metrics, pipelines, plots, quality, quality_tables, report, shapes, variants, viz
from bench.cases import Case
from bench.images import AsUNet, Images
from bench.shapes.scenes import HELD_OUT, SIDE, draw, numbered
from tome_fx import ops

mpl.use("agg")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*"),
]


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


def test_differences_are_told_where_both_rows_are_there() -> None:
    cases = [Case(), Case("tome_fx", 0.5), Case("tomesd", 0.5), Case("tome_fx", 0.25), Case("tome_fx", 0.5, "all")]
    cases += [Case("tome_fx", 0.5, max_downsample=2), Case("one-match", 0.5, max_downsample=2)]
    rows = [
        {"case": asdict(case), "psnr": [30.0 + i, 20.0 + i] if i else [None] * 2, "latent_error": [0.1 * i, 0.1 * i]}
        for i, case in enumerate(cases)
    ]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in quality_tables.differences({"rows": rows}).split("\n")
    ]
    assert lines[2:] == [
        ["`tome_fx` - `tomesd`", "0.5", "attn", "finest", "-1.00 (-1.00 to -1.00)", "-0.100 (-0.100 to -0.100)"],
        ["`one-match` - `tome_fx`", "0.5", "attn", "2", "+1.00 (+1.00 to +1.00)", "+0.100 (+0.100 to +0.100)"],
        ["all - attn", "0.5", "", "finest", "+3.00 (+3.00 to +3.00)", "+0.300 (+0.300 to +0.300)"],
    ]


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
    cases += [Case(variant, 0.5) for variant in ("each-step", "tomesd", "prop_attn")]
    options: dict[str, Any] = {"count": 3, "steps": 2, "guidance": 3.0, "prompts": None, "batch": 2, "keep": 1}
    document, kept = quality.run("shapes", cases, path=tmp_path / "q.json", **options)
    rows = {row["case"]["variant"] + str(row["case"]["ratio"]): row for row in document["rows"]}
    assert rows["stock0.0"]["latent_error"] == rows["tome_fx0.0"]["latent_error"] == [0.0] * 3
    for name in ("tome_fx0.5", "each-step0.5", "tomesd0.5", "prop_attn0.5"):
        assert all(0 < error < 0.5 for error in rows[name]["latent_error"])
        assert len(rows[name]["right"]) == 3
    assert len({tuple(row["latent_error"]) for row in document["rows"]}) == 5
    assert fmean(rows["prop_attn0.5"]["latent_error"]) < fmean(rows["tome_fx0.5"]["latent_error"])
    assert [images.shape for images in kept.values()] == [(1, 3, SIDE, SIDE)] * 6
    assert all(row["argv"] == sys.argv[1:] for row in document["rows"])
    assert document["real"].keys() == {"right", "counted", "frechet"}
    lines = quality_tables.table(document).splitlines()
    assert len(lines) == 3 + len(cases)
    assert [lines[0].count(head) for head in ("captions right", "count right", "Fréchet")] == [1, 1, 1]
    assert [cell.strip() for cell in lines[3].split("|")[1:8]] == ["`stock`", "", "", "", "", "", ""]
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


def test_every_case_has_a_title_of_its_own() -> None:
    cases = [Case(), Case("tome_fx", 0.5), Case("tome_fx", 0.25), Case("tome_fx", 0.5, "all")]
    cases += [Case("tome_fx", 0.5, max_downsample=2), Case("tome_fx", 0.5, "all", 2)]
    assert [case.title for case in cases[:2]] == ["stock, ratio 0", "tome_fx, ratio 0.5"]
    assert cases[-1].title == "tome_fx, ratio 0.5, all, levels 2"
    assert len({case.title for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("todo", 0.5), "ratio must be 0.75 for todo, got 0.5"),
        (Case("todo", 0.75, "all"), "scope must be attn for todo, got all"),
        (Case("todo", 0.75, max_downsample=2), "max_downsample must be None for todo, got 2"),
        (Case("tomesd", 0.5, max_downsample=2), "max_downsample must be None for tomesd, got 2"),
        (Case("stock", 0.5), "ratio must be 0.0 for stock, got 0.5"),
    ],
)
def test_an_option_that_a_variant_would_pass_over_is_refused(case: Case, message: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"count": 1, "steps": 1, "guidance": 3.0, "prompts": None, "path": tmp_path / "q.json"}
    with pytest.raises(ValueError, match=message):
        quality.run("shapes", [Case(), case], **options)
    assert not (tmp_path / "q.json").exists()


@pytest.mark.slow
def test_rows_are_added_to_those_of_the_file_and_timed_in_turns(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    options: dict[str, Any] = {"steps": 1, "guidance": 3.0, "prompts": None, "path": path}
    quality.run("shapes", [Case(), Case("tome_fx", 0.5)], count=1, **options)
    first, _ = quality.run("shapes", [Case(), Case("each-step", 0.25)], count=1, **options)
    assert [row["case"]["variant"] for row in first["rows"]] == ["stock", "tome_fx", "each-step"]
    document = quality.add_times(path, 16, rounds=2)
    assert [len(row.pop("ms")) for row in document["rows"]] == [2, 2, 2]
    assert document["rows"] == first["rows"]
    assert document["timed"]["latents"] == 16
    told = "\n".join(report._quality(documents.read(path)))
    assert f"`python -m bench {' '.join(document['timed']['argv'])}`, commit " in told
    (drawn,) = plots.write({"quality": documents.read(path)}, tmp_path)
    assert drawn.exists()
    with pytest.raises(ValueError, match=r"q.json holds images of another size; give another file"):
        quality.run("shapes", [Case()], count=1, size={"height": 64, "width": 64}, **options)
    with pytest.raises(ValueError, match=r"q.json holds results of another count, prompts; give another file"):
        quality.run("shapes", [Case()], count=2, **options)


def test_a_speed_up_is_the_median_over_rounds() -> None:
    rows = [
        {"case": {"variant": "stock"}, "ms": [2.0, 2.0, 12.0]},
        {"case": {"variant": "todo"}, "ms": [1.0, 2.0, 4.0]},
    ]
    assert quality_tables.speed_range(rows[1], rows) == (2, 1, 3)


def test_quality_over_speed_up_is_drawn_for_each_scope(tmp_path: Path) -> None:
    cases = [Case(), *(Case("tome_fx", ratio, scope) for scope in ("attn", "all") for ratio in (0.25, 0.5))]
    rows = [{"case": asdict(case), "ssim": [0.9, 0.8], "ms": [1.0]} for case in cases]
    axes: Any
    figure, axes = plt.subplots()
    plots.draw_tradeoff(axes, rows)
    plt.close(figure)
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["stock", "tome_fx, all", "tome_fx, attn"]
    assert [text.get_text() for text in axes.texts] == ["0.25", "0.5"] * 2


def test_another_pipeline_needs_prompts_and_is_told_what_cannot_be_measured(tmp_path: Path, monkeypatch: Any) -> None:
    options: dict[str, Any] = {"count": 1, "steps": 1, "guidance": 3.0, "path": tmp_path / "q.json"}
    with pytest.raises(ValueError, match="prompts must be a file of prompts, for any pipeline but shapes; got none"):
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
    variant = AsUNet(lambda sample, **inputs: {"sample": sample, **inputs}, unet)
    assert variant.add_embedding is unet.add_embedding
    assert (variant.config, variant.dtype, variant.device) == (unet.config, unet.dtype, unet.device)
    assert variant(1, 2, c=3) == {"sample": 1, "timestep": 2, "c": 3}
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = variant.no_such_thing


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
    assert (document["size"], document["dtype"], document["device"]) == ([64, 96], "bf16", "cpu")
    assert document["machine"]["gpu"] is None
    timed = quality.add_times(path, 8, 1, dtype="bf16")["timed"]
    assert (timed["dtype"], timed["device"]) == ("bf16", "cpu")


def test_one_match_leaves_one_match_for_stacked_blocks() -> None:
    unet = sdxl()
    ours = tome_fx.transform(unet, 0.5, max_downsample=4)
    shared = variants.apply(Case("one-match", 0.5, max_downsample=4), unet)
    for path, module in ours.named_modules():
        if type(module).__name__ == "Transformer2DModel" and hasattr(module, "graph"):
            count = [
                sum(node.target is ops.match for node in graph.nodes)
                for graph in (module.graph, shared.get_submodule(path).graph)
            ]
            assert count == [len(module.transformer_blocks), 1]
    with torch.no_grad():
        given = model_inputs(unet)
        assert not torch.equal(shared(**given).sample, ours(**given).sample)


def test_other_destinations_in_every_step_come_round_again() -> None:
    unet = one_stage()
    given = model_inputs(unet)
    with torch.no_grad():
        call = variants.each_step(unet, Case("each-step", 0.5), 3)
        outputs = [call(**given).sample for _ in range(6)]
    assert not torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(outputs[i], outputs[i + 3]) for i in range(3))


def test_a_merge_map_paints_each_group_in_its_mean_colour_and_leaves_the_rest() -> None:
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    slot = torch.arange(16)
    slot[[1, 2]] = 0  # three tokens of 4 x 4 pixels in the first row
    result = viz.merge_map(image, slot, 4, 4)
    mean = image[:, :4, :12].mean((1, 2))
    assert torch.allclose(result[:, :3, :11], mean[:, None, None].expand(3, 3, 11), atol=1e-6)
    assert torch.equal(result[:, 4:], image[:, 4:])
    assert torch.equal(result[:, :4, 12:], image[:, :4, 12:])


def test_a_merge_map_outlines_groups() -> None:
    image = torch.ones(3, 16, 16)
    slot = torch.arange(16)
    slot[[5, 6]] = 4
    result = viz.merge_map(image, slot, 4, 4)
    for border in (result[:, 4, :12], result[:, 7, :12], result[:, 4:8, 11]):  # no neighbour is at the left
        assert (border < 1).all()
    assert (result[:, 5:7, :11] == 1).all()
    assert (result[:, 4:8, 12:] == 1).all()


def test_slots_are_recorded_and_the_model_is_left_without_hooks() -> None:
    unet = tome_fx.transform(one_stage(), 0.5)
    given = model_inputs(unet)
    with torch.no_grad(), viz.recorded_slots(unet) as slots:
        for _ in range(2):
            unet(**given)
    assert {len(calls) for calls in slots.values()} == {2}
    assert all(slot.shape == (2, 32 * 32) for calls in slots.values() for slot in calls)
    assert not any(module._forward_pre_hooks for module in unet.modules())


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
    quality.main(parser.parse_args([*given, *rows, "--grid", str(tmp_path / "grid.png")]))
    assert (tmp_path / "q.json").exists()
    with Image.open(tmp_path / "map.png") as maps, Image.open(tmp_path / "grid.png") as grid:
        assert maps.size[1] > 2.5 * grid.size[1]  # three sites, one prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--map", "m.png", "--n", "4", "--variant", "tomesd"], "--map goes with .* alone; --n, --variant would do"),
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
