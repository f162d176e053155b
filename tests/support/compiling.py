"""Ways to compile a model with a backend that counts its graphs, and what is counted."""

from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

from tome_fx.families.unet import find_sites
from tome_fx.plan import Plan

RATIOS = [round(0.06 * i, 2) for i in range(12)]  # more than dynamo would recompile one code object for, 0 among them
EVERYTHING: dict[str, Any] = {"max_downsample": 8, "merge_crossattn": True, "merge_mlp": True, "prop_attn": True}


def raised_while_compiling(text: str) -> str:
    """What an error matches that is raised in code being traced: before torch 2.12 dynamo leaves out its words."""
    return text if TorchVersion(torch.__version__) >= "2.12" else "Observed exception"


def whole(model: Any, counter: Any, **options: Any) -> Any:
    """The model compiled as one graph."""
    return torch.compile(model, backend=counter, fullgraph=True, **options)


def in_place(model: Any, counter: Any) -> Any:
    """The model itself, compiled by `model.compile`."""
    model.compile(backend=counter, fullgraph=True)
    return model


def by_block(model: Any, counter: Any) -> Any:
    """The model itself, each kind of block compiled once."""
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    return model


def plan_of(model: Any) -> Plan:
    """What the transformed model merges."""
    plan = model.tome_fx.plan
    assert isinstance(plan, Plan)
    return plan


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
    """Assert that so many graphs reached the backend, and that nothing broke one."""
    assert counter.frame_count == compiles
    assert counters["stats"]["unique_graphs"] == compiles
    assert not counters["graph_break"]
