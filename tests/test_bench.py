"""The bench can tell: slow is shown slower, a graph break is counted, a broken variant is reported and not averaged."""

import argparse
import contextlib
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import table
from support.measuring import interrupt_the_second
from support.models import relative_error, sdxl
from torch import Tensor, nn

import tome_fx
from bench import (
    cold,
    demo,
    documents,
    flops,
    latency,
    measure,
    models,
    peers,
    plots,
    report,
    runs,
    shapes,
    tables,
    variants,
    viz,
    warm,
    weights,
)
from bench.apart import side_by_side
from bench.cases import Case, options
from bench.cells import Cell, Task, suite
from tome_fx.families.skeleton import skeleton

RESULTS = sorted(report.RESULTS.glob("*.json"))


def spin(milliseconds: float) -> Callable[[], Tensor]:
    """A call that takes so long, whatever the machine does beside it."""

    def call() -> Tensor:
        end = time.perf_counter() + milliseconds / 1e3
        while time.perf_counter() < end:
            pass
        return torch.ones(3)

    return call


def compare(calls: dict[str, Callable[[], Tensor]], exact: bool = True, rounds: int = 5) -> dict[str, warm.Row]:
    runs = {name: (lambda call=call: call) for name, call in calls.items()}
    return measure.compare(runs, exact=dict.fromkeys(calls, exact), rounds=rounds, device="cpu", title="test")


def test_a_variant_slowed_on_purpose_is_shown_slower() -> None:
    rows = measure.as_json(compare({"fast": spin(1), "slow": spin(20)}))
    ratio = tables.speedup(rows, "slow", "fast")
    assert ratio is not None
    assert ratio > 2


def fail() -> None:
    raise torch.OutOfMemoryError("spoilt")


def die() -> None:
    os._exit(3)


def prepared(milliseconds: float, first: Callable[[], None] | None = None) -> Callable[[], Tensor]:
    """What a process of its own can be given, and does first."""
    if first:
        first()
    return spin(milliseconds)


def late(then: Callable[[], None]) -> Callable[[], Tensor]:
    """The like, whose third call does it: the first that is timed."""
    calls = iter(range(9))

    def call() -> Tensor:
        if next(calls) == 2:
            then()
        return torch.ones(3)

    return call


@pytest.mark.slow  # seconds for each process to begin
def test_variants_in_processes_of_their_own_are_compared_like_others_and_one_that_dies_takes_none_with_it(
    tmp_path: Path,
) -> None:
    makes = {"fast": partial(prepared, 1), "slow": partial(prepared, 20)}
    makes |= {"failing": partial(prepared, 1, fail), "dying": partial(prepared, 1, die)}
    makes |= {"failing late": partial(late, fail), "dying late": partial(late, die)}
    with side_by_side(makes, "cpu", tmp_path) as runs:
        rows = measure.compare(runs, exact=dict.fromkeys(runs, True), rounds=3, device="cpu", title="test")
        processes = [run.process for run in runs.values()]
    assert [len(row.samples_ms) for row in rows.values()] == [3, 3, 0, 0, 0, 0]
    assert [row.relative_error for row in rows.values()] == [0, 0, None, None, 0, 0]
    spoilt, ended = "OOM", "its process ended with 3"
    assert [row.error for row in rows.values()] == [None, None, spoilt, ended, spoilt, ended]
    assert not any(process.is_alive() for process in processes)


def test_variants_take_turns_in_every_round() -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            order.append(name)
            return torch.ones(1)

        return call

    compare({name: noting(name) for name in "abc"}, rounds=3)
    timed = order[-9:]
    assert timed == ["a", "b", "c"] * 3


def test_a_graph_break_planted_on_purpose_is_counted() -> None:
    def whole(x: Tensor) -> Tensor:
        return x.sin().cos()

    def broken(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    x = torch.randn(8)
    compiled = {f.__name__: torch.compile(f, backend="eager") for f in (whole, broken)}
    rows = compare({name: partial(function, x) for name, function in compiled.items()})
    assert rows["whole"].compiles == warm.Compiles(graphs=1, graph_breaks=0, recompiles=0)
    assert rows["broken"].compiles == warm.Compiles(graphs=2, graph_breaks=1, recompiles=0)


def test_a_recompile_is_counted() -> None:
    compiled = torch.compile(lambda x: x.sin(), backend="eager", dynamic=False)
    with warm.count_compiles() as compiles:
        for size in (3, 4, 3, 5):
            compiled(torch.ones(size))
    assert compiles == warm.Compiles(graphs=3, graph_breaks=0, recompiles=2)


def test_a_variant_that_raises_is_reported_and_the_others_go_on() -> None:
    def fails() -> Tensor:
        raise RuntimeError("no such kernel\nsecond line")

    rows = compare({"good": spin(1), "bad": fails, "also good": spin(1)})
    assert rows["bad"].error == "RuntimeError: no such kernel"
    assert rows["bad"].samples_ms == []
    assert len(rows["good"].samples_ms) == len(rows["also good"].samples_ms) == 5


def test_a_variant_that_raises_while_it_is_timed_keeps_no_samples() -> None:
    calls = iter(range(100))

    def fails_later() -> Tensor:
        if next(calls) >= 4:
            raise ValueError("tired")
        return torch.ones(3)

    rows = compare({"good": spin(1), "late": fails_later})
    assert rows["late"].error == "ValueError: tired"
    assert rows["late"].samples_ms == []
    assert len(rows["good"].samples_ms) == 5


@pytest.mark.parametrize(("output", "message"), [(math.nan, "not finite"), (7.0, "wrong output")])
def test_a_wrong_output_is_no_result(output: float, message: str) -> None:
    rows = compare({"reference": spin(1), "wrong": lambda: torch.full((3,), output)})
    assert message in str(rows["wrong"].error)
    assert rows["wrong"].samples_ms == []


def test_a_broken_first_variant_is_no_reference_for_the_others() -> None:
    rows = compare({"broken": lambda: torch.full((3,), math.nan), "good": spin(1), "also good": spin(1)})
    assert rows["broken"].error
    assert [rows[name].error for name in ("good", "also good")] == [None, None]


def test_a_merging_variant_may_differ() -> None:
    runs = {"reference": lambda: spin(1), "merging": lambda: lambda: torch.full((3,), 2.0)}
    exact = {"reference": True, "merging": False}
    rows = measure.compare(runs, exact=exact, rounds=2, device="cpu", title="test")
    assert rows["merging"].error is None
    assert rows["merging"].relative_error == pytest.approx(1)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_says_so(error: Exception) -> None:
    assert warm.reason(error) == "OOM"


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


def test_every_eager_variant_runs_and_those_that_merge_differ() -> None:
    unet = models.build("tiny")
    given = models.inputs(unet, 128, 2)
    with torch.no_grad():
        names = [name for name, run in runs.RUNS.items() if not run.compiled]
        outputs = {name: variants.predict(runs.prepare(name, unet), given) for name in names}
    assert relative_error(outputs["vanilla"], outputs["sdpa"]) < 1e-4
    for name in ("tomesd", "tomesd+sdpa", "tome_fx"):
        assert relative_error(outputs[name], outputs["sdpa"]) > 1e-4


def test_a_row_has_what_it_heeds_of_its_cells_ratio_and_options_and_its_own() -> None:
    given = options(tile=8, merge_crossattn=True)
    assert runs.RUNS["tomesd+compile"].case(0.5, given) == Case("tomesd", 0.5, options(merge_crossattn=True))
    assert runs.RUNS["todo+compile"].case(0.5, given) == Case("todo", 0.75)
    assert runs.RUNS["v0.1+compile"].case(0.5, given) == Case("v0.1", 0.5, options(merge_crossattn=True))
    kv = runs.RUNS["tome_fx+kv+compile"].case(0.25, options(tile=8, merge_queries=True))
    assert kv == Case("tome_fx", 0.25, options(tile=8, merge_queries=False))
    assert runs.RUNS["compile"].case(0.5, given) == Case()


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


@pytest.mark.parametrize("name", ["sd21", "sdxl", "pixart-shallow", "flux-shallow"])
def test_a_model_to_measure_takes_the_inputs_that_it_is_given(name: str) -> None:
    shapes = skeleton(models.build(name, "meta"))
    result = variants.predict(shapes, models.example(shapes, 32, 32, 1))
    assert result.shape[0] == 1
    assert result.numel() == 4 * 32 * 32 * (4 if name == "flux-shallow" else 2 if name == "pixart-shallow" else 1)


@pytest.mark.parametrize(
    "given",
    [
        options(),
        options(merge_crossattn=True),
        options(merge_crossattn=True, merge_mlp=True),
        options(merge_queries=False),
        options(merge_block=True),
    ],
    ids=str,
)
def test_the_oracle_is_our_graph_with_matching_merging_and_weights_removed(given: Any) -> None:
    unet = models.build("tiny")
    case = Case("oracle", 0.5, given)
    ours, oracle = variants.merged(unet, case), variants.apply(case, unet)
    changed = set()
    for path, module in ours.named_modules():
        if hasattr(module, "graph"):
            pairs = zip(module.graph.nodes, oracle.get_submodule(path).graph.nodes, strict=True)
            changed |= {node.target for node, other in pairs if node.target != other.target}
    names = {function.__name__ for function in changed}
    back = {"merge_queries": {"merged_keys"}, "merge_block": {"merge", "changed"}}
    assert names == {"match", "weights_where_taken"} | next(
        (back[name] for name, _ in given if name in back), {"merge", "unmerge"}
    )
    assert masks(oracle) == masks(ours)
    assert set(masks(oracle).values()) - {None}


def masks(unet: nn.Module) -> dict[str, Any]:
    """The shapes of the masks that self-attention is given, None for none, by its path."""
    seen: dict[str, Any] = {}

    def look(path: str, given: dict[str, Any]) -> None:
        mask = given["attention_mask"]
        seen[path] = None if mask is None else mask.shape

    for path, module in unet.named_modules():
        if path.endswith("attn1"):
            module.register_forward_pre_hook(lambda m, args, given, path=path: look(path, given), with_kwargs=True)
    with torch.no_grad():
        assert unet(**models.inputs(unet, 128, 2)).sample.isfinite().all()
    return seen


def test_peers_act_at_the_finest_level_that_has_attention() -> None:
    unet = sdxl()
    assert {site.downsample for site in peers.finest_sites(unet)} == {2}
    assert variants.apply(Case("tomesd", 0.5), unet)._tome_info["args"]["max_downsample"] == 2


def attended(unet: nn.Module, case: Case) -> dict[str, tuple[int, ...]]:
    """What self-attention's projections are given, by their path."""
    result, seen = variants.apply(case, unet), {}
    for path, module in result.named_modules():
        if path.endswith(("attn1.to_k", "attn1.to_q")):
            module.register_forward_hook(lambda m, args, out, path=path: seen.update({path: tuple(args[0].shape[:2])}))
    with torch.no_grad():
        result(**models.inputs(unet, 128, 1))
    return seen


FINEST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"


def test_todo_halves_keys_and_values_along_both_sides_at_the_finest_level() -> None:
    seen = attended(models.build("tiny"), Case("todo", 0.75))
    assert (seen[f"{FINEST}.to_q"], seen[f"{FINEST}.to_k"]) == ((1, 256), (1, 64))
    assert (seen[f"{MIDDLE}.to_q"], seen[f"{MIDDLE}.to_k"]) == ((1, 64), (1, 64))


def test_hidiffusion_attends_in_four_windows_at_the_finest_level() -> None:
    seen = attended(models.build("tiny"), Case("hidiffusion", 0.75))
    assert (seen[f"{FINEST}.to_q"], seen[f"{FINEST}.to_k"]) == ((4, 64), (4, 64))
    assert (seen[f"{MIDDLE}.to_q"], seen[f"{MIDDLE}.to_k"]) == ((1, 64), (1, 64))


@pytest.mark.parametrize("shift", range(peers.WindowProcessor.STRIDES))
def test_a_window_is_half_of_the_grids_sides_and_goes_round_its_edges(shift: int) -> None:
    attn: Any = models.build("tiny").get_submodule(FINEST)
    side = 8
    tokens = torch.randn(2, side * side, 32, generator=torch.Generator().manual_seed(0))
    window = (torch.arange(side) - shift) % side // (side // 2)  # a stride is a quarter of a window of 4: one token
    number = (window[:, None] * 2 + window).flatten()
    mask = torch.where(number[:, None] == number, 0.0, -torch.inf).expand(2 * attn.heads, -1, -1)
    expected = attn.processor(attn, tokens, attention_mask=mask)
    found = peers.WindowProcessor(attn.processor, shift)(attn, tokens, None)
    assert torch.allclose(found, expected, atol=1e-6)
    assert relative_error(found, attn(tokens)) > 1e-4


def test_stock_in_half_precision_has_weights_of_its_own_and_is_near() -> None:
    unet = models.build("tiny")
    given = models.inputs(unet, 128, 2)
    with torch.no_grad():
        stock = variants.predict(unet, given)
        outputs = {name: variants.predict(variants.apply(Case(name), unet), given) for name in ("bf16", "fp16")}
        assert torch.equal(variants.predict(unet, given), stock)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    errors = {name: relative_error(output, stock) for name, output in outputs.items()}
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    assert 0 < errors["fp16"] < errors["bf16"] < 0.05


def test_flops_of_ours_are_those_that_explain_tells() -> None:
    unet = models.build("tiny")
    for case in (Case("tome_fx", 0.5, options(tile=8)), Case("tome_fx", 0.25, options(tile=None, max_downsample=8))):
        report = tome_fx.explain(variants.merged(unet, case), 32, 32)
        assert flops.counted(case, skeleton(unet), side=32) == report.flops_after
    assert flops.counted(Case(), skeleton(unet), side=32) == report.flops_before


def test_flops_of_a_schedule_are_the_mean_of_its_steps() -> None:
    shapes = skeleton(models.build("tiny"))
    counted = partial(flops.counted, shapes=shapes, side=16)
    late = counted(Case("tome_fx", 0, (), ((0.75, 0.5),)), steps=4)
    assert late == pytest.approx((3 * counted(Case()) + counted(Case("tome_fx", 0.5))) / 4)


def test_savings_are_told_of_the_model_and_of_others_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "BESIDE", {"unet": ("tiny",), "transformer": ()})
    saved = flops.saving("mine", sdxl(), 4)(Case("todo", 0.75))
    assert saved.keys() == {"mine", "tiny"}
    assert 0 < saved["mine"] < saved["tiny"] < 1
    assert set(flops.saving("mine", sdxl(), 4)(Case("bf16")).values()) == {0}


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
    cpu = {(task.cell.model, task.cell.resolution): task for task in suite("cpu", "cpu")}
    assert cpu.keys() == {(model, side) for model in ("tiny", "sd15") for side in (512, 768, 1024)}
    asked = {"compile", "v0.1+compile", "tome_fx+compile", "tome_fx+dynamic+compile", "tome_fx+kv+compile"}
    asked |= {"oracle+compile", "todo+compile", "hidiffusion+compile", "tomesd+compile"}
    assert all(asked <= set(task.names) for task in cpu.values())
    assert not {"vanilla", "tomesd"} & set(cpu["sd15", 1024].names)


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
def test_a_cell_is_measured_in_processes_of_their_own_with_its_parts(tmp_path: Path) -> None:
    task = Task(Cell("tiny", 64, guidance=False), ("sdpa", "tome_fx"), 1)
    (entry,) = latency.run([task], tmp_path / "run.json", breakdown=True, apart=True)["cells"]
    assert entry["apart"]
    assert all(len(row["samples_ms"]) == 1 for row in entry["rows"].values())
    assert all(len(row["samples_ms"]) == 10 for row in entry["breakdown"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert not multiprocessing.active_children()


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


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_have_the_schema(path: Path) -> None:
    document = documents.read(path)
    assert document["schema"] == documents.SCHEMAS.get(document["kind"], 1)
    if document["kind"] == "published":  # by others: each says where
        assert all("arXiv" in row["source"] and row["speedups"] for row in document["rows"])
        return
    for entry in document.get("cells", [document]):
        assert {"cpu", "cores", "gpu", "torch", "diffusers", "tomesd", "python", "commit"} <= entry["machine"].keys()
    filled_by = document["rows"] if document["kind"] == "quality" else document.get("cells", [document])
    assert document["kind"] == "prototypes" or all(entry["argv"] for entry in filled_by)  # which no command measures
    if document["kind"] == "cold":
        for modes in document["models"].values():
            for ways in modes.values():
                assert len({len(seconds) for seconds in ways.values()}) == 1
                assert all(second > 0 for seconds in ways.values() for second in seconds)
    if document["kind"] not in ("latency", "demo", "weights"):
        return  # others have no timed calls, or are held in test_quality and by the report itself
    groups = [entry["rows"] for entry in document.get("cells", [])] or [document["rows"]]
    for entry in document.get("cells", []):
        if document["kind"] == "weights":
            weights.Cell(**entry["cell"])
            assert entry["kernels"].keys() == entry["rows"].keys()
            continue
        assert entry["complete"]
        assert entry["bounds"].keys() == entry["rows"].keys()
        Cell.read(entry["cell"])
    for rows in groups:
        assert rows
        for row in rows.values():
            parsed = warm.Row(**{**row, "compiles": row["compiles"] and warm.Compiles(**row["compiles"])})
            assert bool(parsed.samples_ms) != bool(parsed.error)
            assert all(sample > 0 for sample in parsed.samples_ms)


def test_there_are_results() -> None:
    assert RESULTS


def test_the_pages_have_the_tables_of_the_committed_results() -> None:
    report.main(argparse.Namespace(check=True))


def test_a_page_out_of_date_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = report.fill(report.pages(report.ROOT), "quality", "another table")
    monkeypatch.setattr(report, "pages", lambda root: texts)
    with pytest.raises(SystemExit, match=r"^docs/quality.md: out of date"):
        report.main(argparse.Namespace(check=True))


def test_markers_that_are_missing_are_named() -> None:
    with pytest.raises(ValueError, match="found no markers <!-- bench:gpu -->"):
        report.fill({Path("README.md"): "text"}, "gpu", "table")


def test_levels_pay_by_rule_where_they_do_by_the_estimates_for_the_card_that_the_rule_is_made_for() -> None:
    document = documents.read(report.RESULTS / "code-levels.json")
    unet = models.build(document["model"], "meta")
    side = document["resolution"] // models.LATENT
    rule = {level.height: level.pays for level in tome_fx.explain(tome_fx.transform(unet), side, side).levels}
    estimated = {}
    for level in document["levels"]:
        if level["card"] == "sm_90":
            stock, merged = (sum(row["estimated_us"].values()) for row in level["rows"].values())
            estimated[level["image"][2]] = merged < stock
    assert rule == estimated == {64: True, 32: False, 16: False, 8: False}


@pytest.mark.slow
def test_the_demo_counts_compiles_of_a_sweep() -> None:
    first, again = demo.sweep("tome_fx+compile", models.build("tiny"))
    assert (first, again) == (len(demo.RATIOS), 0)


def test_the_demo_pictures_no_variant_that_failed_and_puts_the_unet_back(tmp_path: Path, monkeypatch: Any) -> None:
    pipe = shapes.pipeline()
    own, prepare = pipe.unet, runs.prepare
    columns: dict[str, Any] = {}

    def eager(name: str, unet: Any, **options: Any) -> Any:
        if name.startswith("tomesd"):
            raise RuntimeError("no such variant")
        return prepare("tome_fx" if name.startswith("tome_fx") else "sdpa", unet, **options)

    monkeypatch.setattr(shapes, "pipeline", lambda: pipe)
    monkeypatch.setattr(demo, "prepare", eager)
    monkeypatch.setattr(demo, "sweep", lambda name, unet: (0, 0))
    monkeypatch.setattr(viz, "grid", lambda path, images, rows: columns.update(images))
    monkeypatch.setattr(demo, "LATENTS", 16)
    document = demo.run(1, 1, 1, tmp_path / "demo.json")
    assert list(columns) == ["sdpa, ratio 0", "tome_fx, ratio 0.5"]
    assert all(images[0].shape == (3, 128, 128) for images in columns.values())
    assert document["rows"]["tomesd+compile"]["error"] == "RuntimeError: no such variant"
    assert pipe.unet is own


def test_only_a_file_with_every_step_of_the_waterfall_makes_a_plot(tmp_path: Path) -> None:
    def entry(side: int, *names: str) -> dict[str, Any]:
        rows = {name: {"samples_ms": [1.0]} for name in names}
        return {"cell": Cell("tiny", side).stored(), "rows": rows, "bounds": dict.fromkeys(names, 2.0)}

    every = entry(64, *plots.WATERFALL)
    large = entry(128, "sdpa", "compile", plots.OURS)  # attention that is written out has no memory there
    files = {"all": [every, large], "some": [entry(64, "vanilla", "compile", plots.OURS)]}
    results = {name: {"kind": "latency", "cells": cells} for name, cells in files.items()}
    shown = plots.write(results, tmp_path, lambda name: True)
    assert [path.name for path in shown] == ["all-tiny.png"]
    assert not plots.write(results, tmp_path, lambda name: False)


def test_seconds_to_compile_are_taken_from_both_ways_in_each_round(tmp_path: Path, monkeypatch: Any) -> None:
    seconds = iter([99.0, 10.0, 11.0, 4.0, 2.0, 18.0, 20.0, 6.0, 4.0])  # the first is not counted; the order alternates
    monkeypatch.setattr(cold, "compile_seconds", lambda model, inputs: next(seconds))
    document = cold.run(["tiny"], 64, 2, tmp_path / "cold.json")
    assert document["models"]["tiny"]["default"] == {"stock": [10.0, 20.0], "tome_fx": [11.0, 18.0]}
    assert document["models"]["tiny"]["regional"] == {"stock": [4.0, 4.0], "tome_fx": [2.0, 6.0]}
    assert documents.read(tmp_path / "cold.json") == document
    lines = cold.table(document).splitlines()
    row = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert row == ["tiny", "whole", "15.0", "14.5", "1.00x", "0.90 - 1.10", "2"]
    assert "block by block" in lines[3]


def test_the_support_table_names_tests_that_there_are() -> None:
    features = documents.read(report.RESULTS / "support.json")["features"]
    assert len(features) > 40
    for row in features.values():
        assert row["tests"]
        for name in row["tests"]:
            path, function = name.split("::")
            assert f"def {function}(" in (report.ROOT / path).read_text()


def test_the_support_table_names_every_test_that_shows_a_feature(request: pytest.FixtureRequest) -> None:
    features = documents.read(report.RESULTS / "support.json")["features"]
    for item in request.session.items:  # of this run, which are all of them where CI runs
        for marker in item.iter_markers("supports"):
            group, feature, verdict, condition = (*marker.args, "")[:4]
            row = {"group": group, "verdict": verdict, "condition": condition}
            known = features.get(feature, {"tests": {}})
            assert known | row == known, f"{feature}: record the table again"
            assert item.nodeid.split("[")[0] in known["tests"], f"{feature}: record the table again"


@pytest.mark.parametrize("processes", [None, 0, 2])
def test_a_support_table_is_not_recorded_in_several_processes(
    processes: int | None, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytestconfig.option, "support", Path("support.json"))
    monkeypatch.setattr(pytestconfig.option, "numprocesses", processes, raising=False)
    expected = pytest.raises(pytest.UsageError, match="leave -n out") if processes else contextlib.nullcontext()
    with expected:
        table.pytest_configure(pytestconfig)


def test_a_feature_whose_test_failed_makes_no_table() -> None:
    row = {"group": "a", "verdict": "works", "condition": "", "tests": {"tests/a.py::test_a": "failed"}}
    with pytest.raises(ValueError, match="LoRA: a test failed"):
        report.support({"LoRA": row})
    assert "its test was skipped" in report.support({"LoRA": {**row, "tests": {"tests/a.py::test_a": "skipped"}}})
