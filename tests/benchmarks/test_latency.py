"""Suites and cells of latency: what is measured, of which rows, and what a command line may ask for."""

import argparse
import itertools
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.measuring import interrupt_the_second
from torch import Tensor

import tome_fx
from bench import documents, latency, models, parts, tables, variants
from bench.cases import Case, options
from bench.cells import Cell, Task, suite


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    cells = [Cell("tiny", side) for side in (64, 128)]
    tasks = [Task(cell, ("sdpa", "tome_fx"), 2) for cell in cells]
    measured = interrupt_the_second(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        latency.run(tasks, path)
    first = documents.read(path)["cells"][0]
    document = latency.run(tasks, path)
    assert measured == [str(cells[0]), str(cells[1]), str(cells[1])]
    assert document["cells"][0] == first
    assert all(entry["complete"] for entry in document["cells"])


def test_a_transformer_is_measured_as_a_unet_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
    monkeypatch.setitem(models.CONFIGS, "small", ("SD3Transformer2DModel", small | {"in_channels": 4}))
    names = ("sdpa", "tome_fx")
    (entry,) = latency.run([Task(Cell("small", 128, guidance=False), names, 1)], tmp_path / "run.json")["cells"]
    assert entry["bounds"]["sdpa"] == 1 < entry["bounds"]["tome_fx"]
    rows = entry["rows"]
    assert all(len(rows[name]["samples_ms"]) == 1 for name in ("sdpa", "tome_fx"))
    assert rows["tome_fx"]["relative_error"] > 0
    with pytest.raises(ValueError, match="merge in UNets, got a SD3Transformer2DModel"):
        variants.apply(Case("todo", 0.75), models.build("small"))


def test_end_to_end_makes_a_whole_image_through_the_variant_and_the_vae() -> None:
    unet = models.build("tiny")
    calls: list[tuple[int, ...]] = []

    def counting(sample: Tensor, **given: Any) -> Any:
        calls.append(tuple(sample.shape))
        return unet(sample, **given)

    cell = Cell("tiny", 64, end_to_end=True)
    with torch.no_grad():
        image = latency.image(counting, unet, cell, steps=2)()
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all()
    assert calls == [(2, 4, 8, 8)] * 2


def test_suites_have_the_cells_they_are_named_for() -> None:
    seed = [task.cell for task in suite("seed", "cuda")]
    assert {(cell.resolution, cell.batch) for cell in seed} == {
        (s, b) for s in (512, 768, 1024) for b in (1, 2, 4, 8, 10)
    }
    gpu = suite("gpu", "cuda")
    sides = {(task.cell.model, task.cell.resolution) for task in gpu}
    assert {("sd15", 512), ("sd15", 2048), ("sdxl", 1024), ("sdxl", 2048)} <= sides
    asked = {"compile", "tome_fx+compile", "tome_fx+blocks+compile"}
    assert all(asked <= set(task.names) for task in gpu)
    cpu = {(task.cell.dtype, task.cell.model, task.cell.resolution): task for task in suite("cpu", "cpu")}
    assert cpu.keys() == set(itertools.product(("fp32", "bf16"), ("tiny", "sd15"), (512, 768, 1024)))
    few = {"sdpa", "tomesd+sdpa", "compile", "tome_fx", "tome_fx+compile", "oracle+compile", "todo+compile"}
    assert all(few <= set(task.names) for task in cpu.values())
    asked = {"compile", "v0.1+compile", "tome_fx+compile", "tome_fx+dynamic+compile", "tome_fx+kv+compile"}
    asked |= {"oracle+compile", "todo+compile", "hidiffusion+compile", "tomesd+compile"}
    assert all(asked <= set(task.names) for (dtype, *_), task in cpu.items() if dtype == "fp32")
    assert not {"vanilla", "tomesd"} & set(cpu["fp32", "sd15", 1024].names)


def test_a_cell_is_stored_and_read_with_its_options() -> None:
    cell = Cell("tiny", 64, options=options(tile=None, merge_mlp=True))
    assert cell.stored()["options"] == {"tile": None, "merge_mlp": True}
    assert Cell.read(cell.stored()) == cell


def test_each_row_has_the_bound_of_its_own_flops(tmp_path: Path) -> None:
    names = ("sdpa", "tomesd+sdpa", "tome_fx")
    tiles = options(tile=8)
    (entry,) = latency.run([Task(Cell("tiny", 256, guidance=False, options=tiles), names, 1)], tmp_path / "run.json")[
        "cells"
    ]
    assert entry["bounds"]["sdpa"] == 1
    report = tome_fx.explain(variants.merged(models.build("tiny"), Case("tome_fx", 0.5, tiles)), 32, 32)
    assert entry["bounds"]["tome_fx"] == pytest.approx(report.bound)
    assert 1 < entry["bounds"]["tomesd+sdpa"] != entry["bounds"]["tome_fx"]


@pytest.mark.slow
def test_a_cell_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())  # those of other tests, which may wait in this process
    task = Task(Cell("tiny", 64, guidance=False), ("sdpa", "tome_fx"), 1)
    (entry,) = latency.run([task], tmp_path / "run.json", apart=True)["cells"]
    assert entry["apart"]
    assert all(len(row["samples_ms"]) == 1 for row in entry["rows"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert set(multiprocessing.active_children()) <= others


def test_parts_of_a_site_can_be_given_to_processes_of_their_own() -> None:
    makes = parts.of_a_site(Cell("tiny", 64, guidance=False), models.build)
    assert pickle.loads(pickle.dumps(makes)).keys() == makes.keys()


def test_a_breakdown_of_a_transformer_is_refused(tmp_path: Path) -> None:
    command = ["--model", "flux-shallow", "--breakdown", "--json", str(tmp_path / "run.json")]
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    with pytest.raises(ValueError, match="breakdown must be of a UNet among others, got flux-shallow"):
        latency.main(parser.parse_args(command))


@pytest.mark.slow
def test_a_breakdown_times_the_whole_grid_beside_tiles(tmp_path: Path) -> None:
    task = Task(Cell("tiny", 320, guidance=False), ("sdpa",), 1)
    (entry,) = latency.run([task], tmp_path / "run.json", breakdown=True)["cells"]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in tables.breakdown(entry["breakdown"]).split("\n")
    ]
    assert lines[0] == ["part", "whole grid, ms (median)", "tiles, ms (median)", "whole grid / tiles"]
    assert [line[0] for line in lines[2:6]] == ["match", "merge", "unmerge", "all three"]
    assert all(float(ms) > 0 for line in lines[2:6] for ms in line[1:3])
    assert {line[0] for line in lines[6:]} == {
        f"attention, {what}" for what in ("all tokens", "merged", "merged and weighed")
    }


def test_the_sum_of_parts_is_taken_within_each_round() -> None:
    samples = {"match": ([3.0, 9.0], [1.0, 1.0]), "merge": ([1.0, 0.0], [1.0, 1.0]), "unmerge": ([0.0, 0.0], [])}
    rows = {
        f"{part}, {search}": {"samples_ms": ms}
        for part, both in samples.items()
        for search, ms in zip(tables.SEARCHES, both, strict=True)
    }
    rows |= {"attention, merged": {"samples_ms": [7.0]}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.breakdown(rows).split("\n")]
    assert lines[2] == ["match", "6.00", "1.00", "6.00x"]
    assert lines[4] == ["unmerge", "0.00", "not measured", ""]
    assert lines[5] == ["all three", "6.50", "not measured", ""]
    assert lines[6] == ["attention, merged", "7.00", "", ""]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--variant", "todo+compile", "--ratio", "0.5"], "ratio must not be given for todo.compile alone"),
        (["--variant", "compile", "sdpa", "--options", "tile=8"], "options must not be given for compile, sdpa alone"),
        (["--variant", "tome_fx", "tomesd", "--mode", "regional"], "mode must not be given for tome_fx, tomesd alone"),
        (["--options", "tiles=8"], "options must be NAME=VALUE of tile, .*; got 'tiles=8'"),
        (["--suite", "cpu", "--ratio", "0.5"], "--suite goes with .* alone; --ratio would do nothing"),
        (["--suite", "cpu", "--end-to-end"], "--suite goes with .* alone; --end-to-end would do nothing"),
    ],
)
def test_an_option_that_no_row_heeds_is_refused(given: list[str], message: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(latency, "run", lambda *args, **options: None)  # nothing is measured where it is not
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        latency.main(parser.parse_args(given))


def test_options_of_the_command_line_are_those_of_transform(monkeypatch: Any) -> None:
    tasks: list[Task] = []
    monkeypatch.setattr(latency, "run", lambda given, *args, **options: tasks.extend(given))
    parser = argparse.ArgumentParser()
    latency.add_arguments(parser)
    given = ["--options", "tile=None", "max_downsample=finest", "merge_queries=False", "share_match=True"]
    latency.main(parser.parse_args([*given, "--variant", "tome_fx", "--rounds", "2"]))
    cell = Cell("tiny", 512, options=options(tile=None, max_downsample="finest", merge_queries=False))
    assert tasks == [Task(cell, ("tome_fx",), 2)]
