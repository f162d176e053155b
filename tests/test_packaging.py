"""What is built, and what is asked of others: the wheel is the package alone, and every range of versions is tried."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import tome_fx

ROOT = Path(tome_fx.__file__).parents[1]
SOURCES = {str(file.relative_to(ROOT)) for file in (ROOT / "tome_fx").rglob("*.py")} | {"tome_fx/py.typed"}
OF_THE_BUILD = r"tome_fx-[^/]+/(PKG-INFO|setup\.cfg|tome_fx\.egg-info/.*)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of a copy of the repository, with all that must not be in them."""
    copy, folder = tmp_path_factory.mktemp("copy") / "repository", tmp_path_factory.mktemp("dist")
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "out")
    )
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def metadata(built: Path) -> Any:
    """What the wheel says of itself."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        return message_from_string(wheel.read(name).decode())


def test_the_wheel_holds_the_package_and_the_sdist_what_it_is_built_from(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if not re.match(r"tome_fx-[^/]+\.dist-info/", name)} == SOURCES
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {member.name for member in sdist.getmembers() if member.isfile()}
    names = {name.partition("/")[2] for name in names if not re.fullmatch(OF_THE_BUILD, name)}
    assert names == SOURCES | {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}

    found = metadata(built)
    assert found["Version"] == tome_fx.__version__
    assert found["License-Expression"] == "MIT"
    assert found["Author"] == "tome_fx contributors"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert found.get_all("Provides-Extra") == ["viz", "bench", "dev"]
    assert found.get_all("Project-URL") is None


def asked(built: Path, extra: str) -> dict[str, Requirement]:
    """What the package asks for with an extra, by name."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, metadata(built).get_all("Requires-Dist")):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.name == "tome-fx":  # an extra of its own
            for other in requirement.extras:
                found |= asked(built, other)
        else:
            found[requirement.name.lower()] = requirement
    return found


def pinned(name: str) -> dict[str, str]:
    """The versions of a requirements file."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text.lower(), flags=re.MULTILINE))


@pytest.mark.parametrize("file", ["requirements-dev.txt", "requirements-floor.txt"])
def test_every_range_holds_the_versions_that_are_tested(file: str, built: Path) -> None:
    versions = pinned(file)
    extra = "dev" if file == "requirements-dev.txt" else "bench"  # the oldest are tested, not measured or documented
    assert asked(built, "viz").keys() < asked(built, "bench").keys() <= asked(built, extra).keys() <= versions.keys()
    for name, requirement in asked(built, extra).items():
        assert requirement.specifier.contains(versions[name]), requirement


def test_the_extra_bench_is_what_bench_imports(built: Path) -> None:
    imported = set()
    for file in (ROOT / "bench").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    imported -= {*sys.stdlib_module_names, "bench", "tome_fx", "triton"}  # the last comes with a torch for GPUs
    distributions = packages_distributions()
    assert {distributions[name][0].lower() for name in imported} == asked(built, "bench").keys()


def test_the_workflow_does_what_ci_does_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make ${{ matrix.target }}"]
    targets = {entry["target"] for entry in job["strategy"]["matrix"]["include"]}
    assert targets >= set(re.findall(r"^make (\S+)$", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)) > set()
