"""The contract of the package as a whole.

A file imports only files to its right: `__init__ > diagnose > explain > schedule > api > capture > inputs > specialize
> trace > passes > rewrite > ops > plan`. One file knows diffusers, the last one does without torch, and each is short
enough to read. Importing tome_fx brings no module that its dependencies do not bring, and leaves every setting of torch
as it is.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tome_fx

ARROW = [
    "__init__",
    "diagnose",
    "explain",
    "schedule",
    "api",
    "capture",
    "inputs",
    "specialize",
    "trace",
    "passes",
    "rewrite",
    "ops",
    "plan",
]
PACKAGE = Path(tome_fx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(source: str) -> set[str]:
    """Every module that a source imports, anywhere in it; names taken from the package itself count as modules."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"tome_fx.{alias.name}" for alias in node.names} if module == "tome_fx" else {module}
    return found


def complaints(name: str, source: str) -> list[str]:
    """What is wrong with the imports and the length of the file `name`.py."""
    if name not in ARROW:
        return [f"{name}.py has no place in the arrow {' > '.join(ARROW)}"]
    wrong = []
    for module in sorted(imports(source)):
        top, _, inner = module.partition(".")
        if not top:
            wrong.append(f"{name}.py imports {module}, a relative path")
        elif top == "tome_fx" and inner not in ARROW[ARROW.index(name) + 1 :]:
            wrong.append(f"{name}.py imports {module}, which is not to its right")
        elif top == "diffusers" and name != "capture":
            wrong.append(f"{name}.py imports {module}; only capture.py knows diffusers")
        elif top == "torch" and name == "plan":
            wrong.append(f"{name}.py imports {module}; it is plain numbers")
    if len(source.splitlines()) > 200:
        wrong.append(f"{name}.py has {len(source.splitlines())} lines, more than one reads at a sitting")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=[file.name for file in FILES])
def test_a_file_imports_only_what_is_to_its_right_and_is_short(file: Path) -> None:
    assert file.parent == PACKAGE, "the package is flat"
    assert not complaints(file.stem, file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name, source, complaint",
    [
        (
            "ops",
            "from tome_fx.rewrite import insert_merge",
            "ops.py imports tome_fx.rewrite, which is not to its right",
        ),
        ("ops", "import tome_fx.ops", "ops.py imports tome_fx.ops, which is not to its right"),
        ("trace", "def f():\n    from tome_fx import api", "trace.py imports tome_fx.api, which is not to its right"),
        ("trace", "from tome_fx import transform", "trace.py imports tome_fx.transform, which is not to its right"),
        ("trace", "import tome_fx", "trace.py imports tome_fx, which is not to its right"),
        ("api", "from .plan import Plan", "api.py imports .plan, a relative path"),
        ("api", "from . import plan", "api.py imports ., a relative path"),
        ("api", "import diffusers.models", "api.py imports diffusers.models; only capture.py knows diffusers"),
        ("plan", "from torch import nn", "plan.py imports torch; it is plain numbers"),
        ("utils", "", "utils.py has no place in the arrow"),
        ("plan", "\n" * 251, "plan.py has 251 lines"),
    ],
)
def test_the_check_of_a_file_sees_what_it_is_for(name: str, source: str, complaint: str) -> None:
    (found,) = complaints(name, source)
    assert found.startswith(complaint)


def test_the_check_of_a_file_lets_the_arrow_pass() -> None:
    assert not complaints("ops", "import torch\nfrom tome_fx import plan\nfrom tome_fx.plan import Plan")
    assert not complaints("capture", "from diffusers import UNet2DConditionModel")


PROBE = """
import json, sys
import torch, torch._dynamo, torch._inductor.config
from diffusers import ControlNetModel, UNet2DConditionModel

def settings():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad": torch.is_grad_enabled(),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark],
        "random state": torch.get_rng_state().tolist(),
        "dynamo": repr(sorted(torch._dynamo.config.get_config_copy().items())),
        "inductor": repr(sorted(torch._inductor.config.get_config_copy().items())),
        "module": [id(torch.nn.Module.__call__), id(torch.nn.Module.__getattr__), id(torch.nn.Module.__setattr__)],
    }

modules, before = set(sys.modules), settings()
import tome_fx
after = settings()
if "--break" in sys.argv:
    torch._dynamo.config.recompile_limit += 1
    after = settings()
print(json.dumps({
    "new": sorted(set(sys.modules) - modules),
    "changed": [name for name in before if before[name] != after[name]],
}))
"""


def probe(*arguments: str) -> dict[str, Any]:
    """What `import tome_fx` adds to and changes in a process that has torch and the two models already."""
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_importing_adds_no_module_that_the_dependencies_do_not_bring_and_changes_no_setting() -> None:
    found = probe()
    new = [module for module in found["new"] if module.partition(".")[0] not in sys.stdlib_module_names]
    assert {module.partition(".")[0] for module in new} <= {"tome_fx", "torch", "tabulate"}
    assert not [module for module in new if module.startswith("diffusers.")]
    assert {f"tome_fx.{name}" for name in ARROW[1:]} <= set(new), "the probe does not see what is imported"
    assert found["changed"] == []


def test_the_probe_sees_a_changed_setting() -> None:
    assert probe("--break")["changed"] == ["dynamo"]
