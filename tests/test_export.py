"""The other ways through PyTorch's compiler: exported, compiled ahead of time, and from saved artifacts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import finest
from support.models import (
    inputs,
    one_block,
    sdxl,
    two_stages,
)
from torch import Tensor
from torch._inductor.utils import fresh_cache

from tome_fx import set_ratio, transform

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def exportable(model: Any, height: int = 16, width: int = 16) -> tuple[tuple[Tensor], dict[str, Any]]:
    """The inputs as positional and keyword arguments, for a tuple as output."""
    arguments = inputs(model, height, width)
    return (arguments.pop("sample"),), {"return_dict": False, **arguments}


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("build", [two_stages, pytest.param(sdxl, marks=pytest.mark.slow)])
def test_export_takes_the_model_and_gives_what_eager_gives(build: Callable[[], Any], strict: bool) -> None:
    model = transform(build(), ratio=0.5)
    args, kwargs = exportable(model)
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, strict=strict)
        (result,), (expected,) = exported.module()(*args, **kwargs), model(*args, **kwargs)
    bags = [node for node in exported.graph.nodes if "embedding_bag" in str(node.target)]
    assert len(bags) == finest(model)
    assert torch.equal(result, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_may_have_dynamic_sizes(strict: bool) -> None:
    # What torch 2.8 exports cannot say that a size is of several tiles or one.
    tile = 16 if torch.torch_version.TorchVersion(torch.__version__) >= "2.13" else None
    model = transform(one_block(), ratio=0.5, tile=tile)
    args, kwargs = exportable(model, 16, 20)
    free = torch.export.Dim.AUTO
    sizes = {"sample": {2: free, 3: free}, **dict.fromkeys(kwargs)}
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, strict=strict, dynamic_shapes=sizes).module()
        for height, width in ((16, 20), (24, 24), (7, 9)):
            args, kwargs = exportable(model, height, width)
            assert torch.equal(program(*args, **kwargs)[0], model(*args, **kwargs)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_with_a_dynamic_ratio_has_the_one_it_was_exported_at(strict: bool) -> None:
    model = transform(one_block(), ratio=0.5, dynamic_ratio=True)
    set_ratio(model, 0.25)
    args, kwargs = exportable(model)
    with torch.no_grad():
        (expected,) = model(*args, **kwargs)
        program = torch.export.export(model, args, kwargs, strict=strict).module()
        set_ratio(model, 0.5)
        assert torch.equal(program(*args, **kwargs)[0], expected)


LOAD = """
import sys, torch
given = torch.load(sys.argv[2])
(result,) = torch._inductor.aoti_load_package(sys.argv[1])(*given["args"], **given["kwargs"])
assert not {"tome_fx", "diffusers"} & set(sys.modules)
torch.testing.assert_close(result, given["expected"], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch's own
def test_a_package_compiled_ahead_of_time_runs_in_a_process_without_tome_fx(tmp_path: Path) -> None:
    model = transform(one_block(), ratio=0.5)
    args, kwargs = exportable(model)
    with torch.no_grad(), fresh_cache():
        exported = torch.export.export(model, args, kwargs)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "unet.pt2"))
        torch.save({"args": args, "kwargs": kwargs, "expected": model(*args, **kwargs)[0]}, tmp_path / "given.pt")
    subprocess.run([sys.executable, "-c", LOAD, package, str(tmp_path / "given.pt")], check=True, timeout=600)


WARM = """
import sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
sys.path.insert(0, sys.argv[1])
from support.models import one_block, transformer
from tome_fx import transform

artifacts = Path(sys.argv[2])
if artifacts.exists():
    torch.compiler.load_cache_artifacts(artifacts.read_bytes())
model, (image, prompt) = transformer(transform(one_block(), ratio=0.5))
with torch.no_grad():
    torch.compile(model, fullgraph=True)(image, encoder_hidden_states=prompt, return_dict=False)
caches = {**counters["inductor"], **counters["aot_autograd"]}
found = {name: count for name, count in caches.items() if name.endswith(("cache_hit", "cache_miss"))}
if not artifacts.exists():
    artifacts.write_bytes(torch.compiler.save_cache_artifacts()[0])
print(found)
"""


@pytest.mark.slow
def test_a_second_process_with_the_saved_artifacts_compiles_no_graph(tmp_path: Path) -> None:
    tests, artifacts = str(Path(__file__).parent), str(tmp_path / "artifacts")
    printed = []
    for run in ("first", "second"):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / run)}
        command = [sys.executable, "-c", WARM, tests, artifacts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines()[-1])
    assert printed == [
        "{'fxgraph_cache_miss': 1, 'autograd_cache_miss': 1}",
        "{'fxgraph_cache_hit': 1, 'autograd_cache_hit': 1}",
    ]
