"""What a transform writes into the graphs: a match for each block reached, a merge and an unmerge around each module.

That what is printed is looked at has a reason: people read it, and caches on disk go by it.
"""

import itertools
import math
import re
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
    sd15,
    sd21,
    sdxl,
    transformers,
    two_stages,
)
from torch import fx, nn

from tome_fx import ops, transform
from tome_fx.families.unet import find_sites
from tome_fx.graph import specialize

MODELS = [sd15, sd21, sdxl, controlnet, gligen, two_stages]
SCOPES = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}


def rewritten(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(type(module), "graph")}


def calls(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes)


def sources(model: nn.Module) -> dict[str, str]:
    return {path: module.graph.python_code("self").src for path, module in rewritten(model).items()}


@pytest.mark.parametrize("chosen", [c for n in (1, 2, 3) for c in itertools.combinations(SCOPES, n)])
def test_a_block_has_one_merge_and_one_unmerge_around_each_module_asked_for(chosen: tuple[str, ...]) -> None:
    result = transform(sdxl(), ratio=0.25, **{name: name in chosen for name in SCOPES})
    modules = [SCOPES[name] for name in chosen]
    for block in blocks(result).values():
        nodes = {node.target: node for node in block.graph.nodes}
        assert calls(block.graph)[ops.merge] == calls(block.graph)[ops.unmerge] == len(chosen)
        assert calls(block.graph)["slots"] == 1
        for module in ("attn1", "attn2", "ff"):
            node = nodes[module]
            (user,) = node.users
            if module in modules:
                assert node.args[0].target is ops.merge
                assert node.args[0].args[1:] == (nodes["slots"],)
                assert user.target is ops.unmerge
                assert user.args == (node, nodes["slots"])
            else:
                assert node.args[0].target is not ops.merge
                assert user.target is not ops.unmerge
        printed = str(block.graph)
        assert printed.count("target=tome_fx.ops.merge]") == printed.count("target=tome_fx.ops.unmerge]") == len(chosen)


@pytest.mark.parametrize(
    "build, max_downsample", [(sd15, None), (sd15, 1), (sd15, 2), (sd15, 4), (sd15, 8), (sdxl, None), (sdxl, 4)]
)
def test_the_levels_reached_have_one_match_per_block_and_the_others_none(
    build: Callable[[], Any], max_downsample: int | None
) -> None:
    model = build()
    result = transform(model, max_downsample=max_downsample)
    level = {site.transformer: site.downsample for site in find_sites(model)}
    deepest = max_downsample or min(level.values())
    assert set(level.values()) == ({1, 2, 4, 8} if build is sd15 else {2, 4})
    for path, transformer in transformers(result).items():
        assert hasattr(transformer, "graph") == (level[path] <= deepest)
        if level[path] <= deepest:
            assert calls(transformer.graph)[ops.match] == len(transformer.transformer_blocks)
            assert str(transformer.graph).count("target=tome_fx.ops.match]") == len(transformer.transformer_blocks)
            by_name = {node.target: node for node in transformer.graph.nodes}
            for i in range(len(transformer.transformer_blocks)):
                call = by_name[f"transformer_blocks.{i}"]
                match = call.kwargs["slots"]
                assert match.target is ops.match
                assert match.args[0] is call.args[0]  # matched by what the block is given, not by an older state


@pytest.mark.parametrize("build", MODELS)
def test_transforming_twice_prints_the_same_code(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's caches go by the code: were it another in each process, every process would compile anew."""
    model = build()
    once = sources(transform(model, merge_mlp=True))
    monkeypatch.setattr(specialize, "_classes", {})  # as in a new process
    assert sources(transform(model, merge_mlp=True)) == once
    assert len(once) > len(blocks(model))


def test_all_blocks_choose_alike_and_the_grid_is_used_evenly() -> None:
    result = transform(sdxl(), max_downsample=8)
    nodes = [node for t in transformers(result).values() for node in t.graph.nodes if node.target is ops.match]
    seeds = {node.kwargs["seed"] for node in nodes}
    assert len(nodes) == len(blocks(result))
    assert len(seeds) == 1
    pattern = ops.destinations_first(64, 64, 2, 2, seeds.pop(), torch.device("cpu"))[: 32 * 32]
    corner = (pattern // 64 % 2) * 2 + pattern % 2
    share = corner.bincount(minlength=4) / len(corner)
    assert ((share - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / len(corner))).all()


def test_the_graph_in_the_readme_is_the_one_that_is_printed() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    shown = re.findall(r"^    (?:norm1|merge|attn1|unmerge|add) = .*$", readme, re.MULTILINE)
    block = next(iter(blocks(transform(two_stages())).values()))
    printed = block.graph.python_code("self").src.splitlines()
    assert len(shown) == 5
    assert all(line in printed for line in shown)
