"""Committed results have their schema, and the pages their tables; the table of support is what tests have shown."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import pytest
from support import table

import tome_fx
from bench import documents, models, plots, report, warm, weights
from bench.cells import Cell

RESULTS = sorted(report.RESULTS.glob("*.json"))


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


def test_only_a_file_with_every_step_of_the_waterfall_makes_a_plot(tmp_path: Path) -> None:
    def entry(side: int, *names: str, dtype: str = "fp32") -> dict[str, Any]:
        rows = {name: {"samples_ms": [1.0]} for name in names}
        return {"cell": Cell("tiny", side, dtype=dtype).stored(), "rows": rows, "bounds": dict.fromkeys(names, 2.0)}

    every = entry(64, *plots.WATERFALL)
    half = entry(64, *plots.WATERFALL, dtype="bf16")
    large = entry(128, "sdpa", "compile", plots.OURS)  # attention that is written out has no memory there
    files = {"all": [every, half, large], "some": [entry(64, "vanilla", "compile", plots.OURS)]}
    results = {name: {"kind": "latency", "cells": cells} for name, cells in files.items()}
    shown = plots.write(results, tmp_path, lambda name: True)
    assert [path.name for path in shown] == ["all-tiny-fp32.png", "all-tiny-bf16.png"]
    assert not plots.write(results, tmp_path, lambda name: False)


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
