"""What waits for a GPU is one command: it goes on where it was stopped, whatever fails, and its JSON becomes tables."""

import argparse
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.measuring import interrupt_the_second

from bench import attention, documents, gpu, latency, measure, models, parts, quality, report, warm, weights
from bench.cells import Cell, Task, suite
from tome_fx import ops


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled elsewhere runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def writing(path: Path) -> gpu.Step:
    """A step that has something left until it has written the file."""
    return gpu.Step(path.name, ("-c", f"open({str(path)!r}, 'x')"), lambda: not path.exists())


def test_a_step_that_fails_stops_no_other_and_what_is_done_is_not_done_again(tmp_path: Path, capsys: Any) -> None:
    one, other = (writing(tmp_path / name) for name in ("one", "other"))
    broken = gpu.Step("broken", ("-c", "raise SystemExit(3)"), lambda: True)
    assert gpu.run([one, broken, other]) == ["broken: ended with 3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
    assert capsys.readouterr().out.count("===") == 3
    assert gpu.run([one, other]) == []
    assert not capsys.readouterr().out


def test_a_run_ends_in_time_and_says_what_is_left(tmp_path: Path) -> None:
    endless = gpu.Step("endless", ("-c", "import threading; threading.Event().wait()"), lambda: True)
    assert gpu.run([endless, writing(tmp_path / "file")], 0.2) == ["endless: out of time", "file: not begun"]
    assert not list(tmp_path.iterdir())


def test_nothing_that_a_step_started_outlives_it(tmp_path: Path) -> None:
    path = tmp_path / "child"
    code = f"""
import os, threading
child = os.fork()
if child:
    open({str(path)!r}, "w").write(str(child))
    os._exit(0)
threading.Event().wait()
"""
    assert gpu._run(("-c", code), None) == 0
    try:
        process = os.pidfd_open(int(path.read_text()))
    except ProcessLookupError:
        return  # it is dead, and buried
    with open(process) as ending:
        assert select.select([ending], [], [], 30)[0], "it lives"


def test_each_step_asks_for_all_that_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(latency, "run", lambda tasks, path, **options: asked.append((*tasks, path, options)))
    monkeypatch.setattr(weights, "run", lambda cells, path, rounds: asked.append((cells, path, rounds)))
    monkeypatch.setattr(weights, "table", lambda document: "")
    monkeypatch.setattr(quality, "add_times", lambda *given: asked.append(given))
    monkeypatch.setattr(quality, "table", lambda document: "")
    first, *rest = gpu.steps(tmp_path, gpu.PLAN)
    assert first.command[:4] == ("-m", "pytest", "-m", "gpu")
    for step in rest:
        module = {"latency": latency, "weights": weights, "quality": quality}[step.command[2]]
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        module.main(parser.parse_args(step.command[3:]))
    cells = weights.cells(weights.TOKENS, dtype="fp16", device="cuda")
    assert {cell.width for cell in cells} == {40, 64, 80, 160}
    assert asked == [
        (cells, tmp_path / "weights.json", weights.ROUNDS),
        (tmp_path / "quality.json", 128, quality.ROUNDS, "cuda", "fp16"),
        *(
            (task, tmp_path / f"{name}.json", {"breakdown": True, "apart": True})
            for name in gpu.PLAN.suites
            for task in suite(name, "cuda")
        ),
    ]


def test_times_are_left_until_the_recorded_rows_have_those_of_the_device(tmp_path: Path) -> None:
    (step,) = (step for step in gpu.steps(tmp_path, gpu.PLAN) if step.name == "times of quality")
    assert step.left()
    path = tmp_path / "quality.json"
    document = documents.read(path)
    assert document["rows"] == documents.read(gpu.RECORDED)["rows"]
    for device, left in (("cpu", True), ("cuda", False)):
        documents.write(path, document | {"timed": {"latents": 128, "device": device, "dtype": "fp16"}})
        assert step.left() == left


def test_a_cell_is_left_until_all_of_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "of_a_site", lambda *given: {})
    task, path = Task(Cell("tiny", 64), ("sdpa",), 1), tmp_path / "run.json"
    assert latency.left(task, path)
    latency.run([task], path)
    assert not latency.left(task, path)
    assert latency.left(task, path, breakdown=True)
    latency.run([task], path, breakdown=True)
    assert not latency.left(task, path, breakdown=True)
    assert latency.left(Task(task.cell, ("sdpa", "tome_fx"), 1), path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]  # nothing that was compiled is kept


def compiling(log: list[str], interrupted: bool = False) -> Callable[[], warm.Call]:
    """Notes what is in the cache when it is called first, and leaves a file there."""

    def call() -> torch.Tensor:
        cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        log.append(",".join(sorted(path.name for path in cache.iterdir())))
        (cache / "code").touch()
        if interrupted:
            raise KeyboardInterrupt
        return torch.ones(1)

    return lambda: call


def test_what_was_compiled_for_a_cell_that_was_stopped_is_there_when_it_goes_on(tmp_path: Path) -> None:
    log: list[str] = []
    common: dict[str, Any] = {"exact": None, "rounds": 0, "device": "cpu", "title": "", "kept": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        measure.compare({"a, or": compiling(log), "b": compiling(log, interrupted=True)}, **common)
    assert log == ["", "code", ""]  # two calls of the first row, one of the second
    log.clear()
    cold = (tmp_path / "a-or" / warm.COLD).read_text()
    rows = measure.compare({name: compiling(log) for name in ("a, or", "b")}, **common)
    assert log[:4] == ["code,cold", "code,cold", "", "code"]  # what was stopped in the middle starts anew
    assert rows["a, or"].first_s == float(cold)


@pytest.mark.usefixtures("uncompiled")
def test_a_part_of_a_site_that_finds_no_memory_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(*given: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    # of the command alone, for graphs of models that are traced meanwhile stay
    monkeypatch.setattr(parts, "ops", SimpleNamespace(match=ops.match, merge=merge, unmerge=ops.unmerge))
    with torch.no_grad():
        cell = Cell("tiny", 64, guidance=False)
        makes = parts.of_a_site(cell, models.build)
        rows = measure.compare(makes, exact=None, rounds=1, device="cpu", title="parts", kept=tmp_path)
    failed = {name for name, row in rows.items() if row.error == warm.OUT_OF_MEMORY}
    assert failed == {name for name in rows if "merge" in name}
    assert all(row.samples_ms for name, row in rows.items() if name not in failed)


SMALL = [weights.Cell(width, 16, batch=1) for width in (40, 64)]


@pytest.fixture
def without_flex(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention is for compilers; here it finds no memory."""

    def by_score(*inputs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(attention, "by_score", by_score)
    monkeypatch.setitem(attention.FORMS, "FlexAttention", by_score)


@pytest.mark.usefixtures("without_flex")
def test_weights_go_on_where_they_were_stopped_and_become_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, measured = tmp_path / "weights.json", interrupt_the_second(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        weights.run(SMALL, path, 2)
    assert weights.left(SMALL, path) == SMALL[1:]
    document = weights.run(SMALL, path, 2)
    assert measured == [str(SMALL[0]), str(SMALL[1]), str(SMALL[1])]
    assert document == documents.read(path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in weights.table(document).splitlines()[2:]]
    assert [line[:3] for line in lines] == [[str(c.width), "16", form] for c in SMALL for form in attention.FORMS]
    assert [line[3] for line in lines[:4]] == ["flash", "flash", "flash", "its own"]
    assert lines[3][4:6] == [warm.OUT_OF_MEMORY, ""]
    assert all(float(line[4]) > 0 and line[5].endswith(")") for line in lines[1:3])
    text = report.section("weights", document)
    assert all(part in text for part in (weights.NOTE, "Batch 1, 8 heads, fp32 on cpu", weights.table(document)))


@pytest.mark.slow
def test_every_form_of_weights_computes_the_same(tmp_path: Path) -> None:
    (entry,) = weights.run(SMALL[:1], tmp_path / "weights.json", 1)["cells"]
    errors = {form: row["relative_error"] for form, row in entry["rows"].items()}
    assert errors.pop(attention.PLAIN) is None
    assert len(errors) == 3
    assert all(error < 1e-5 for error in errors.values())
    with torch.no_grad():
        inputs = weights.example(SMALL[0])
        assert not torch.allclose(attention.plain(*inputs), attention.by_mask(*inputs), rtol=1e-2)


def test_the_kernels_of_cards_are_told_of_each_form() -> None:
    lines = attention.chosen().splitlines()[4:]
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[3:-1] for line in lines}
    kernels = {(card.split(",")[0], int(width)): [cell.strip() for cell in row] for (card, width), row in rows.items()}
    assert len(kernels) == 12
    assert kernels["sm_80", 40] == ["flash, made for 64", "efficient", "flash, made for 64"]
    assert kernels["sm_89", 64] == ["flash, made for 64", "efficient", "flash, made for 96"]
    assert kernels["sm_90", 80] == ["cudnn"] * 3


def test_a_page_with_other_kernels_than_those_of_cards_is_out_of_date(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = report.fill(report.pages(report.ROOT), "attention-kernels", attention.chosen().replace("cudnn", "flash"))
    monkeypatch.setattr(report, "pages", lambda root: texts)
    with pytest.raises(SystemExit, match=r"^docs/cuda\.md: out of date"):
        report.main(argparse.Namespace(check=True))


XML = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_one"/>
<testcase classname="tests.test_a" name="test_two[1]"><failure message="no"/></testcase>
<testcase classname="tests.test_b" name="test_three"><skipped/></testcase>
<testcase classname="" name="tests.test_c"><error/></testcase>
</testsuite></testsuites>"""


def test_the_outcome_of_the_tests_is_recorded_and_told(tmp_path: Path) -> None:
    step = gpu.steps(tmp_path, gpu.REHEARSAL)[0]
    step.then()
    assert step.left()  # they were ended before they were done
    (tmp_path / "tests.xml").write_text(XML)
    step.then()
    assert step.left()  # some failed
    document = documents.read(tmp_path / "tests.json")
    documents.write(tmp_path / "tests.json", document | {"failed": []})
    assert not step.left()
    text = report.section("tests", document)
    assert "1 passed, 1 skipped" in text
    assert text.splitlines()[-2:] == ["- failed: `tests.test_a::test_two[1]`", "- failed: `::tests.test_c`"]
    assert report.machine(document["machine"]) in text


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    with pytest.raises(SystemExit, match=f"{sys.executable} has no GPU: use another Python, or --rehearse"):
        gpu.main(parser.parse_args([]))


def test_what_is_left_is_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    given: list[float | None] = []
    outcomes = iter([["tests: out of time"], []])

    def run(todo: Any, seconds: float | None) -> list[str]:
        given.append(seconds)
        return next(outcomes)

    monkeypatch.setattr(gpu, "run", run)
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    common = ["--rehearse", "--folder", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="left for the same command:\ntests: out of time"):
        gpu.main(parser.parse_args([*common, "--minutes", "9"]))
    gpu.main(parser.parse_args(common))
    assert given == [9 * 60, None]
    assert capsys.readouterr().out.endswith(f"all is in {tmp_path / 'out'}\n")
