"""Features of diffusers' models that are not adapters: they act on a transformed model as on the stock one."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from support.models import (
    blocks,
    controlnet,
    gradients,
    inputs,
    output,
    relative_error,
    sd15,
    transformers,
    two_stages,
)
from support.state import untouched
from support.wrapped import wrapped
from torch import Tensor

import tome_fx
from tome_fx import transform


def test_a_controlnet_and_its_unet_run_together() -> None:
    arguments, condition = inputs(sd15()), inputs(controlnet(), seed=1)
    samples = []
    changes: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, transform)
    for change in changes:
        guide, unet = change(controlnet()), change(sd15())
        assert isinstance(guide, ControlNetModel)
        with torch.no_grad():
            down, middle = guide(**condition, return_dict=False)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        samples.append(output(unet, {**arguments, **extra}))
    plain, merged = samples
    assert 1e-3 < relative_error(merged, plain) < 0.3
    assert relative_error(output(sd15(), arguments), plain) > 0.01  # the ControlNet has a say at all


@pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning")  # diffusers' own
def test_the_output_is_a_tuple_or_an_output_object_as_asked() -> None:
    result = transform(two_stages())
    arguments = inputs(result)
    with torch.no_grad():
        (sample,) = result(**arguments, return_dict=False)
        assert torch.equal(result(**arguments).sample, sample)
        (transformer, *_) = transformers(result).values()
        image = torch.ones(1, 32, 8, 8)
        (tokens,) = transformer(image, torch.ones(1, 5, 16), return_dict=False)
        assert torch.equal(transformer(image, torch.ones(1, 5, 16)).sample, tokens)


@pytest.mark.parametrize("options", [{}, {"merge_mlp": True}], ids=str)
def test_the_feed_forward_may_be_chunked_after_the_transform(options: dict[str, Any]) -> None:
    result = transform(two_stages(), ratio=0.5, **options)
    arguments = inputs(result)
    expected = output(result, arguments)
    for size, dim in ((1, 0), (256, 1), (None, 0)):
        for block in blocks(result).values():
            block.set_chunk_feed_forward(size, dim)
        sizes: list[Tensor] = []
        handle = next(iter(blocks(result).values())).ff.register_forward_hook(lambda *a, s=sizes: s.append(a[1][0]))
        assert relative_error(output(result, arguments), expected) < 1e-6
        handle.remove()
        tokens = 512 if options else 1024  # of the first block
        assert len(sizes) == {0: 2, 1: tokens // 256}[dim] if size else 1
        assert sum(s.numel() for s in sizes) == 2 * tokens * 32


def test_chunks_that_do_not_divide_merged_tokens_are_diffusers_error() -> None:
    result = transform(two_stages(), ratio=0.5, merge_mlp=True)
    for block in blocks(result).values():
        block.set_chunk_feed_forward(1024, 1)
    with pytest.raises(ValueError, match="chunk"):
        output(result, inputs(result))


def test_gradients_reach_the_shared_parameters() -> None:
    model = copy.deepcopy(two_stages()).train()
    gradients(transform(model, ratio=0.5, merge_crossattn=True, merge_mlp=True), inputs(model))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("ratio", [0, 0.5])
def test_gradients_are_those_of_wrapped_children(ratio: float) -> None:
    model = copy.deepcopy(two_stages()).train()
    expected = gradients(wrapped(model, ratio), inputs(model))
    ours = gradients(transform(model, ratio=ratio, use_rand=False), inputs(model))
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert relative_error(gradient, expected[name]) < 1e-4, name


@pytest.mark.parametrize("options", [{}, {"merge_crossattn": True, "merge_mlp": True}], ids=str)
def test_gradient_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    model = copy.deepcopy(two_stages()).train()
    arguments = inputs(model)
    result = transform(model, ratio=0.5, **options)
    expected = {name: gradient.clone() for name, gradient in gradients(result, arguments).items()}
    sample = output(result, arguments)
    result.enable_gradient_checkpointing()
    runs = [0]
    (block, *_) = blocks(result).values()
    handle = block.attn1.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    checkpointed = gradients(result, arguments)
    handle.remove()
    assert runs == [2]  # once forward, once again for the backward
    for name, gradient in checkpointed.items():
        assert torch.equal(gradient, expected[name]), name
    assert torch.equal(output(result, arguments), sample)
    result.disable_gradient_checkpointing()
    assert torch.equal(output(result, arguments), sample)


def test_hooks_and_processors_that_were_there_before_go_on_working_for_their_owner() -> None:
    class Telling(AttnProcessor2_0):  # type: ignore[misc]
        def __init__(self, store: list[str]) -> None:
            super().__init__()
            self.store = store

        def hook(self, *_: Any) -> None:
            self.store.append("bound")

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.store.append("processor")
            return super().__call__(*args, **kwargs)

    def note(store: list[str], *_: Any) -> None:
        store.append("partial")

    def tell(*_: Any) -> None:
        seen.append("function")

    def count(module: Any, *_: Any) -> None:
        module.calls = getattr(module, "calls", 0) + 1

    seen: list[str] = []
    model = copy.deepcopy(two_stages())
    path, block = next(iter(blocks(model).items()))
    block.attn1.set_processor(Telling(seen))
    block.attn1.register_forward_pre_hook(Telling(seen).hook)
    block.attn1.register_forward_hook(functools.partial(note, seen))
    block.attn1.register_forward_hook(tell)
    block.attn1.register_forward_hook(types.MethodType(count, block))
    result = transform(model)
    tome_fx.explain(result, 8, 8)
    assert not seen, "explain has run what is the user's"
    output(result, inputs(model))
    assert seen == ["bound", "processor", "partial", "function"]
    assert not hasattr(block, "calls"), "a hook that is the model's own counts in the original"
    assert result.get_submodule(path).calls == 1


def test_hooks_and_processors_are_put_on_the_result_without_touching_the_original() -> None:
    model = two_stages()
    arguments = inputs(model)
    with untouched(model):
        result = transform(model, ratio=0.5)
        expected = output(result, arguments)
        add_hook_to_module(result.mid_block, ModelHook())
        assert torch.equal(output(result, arguments), expected)
        result.set_attention_slice(1)
        assert relative_error(output(result, arguments), expected) < 1e-5


def test_a_lora_loaded_into_the_result_acts_there_and_leaves_the_original_alone() -> None:
    lora = LoraConfig(r=2, target_modules=["to_q", "proj_in", "ff.net.0.proj"], init_lora_weights=False)
    original, arguments = copy.deepcopy(two_stages()), inputs(two_stages())  # a LoRA freezes what is shared
    before = output(original, arguments)
    loaded = transform(original, use_rand=False)
    loaded.add_adapter(lora)
    assert torch.equal(output(original, arguments), before)
    assert not any("lora" in name for name, _ in original.named_modules())
    stock = copy.deepcopy(original)
    stock.add_adapter(lora)
    stock.load_state_dict(loaded.state_dict())
    assert torch.equal(output(loaded, arguments), output(transform(stock, use_rand=False), arguments))
    assert relative_error(output(loaded, arguments), output(transform(original, use_rand=False), arguments)) > 1e-3


def test_encoder_states_may_be_a_tuple_and_reach_cross_attention_whole() -> None:
    seen = []

    class Whole(AttnProcessor2_0):  # type: ignore[misc]
        def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
            if isinstance(encoder_hidden_states, tuple):
                seen.append(len(encoder_hidden_states))
                encoder_hidden_states = encoder_hidden_states[0]
            return super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)

    model, arguments = transform(two_stages(), prop_attn=False), inputs(two_stages())
    expected = output(model, arguments)
    model.set_attn_processor(Whole())
    text = arguments["encoder_hidden_states"]
    assert torch.equal(output(model, {**arguments, "encoder_hidden_states": (text, [text])}), expected)
    assert seen == [2] * len(blocks(model))
