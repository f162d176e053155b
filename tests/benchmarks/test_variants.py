"""Variants and peers do what they are named for, and have the FLOPs that are told of them."""

from functools import partial
from typing import Any

import pytest
import torch
from support.models import relative_error, sdxl
from torch import nn

import tome_fx
from bench import flops, models, peers, runs, variants
from bench.cases import Case, options
from tome_fx.families.skeleton import skeleton


def test_every_eager_variant_runs_and_those_that_merge_differ() -> None:
    unet = models.build("tiny")
    given = models.inputs(unet, 128, 2)
    with torch.no_grad():
        names = [name for name, run in runs.RUNS.items() if not run.compiled]
        outputs = {name: variants.predict(runs.prepare(name, unet), given) for name in names}
    assert relative_error(outputs["vanilla"], outputs["sdpa"]) < 1e-4
    for name in ("tomesd", "tomesd+sdpa", "tome_fx"):
        assert relative_error(outputs[name], outputs["sdpa"]) > 1e-4


def test_a_row_has_what_it_heeds_of_its_cells_ratio_and_options_and_its_own() -> None:
    given = options(tile=8, merge_crossattn=True)
    assert runs.RUNS["tomesd+compile"].case(0.5, given) == Case("tomesd", 0.5, options(merge_crossattn=True))
    assert runs.RUNS["todo+compile"].case(0.5, given) == Case("todo", 0.75)
    assert runs.RUNS["v0.1+compile"].case(0.5, given) == Case("v0.1", 0.5, options(merge_crossattn=True))
    kv = runs.RUNS["tome_fx+kv+compile"].case(0.25, options(tile=8, merge_queries=True))
    assert kv == Case("tome_fx", 0.25, options(tile=8, merge_queries=False))
    assert runs.RUNS["compile"].case(0.5, given) == Case()


@pytest.mark.parametrize("name", ["sd21", "sdxl", "pixart-shallow", "flux-shallow"])
def test_a_model_to_measure_takes_the_inputs_that_it_is_given(name: str) -> None:
    shapes = skeleton(models.build(name, "meta"))
    result = variants.predict(shapes, models.example(shapes, 32, 32, 1))
    assert result.shape[0] == 1
    assert result.numel() == 4 * 32 * 32 * (4 if name == "flux-shallow" else 2 if name == "pixart-shallow" else 1)


@pytest.mark.parametrize(
    "given",
    [
        options(),
        options(merge_crossattn=True),
        options(merge_crossattn=True, merge_mlp=True),
        options(merge_queries=False),
        options(merge_block=True),
    ],
    ids=str,
)
def test_the_oracle_is_our_graph_with_matching_merging_and_weights_removed(given: Any) -> None:
    unet = models.build("tiny")
    case = Case("oracle", 0.5, given)
    ours, oracle = variants.merged(unet, case), variants.apply(case, unet)
    changed = set()
    for path, module in ours.named_modules():
        if hasattr(module, "graph"):
            pairs = zip(module.graph.nodes, oracle.get_submodule(path).graph.nodes, strict=True)
            changed |= {node.target for node, other in pairs if node.target != other.target}
    names = {function.__name__ for function in changed}
    back = {"merge_queries": {"merged_keys"}, "merge_block": {"merge", "changed"}}
    assert names == {"match", "weights_where_taken"} | next(
        (back[name] for name, _ in given if name in back), {"merge", "unmerge"}
    )
    assert masks(oracle) == masks(ours)
    assert set(masks(oracle).values()) - {None}


def masks(unet: nn.Module) -> dict[str, Any]:
    """The shapes of the masks that self-attention is given, None for none, by its path."""
    seen: dict[str, Any] = {}

    def look(path: str, given: dict[str, Any]) -> None:
        mask = given["attention_mask"]
        seen[path] = None if mask is None else mask.shape

    for path, module in unet.named_modules():
        if path.endswith("attn1"):
            module.register_forward_pre_hook(lambda m, args, given, path=path: look(path, given), with_kwargs=True)
    with torch.no_grad():
        assert unet(**models.inputs(unet, 128, 2)).sample.isfinite().all()
    return seen


def test_peers_act_at_the_finest_level_that_has_attention() -> None:
    unet = sdxl()
    assert {site.downsample for site in peers.finest_sites(unet)} == {2}
    assert variants.apply(Case("tomesd", 0.5), unet)._tome_info["args"]["max_downsample"] == 2


def attended(unet: nn.Module, case: Case) -> dict[str, tuple[int, ...]]:
    """What self-attention's projections are given, by their path."""
    result, seen = variants.apply(case, unet), {}
    for path, module in result.named_modules():
        if path.endswith(("attn1.to_k", "attn1.to_q")):
            module.register_forward_hook(lambda m, args, out, path=path: seen.update({path: tuple(args[0].shape[:2])}))
    with torch.no_grad():
        result(**models.inputs(unet, 128, 1))
    return seen


FINEST = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"


def test_todo_halves_keys_and_values_along_both_sides_at_the_finest_level() -> None:
    seen = attended(models.build("tiny"), Case("todo", 0.75))
    assert (seen[f"{FINEST}.to_q"], seen[f"{FINEST}.to_k"]) == ((1, 256), (1, 64))
    assert (seen[f"{MIDDLE}.to_q"], seen[f"{MIDDLE}.to_k"]) == ((1, 64), (1, 64))


def test_hidiffusion_attends_in_four_windows_at_the_finest_level() -> None:
    seen = attended(models.build("tiny"), Case("hidiffusion", 0.75))
    assert (seen[f"{FINEST}.to_q"], seen[f"{FINEST}.to_k"]) == ((4, 64), (4, 64))
    assert (seen[f"{MIDDLE}.to_q"], seen[f"{MIDDLE}.to_k"]) == ((1, 64), (1, 64))


@pytest.mark.parametrize("shift", range(peers.WindowProcessor.STRIDES))
def test_a_window_is_half_of_the_grids_sides_and_goes_round_its_edges(shift: int) -> None:
    attn: Any = models.build("tiny").get_submodule(FINEST)
    side = 8
    tokens = torch.randn(2, side * side, 32, generator=torch.Generator().manual_seed(0))
    window = (torch.arange(side) - shift) % side // (side // 2)  # a stride is a quarter of a window of 4: one token
    number = (window[:, None] * 2 + window).flatten()
    mask = torch.where(number[:, None] == number, 0.0, -torch.inf).expand(2 * attn.heads, -1, -1)
    expected = attn.processor(attn, tokens, attention_mask=mask)
    found = peers.WindowProcessor(attn.processor, shift)(attn, tokens, None)
    assert torch.allclose(found, expected, atol=1e-6)
    assert relative_error(found, attn(tokens)) > 1e-4


def test_stock_in_half_precision_has_weights_of_its_own_and_is_near() -> None:
    unet = models.build("tiny")
    given = models.inputs(unet, 128, 2)
    with torch.no_grad():
        stock = variants.predict(unet, given)
        outputs = {name: variants.predict(variants.apply(Case(name), unet), given) for name in ("bf16", "fp16")}
        assert torch.equal(variants.predict(unet, given), stock)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    errors = {name: relative_error(output, stock) for name, output in outputs.items()}
    assert {output.dtype for output in outputs.values()} == {torch.float32}
    assert 0 < errors["fp16"] < errors["bf16"] < 0.05


def test_flops_of_ours_are_those_that_explain_tells() -> None:
    unet = models.build("tiny")
    for case in (Case("tome_fx", 0.5, options(tile=8)), Case("tome_fx", 0.25, options(tile=None, max_downsample=8))):
        report = tome_fx.explain(variants.merged(unet, case), 32, 32)
        assert flops.counted(case, skeleton(unet), side=32) == report.flops_after
    assert flops.counted(Case(), skeleton(unet), side=32) == report.flops_before


def test_flops_of_a_schedule_are_the_mean_of_its_steps() -> None:
    shapes = skeleton(models.build("tiny"))
    counted = partial(flops.counted, shapes=shapes, side=16)
    late = counted(Case("tome_fx", 0, (), ((0.75, 0.5),)), steps=4)
    assert late == pytest.approx((3 * counted(Case()) + counted(Case("tome_fx", 0.5))) / 4)


def test_savings_are_told_of_the_model_and_of_others_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "BESIDE", {"unet": ("tiny",), "transformer": ()})
    saved = flops.saving("mine", sdxl(), 4)(Case("todo", 0.75))
    assert saved.keys() == {"mine", "tiny"}
    assert 0 < saved["mine"] < saved["tiny"] < 1
    assert set(flops.saving("mine", sdxl(), 4)(Case("bf16")).values()) == {0}
