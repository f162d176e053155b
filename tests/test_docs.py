"""What README and docs show is true: each Python block runs as it stands, and a reader can take in every line.

The blocks of a page run in order and in one namespace, as those of a session would. `from_pretrained` is diffusers' own
and reads small pipelines (`support.folders`). The one thing in another's place is the compiler: Inductor takes minutes
and is tested elsewhere, so graphs run as they are, with `fullgraph` as the page asks for it. A block that starts with
`>>>` shows what it prints, and that is compared. Links and anchors are checked by `make docs`, which builds the site.
"""

import ast
import doctest
import functools
import inspect
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomesd
import torch
from accelerate import PartialState
from markdown_it import MarkdownIt
from support import folders

import tome_fx

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")  # before a block that cannot be, with the reason
GENERATED = re.compile(r"<!-- bench:(\S+) -->.*?<!-- /bench:\1 -->", re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' Euler scheduler
]


@dataclass(frozen=True)
class Block:
    """Python on a page, and the number of the line before its first."""

    code: str
    line: int


def python_blocks(text: str) -> list[Block]:
    """The blocks to run, in order."""
    found: list[Block] = []
    before = ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type == "fence" and token.info.split()[:1] == ["python"] and not NOT_RUN.search(before):
            assert token.map is not None
            found.append(Block(token.content, token.map[0] + 1))
        before = token.content if token.type == "html_block" else ""
    return found


def run(page: Path) -> None:
    """Run the blocks of a page.

    Raises:
        AssertionError: One fails, or prints something else; says on which line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(page.read_text()):
        try:
            if block.code.startswith(">>>"):
                _run_session(page, block, namespace)
            else:
                exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
            line = lines[-1] if lines else getattr(error, "lineno", None) or block.line + 1
            raise AssertionError(f"{page.name}, line {line}: {type(error).__name__}: {error}") from error


def _run_session(page: Path, block: Block, namespace: dict[str, Any]) -> None:
    session = doctest.DocTestParser().get_doctest(block.code, namespace, page.name, str(page), block.line)
    told: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(verbose=False, optionflags=options).run(session, out=told.append, clear_globs=False)
    if told:
        raise ValueError("".join(told))
    namespace.update(session.globs)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines that pages load."""
    folder = tmp_path_factory.mktemp("models")
    folders.write(folder)
    return folder


@pytest.fixture
def reader(models: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    """In the folder with the pipelines, and with graphs that run without code being generated."""
    monkeypatch.chdir(models)
    monkeypatch.setattr(PartialState, "_shared_state", {})  # where the page on several processes leaves its state
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(
        torch._inductor,
        "aoti_compile_and_package",
        lambda program, package_path: torch.export.save(program, Path(package_path).with_suffix(".pt2")),
    )
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: torch.export.load(path).module())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def pages_to_run() -> list[Any]:
    """The pages that have blocks; those that compile something are slow."""
    found = {page: "".join(block.code for block in python_blocks(page.read_text())) for page in PAGES}
    slow = {page: [pytest.mark.slow] if "torch.compile(" in code else [] for page, code in found.items()}
    return [pytest.param(page, id=page.stem, marks=slow[page]) for page, code in found.items() if code]


@pytest.mark.parametrize("page", pages_to_run())
def test_the_blocks_of_a_page_run(page: Path, reader: None) -> None:
    run(page)


@pytest.mark.slow
def test_two_processes_share_the_images_of_one_by_the_script_of_their_page(models: Path, reader: None) -> None:
    page = ROOT / "docs" / "distributed.md"
    run(page)
    one = taken_images(models)
    (script,) = python_blocks(page.read_text())
    (models / "images.py").write_text(f"{script.code}\nprint(own)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "images.py"]
    told = subprocess.run(torchrun, cwd=models, check=True, timeout=600, capture_output=True, text=True).stdout
    assert len(set(one.values())) == 4
    assert taken_images(models) == one
    assert sorted(map(ast.literal_eval, told.splitlines())) == [
        [(0, "a red circle"), (1, "a blue square")],
        [(2, "a red square"), (3, "a blue circle")],
    ]


def taken_images(folder: Path) -> dict[str, bytes]:
    """The images of a folder, which are there no longer afterwards."""
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    for name in found:
        (folder / name).unlink()
    return found


PAGE = """
# A page

```python
one = 1
```

- In a list:

  ```python
  two = one + 1

  {line}
  ```

```sh
not Python
```
"""


@pytest.mark.parametrize(
    "line, told",
    [
        ("three", "page.md, line 13: NameError"),
        ("(two", "page.md, line 13: SyntaxError"),
        ("assert two == 3", "page.md, line 13: AssertionError"),
        ("def f():\n      raise OSError('no')\n  f()", "page.md, line 14: OSError: no"),
    ],
)
def test_a_block_that_fails_is_told_of_by_page_and_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "page.md").write_text(PAGE.format(line=line))
    with pytest.raises(AssertionError, match=f"^{re.escape(told)}"):
        run(tmp_path / "page.md")


def test_what_a_block_prints_is_compared_with_what_it_shows(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = [1, 2]\n```\n\n```python\n>>> print(x)\n[1, ...]\n```\n")
    run(page)
    page.write_text(page.read_text().replace("[1, ...]", "[2, ...]"))
    with pytest.raises(AssertionError, match=r"(?s)^page.md, line 6: .*Expected:.*\[2, \.\.\.\].*Got:.*\[1, 2\]"):
        run(page)


def test_a_block_is_left_out_for_a_reason_alone() -> None:
    block = "```python\nraise ValueError\n```\n"
    assert not python_blocks(f"<!-- not run: it takes a day -->\n{block}")
    assert python_blocks(f"<!-- not run: -->\n{block}")
    assert python_blocks(f"<!-- not run: it takes a day -->\n\nText.\n\n{block}")


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12 * 1024
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md", "docs"])
def test_lines_are_short_but_for_generated_tables(path: str) -> None:
    limit = 140 if path == "README.md" else 120
    for page in [ROOT / path] if path.endswith(".md") else (ROOT / path).glob("*.md"):
        text = page.read_text()
        lines = GENERATED.sub("", text).splitlines()
        lines += [line for line in text.splitlines() if not line.startswith("|")]
        assert [line for line in lines if len(line) > limit] == [], page


def test_the_page_for_tomesds_users_has_each_of_its_arguments() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "from_tomesd.md").read_text(), re.MULTILINE)
    for name in inspect.signature(tomesd.apply_patch).parameters:
        assert any(f"`{name}" in row for row in rows), name


def test_the_guide_has_each_option_with_its_default() -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(tome_fx.transform).parameters.items()
        if name != "model"
    }
    trees = [ast.parse(block.code) for block in python_blocks((ROOT / "docs" / "guide.md").read_text())]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (given,) = [call.keywords for call in calls if {word.arg for word in call.keywords} >= {"sx", "sy"}]
    assert {word.arg: ast.literal_eval(word.value) for word in given} == defaults


def test_the_reference_has_each_public_name() -> None:
    shown = re.findall(r"^::: tome_fx\.(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(set(tome_fx.__all__) - {"__version__"})
