"""Weights of merged tokens: attention to the tokens of a merge, each in the place of its slot's mean, in either form.

A mask and a channel give the same to rounding. Which of them is taken is a rule of device, dtype and head size. The
processor that takes them passes for diffusers' own wherever diffusers looks.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0
from support.compiling import assert_no_break_and, whole
from support.models import blocks, gradients, inputs, one_stage, output, relative_error, sd15, sdxl, two_stages
from support.speed import slow_but
from support.state import untouched
from support.wrapped import wrapped
from torch import Tensor

from tome_fx import TransformError, explain, ops, set_ratio, transform
from tome_fx.families import weights
from tome_fx.families.weights import WeighingProcessor, attend_by_channel, faster_as_channel

# torch's own, on the first import of its compiler in a process
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
SIZE = 24, 20


@pytest.fixture
def by_channel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weights go as a channel on every device; what it is asked of is noted."""
    seen: list[Any] = []

    def always(*of: Any) -> bool:
        seen.append(of)
        return True

    monkeypatch.setattr(weights, "faster_as_channel", always)
    return seen


# ------------------------------------------------------------------------------------------------ the two forms


def heads(width: int, dtype: torch.dtype, queries: int | None = None) -> tuple[Tensor, ...]:
    """Queries, merged keys and values, their weights, and the keys and values of all tokens in the place of these."""
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randn(2, 16 * 12, 3 * width, generator=generator, dtype=torch.float64)
    slots = ops.match(tokens, 16, 12, kept=70, sx=2, sy=2, seed=None)

    def split(tokens: Tensor) -> Tensor:
        return tokens.view(*tokens.shape[:2], 3, width).transpose(1, 2)

    merged = ops.merge(tokens, slots).to(dtype)
    keys, values = merged, merged.flip(-1)
    asked = torch.randn(2, queries or 70, 3 * width, generator=generator, dtype=torch.float64).to(dtype)
    size = ops.log_sizes(merged, slots, heads=3)
    assert size is not None
    everywhere = [split(ops.unmerge(one.double(), slots)) for one in (keys, values)]
    return split(asked), split(keys), split(values), size.unflatten(0, (2, 3)), *everywhere


@pytest.mark.parametrize("queries", [None, 192], ids=["merged", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [8, 40, 64, 80, 160])
def test_a_channel_and_a_mask_are_attention_to_all_tokens_in_the_place_of_their_means(
    width: int, dtype: torch.dtype, queries: int | None
) -> None:
    query, key, value, size, keys, values = heads(width, dtype, queries)
    exact = F.scaled_dot_product_attention(query.double(), keys, values)
    by_mask = F.scaled_dot_product_attention(query, key, value, attn_mask=size)
    by_channel = attend_by_channel(query, key, value, size)
    assert by_channel.dtype == dtype
    errors = [relative_error(result.double(), exact) for result in (by_channel, by_mask)]
    # As near as the mask is, but for the rounding of one more term of a sum.
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps
    unweighed = F.scaled_dot_product_attention(query, key, value)
    assert relative_error(unweighed.double(), exact) > 4 * errors[0]


def test_a_channel_fills_up_to_a_width_that_flash_attention_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        assert set(options) == {"scale"}, "a mask would cost FlashAttention"
        return value[:, :, : query.shape[2]]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for width in (1, 7, 8, 40, 64, 80, 160):
        query, key, value, size, *_ = heads(width, torch.float32)
        assert attend_by_channel(query, key, value, size).shape == query.shape
        assert len(set(seen[-1])) == 1
        assert seen[-1][0] % 8 == 0
        assert width < seen[-1][0] <= width + 8


MODES: dict[str, dict[str, Any]] = {
    "": {"tile": 16},  # several, as the sizes of users hold of the default
    "keys": {"merge_queries": False},
    "blocks": {"merge_block": True},
}


@pytest.mark.usefixtures("by_channel")
@pytest.mark.parametrize("options", [pytest.param(options, id=name or "default") for name, options in MODES.items()])
@pytest.mark.parametrize("build", [two_stages, sdxl])
def test_a_unet_weighs_by_a_channel_as_by_a_mask(
    build: Callable[[], Any], options: dict[str, Any], by_channel: list[Any]
) -> None:
    model, arguments = build(), inputs(build(), *SIZE)
    result = transform(model, use_rand=False, **options)
    ours = output(result, arguments)
    merged = [path for path in blocks(result) if type(result.get_submodule(path).attn1.processor) is WeighingProcessor]
    assert len(by_channel) == len(merged) > 0, (
        "attention does not go by a channel where it weighs, or where it does not"
    )
    channels = {block.attn1.inner_dim // block.attn1.heads for block in blocks(model).values()}
    assert {of[:2] for of in by_channel} == {(torch.device("cpu"), torch.float32)}
    assert {of[2] for of in by_channel} <= channels
    assert relative_error(ours, output(wrapped(model, **options), arguments)) < 1e-5
    plain = output(transform(model, use_rand=False, prop_attn=False, **options), arguments)
    assert relative_error(ours, plain) > 1e-4


@pytest.mark.usefixtures("by_channel", "fresh_dynamo")
@pytest.mark.parametrize(
    "options",
    slow_but(["default"], [pytest.param(options, id=name or "default") for name, options in MODES.items()]),
)
def test_gradients_and_graphs_by_a_channel_are_those_by_a_mask(options: dict[str, Any], counter: Any) -> None:
    model = copy.deepcopy(two_stages()).train()
    arguments = inputs(model, *SIZE)
    result = transform(model, use_rand=False, **options)
    expected = gradients(wrapped(model, **options), arguments)
    for name, gradient in gradients(result, arguments).items():
        assert relative_error(gradient, expected[name]) < 1e-4, name
    compiled = whole(result.eval(), counter)
    assert relative_error(output(compiled, arguments), output(result, arguments)) < 1e-5
    assert_no_break_and(counter, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_low_precision_a_unet_by_a_channel_is_as_near_to_float32_as_by_a_mask(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(two_stages()).to(dtype)
    arguments = inputs(model, *SIZE)
    exact = output(transform(copy.deepcopy(model).float(), use_rand=False), {
        name: value.float() if value.is_floating_point() else value for name, value in arguments.items()
    })  # fmt: skip
    errors = []
    for channel in (True, False):
        monkeypatch.setattr(weights, "faster_as_channel", lambda *of, channel=channel: channel)
        ours = output(transform(model, use_rand=False), arguments)
        assert ours.dtype == dtype
        errors.append(relative_error(ours.float(), exact))
    assert errors[0] <= 2 * errors[1], "a match of other tokens moves both alike"


# ------------------------------------------------------------------------------------------------ the rule


@pytest.mark.parametrize(
    "device, dtype, capability, expected",
    [
        ("cuda", torch.float16, (8, 0), True),
        ("cuda", torch.bfloat16, (8, 6), True),
        ("cuda", torch.float16, (8, 9), True),
        ("cuda", torch.float32, (8, 0), False),  # FlashAttention takes none
        ("cuda", torch.float64, (8, 0), False),
        ("cuda", torch.float16, (9, 0), False),  # cuDNN takes a mask
        ("cuda", torch.float16, (10, 0), False),
        ("cuda", torch.float16, (12, 0), True),
        ("cuda", torch.float16, (7, 5), False),  # there is no FlashAttention to lose
        ("cpu", torch.float16, (8, 0), False),
        ("mps", torch.float16, (8, 0), False),
        ("meta", torch.bfloat16, (8, 0), False),
    ],
)
def test_a_channel_is_taken_where_a_mask_would_cost_flash_attention(
    device: str, dtype: torch.dtype, capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: capability)
    assert faster_as_channel(torch.device(device), dtype, 40) is expected
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not faster_as_channel(torch.device(device), dtype, 40)


@pytest.mark.parametrize("width, expected", [(40, False), (120, False), (160, True), (192, False)])
def test_where_cudnn_has_kernels_a_channel_is_for_heads_that_are_too_wide_for_them(
    width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: (9, 0))
    assert faster_as_channel(torch.device("cuda"), torch.float16, width) is expected


@pytest.mark.parametrize(
    "width, expected",
    [
        *((width, True) for width in (1, 24, 40, 48, 72, 80, 88, 104, 120, 160, 176, 200, 248)),
        *((width, False) for width in (32, 64, 96, 128, 192, 256, 320)),  # they fill their kernel, or have none
        *((31, True), (255, True)),  # a kernel is as wide as the next multiple of 8
    ],
)
def test_a_channel_is_taken_where_it_stays_within_the_kernel_of_the_head(
    width: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda asked: (8, 0))
    assert faster_as_channel(torch.device("cuda"), torch.float16, width) is expected


# ------------------------------------------------------------------------------------------------ the processor


def test_the_processor_is_put_where_tokens_are_weighed_and_nowhere_else() -> None:
    with untouched(sdxl()):
        for options, depth in (
            ({}, 1),
            ({"max_downsample": 4}, 2),
            ({"prop_attn": True}, 1),
            ({"merge_block": True}, 1),
        ):
            result = transform(sdxl(), **options)
            found = {
                p.removesuffix(".processor")
                for p, at in result.attn_processors.items()
                if type(at) is WeighingProcessor
            }
            assert {path.rpartition(".")[2] for path in found} == {"attn1"}
            levels = {result.get_submodule(path).to_q.in_features for path in found}
            assert len(levels) == depth
    for options in ({"prop_attn": False}, {"merge_attn": False, "merge_mlp": True}):
        assert {type(one) for one in transform(sdxl(), **options).attn_processors.values()} == {AttnProcessor2_0}


def test_processors_of_the_users_stay_theirs() -> None:
    class Mine(AttnProcessor2_0):  # type: ignore[misc]
        """A processor derived from diffusers' own."""

    model = copy.deepcopy(two_stages())
    model.set_attn_processor(mine := Mine())
    assert set(transform(model).attn_processors.values()) == {mine}


def test_the_processor_passes_for_diffusers_own_where_diffusers_looks() -> None:
    model = transform(copy.deepcopy(two_stages()))
    arguments = inputs(model, *SIZE)
    expected = output(model, arguments)
    assert WeighingProcessor == AttnProcessor2_0
    assert WeighingProcessor != AttnProcessor
    assert WeighingProcessor in (AttnProcessor2_0,)
    assert {AttnProcessor2_0: "known"}[WeighingProcessor] == "known", "diffusers' registers are dicts by class"

    before = dict(model.attn_processors)
    model.set_attn_processor(dict(before))
    assert torch.equal(output(model, arguments), expected)
    model.fuse_qkv_projections()
    assert relative_error(output(model, arguments), expected) < 1e-5
    model.unfuse_qkv_projections()
    assert model.attn_processors == before
    assert torch.equal(output(model, arguments), expected)
    model.set_attn_processor({name: type(processor)() for name, processor in before.items()})  # as IP-Adapters do
    assert torch.equal(output(model, arguments), expected)
    model.set_default_attn_processor()
    assert {type(one) for one in model.attn_processors.values()} == {AttnProcessor}
    assert relative_error(output(model, arguments), expected) < 1e-5


def test_a_mask_of_the_users_is_served_as_the_stock_model_serves_it_where_nothing_is_merged() -> None:
    for heads_of in (one_stage(), UNet2DConditionModel.from_config(one_stage().config, attention_head_dim=1)):
        model = heads_of.eval()
        height, width = SIZE
        hidden = torch.ones(2, height * width).index_fill(1, torch.arange(9), 0)
        arguments = {**inputs(model, *SIZE), "attention_mask": hidden}
        result = transform(model, 0)
        assert {type(block.attn1.processor) for block in blocks(result).values()} == {WeighingProcessor}
        assert torch.equal(output(result, arguments), output(model, arguments))
        assert relative_error(output(result, arguments), output(model, inputs(model, *SIZE))) > 1e-4


@pytest.mark.usefixtures("by_channel")
def test_a_mask_of_the_users_is_no_weight_even_where_weights_go_by_a_channel(by_channel: list[Any]) -> None:
    model, (height, width) = one_stage(), SIZE
    hidden = torch.ones(2, height * width).index_fill(1, torch.arange(9), 0)
    arguments = {**inputs(model, *SIZE), "attention_mask": hidden}
    assert torch.equal(output(transform(model, 0), arguments), output(model, arguments))
    assert not by_channel


# ---------------------------------------------------------------------------------- where nothing can be weighed


class Deaf(AttnProcessor2_0):  # type: ignore[misc]
    """Takes a mask and never looks at it."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return super().__call__(attn, hidden_states, encoder_hidden_states)


def unmasked(unet: Any) -> None:
    unet.set_attn_processor(Deaf())


def perturbed(unet: Any) -> None:
    for block in blocks(unet).values():
        block.attn1.set_processor(PAGIdentitySelfAttnProcessor2_0())


@pytest.mark.parametrize(
    "change, reason",
    [
        (unmasked, "Deaf is none of diffusers', and may attend to other keys"),
        (perturbed, "PAGIdentitySelfAttnProcessor2_0 attends in parts of the batch"),
    ],
)
@pytest.mark.parametrize("options", [pytest.param(options, id=name or "default") for name, options in MODES.items()])
def test_what_cannot_weigh_gets_plain_means_by_default_explain_says_so_and_asked_for_it_is_refused(
    change: Callable[[Any], None], reason: str, options: dict[str, Any]
) -> None:
    arguments = inputs(two_stages(), *SIZE)
    results = {prop: transform(copy.deepcopy(two_stages()), prop_attn=prop, **options) for prop in (None, False, True)}
    weighed = output(results[None], arguments)
    if not options.get("merge_queries", True) and change is not unmasked:
        change(results[None])
        with pytest.raises(TransformError, match="merge_queries=False gives it merged keys"):
            output(results[None], arguments)
    else:
        for result in results.values():
            change(result)
        assert torch.equal(output(results[None], arguments), output(results[False], arguments))
        assert relative_error(output(results[None], arguments), weighed) > 1e-4
        with pytest.raises(TransformError, match="prop_attn=True cannot weigh merged tokens there"):
            output(results[True], arguments)
        set_ratio(results[True], 0)
        output(results[True], arguments)
        report = explain(results[None], *SIZE)
        assert all(row.unweighed.startswith(reason) for row in report.rows)
        assert f"Not weighed at {len(report.rows)} of {len(report.rows)} sites: {reason}" in str(report)


def test_attention_to_the_prompt_is_not_weighed_by_default_and_asked_for_it_is_refused() -> None:
    model = UNet2DConditionModel.from_config(two_stages().config, only_cross_attention=(True, False)).eval()
    arguments = inputs(model, *SIZE)
    result = transform(model, use_rand=False)
    ours = output(result, arguments)
    assert torch.equal(ours, output(transform(model, use_rand=False, prop_attn=False), arguments))
    assert relative_error(ours, output(model, arguments)) > 1e-4
    (reason,) = {row.unweighed for row in explain(result, *SIZE).rows}
    assert "attends to the prompt, whose tokens are not merged" in reason
    with pytest.raises(TransformError, match=r"attends to the prompt in a block of only_cross_attention.*prop_attn=Tr"):
        transform(model, prop_attn=True)


def test_a_processor_that_is_put_in_later_decides_from_then_on() -> None:
    model, arguments = transform(copy.deepcopy(sd15()), use_rand=False), inputs(sd15(), *SIZE)
    weighed = output(model, arguments)
    before = model.attn_processors
    model.set_attn_processor(Deaf())
    plain = output(model, arguments)
    assert torch.equal(plain, output(wrapped(sd15(), prop_attn=False), arguments))
    model.set_attn_processor(before)
    assert torch.equal(output(model, arguments), weighed)
    assert relative_error(weighed, plain) > 1e-4
