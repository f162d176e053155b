"""What real use found, each with the kind behind it: copies and replicas, tracing and packaging, foreign forwards,
a ratio that changes under a compile, and processors and hooks that take merged tokens for pixels.
"""

import abc
import copy
import functools
import gc
import io
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tomesd
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import HookRegistry, SmoothedEnergyGuidanceConfig
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from diffusers.models import attention, attention_processor
from diffusers.models.transformers import transformer_2d
from support.compiling import in_place, raised_while_compiling, whole
from support.models import (
    blocks,
    controlnet,
    inputs,
    mask,
    one_block,
    output,
    relative_error,
    sdxl,
    transformers,
    two_stages,
)
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tome_fx
from tome_fx import TransformError, set_ratio, transform
from tome_fx.families import maps
from tome_fx.graph import specialize
from tome_fx.graph.specialize import original

# torch's own, on the first import of its compiler in a process
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


# ------------------------------------------------------------------------------------------- copies and replicas


def replicate(model: nn.Module, scale: float) -> Any:
    """What `nn.DataParallel` does for one device, with weights that tell it from the original."""
    replicas: dict[nn.Module, Any] = {m: m._replicate_for_data_parallel() for m in model.modules()}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            replica._modules[name] = child and replicas[child]
        for name, weight in module._parameters.items():
            setattr(replica, name, None if weight is None else weight.detach() * scale)
    return replicas[model]


@pytest.mark.parametrize("build", [two_stages, sdxl, controlnet])
@pytest.mark.parametrize("dynamic_ratio", [False, True])
def test_a_replica_uses_its_own_weights(build: Callable[[], Any], dynamic_ratio: bool) -> None:
    stock = build()
    doubled = copy.deepcopy(stock)
    with torch.no_grad():
        for weight in doubled.parameters():
            weight.mul_(2)
    arguments = inputs(stock, 16, 16)
    model = transform(stock, 0.5, dynamic_ratio=dynamic_ratio)
    set_ratio(model, 0.25)
    expected = output(transform(doubled, 0.25, dynamic_ratio=dynamic_ratio), arguments)
    assert torch.equal(output(replicate(model, 2.0), arguments), expected)


def test_a_shallow_copy_runs_its_own_modules() -> None:
    model = transform(two_stages(), 0.5)
    arguments = inputs(model, 16, 16)
    other = copy.copy(model)
    other._modules = dict(model._modules)
    other.conv_out = copy.deepcopy(model.conv_out)
    with torch.no_grad():
        other.conv_out.weight.zero_()
        other.conv_out.bias.fill_(3.0)
    assert output(other, arguments).eq(3.0).all()
    assert not output(model, arguments).eq(3.0).any()


def test_a_model_is_freed_when_it_is_dropped_without_a_search_for_circles() -> None:
    model = transform(copy.deepcopy(two_stages()), 0.5)
    set_ratio(model, 0.25)
    output(model, inputs(model, 16, 16))
    gc.collect()
    references = [weakref.ref(tensor) for tensor in (*model.parameters(), model)]
    gc.disable()
    try:
        del model
        assert not any(reference() is not None for reference in references)
    finally:
        gc.enable()


@pytest.mark.parametrize("arguments", [{}, {"encoder_attention_mask": mask()}], ids=["transform", "a new kind of call"])
def test_a_trace_leaves_no_circle_that_keeps_its_callers_models(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specialize, "_classes", {})  # as in a new process
    gc.collect()
    gc.disable()
    try:
        model = transform(copy.deepcopy(one_block()), 0.5)
        output(model, {**inputs(model, 8, 8), **arguments})
        reference = weakref.ref(model)
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_the_class_of_the_result_passes_for_the_original_s() -> None:
    model = transform(two_stages(), 0.5)
    cls = type(model)
    assert cls.__name__ == "UNet2DConditionModel"
    assert cls.__module__ == UNet2DConditionModel.__module__
    assert cls in (UNet2DConditionModel,)
    assert cls not in {UNet2DConditionModel: 1}, "fully_shard would take the class that it made of the other"
    assert cls not in (type(transform(two_stages(), 0.25)), nn.Module)
    made = cls.from_config(model.config)
    assert type(made) is UNet2DConditionModel, "a class that was generated for modules that exist makes no others"
    parts = ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    pipe = StableDiffusionPipeline(
        **dict.fromkeys(parts),
        unet=model,
        scheduler=None,
        requires_safety_checker=False,
    )
    assert pipe.unet is model


# ------------------------------------------------------------------------------------------ traced and packaged


class Plain(nn.Module):
    """Of tensors alone, as what traces wants it."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Any) -> Any:
        return output_of(self.model, dict(zip(self.names, values, strict=True)))


def output_of(model: Any, arguments: dict[str, Any]) -> Any:
    return model(**arguments, return_dict=False)[0]


@pytest.mark.filterwarnings("ignore")  # torch's of what a trace makes constant; stock has them too
@pytest.mark.parametrize("options", [{}, {"dynamic_ratio": True}, {"prop_attn": True, "merge_mlp": True}], ids=str)
def test_torch_jit_trace_takes_the_model(options: dict[str, Any]) -> None:
    model = transform(two_stages(), 0.5, **options)
    arguments, others = inputs(model, 16, 16), inputs(model, 16, 16, seed=1)
    with torch.no_grad():
        traced = torch.jit.trace(Plain(model, list(arguments)), tuple(arguments.values()))
        assert relative_error(traced(*others.values()), output_of(model, others)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")  # torch's own
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_block_is_exported_saved_and_packaged_by_itself(tmp_path: Path) -> None:
    model = transform(one_block(), 0.5)
    (block,) = blocks(model).values()
    seen: dict[str, Any] = {}
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: seen.update(call=(args, kwargs)), with_kwargs=True)
    output(model, inputs(model, 8, 8))
    hook.remove()
    args, kwargs = seen["call"]
    with torch.no_grad():
        expected = block(*args, **kwargs)
        program, file = torch.export.export(block, args, kwargs), io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(*args, **kwargs), expected)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
        assert relative_error(torch._inductor.aoti_load_package(path)(*args, **kwargs), expected) < 1e-5


# ------------------------------------------------------------------------------------------------ foreign code


def replaced(block: Any) -> None:
    """A forward that a user has written for a block, as reference-only control does."""

    def strict(self: Any, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Any = None,
               encoder_attention_mask: Any = None, timestep: Any = None, cross_attention_kwargs: Any = None,
               class_labels: Any = None) -> Tensor:  # fmt: skip
        return hidden_states

    block.forward = types.MethodType(strict, block)


def swallowing(block: Any) -> None:
    """A forward that takes a slot map and knows nothing of it."""
    block.forward = lambda hidden_states, *_, **__: hidden_states


def derived(block: Any) -> None:
    """A class derived from the block's, with a forward of its own."""

    class Mine(type(block)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

    block.__class__ = Mine


@pytest.mark.parametrize("change", [replaced, swallowing, derived])
def test_a_block_whose_forward_was_replaced_after_the_transform_is_told_of(change: Callable[[Any], None]) -> None:
    model = transform(two_stages(), 0.5)
    change(next(iter(blocks(model).values())))
    with pytest.raises(
        TransformError,
        match=r"forward of transformer_blocks\.0 in a Transformer2DModel is replaced by .*test_field\..* since",
    ):
        output(model, inputs(model, 16, 16))


@pytest.mark.parametrize("change", [replaced, swallowing])
def test_a_block_whose_forward_was_replaced_before_the_transform_is_not_called_hooked(change: Any) -> None:
    model = copy.deepcopy(two_stages())
    change(next(iter(blocks(model).values())))
    with pytest.raises(TransformError, match=r"is replaced on the instance by .*test_field\.") as caught:
        transform(model)
    assert "hook" not in str(caught.value)


@pytest.mark.parametrize(
    "put_on, name",
    [
        (
            lambda model: Accelerator(cpu=True, mixed_precision="bf16").prepare(model),
            r"accelerate\.utils\.operations\.",
        ),
        (lambda model: add_hook_to_module(model, ModelHook()), r"accelerate\.hooks\..*new_forward around it"),
        (lambda model: setattr(model, "forward", functools.partial(model.forward)), r"functools\.partial "),
    ],
    ids=["mixed precision", "hooks", "partial"],
)
def test_what_was_put_around_a_forward_is_named_with_what_to_do(put_on: Callable[[Any], Any], name: str) -> None:
    model = copy.deepcopy(two_stages())
    put_on(model)
    with pytest.raises(TransformError, match=rf"replaced on the instance by {name}.*around the result$"):
        transform(model)


def test_what_cannot_be_copied_is_named() -> None:
    model: Any = copy.deepcopy(two_stages())
    model.mid_block.lock = threading.Lock()
    with pytest.raises(
        TransformError, match=r"^lock of mid_block \(UNetMidBlock2DCrossAttn\) cannot be copied: take that"
    ):
        transform(model)
    del model.mid_block.lock
    prune.random_unstructured(model.conv_in, "weight", 0.5)
    with pytest.raises(TransformError, match=r"^weight of conv_in \(Conv2d\) cannot be copied: take that off before"):
        transform(model)
    prune.remove(model.conv_in, "weight")
    assert output(transform(model), inputs(model, 8, 8)).isfinite().all()


def hooked_for_a_while(ratio: float) -> Any:
    """A transformed model whose hooks were taken off again, after a change of its ratio."""
    model = transform(copy.deepcopy(one_block()))
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    set_ratio(model, ratio)
    remove_hook_from_module(model, recurse=True)
    return model


@pytest.mark.parametrize("ratio", [0.7, 0.25])
def test_hooks_that_were_taken_off_leave_no_forward_when_the_ratio_is_set_anew(ratio: float) -> None:
    model = hooked_for_a_while(0.7)
    assert "forward" in vars(model)
    set_ratio(model, ratio)
    assert "forward" not in vars(model)
    arguments = inputs(model, 8, 8)
    assert torch.equal(output(model, arguments), output(transform(one_block(), ratio), arguments))


@pytest.mark.slow
def test_hooks_that_were_taken_off_leave_any_number_of_ratios(counter: Any) -> None:
    model = hooked_for_a_while(0.7)
    compiled, arguments = torch.compile(model, backend=counter, fullgraph=True), inputs(model, 8, 8)
    for twentieths in range(10):
        set_ratio(model, twentieths / 20)
        output(compiled, arguments)
    assert counter.frame_count == 10


def test_hooks_around_a_block_are_not_taken_for_another_forward() -> None:
    model = transform(two_stages(), 0.5)
    arguments = inputs(model, 16, 16)
    expected = output(model, arguments)
    for block in blocks(model).values():
        add_hook_to_module(block, ModelHook())
        HookRegistry.check_if_exists_or_initialize(block)
    assert torch.equal(output(model, arguments), expected)
    for block in blocks(model).values():
        remove_hook_from_module(block)
        block.forward = torch.compile(block.forward, backend="eager")
    torch._dynamo.reset()
    assert torch.equal(output(model, arguments), expected)


def test_a_model_patched_by_tomesd_before_or_after_is_told_how_to_take_that_back() -> None:
    patched = tomesd.apply_patch(copy.deepcopy(two_stages()), ratio=0.5)
    with pytest.raises(TransformError, match=r"patched by tomesd, at .*tomesd\.remove_patch\(model\)"):
        transform(patched)
    tomesd.remove_patch(patched)
    model = transform(copy.deepcopy(two_stages()), 0.5)
    arguments = inputs(model, 16, 16)
    expected = output(model, arguments)
    tomesd.apply_patch(model, ratio=0.5)
    with pytest.raises(TransformError, match=r"tomesd.*remove_patch"):
        output(model, arguments)
    tomesd.remove_patch(model)
    assert torch.equal(output(model, arguments), expected)


def vendored(module: Any) -> Any:
    """A copy of a module of diffusers under another name, as nodes for other programs carry it."""
    result = types.ModuleType(f"vendored.{module.__name__.rpartition('.')[2]}")
    result.__package__ = module.__package__
    sys.modules[result.__name__] = result  # where a dataclass looks up its module
    exec(compile(Path(module.__file__).read_text(encoding="utf-8"), result.__name__, "exec"), vars(result))
    return result


@pytest.fixture
def own_modules() -> Iterator[None]:
    before = dict(sys.modules)
    yield
    for name in sys.modules.keys() - before.keys():
        if name.startswith("vendored."):
            del sys.modules[name]


@pytest.mark.usefixtures("own_modules")
def test_a_vendored_class_of_the_same_name_is_named_with_its_module() -> None:
    from diffusers.models.unets import unet_2d_condition

    own = vendored(unet_2d_condition).UNet2DConditionModel.from_config(two_stages().config)
    with pytest.raises(TypeError, match=r"got vendored\.unet_2d_condition\.UNet2DConditionModel, a class of the same"):
        transform(own)
    model = copy.deepcopy(two_stages())
    other = vendored(transformer_2d).Transformer2DModel
    for module in model.modules():
        if type(module).__name__ == "Transformer2DModel":
            module.__class__ = other
    with pytest.raises(TransformError, match=r"not diffusers' class of that name: vendored\.transformer_2d\.Transf"):
        transform(model)
    some = copy.deepcopy(two_stages())
    next(iter(transformers(some).values())).__class__ = other
    with pytest.raises(TransformError, match=r"not every transformer block .* vendored\.transformer_2d\.Transf"):
        transform(some)


def wrapped_in_a_module(block: Any) -> Any:
    return torch.compile(block, backend="eager")


def timed(block: Any) -> Any:
    before = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return before(*args, **kwargs)

    block.forward = forward
    return block


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("wrap", [wrapped_in_a_module, checkpoint_wrapper, timed])
def test_a_wrapper_that_goes_on_to_the_block_is_not_taken_for_another_forward(wrap: Callable[[Any], Any]) -> None:
    model = transform(copy.deepcopy(two_stages()), 0.5)
    arguments = inputs(model, 16, 16)
    expected = output(model, arguments)
    for transformer in transformers(model).values():
        transformer.transformer_blocks[0] = wrap(transformer.transformer_blocks[0])
    assert relative_error(output(model, arguments), expected) < 1e-5


@pytest.mark.parametrize(
    "cls", [attention.BasicTransformerBlock, transformer_2d.Transformer2DModel, type(two_stages())]
)
def test_a_class_that_is_patched_after_a_transform_is_taken_as_it_is_by_the_next(
    cls: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = two_stages(), inputs(two_stages(), 16, 16)
    plain, stock = transform(model, 0), cls.forward
    expected = output(plain, arguments)

    @functools.wraps(stock)
    def louder(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        if isinstance(found, Tensor):
            return 1.5 * found
        return (1.5 * found[0],) if isinstance(found, tuple) else type(found)(sample=1.5 * found.sample)

    monkeypatch.setattr(cls, "forward", louder)
    patched = output(model, arguments)
    assert not torch.equal(patched, expected)
    assert torch.equal(output(transform(model, 0), arguments), patched)
    monkeypatch.undo()
    assert torch.equal(output(transform(model, 0), arguments), expected)


def test_a_model_keeps_the_forward_that_it_was_transformed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments, cls = transform(two_stages(), 0), inputs(two_stages(), 16, 16), UNet2DConditionModel
    expected, stock = output(model, arguments), cls.forward
    monkeypatch.setattr(cls, "forward", lambda *args, **kwargs: [1.5 * stock(*args, **kwargs)[0]])
    for ratio in (0.5, 0):
        set_ratio(model, ratio)
    assert torch.equal(output(model, arguments), expected)


def test_a_method_that_is_patched_after_a_transform_is_taken_as_it_is_by_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cls, name = transformer_2d.Transformer2DModel, "_get_output_for_continuous_inputs"
    model, arguments, stock = two_stages(), inputs(two_stages(), 16, 16), getattr(cls, name)
    expected = output(transform(model, 0), arguments)
    monkeypatch.setattr(cls, name, lambda *args, **kwargs: 1.5 * stock(*args, **kwargs))
    patched = output(model, arguments)
    assert not torch.equal(patched, expected)
    assert torch.equal(output(transform(model, 0), arguments), patched)


def test_a_forward_that_names_none_of_its_arguments_is_refused_in_words() -> None:
    class Hidden(attention.BasicTransformerBlock):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = copy.deepcopy(two_stages())
    for block in blocks(model).values():
        block.__class__ = Hidden
    message = r"forward of .*Hidden names none of its arguments: .* must name hidden_states, .*functools\.wraps"
    with pytest.raises(TransformError, match=message):
        transform(model)


class Longer(attention.BasicTransformerBlock):  # type: ignore[misc]
    """A block with one more argument than diffusers' own."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Any = None,
                encoder_attention_mask: Any = None, timestep: Any = None, cross_attention_kwargs: Any = None,
                class_labels: Any = None, added_cond_kwargs: Any = None, extra: float = 0.0) -> Any:  # fmt: skip
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states)) + extra
        prompt = self.attn2(self.norm2(hidden_states), encoder_hidden_states=encoder_hidden_states)
        hidden_states = hidden_states + prompt
        return hidden_states + self.ff(self.norm3(hidden_states))


class Open(attention.BasicTransformerBlock):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, *others: Any, **more: Any) -> Any:
        return hidden_states + self.attn1(self.norm1(hidden_states))


def of_blocks(cls: type[nn.Module]) -> Any:
    model = copy.deepcopy(two_stages())
    for block in blocks(model).values():
        block.__class__ = cls
    return model


def test_a_slot_map_given_by_position_comes_after_the_block_s_own_arguments() -> None:
    model = transform(of_blocks(Longer), 0.5)
    arguments = inputs(model, 16, 16)
    expected = output(model, arguments)
    model.enable_gradient_checkpointing()
    assert torch.equal(model(**arguments).sample, expected)
    model = transform(of_blocks(Open), 0.5)
    output(model, arguments)
    model.enable_gradient_checkpointing()
    with pytest.raises(TransformError, match=r"takes any number of arguments by position"):
        model(**arguments)


class Asks(attention.BasicTransformerBlock):  # type: ignore[misc]
    """A block that looks at what its child is."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        if isinstance(self.attn1, attention_processor.Attention):
            return hidden_states + self.attn1(self.norm1(hidden_states))
        return hidden_states


class Reads(attention.BasicTransformerBlock):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states + self.attn1(hidden_states) * hasattr(self.attn1, "heads")


def test_a_forward_that_depends_on_what_its_children_are_is_refused_and_not_guessed() -> None:
    with pytest.raises(TransformError, match=r"Asks\.forward .* asks for the class of its child attn1"):
        transform(of_blocks(Asks))
    with pytest.raises(TransformError, match=r"Reads\.forward .* reads heads of its child attn1"):
        transform(of_blocks(Reads))


def test_a_unet_of_another_metaclass_is_transformed() -> None:
    class Abstract(UNet2DConditionModel, abc.ABC):  # type: ignore[misc]
        """A class of a user's own."""

    model = copy.deepcopy(two_stages())
    model.__class__ = Abstract
    result = transform(model, 0.5)
    arguments = inputs(model, 16, 16)
    assert original(type(result)) is Abstract
    assert torch.equal(output(result, arguments), output(transform(two_stages(), 0.5), arguments))


@pytest.mark.parametrize("build", [two_stages, sdxl])
def test_a_checkpointing_function_of_the_users_is_given_the_block_itself(build: Callable[[], Any]) -> None:
    seen: list[nn.Module] = []

    def selective(module: nn.Module, *args: Any) -> Any:
        seen.append(module)
        if any(weight.requires_grad for weight in module.parameters()):
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    models = [copy.deepcopy(build()), transform(copy.deepcopy(build()), 0.5)]
    for model in models:
        model.train().requires_grad_(True)  # a LoRA in another test may have frozen what builders share
        model.enable_gradient_checkpointing(selective)
        seen.clear()
        model(**inputs(model, 16, 16)).sample.sum().backward()
        assert set(blocks(model).values()) <= set(seen)


# ------------------------------------------------------------------------------------- a ratio under a compile


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("compiled", [whole, pytest.param(in_place, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic_ratio", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_ratio_set_while_another_thread_compiles_takes_effect_after_it(
    dynamic_ratio: bool, compiled: Callable[..., Any]
) -> None:
    model = transform(one_block(), 0.5, dynamic_ratio=dynamic_ratio)
    arguments = inputs(model, 16, 16)
    threads: list[threading.Thread] = []

    def backend(graph: Any, example: Any) -> Any:
        """The moment at which all is traced and nothing is compiled yet."""
        thread = threading.Thread(target=set_ratio, args=(model, 0.25))
        thread.start()
        threads.append(thread)
        thread.join(0.2)
        assert thread.is_alive() or len(threads) > 1, "the ratio was changed under a compile"
        return graph.forward

    whole_model = compiled(model, backend)
    expected = [output(transform(one_block(), ratio, dynamic_ratio=dynamic_ratio), arguments) for ratio in (0.5, 0.25)]
    assert relative_error(output(whole_model, arguments), expected[0]) < 1e-5
    for thread in threads:
        thread.join()
    assert relative_error(output(whole_model, arguments), expected[1]) < 1e-5


def test_a_change_of_ratio_is_one_assignment_that_all_modules_share() -> None:
    for dynamic_ratio in (False, True):
        model = transform(sdxl(), 0.5, max_downsample=8, dynamic_ratio=dynamic_ratio)
        holders = {id(vars(module)["tome_fx"]) for module in model.modules() if "tome_fx" in vars(module)}
        assert holders == {id(model.tome_fx)}
        classes = [type(module) for module in model.modules()][1:]
        set_ratio(model, 0.25)
        assert [type(module) for module in model.modules()][1:] == classes
        assert model.tome_fx.plan.ratio == 0.25


# ---------------------------------------------------------------------------------- what takes tokens for pixels


class Shared:
    """Every image attends to the keys of the first one as well."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
                 **_: Any) -> Any:  # fmt: skip
        batch = hidden_states.shape[0]
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is None:
            keys = torch.cat([keys, keys[:1].expand(batch, -1, -1)], dim=1)
        q, k, v = (
            t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for t in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys))
        )
        mask = None if attention_mask is None else attention_mask.unflatten(0, (batch, -1))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


def test_attention_to_more_keys_than_those_given_works_and_with_weights_is_refused_in_words() -> None:
    for prop_attn in (False, True):
        model = transform(two_stages(), 0.5, prop_attn=prop_attn)
        model.set_attn_processor(Shared())
        if not prop_attn:
            output(model, inputs(model, 16, 16))
            continue
        with pytest.raises(TransformError, match=r"Shared failed on a mask, .* prop_attn=False"):
            output(model, inputs(model, 16, 16))
        set_ratio(model, 0)
        output(model, inputs(model, 16, 16))


class Kept:
    """Keeps its maps."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Any:
        keys = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(t) for t in (attn.to_q(hidden_states), attn.to_k(keys), attn.to_v(keys)))
        self.probs = attn.get_attention_scores(q, k, None)
        return attn.to_out[0](attn.batch_to_head_dim(self.probs @ v))


class Appended:
    maps: list[Tensor] = []  # noqa: RUF012 - as users write it

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        q, k = attn.to_q(hidden_states), attn.to_k(hidden_states)
        probs = (q @ k.mT).softmax(-1)
        self.maps.append(probs.detach())
        return probs @ attn.to_v(hidden_states)


class Handed:
    store: Any = None

    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        probs = attn.get_attention_scores(attn.to_q(hidden_states), attn.to_k(hidden_states), None)
        self.store(probs, is_cross=True)
        return probs @ attn.to_v(hidden_states)


class OnTheModule:
    def __call__(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        attn.maps = attn.get_attention_scores(attn.to_q(hidden_states), attn.to_k(hidden_states), None)
        return attn.maps @ attn.to_v(hidden_states)


class Twice:
    """One more step between the probabilities and where they are kept, under a condition of its own."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep

    def __call__(processor, attn: Any, hidden_states: Tensor, attention_mask: Any = None, **_: Any) -> Any:
        scores = attn.to_q(hidden_states) @ attn.to_k(hidden_states).mT
        probs: Tensor = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        mean = probs.mean(0)
        if processor.keep and mean is not None:
            processor.first, processor.second = 1, mean
        hidden_states[:] = probs @ attn.to_v(hidden_states)
        processor.last = probs @ hidden_states
        return hidden_states


class Deaf:
    """Takes a mask and never looks at it."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return Kept()(attn, hidden_states, encoder_hidden_states)


Pix2PixZeroAttnProcessor = sys.modules[diffusers.StableDiffusionPix2PixZeroPipeline.__module__].Pix2PixZeroAttnProcessor


def kept(processor: type) -> list[tuple[bool, tuple[str, ...]]]:
    return [tuple(store) for store in maps.stores(processor)]


@pytest.mark.parametrize(
    "processor, expected",
    [
        (Kept, [(False, ())]),
        (Appended, [(False, ())]),
        (Handed, [(True, ())]),
        (OnTheModule, [(True, ())]),
        (Twice, [(False, ("keep",))]),
        (Deaf, []),
        (Shared, []),
        (Pix2PixZeroAttnProcessor, [(False, ("is_pix2pix_zero",))]),
    ],
)
def test_what_a_processor_keeps_of_attention_is_read_off_its_source(processor: type, expected: Any) -> None:
    assert sorted(set(kept(processor))) == expected


def test_no_processor_of_diffusers_is_taken_for_one_that_keeps_maps_or_leaves_out_what_it_is_given() -> None:
    named = {name: value for name, value in vars(attention_processor).items() if "Processor" in name}
    found = {name: value for name, value in named.items() if isinstance(value, type)}
    assert len(found) > 10
    assert not [name for name, processor in found.items() if kept(processor)]
    plain = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
    for argument, others in (("attention_mask", ("AttnAddedKVProcessor2_0",)), ("encoder_hidden_states", ())):
        names = [*plain, "IPAdapterAttnProcessor2_0", *others]
        assert not [name for name in names if maps.ignores(found[name], argument)]


@pytest.mark.parametrize("keep", [False, True])
def test_a_store_under_a_condition_of_the_processor_s_own_counts_where_it_holds(keep: bool) -> None:
    model = transform(two_stages(), 0.5)
    block = next(iter(blocks(model).values()))
    block.attn1.set_processor(Twice(keep))
    arguments = inputs(model, 16, 16)
    if keep:
        with pytest.raises(TransformError, match=r"Twice keeps the attention probabilities that it sees in attn1"):
            output(model, arguments)
    else:
        output(model, arguments)


def test_a_processor_that_leaves_out_the_weights_is_refused_with_them_alone() -> None:
    for prop_attn in (False, True):
        model = transform(two_stages(), 0.5, prop_attn=prop_attn)
        for block in blocks(model).values():
            block.attn1.set_processor(Deaf())
        if prop_attn:
            with pytest.raises(TransformError, match=r"Deaf takes no notice of attention_mask"):
                output(model, inputs(model, 16, 16))
        else:
            output(model, inputs(model, 16, 16))


def test_a_processor_s_class_that_is_patched_later_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kept(attention_processor.AttnProcessor)
    monkeypatch.setattr(attention_processor.AttnProcessor, "__call__", Kept.__call__)
    assert kept(attention_processor.AttnProcessor)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_maps_of_merged_attention_are_refused_and_of_unmerged_ones_served(compiled: bool) -> None:
    for ratio, merge_crossattn in ((0.5, True), (0.5, False), (0, True)):
        model = transform(two_stages(), ratio, merge_crossattn=merge_crossattn)
        arguments = inputs(model, 16, 16)
        for block in blocks(model).values():
            block.attn2.set_processor(Kept())
        called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        if ratio and merge_crossattn:
            words = "Kept keeps the attention probabilities that it sees in attn2"
            with pytest.raises(Exception, match=raised_while_compiling(words) if compiled else words):
                output(called, arguments)
        elif not compiled:
            output(called, arguments)


def test_smoothed_energy_guidance_and_other_hooks_within_merged_attention_are_refused() -> None:
    model = transform(two_stages(), 0.5)
    arguments = inputs(model, 16, 16)
    expected = output(model, arguments)
    config = SmoothedEnergyGuidanceConfig(indices=[0], fqn="down_blocks.0.attentions.0.transformer_blocks")
    _apply_smoothed_energy_guidance_hook(model, config, blur_sigma=10.0, name="guidance")
    with pytest.raises(TransformError, match=r"SmoothedEnergyGuidanceHook changes tokens within attn1"):
        output(model, arguments)
    set_ratio(model, 0)
    output(model, arguments)
    set_ratio(model, 0.5)
    query = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    query._diffusers_hook.remove_hook("guidance")
    assert torch.equal(output(model, arguments), expected)
    seen: list[Any] = []
    query.register_forward_hook(lambda *_: seen.append(1))  # torch's own go on working: they may only look
    assert torch.equal(output(model, arguments), expected)
    assert seen


def test_the_library_is_imported_and_works_where_diffusers_private_module_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.hooks._helpers", None)
    model = tome_fx.transform(two_stages(), 0.5)
    assert attention.BasicTransformerBlock in type(next(iter(blocks(model).values()))).__mro__
    output(model, inputs(model, 16, 16))
