"""The support table of a test run, as a plugin of pytest.

`pytest --support PATH` writes what each test marked `supports(group, feature, verdict, condition)` showed. Where the
environment has what a test needs it passes or fails; where it is skipped its row says so.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench import documents

VERDICTS = ("works", "works with a condition", "refused")
OUTCOMES = ("passed", "skipped", "failed")  # of the cases of one test, the last of these counts
SUPPORT: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support", type=Path, help="write what the tests showed to be supported, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Each worker of pytest-xdist has a table of its own, and the one that would be written is empty."""
    if config.getoption("support") is not None and config.getoption("numprocesses", None):
        raise pytest.UsageError("--support writes what one process saw: leave -n out, or give -n 0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("supports"):
            _check_row(*marker.args)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" or not report.passed:
        for marker in item.iter_markers("supports"):
            tests = SUPPORT[marker.args[1]]["tests"]
            name = item.nodeid.split("[")[0]
            tests[name] = max(tests.get(name, report.outcome), report.outcome, key=OUTCOMES.index)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("support")
    if path is not None:
        shown = {name: row for name, row in SUPPORT.items() if row["tests"]}
        documents.write(path, documents.new("support", **documents.origin("cuda"), features=shown))


def _check_row(group: str, feature: str, verdict: str, condition: str = "") -> None:
    """A feature has one verdict, however many tests show it, and its condition, or why it is refused."""
    if verdict not in VERDICTS or bool(condition) != (verdict != VERDICTS[0]):
        raise pytest.UsageError(f"supports: {feature}: verdict {verdict!r} with condition {condition!r}")
    row = {"group": group, "verdict": verdict, "condition": condition, "tests": {}}
    if SUPPORT.setdefault(feature, row) | {"tests": {}} != row:
        raise pytest.UsageError(f"supports: {feature} is told of in two ways: {SUPPORT[feature]} and {row}")
