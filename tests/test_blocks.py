"""`merge_block=True`: blocks run on merged tokens, whole, and each token is given what its slot was changed by.

What acts on whole tokens acts as in the stock model with wrapped children. What has an entry for each token, keeps what
it sees, or goes by a token's place is refused in words. Blocks themselves stay diffusers' own.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import tomesd
import torch
from diffusers import PyramidAttentionBroadcastConfig, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook, apply_pyramid_attention_broadcast
from support.compiling import raised_while_compiling
from support.features import FIRST, MIDDLE, equal, own, skip, steps
from support.models import (
    blocks,
    controlnet,
    gradients,
    inputs,
    one_stage,
    output,
    relative_error,
    sd15,
    sdxl,
    transformers,
    two_stages,
)
from support.wrapped import wrapped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tome_fx import TransformError, set_ratio, transform

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
BLOCKS: dict[str, Any] = {"merge_block": True, "tile": 16}  # of which SIZE holds several
SIZE = 24, 20


def of_blocks(model: Any, ratio: float = 0.5, **options: Any) -> Any:
    """A transformed model whose destinations are those of `wrapped`."""
    return transform(model, ratio, use_rand=False, **{**BLOCKS, **options})


def test_every_part_of_a_block_sees_merged_tokens_and_the_transformer_around_it_all_of_them() -> None:
    model, arguments = of_blocks(sdxl(), 0.5, max_downsample=4), inputs(sdxl(), 32, 16)
    seen: dict[str, set[int]] = {}
    for path, transformer in transformers(model).items():
        level = seen.setdefault(path, set())
        for block in transformer.transformer_blocks:
            for part in (block, block.norm1, block.attn1, block.norm2, block.attn2, block.norm3, block.ff):
                part.register_forward_hook(lambda _, args, result, level=level: level.update({result.shape[1]}))
        transformer.proj_in.register_forward_hook(lambda _, args, result, level=level: level.add(-result.shape[1]))
        transformer.proj_out.register_forward_hook(lambda _, args, result, level=level: level.add(-result.shape[1]))
    output(model, arguments)
    assert set(map(frozenset, seen.values())) == {frozenset({64, -128}), frozenset({16, -32})}


def test_a_controlnet_and_its_unet_run_together() -> None:
    arguments, condition = inputs(sd15(), *SIZE), inputs(controlnet(), *SIZE, seed=1)
    results = []
    changes: tuple[Callable[[Any], Any], ...] = (of_blocks, lambda model: wrapped(model, **BLOCKS))
    for change in changes:
        guide, unet = change(controlnet()), change(sd15())
        with torch.no_grad():
            down, middle = guide(**condition, return_dict=False)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        results.append(output(unet, {**arguments, **extra}))
    assert torch.equal(*results)
    assert relative_error(results[0], output(of_blocks(sd15()), arguments)) > 0.01


@pytest.mark.parametrize("build", [two_stages, sdxl])
@pytest.mark.parametrize("by_user", [False, True], ids=["diffusers", "user"])
def test_checkpointing_changes_no_gradient_and_is_given_the_block_itself(
    build: Callable[[], Any], by_user: bool
) -> None:
    seen: list[nn.Module] = []

    def function(module: nn.Module, *args: Any) -> Any:
        seen.append(module)
        return checkpoint(module, *args, use_reentrant=False)

    model = copy.deepcopy(build()).train()
    arguments = inputs(model, 16, 20)
    result = of_blocks(model, max_downsample=4)
    expected = gradients(result, arguments)
    result.enable_gradient_checkpointing(*[function] * by_user)
    runs: list[int] = []
    for block in blocks(result).values():
        block.attn1.register_forward_hook(lambda _, args, tokens: runs.append(tokens.shape[1]))
    found = gradients(result, arguments)
    assert len(runs) == 2 * len(blocks(result)), "once forward, once again for the backward"
    assert set(blocks(result).values()) <= set(seen) or not by_user
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


# ---------------------------------------------------------------------------------------------- skipped and kept


@pytest.mark.parametrize("where", [FIRST, MIDDLE])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_ff": False},
        {"skip_attention": False},
        {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    ],
    ids=["block", "attention", "ff", "scores"],
)
def test_layers_are_skipped_as_in_the_stock_model(where: str, options: dict[str, bool]) -> None:
    result, stock = of_blocks(own()), wrapped(two_stages(), **BLOCKS)
    without = steps(of_blocks(two_stages()), 2)
    for model in (result, stock):
        skip(model, where, **options)
    ours = steps(result, 2)
    assert equal(ours, steps(stock, 2))
    assert not equal(ours, without)


def broadcast(kind: str, unet: Any) -> None:
    config = PyramidAttentionBroadcastConfig(**{f"{kind}_attention_block_skip_range": 2})
    config.current_timestep_callback = lambda: 500
    apply_pyramid_attention_broadcast(unet, config)


class Keeping(ModelHook):  # type: ignore[misc]
    """A hook that has what it saw in the step before."""

    _is_stateful = True

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


def keep(module: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(Keeping(), "keeping")


def kept_by(name: str, unet: Any) -> None:
    for block in blocks(unet).values():
        keep(block.get_submodule(name))


@pytest.mark.parametrize(
    "enable, name",
    [
        (functools.partial(broadcast, "spatial"), r"PyramidAttentionBroadcastHook keeps what it sees in"),
        (functools.partial(broadcast, "cross"), r"PyramidAttentionBroadcastHook keeps what it sees in"),
        (functools.partial(kept_by, ""), r"Keeping keeps what it sees in transformer_blocks\.0"),
        (functools.partial(kept_by, "norm2"), r"Keeping keeps what it sees in transformer_blocks\.0"),
        (functools.partial(kept_by, "ff"), r"Keeping keeps what it sees in"),
    ],
    ids=["self-attention", "cross-attention", "block", "norm", "ff"],
)
def test_hooks_that_keep_what_they_see_are_refused_by_name(enable: Callable[[Any], None], name: str) -> None:
    result = of_blocks(own())
    enable(result)
    with pytest.raises(TransformError, match=name + r".* whose tokens are merged \(merge_block=True\)"):
        steps(result, 1)
    set_ratio(result, 0)
    steps(result, 1)


def test_hooks_that_keep_nothing_and_those_of_unmerged_blocks_go_on_working() -> None:
    class Silent(ModelHook):  # type: ignore[misc]
        """A hook that changes nothing."""

    result = of_blocks(own())
    expected = steps(result, 2)
    for block in blocks(result).values():
        HookRegistry.check_if_exists_or_initialize(block).register_hook(Silent(), "silent")
    keep(result.mid_block.attentions[0].transformer_blocks[0].attn1)
    assert equal(steps(result, 2), expected)


class Storing:
    """A processor that keeps its maps."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(t) for t in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys)))
        self.probs = attn.get_attention_scores(q, k, None)
        return attn.to_out[0](attn.batch_to_head_dim(self.probs @ v))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("module", ["attn1", "attn2"])
def test_maps_of_merged_tokens_are_refused_and_those_of_unmerged_blocks_served(module: str, compiled: bool) -> None:
    result = of_blocks(own())
    arguments = inputs(result, *SIZE)
    result.mid_block.attentions[0].transformer_blocks[0].get_submodule(module).set_processor(Storing())
    output(result, arguments)
    for block in blocks(result).values():
        block.get_submodule(module).set_processor(Storing())
    called = torch.compile(result, backend="eager", fullgraph=True) if compiled else result
    words = rf"Storing keeps the attention probabilities that it sees in {module}, whose tokens are merged \(merge_bl"
    with pytest.raises(Exception, match=raised_while_compiling(words) if compiled else words):
        output(called, arguments)


# ------------------------------------------------------------------------------------------------ what goes by place


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_with_an_entry_for_each_token_is_refused(compiled: bool) -> None:
    result = of_blocks(one_stage())
    arguments = inputs(result, *SIZE)
    expected = output(result, arguments)
    masked = {**arguments, "attention_mask": torch.ones(2, SIZE[0] * SIZE[1]).index_fill(1, torch.arange(9), 0)}
    called = torch.compile(result, backend="eager", fullgraph=True) if compiled else result
    words = r"attention_mask was given to transformer_blocks\.0, whose tokens are merged \(merge_block=True\)"
    with pytest.raises(Exception, match=raised_while_compiling(words) if compiled else words) as info:
        output(called, masked)
    assert compiled or info.type is TransformError
    assert torch.equal(output(result, arguments), expected)
    set_ratio(result, 0)
    assert torch.equal(output(result, masked), output(one_stage(), masked))


def test_a_block_with_embeddings_of_place_is_refused() -> None:
    model = copy.deepcopy(two_stages())
    for block in blocks(model).values():
        block.pos_embed = nn.Identity()
    with pytest.raises(TransformError, match=r"adds an embedding of its place to each token.* merge_block=True cannot"):
        transform(model, **BLOCKS)


def test_a_patch_of_tomesd_over_merged_blocks_is_told_of_and_can_be_taken_back() -> None:
    result = of_blocks(own())
    arguments = inputs(result, *SIZE)
    expected = output(result, arguments)
    tomesd.apply_patch(result, ratio=0.5)
    with pytest.raises(TransformError, match=r"patched by tomesd since the transform.*tomesd\.remove_patch\(model\)"):
        output(result, arguments)
    tomesd.remove_patch(result)
    assert torch.equal(output(result, arguments), expected)


# ------------------------------------------------------------------------------------------------ blocks of others


def test_a_forward_of_the_users_runs_on_merged_tokens() -> None:
    result, seen = of_blocks(own()), []
    arguments = inputs(result, *SIZE)

    def forward(hidden_states: Tensor, **_: Any) -> Tensor:
        seen.append(hidden_states.shape[1])
        return hidden_states * 1.5

    for block in blocks(result).values():
        block.forward = forward
    output(result, arguments)
    assert sorted(set(seen)) == [SIZE[0] * SIZE[1] // 4, SIZE[0] * SIZE[1] // 2]  # the mid block is not merged


def test_a_feed_forward_in_chunks_gives_the_same() -> None:
    result = of_blocks(own())
    arguments = inputs(result, *SIZE)
    expected = output(result, arguments)
    for size, dim in ((1, 0), (60, 1)):
        for block in blocks(result).values():
            block.set_chunk_feed_forward(size, dim)
        assert relative_error(output(result, arguments), expected) < 1e-5


def test_blocks_that_attend_to_the_prompt_alone_are_merged_without_weights() -> None:
    model = UNet2DConditionModel.from_config(two_stages().config, only_cross_attention=(True, False)).eval()
    arguments = inputs(model, *SIZE)
    ours = output(of_blocks(model), arguments)
    assert torch.equal(ours, output(of_blocks(model, prop_attn=False), arguments))
    assert relative_error(ours, output(model, arguments)) > 1e-4
    with pytest.raises(TransformError, match=r"only_cross_attention.*prop_attn=True has no merged tokens to weigh"):
        of_blocks(model, prop_attn=True)
