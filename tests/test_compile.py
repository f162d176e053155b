"""The contract under `torch.compile`: the whole model is one graph, and it is compiled no oftener than it must be.

One compile per ratio and shape: none over steps, prompts and seeds, none on coming back to a ratio, and block by
block no more than the stock model takes. Compiles are counted by the backend, which dynamo calls once per graph.
No limit of dynamo's is raised for it.
"""

import contextlib
import copy
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import (
    blocks,
    controlnet,
    gligen,
    inputs,
    mask,
    objects,
    one_block,
    one_stage,
    output,
    relative_error,
    sd15,
    sd21,
    sdxl,
    transformers,
    two_stages,
)
from support.wrapped import wrapped
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tome_fx import ops, set_ratio, transform
from tome_fx.families.unet import find_sites
from tome_fx.graph import specialize

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

UNETS = [sd15, sd21, sdxl]
EVERYTHING: dict[str, Any] = {"max_downsample": 8, "merge_crossattn": True, "merge_mlp": True, "prop_attn": True}


def merges(counter: Any) -> list[int]:
    """How many merges each graph that reached the backend holds, in order."""
    bags = [
        [node for node in g.graph.nodes if node.target is torch.nn.functional.embedding_bag] for g in counter.graphs
    ]
    return [len(found) for found in bags]


def finest(model: Any) -> int:
    """How many blocks the model has at its finest level of attention."""
    level = [site.downsample for site in find_sites(model)]
    return level.count(min(level))


def assert_no_break_and(counter: Any, compiles: int) -> None:
    assert counter.frame_count == compiles
    assert counters["stats"]["unique_graphs"] == compiles
    assert not counters["graph_break"]


# ------------------------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize("build", [*UNETS, controlnet, gligen])
def test_the_whole_model_is_one_graph_with_every_merge_in_it(build: Callable[[], Any], counter: Any) -> None:
    model = transform(build(), ratio=0.5)
    arguments = inputs(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.equal(output(compiled, arguments), output(model, arguments))
    assert_no_break_and(counter, 1)
    assert merges(counter) == [finest(model)]


def test_nothing_breaks_the_graph_where_breaks_are_allowed(counter: Any) -> None:
    model = transform(two_stages(), ratio=0.5, **EVERYTHING)
    arguments = inputs(model)
    output(torch.compile(model, backend=counter), arguments)
    assert_no_break_and(counter, 1)
    assert merges(counter) == [3 * len(blocks(model))]
    found = torch._dynamo.explain(model)(**arguments)
    assert (found.graph_count, found.graph_break_count, found.break_reasons) == (1, 0, [])


def test_steps_prompts_and_seeds_compile_nothing_new(counter: Any) -> None:
    model = transform(two_stages(), ratio=0.5)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    samples, prompts = inputs(model), [inputs(model, seed=seed)["encoder_hidden_states"] for seed in range(3)]
    output(compiled, samples)
    with torch._dynamo.config.patch(error_on_recompile=True):
        results = [output(compiled, {**samples, "timestep": torch.tensor(step)}) for step in range(999, 0, -100)]
        results += [output(compiled, inputs(model, seed=seed)) for seed in range(3)]
        results += [output(compiled, {**samples, "encoder_hidden_states": prompt}) for prompt in prompts]
    assert_no_break_and(counter, 1)
    assert len(results) == 16
    assert torch.equal(results[-1], output(model, {**samples, "encoder_hidden_states": prompts[-1]}))


def test_a_ratio_is_compiled_once_and_coming_back_to_it_or_transforming_anew_compiles_nothing(counter: Any) -> None:
    arguments = inputs(one_stage())
    ratios = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    models = [transform(one_stage(), ratio=ratio) for ratio in ratios]
    anew = [transform(one_stage(), ratio=ratio) for ratio in ratios]
    for visit in (models, models, anew):
        for model in visit:
            compiled = torch.compile(model, backend=counter, fullgraph=True)
            assert torch.equal(output(compiled, arguments), output(model, arguments))
        assert_no_break_and(counter, len(ratios))
    assert merges(counter) == [finest(one_stage())] * len(ratios)


def test_a_shape_is_compiled_once(counter: Any) -> None:
    model = transform(one_stage(), ratio=0.5)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(2):
        for height, width, batch in ((16, 16, 2), (16, 24, 2), (16, 16, 3)):
            arguments = inputs(model, height, width, batch=batch)
            assert torch.equal(output(compiled, arguments), output(model, arguments))
        assert_no_break_and(counter, 3)


def test_dynamic_shapes_take_no_more_compiles_than_the_stock_model() -> None:
    taken = {}
    for name, model in (("stock", one_stage()), ("ours", transform(one_stage(), ratio=0.5))):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
        for height, width in ((32, 32), (32, 24), (17, 40), (16, 48)):
            arguments = inputs(model, height, width)
            assert torch.equal(output(compiled, arguments), output(model, arguments))
        taken[name] = counter.frame_count
    assert taken == {"stock": 2, "ours": 2}  # one for squares, one for the rest


@pytest.mark.parametrize(
    "build, extra",
    [
        (two_stages, {"encoder_attention_mask": mask()}),
        (gligen, {"cross_attention_kwargs": {"gligen": objects()}}),
    ],
    ids=["mask", "gligen"],
)
def test_an_optional_input_that_is_first_met_while_compiling_leaves_merging_in_place(
    build: Callable[[], Any], extra: dict[str, Any], counter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialize, "_classes", {})  # so that no graph for it is known from another test
    model, reference = transform(build(), ratio=0.5, use_rand=False), wrapped(build())
    plain = inputs(model)
    assert all(len(block.graphs) == 1 for block in blocks(model).values())
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for arguments in ({**plain, **extra}, plain, {**plain, **extra}, plain):
        assert torch.equal(output(compiled, arguments), output(reference, arguments))
    assert_no_break_and(counter, 2)
    assert merges(counter) == [finest(model)] * 2
    assert all(len(block.graphs) == 2 for block in blocks(model).values())


# ------------------------------------------------------------------------------------------------ block by block


@pytest.mark.parametrize("options", [{}, {"max_downsample": 2}, EVERYTHING], ids=["defaults", "two", "everything"])
@pytest.mark.parametrize("build, stock", [(sd15, 3), (sd21, 3), (sdxl, 2)])
def test_regional_compile_takes_no_more_compiles_than_the_stock_model(
    build: Callable[[], Any], stock: int, options: dict[str, Any]
) -> None:
    taken = []
    changes: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, lambda model: transform(model, ratio=0.5, **options))
    for change in changes:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model, eager = change(build()), change(build())
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for seed in range(2):
            arguments = inputs(model, seed=seed)
            assert torch.equal(output(model, arguments), output(eager, arguments))
        taken.append(counter.frame_count)
    assert taken == [stock, stock]


# ------------------------------------------------------------------------------------------------ other ways through


def exportable(model: Any, height: int = 16, width: int = 16) -> tuple[tuple[Tensor], dict[str, Any]]:
    """The inputs as positional and keyword arguments, for a tuple as output."""
    arguments = inputs(model, height, width)
    return (arguments.pop("sample"),), {"return_dict": False, **arguments}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("build", [two_stages, sdxl])
def test_export_takes_the_model_and_gives_what_eager_gives(build: Callable[[], Any], strict: bool) -> None:
    model = transform(build(), ratio=0.5)
    args, kwargs = exportable(model)
    with torch.no_grad():
        exported = torch.export.export(model, args, kwargs, strict=strict)
        (result,), (expected,) = exported.module()(*args, **kwargs), model(*args, **kwargs)
    bags = [node for node in exported.graph.nodes if "embedding_bag" in str(node.target)]
    assert len(bags) == finest(model)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_may_have_dynamic_sizes(strict: bool) -> None:
    model = transform(one_block(), ratio=0.5)
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
from support.models import inputs, one_block, output
from tome_fx import transform

artifacts = Path(sys.argv[2])
if artifacts.exists():
    torch.compiler.load_cache_artifacts(artifacts.read_bytes())
model = transform(one_block(), ratio=0.5)
output(torch.compile(model, fullgraph=True), inputs(model, 16, 16))
caches = {**counters["inductor"], **counters["aot_autograd"]}
found = {name: count for name, count in caches.items() if name.endswith(("cache_hit", "cache_miss"))}
if not artifacts.exists():
    artifacts.write_bytes(torch.compiler.save_cache_artifacts()[0])
print(found)
"""


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


CONTEXTS: list[Any] = [
    torch.inference_mode,
    torch.no_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
    contextlib.nullcontext,
]


@pytest.mark.parametrize("dynamic_ratio", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_contexts_and_memory_formats_change_no_count_and_no_result(
    layout: torch.memory_format, context: Any, dynamic_ratio: bool, counter: Any
) -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5, dynamic_ratio=dynamic_ratio).to(memory_format=layout)
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    with context():
        for seed in range(2):
            arguments = inputs(model, 16, 16, seed=seed)
            arguments["sample"] = arguments["sample"].contiguous(memory_format=layout)
            assert torch.equal(compiled(**arguments).sample, model(**arguments).sample)
    assert_no_break_and(counter, 1)


class Devices(TorchDispatchMode):
    """The devices of all tensors that operations take and give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read from the device"
        result = func(*args, **(kwargs or {}))
        self.seen |= {
            tensor.device.type for tensor in tree_leaves((args, kwargs, result)) if isinstance(tensor, Tensor)
        }
        return result


@pytest.mark.parametrize("seed", [None, 3])
def test_no_operation_leaves_the_device_of_its_tokens_which_a_cuda_graph_would_not_allow(seed: int | None) -> None:
    tokens = torch.empty(2, 64, 8, device="meta")
    with Devices() as devices:
        slots = ops.match(tokens, 8, 8, kept=32, sx=2, sy=2, seed=seed)
        ops.unmerge(ops.merge(tokens, slots), slots)
    assert devices.seen == {"meta"}
    with Devices() as devices:
        torch.ones(2)
    assert devices.seen != {"meta"}, "the check does not see what it is for"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("dynamic_ratio", [False, True])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_every_mode_gives_what_eager_gives_and_cuda_graphs_are_not_skipped(mode: str, dynamic_ratio: bool) -> None:
    model = transform(copy.deepcopy(two_stages()).to("cuda"), ratio=0.5, dynamic_ratio=dynamic_ratio)
    compiled: Any = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for ratio in (0.5, 0.25, 0.5):
            set_ratio(compiled, ratio)
            for seed in range(3):
                arguments = inputs(model, seed=seed)
                torch.compiler.cudagraph_mark_step_begin()
                result = compiled(**arguments).sample.clone()
                assert relative_error(result, model(**arguments).sample) < 1e-3
    assert counters["inductor"]["cudagraph_skips"] == 0
    if mode != "default":
        from torch._inductor.cudagraph_trees import get_container

        assert get_container(0).tree_manager is not None, "no CUDA graph was recorded"
    assert not counters["graph_break"]


def on_gpu(way: str, model: Any) -> Any:
    if way == "by blocks":
        model.compile_repeated_blocks(fullgraph=True)
        return model
    return torch.compile(model, fullgraph=True, dynamic=True if way == "dynamic" else None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("options", [{}, {"dynamic_ratio": True}, EVERYTHING], ids=["", "dynamic ratio", "everything"])
@pytest.mark.parametrize("way", ["by blocks", "dynamic", "channels_last", "autocast"])
def test_other_ways_to_compile_give_what_eager_gives_on_a_gpu_gradients_included(
    way: str, options: dict[str, Any]
) -> None:
    layout = torch.channels_last if way == "channels_last" else torch.contiguous_format
    model = transform(copy.deepcopy(two_stages()).to("cuda", memory_format=layout), ratio=0.5, **options)
    eager, arguments = copy.deepcopy(model), inputs(model)
    arguments["sample"] = arguments["sample"].contiguous(memory_format=layout)
    outputs, gradients = [], []
    with torch.autocast("cuda", torch.bfloat16, enabled=way == "autocast"):
        for run, owner in ((on_gpu(way, model), model), (eager, eager)):
            sample = run(**arguments).sample
            found = torch.autograd.grad(sample.float().square().mean(), list(owner.parameters()))
            outputs.append(sample.detach().float())
            gradients.append(torch.cat([gradient.flatten().float() for gradient in found]))
    tolerance = 5e-2 if way == "autocast" else 1e-3
    assert relative_error(*outputs) < tolerance
    assert relative_error(*gradients) < tolerance
    assert not counters["graph_break"]


@pytest.mark.parametrize("options", [{"seed": 5}, {"seed": 5, **EVERYTHING}], ids=["defaults", "everything"])
def test_random_destinations_are_the_same_when_compiled(options: dict[str, Any]) -> None:
    model = transform(two_stages(), ratio=0.5, **options)
    arguments = inputs(model)
    compiled = output(torch.compile(model, backend="aot_eager", fullgraph=True), arguments)
    assert relative_error(compiled, output(model, arguments)) < 1e-5
    assert relative_error(compiled, output(transform(two_stages(), ratio=0.5, use_rand=False), arguments)) > 1e-3


@pytest.mark.parametrize("dynamic_ratio", [False, True])
def test_a_compiled_training_step_has_the_gradients_of_an_eager_one(dynamic_ratio: bool) -> None:
    gradients = []
    model = transform(two_stages(), ratio=0.5, dynamic_ratio=dynamic_ratio)
    arguments = inputs(model, 16, 16)
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        found = torch.autograd.grad(run(**arguments).sample.square().mean(), list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    eager, compiled = gradients
    assert relative_error(compiled, eager) < 1e-5


def transformer(**options: bool) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A transformed transformer alone, without the convolutions around it, which take long to compile; its inputs."""
    (model,) = transformers(transform(one_block(), ratio=0.5, **options)).values()
    generator = torch.Generator().manual_seed(0)
    return model, (torch.randn(2, 32, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's own, of its autotuning
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_modes_of_inductor_give_what_eager_gives(mode: str) -> None:
    """Their CUDA graphs are for the test above, which needs a GPU."""
    model, (image, prompt) = transformer()
    compiled: Any = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad(), fresh_cache():
        for _ in range(2):
            ours = compiled(image, encoder_hidden_states=prompt, return_dict=False)[0]
            eager = model(image, encoder_hidden_states=prompt, return_dict=False)[0]
            assert relative_error(ours, eager) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{"dynamic_ratio": True}, {}], ids=["dynamic ratio", "dynamic sizes"])
def test_a_kept_count_that_is_symbolic_trains_under_inductor(options: dict[str, bool]) -> None:
    model, (image, prompt) = transformer(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=None if options else True)
    gradients = []
    for run in (model, compiled):
        loss = run(image, encoder_hidden_states=prompt, return_dict=False)[0].square().mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def generated(model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Counter[str], int]:
    """The result under Inductor, its calls of ATen by name, and how many kernels of its own it launches."""
    with fresh_cache(), torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), **arguments)
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))
    return (
        result.sample,
        Counter(re.findall(r"\baten\.(\w+)[.\w]*\(", code)),
        len(re.findall(r"^ +cpp_fused_\w+\(", code, re.M)),
    )


def test_what_inductor_generates_for_a_site_is_counted() -> None:
    """A change that adds a kernel or a call of ATen is seen here. The launches are those of a CPU."""
    arguments = inputs(one_stage(), 16, 16)
    model = transform(one_stage(), ratio=0.5, merge_crossattn=True)
    result, called, launches = generated(model, arguments)
    assert relative_error(result, output(model, arguments)) < 1e-5
    _, stock, stock_launches = generated(one_stage(), arguments)
    sites = len(blocks(model))
    assert called - stock == {"sort": 2 * sites, "searchsorted": sites, "_embedding_bag_forward_only": 2 * sites}
    assert launches - stock_launches == 13  # for three sites: some fuse with what stands beside them, some do not


SETTINGS = """
import torch
import torch._dynamo, torch._functorch.config, torch._inductor.config
from diffusers import ControlNetModel, UNet2DConditionModel

def settings():
    configs = torch._dynamo.config, torch._functorch.config, torch._inductor.config
    flags = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return [config.get_config_copy() for config in configs], flags, torch.get_rng_state().tolist()

before = settings()
import tome_fx
assert settings() == before
model = UNet2DConditionModel.from_config({CONFIG})
before = settings()
tome_fx.transform(model, ratio=0.5, merge_mlp=True)
assert settings() == before
"""


def test_neither_import_nor_transform_changes_a_setting_or_the_random_state() -> None:
    config = {name: value for name, value in one_stage().config.items() if not name.startswith("_")}
    subprocess.run([sys.executable, "-c", SETTINGS.replace("{CONFIG}", repr(config))], check=True, timeout=600)


def test_a_compiled_call_changes_no_setting_of_the_compiler() -> None:
    configs = (torch._dynamo.config, torch._inductor.config, torch._functorch.config)
    before = [config.get_config_copy() for config in configs]
    model = transform(one_stage(), ratio=0.5)
    output(torch.compile(model, backend="eager", fullgraph=True), inputs(model, 16, 16))
    assert [config.get_config_copy() for config in configs] == before
