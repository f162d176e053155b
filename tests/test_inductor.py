"""A transformed model under Inductor: right in every mode, and no more generated for a site than was counted.

Most of it generates code, which takes long, or needs a GPU.
"""

import copy
import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.compiling import EVERYTHING
from support.models import (
    blocks,
    inputs,
    one_block,
    one_stage,
    output,
    relative_error,
    transformer,
    two_stages,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tome_fx import ops, set_ratio, transform

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, wherever a card could round products of float32 more
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


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


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("seed", [None, 3])
def test_no_operation_leaves_the_device_of_its_tokens_which_a_cuda_graph_would_not_allow(
    seed: int | None, width: int, tile: int | None
) -> None:
    tokens = torch.empty(2, 8 * width, 8, device="meta")
    with Devices() as devices:
        slots = ops.match(tokens, 8, width, kept=32, sx=2, sy=2, seed=seed, tile=tile)
        ops.unmerge(ops.merge(tokens, slots), slots)
        ops.log_sizes(tokens, slots, 2)
    assert devices.seen == {"meta"}
    with Devices() as devices:
        torch.ones(2)
    assert devices.seen != {"meta"}, "the check does not see what it is for"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's own, of its autotuning
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_the_modes_of_inductor_give_what_eager_gives(mode: str) -> None:
    """Their CUDA graphs are for the tests below, which need a GPU."""
    model, (image, prompt) = transformer(transform(one_block(), 0.5))
    compiled: Any = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad(), fresh_cache():
        for _ in range(2):
            ours = compiled(image, encoder_hidden_states=prompt, return_dict=False)[0]
            eager = model(image, encoder_hidden_states=prompt, return_dict=False)[0]
            assert relative_error(ours, eager) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


def attended(image: Tensor, ratio: str | Tensor) -> Tensor:
    """Merged and weighed attention of two heads, of an image `[B, C, H, W]` of any size."""
    height, width = ops.grid_of(image)
    tokens = image.flatten(2).mT
    slots = ops.match(tokens, height, width, kept=ops.kept(height, width, ratio), sx=2, sy=2, seed=3, tile=16)
    merged = ops.merge(tokens, slots).unflatten(2, (2, -1)).transpose(1, 2)
    weights = ops.log_sizes(tokens, slots, 2)
    assert weights is not None
    mask = weights.unflatten(0, (-1, 2))
    return ops.unmerge(F.scaled_dot_product_attention(merged, merged, merged, mask).transpose(1, 2).flatten(2), slots)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_ratio", [True, False], ids=["dynamic ratio", "dynamic sizes"])
def test_a_kept_count_that_is_symbolic_trains_under_inductor(dynamic_ratio: bool) -> None:
    compiled = torch.compile(attended, fullgraph=True, dynamic=None if dynamic_ratio else True)
    image = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for share in (0.5, 0.25):
        ratio = ops.as_read(share, dynamic=dynamic_ratio)
        found, expected = (
            torch.autograd.grad(run(image, ratio).square().mean(), image)[0] for run in (compiled, attended)
        )
        assert relative_error(found, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == (1 if dynamic_ratio else 2)


def generated(model: Any, arguments: dict[str, Any]) -> tuple[Tensor, Counter[str]]:
    """The result under Inductor, and its calls of ATen by name."""
    with fresh_cache(), torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(model, fullgraph=True), **arguments)
    code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))
    return result.sample, Counter(re.findall(r"\baten\.(\w+)[.\w]*\(", code))


@pytest.mark.slow
def test_what_inductor_calls_for_a_site_is_counted() -> None:
    """Each call of ATen is a kernel that nothing is fused with: they are what a site costs, and one more is seen here.

    Kernels of Inductor's own are not counted: what they are fused with differs from one version of torch to the next.
    """
    arguments = inputs(one_stage(), 16, 16)
    model = transform(one_stage(), ratio=0.5, merge_crossattn=True)
    result, called = generated(model, arguments)
    assert relative_error(result, output(model, arguments)) < 1e-5
    _, stock = generated(one_stage(), arguments)
    sites = len(blocks(model))
    assert called - stock == {"sort": 2 * sites, "searchsorted": sites, "_embedding_bag_forward_only": 2 * sites}


# ------------------------------------------------------------------------------------------------ on a GPU


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
                arguments = inputs(model, 64, 64, seed=seed)  # four tiles, which are counted
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
    eager, arguments = copy.deepcopy(model), inputs(model, 40, 40)  # four tiles, which Inductor sorts
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
