"""What a transform writes into the graphs: a match for each stack of blocks reached, a merge and an unmerge around each
module, or around the blocks.

That what is printed is looked at has a reason: people read it, and caches on disk go by it.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
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
from tome_fx.families import weights
from tome_fx.families.unet import find_sites
from tome_fx.graph import nodes, specialize
from tome_fx.graph.calls import calls_of
from tome_fx.plan import Plan

MODELS = [sd15, sd21, sdxl, controlnet, gligen, two_stages]
WEIGH = weights.WEIGH
WEIGHERS = list(WEIGH.values())
SCOPES = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}


def rewritten(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if hasattr(type(module), "graph")}


def calls(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes)


def run(graph: fx.Graph, modules: Iterable[str]) -> list[Any]:
    """Where the graph calls these modules, in order; what weighs for a module is handed it, too, and calls nothing."""
    return [call for call in calls_of(graph, list(modules)) if call.node.target not in WEIGHERS]


def sources(model: nn.Module) -> dict[str, str]:
    return {path: module.graph.python_code("self").src for path, module in rewritten(model).items()}


CHOSEN = [c for n in (1, 2, 3) for c in itertools.combinations(SCOPES, n)]


@pytest.mark.parametrize(
    "chosen, prop_attn", [(c, prop) for c in CHOSEN for prop in WEIGH if "merge_attn" in c or not prop]
)
def test_a_block_has_one_merge_and_one_unmerge_around_each_module_asked_for(
    chosen: tuple[str, ...], prop_attn: bool | None
) -> None:
    result = transform(sdxl(), ratio=0.25, prop_attn=prop_attn, **{name: name in chosen for name in SCOPES})
    modules = [SCOPES[name] for name in chosen]
    weigh = WEIGH[prop_attn] if "merge_attn" in chosen else None
    for block in blocks(result).values():
        (slots,) = [node for node in block.graph.nodes if node.target == "slots"]
        count = calls(block.graph)
        assert count[ops.merge] == count[ops.unmerge] == len(chosen)
        assert count[nodes.attend] == count[weigh] == (weigh is not None)
        for call in run(block.graph, SCOPES.values()):
            (user,) = [user for user in call.node.users if user.target is not weigh]
            tokens = call.argument("hidden_states")
            if call.module in modules:
                assert tokens.target is ops.merge
                assert tokens.args[1:] == (slots,)
                assert user.target is ops.unmerge
                assert user.args == (call.node, slots)
            else:
                assert tokens.target is not ops.merge
                assert user.target is not ops.unmerge
            if weigh and call.module == "attn1":
                mask = call.node.kwargs["attention_mask"]
                assert mask.target is weigh
                assert mask.args[1:] == (tokens.args[0], slots)
        printed = str(block.graph)
        assert printed.count("target=tome_fx.ops.merge]") == printed.count("target=tome_fx.ops.unmerge]") == len(chosen)


@pytest.mark.parametrize("prop_attn", WEIGH)
def test_a_block_whose_queries_stay_whole_merges_what_they_attend_to_and_unmerges_nothing(
    prop_attn: bool | None,
) -> None:
    result, weigh = transform(sdxl(), merge_queries=False, prop_attn=prop_attn), WEIGH[prop_attn]
    for block in blocks(result).values():
        (call,) = run(block.graph, ["attn1"])
        keys, mask = (call.node.kwargs.get(name) for name in ("encoder_hidden_states", "attention_mask"))
        assert keys.target is nodes.merged_keys
        assert keys.args[0] is call.argument("hidden_states")
        assert keys.args[1].target == "slots"
        assert mask is None if weigh is None else (mask.target, mask.args[1:]) == (weigh, keys.args)
        count = calls(block.graph)
        assert count[nodes.merged_keys] == 1
        assert not count[ops.merge] + count[ops.unmerge] + count[ops.changed]


def test_queries_stay_whole_in_self_attention_alone() -> None:
    result = transform(two_stages(), merge_queries=False, merge_crossattn=True, merge_mlp=True)
    for block in blocks(result).values():
        found = run(block.graph, SCOPES.values())
        assert [call.module for call in found] == list(SCOPES.values())
        assert [call.argument("hidden_states").target is ops.merge for call in found] == [False, True, True]
        assert calls(block.graph)[ops.unmerge] == 2


REACHED: list[tuple[Callable[[], Any], int | str | None, set[int]]] = [
    *((sd15, level, {d for d in (1, 2, 4, 8) if d <= level}) for level in (1, 2, 4, 8)),
    (sd15, None, {1}),  # at a size for tests a launch is dear
    (sd15, "finest", {1}),
    (sdxl, None, {2}),
    (sdxl, "finest", {2}),
    (sdxl, 4, {2, 4}),
]


@pytest.mark.parametrize("options", [{}, {"share_match": False}], ids=["once", "each"])
@pytest.mark.parametrize("build, max_downsample, reached", REACHED)
def test_the_levels_reached_have_one_match_per_transformer_or_per_block_and_the_others_none(
    build: Callable[[], Any], max_downsample: int | None, reached: set[int], options: dict[str, bool]
) -> None:
    model = build()
    result = transform(model, max_downsample=max_downsample, **options)
    level = {site.transformer: site.downsample for site in find_sites(model)}
    assert set(level.values()) == ({1, 2, 4, 8} if build is sd15 else {2, 4})
    for path, transformer in transformers(result).items():
        assert hasattr(transformer, "graph") == (level[path] in reached)
        if level[path] in reached:
            depth = len(transformer.transformer_blocks)
            matches = 1 if options.get("share_match", True) else depth
            assert calls(transformer.graph)[ops.match] == matches
            assert str(transformer.graph).count("target=tome_fx.ops.match]") == matches
            by_name = {node.target: node for node in transformer.graph.nodes}
            for i in range(depth):
                call = by_name[f"transformer_blocks.{i}"]
                match = call.kwargs["slots"]
                first = call if matches == depth else by_name["transformer_blocks.0"]
                assert match.target is ops.match
                assert match.args[0] is first.args[0]  # matched by what the block is given, not by an older state


@pytest.mark.parametrize("prop_attn", [True, None, False])
@pytest.mark.parametrize("share_match", [True, False])
def test_blocks_of_one_match_are_merged_before_the_first_and_unmerged_after_the_last(
    share_match: bool, prop_attn: bool | None
) -> None:
    model = sdxl()
    result = transform(model, merge_block=True, max_downsample=4, share_match=share_match, prop_attn=prop_attn)
    assert {len(transformer.transformer_blocks) for transformer in transformers(result).values()} == {2, 3}
    for transformer in transformers(result).values():
        depth = len(transformer.transformer_blocks)
        count, names = calls(transformer.graph), [f"transformer_blocks.{i}" for i in range(depth)]
        runs = 1 if share_match else depth
        assert (count[ops.match], count[ops.merge], count[ops.changed]) == (runs, runs, runs)
        assert count[nodes.attend] == (0 if prop_attn is False else depth)
        assert not count[ops.unmerge], "a graph that unmerges by hand"
        found = run(transformer.graph, names)
        assert [call.module for call in found] == names
        for before, call in itertools.pairwise(found):
            tokens = call.argument("hidden_states")
            assert (tokens is before.node) == share_match
            assert tokens.target is ops.merge or share_match
        (last,) = [user for user in found[-1].node.users if user.target is ops.changed]
        before, merged, inside, slots = last.args
        assert inside is found[-1].node
        assert merged.args == (before, slots)
        assert slots.args[0] is before


@pytest.mark.parametrize("prop_attn", [None, False])
def test_where_whole_blocks_are_merged_they_are_left_as_they_are(prop_attn: bool | None) -> None:
    result = transform(sdxl(), merge_block=True, prop_attn=prop_attn)
    assert {type(block) for block in blocks(result).values()} == {type(block) for block in blocks(sdxl()).values()}


@pytest.mark.parametrize("build", MODELS)
def test_transforming_twice_prints_the_same_code(build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's caches go by the code: were it another in each process, every process would compile anew."""
    model = build()
    once = sources(transform(model, merge_mlp=True))
    monkeypatch.setattr(specialize, "_classes", {})  # as in a new process
    assert sources(transform(model, merge_mlp=True)) == once
    assert len(once) > len(blocks(model))


@pytest.mark.parametrize("options", [{}, {"merge_block": True}, {"share_match": False}], ids=str)
def test_all_blocks_choose_alike(options: dict[str, bool]) -> None:
    result = transform(sdxl(), max_downsample=8, tile=6, **options)
    found = [node.kwargs for t in transformers(result).values() for node in t.graph.nodes if node.target is ops.match]
    assert len(found) == len(blocks(result) if "share_match" in options else transformers(result))
    assert {frozenset((name, found[name]) for name in ("seed", "tile", "sx", "sy")) for found in found} == {
        frozenset({"seed": Plan().cell_seed, "tile": 6, "sx": 2, "sy": 2}.items())
    }
