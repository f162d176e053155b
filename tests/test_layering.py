"""The contract of the package as a whole.

A layer imports only from layers to its right: `__main__ > __init__ > viz > tools > api > families > graph > ops >
plan`, and no files import one another in a circle. `families` alone knows diffusers, `plan` does without torch.
Importing tome_fx brings no module that diffusers' models do not bring, so no pipelines, no tables and no pictures, and
leaves every setting of torch as it is.
"""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tome_fx

LAYERS = ["__main__", "__init__", "viz", "tools", "api", "families", "graph", "ops", "plan"]
OF_THE_COMMAND = {"tome_fx.__main__", "tome_fx.families.folders", "tome_fx.tools.info"}
PACKAGE = Path(tome_fx.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module(file: Path) -> str:
    """The file's name as it is imported, without the package's: `graph.trace`, `ops`."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imports(source: str) -> set[str]:
    """Every module that a source imports, anywhere in it; names taken from one of our packages count as modules."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            inner = {f"{name}.{alias.name}" for alias in node.names}
            known = {f"tome_fx.{module(file)}" for file in FILES}
            found |= inner if name == "tome_fx" else (inner & known or {name})
    return found


def complaints(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the module `name`."""
    layer = name.partition(".")[0]
    if layer not in LAYERS:
        return [f"{name} has no place in the arrow {' > '.join(LAYERS)}"]
    wrong = []
    for imported in sorted(imports(source)):
        top, _, inner = imported.partition(".")
        target = inner.partition(".")[0]
        folder = "." in name or (PACKAGE / name).is_dir()  # whose files may import one another
        allowed = LAYERS[LAYERS.index(layer) + (not folder) :]
        if not top:
            wrong.append(f"{name} imports {imported}, a relative path")
        elif top == "tome_fx" and target not in allowed:
            wrong.append(f"{name} imports {imported}, which is not to its right")
        elif top == "diffusers" and layer != "families":
            wrong.append(f"{name} imports {imported}; only families knows diffusers")
        elif top == "torch" and layer == "plan":
            wrong.append(f"{name} imports {imported}; it is plain numbers")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=[module(file) for file in FILES])
def test_a_file_imports_only_what_is_to_its_right(file: Path) -> None:
    assert not complaints(module(file), file.read_text(encoding="utf-8"))


def test_no_files_import_one_another_in_a_circle() -> None:
    known = {f"tome_fx.{module(file)}" for file in FILES}
    graph = {f"tome_fx.{module(file)}": imports(file.read_text(encoding="utf-8")) & known for file in FILES}
    assert sum(map(len, graph.values())) > len(FILES), "the check does not see what is imported"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "name, source, complaint",
    [
        ("ops", "from tome_fx.graph.rewrite import insert_merge", "ops imports tome_fx.graph.rewrite, which is not to"),
        ("plan", "import tome_fx.plan", "plan imports tome_fx.plan, which is not to its right"),
        ("graph.trace", "def f():\n    from tome_fx import api", "graph.trace imports tome_fx.api, which is not to"),
        ("graph.trace", "from tome_fx import transform", "graph.trace imports tome_fx.transform, which is not to its"),
        ("graph.trace", "import tome_fx", "graph.trace imports tome_fx, which is not to its right"),
        ("api", "from tome_fx.tools import explain", "api imports tome_fx.tools.explain, which is not to its right"),
        ("api", "from .plan import Plan", "api imports .plan, a relative path"),
        ("api", "from . import plan", "api imports ., a relative path"),
        ("api", "import diffusers.models", "api imports diffusers.models; only families knows diffusers"),
        ("plan", "from torch import nn", "plan imports torch; it is plain numbers"),
        ("utils", "", "utils has no place in the arrow"),
    ],
)
def test_the_check_of_a_file_sees_what_it_is_for(name: str, source: str, complaint: str) -> None:
    (found,) = complaints(name, source)
    assert found.startswith(complaint)


def test_the_check_of_a_file_lets_the_arrow_pass() -> None:
    assert not complaints("ops", "import torch\nfrom tome_fx import plan\nfrom tome_fx.plan import Plan")
    assert not complaints("graph.specialize", "from tome_fx.graph.trace import trace\nfrom tome_fx.graph import trace")
    assert not complaints("families.unet", "from diffusers import UNet2DConditionModel")


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


def test_importing_adds_no_module_that_models_of_diffusers_do_not_bring_and_changes_no_setting() -> None:
    found = probe()
    new = [module for module in found["new"] if module.partition(".")[0] not in sys.stdlib_module_names]
    assert {module.partition(".")[0] for module in new} <= {"tome_fx", "torch"}
    assert not [module for module in new if module.startswith("diffusers.")]
    assert {f"tome_fx.{module(file)}" for file in FILES} - {"tome_fx.__init__"} - OF_THE_COMMAND <= set(new), (
        "the probe does not see what is imported"
    )
    assert found["changed"] == []


@pytest.mark.slow
def test_the_probe_sees_a_changed_setting() -> None:
    assert probe("--break")["changed"] == ["dynamo"]
