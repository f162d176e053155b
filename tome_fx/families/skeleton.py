"""A copy of a model that only shapes go through: without values, hooks and what else is put around its modules.

NOTE [What of a model is counted]
What a forward costs is a matter of its layers and their shapes. Where weights are kept (offloading, sharding), in
which type (casting, quantization) and who listens or steps in (hooks, stores, `torch.compile`, checkpointing) changes
neither. All of that works through a few places: functions in an instance's own dict, hooks, attention processors,
and parameters of types of their own. So the copy has none of these. Its layers are the model's, those of a LoRA
among them. Left out is what a processor does besides attention: the image prompt of an IP-Adapter, the perturbed
images of PAG. Feed-forwards in chunks count whole, and FreeNoise, which goes over a clip in windows, counts one.
"""

from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.attention import AttentionModuleMixin, BasicTransformerBlock, FreeNoiseTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tome_fx.families.registry import family_of

Model = TypeVar("Model", bound=nn.Module)

# What accelerate, diffusers and torch.compile keep on a module that they have put something around.
AROUND = ("_hf_hook", "_old_forward", "_diffusers_hook", "_compiled_call_impl")
QUANTIZED = (nn.Linear, nn.Conv2d)  # what quantization has classes of its own for
SWITCHED_OFF = {"training": False, "gradient_checkpointing": False, "_chunk_size": None}  # of any module that has them


def skeleton(model: Model) -> Model:
    """The model's structure on the meta device, in evaluation mode; see NOTE [What of a model is counted].

    Every module is new and every tensor an empty one of the same shape: float32 where it has floating point, which
    all operations take. Other attributes are shared. The model is left as it is, and none of its values is read.
    """
    family = family_of(model)
    result: Any = _module(model, {})
    for attention in result.modules():
        if isinstance(attention, (Attention, AttentionModuleMixin)):
            attention._modules.pop("processor", None)  # one with weights of its own, which is not called either
            vars(attention)["processor"] = family.plain_processor(model, attention)
    if getattr(getattr(result, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj":
        # The adapter stands in the place of the prompt's own projection, which it has put aside if there was one.
        result.encoder_hid_proj = own = getattr(result, "text_encoder_hid_proj", None)
        kind = None if own is None else "text_proj"
        result._internal_dict = FrozenDict({**result.config, "encoder_hid_dim_type": kind})
    return result  # type: ignore[no-any-return]


def _module(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """The copy of a module and what is in it; `known` are those made already, by the id of what they are copies of."""
    if id(module) in known:
        return known[id(module)]  # type: ignore[no-any-return]
    if isinstance(inner := module._modules.get("_orig_mod"), nn.Module):  # in what torch.compile wraps around a module
        return _module(inner, known)
    cls = _class(module)
    result: Any = object.__new__(cls)
    known[id(module)] = result
    nn.Module.__init__(result)  # which has no hooks yet
    for name, value in vars(module).items():
        method = callable(value) and callable(getattr(cls, name, None))  # stands in for the class's, on this instance
        if name not in vars(result) and name not in AROUND and not method:
            vars(result)[name] = _value(value, known)
    vars(result).update({name: value for name, value in SWITCHED_OFF.items() if name in vars(result)})

    for name, parameter in module._parameters.items():
        empty = None if parameter is None else _empty(parameter)
        if name == "weight" and isinstance(module, nn.Linear) and _is_quantized(module):  # the stored shape may differ
            empty = torch.empty(module.out_features, module.in_features, dtype=torch.float32, device="meta")
        result._parameters[name] = None if empty is None else nn.Parameter(empty, requires_grad=False)
    for name, buffer in module._buffers.items():
        result._buffers[name] = None if buffer is None else _empty(buffer)
    for name, child in module._modules.items():
        result._modules[name] = None if child is None else _module(child, known)
    return result  # type: ignore[no-any-return]


def _class(module: nn.Module) -> type[nn.Module]:
    """The class that the module's copy is of."""
    if isinstance(module, FreeNoiseTransformerBlock):
        return BasicTransformerBlock  # type: ignore[no-any-return]
    if _is_quantized(module):
        return nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
    cls = type(module)
    while any(base.__name__ == "FSDPModule" for base in cls.__mro__):  # what fully_shard has derived from the class
        cls = next(base for base in cls.__bases__ if issubclass(base, nn.Module))
    return cls


def _is_quantized(module: nn.Module) -> bool:
    """Whether the weights of a layer are of a type that its copy cannot have: packed, or a type of a library's own."""
    weight = module._parameters.get("weight")
    if weight is None or not isinstance(module, QUANTIZED):
        return False
    return type(weight) not in (Tensor, nn.Parameter) or not weight.dtype.is_floating_point


def _value(value: Any, known: dict[int, Any]) -> Any:
    """The copy's own of an attribute: modules and tensors as everywhere in it, lists and dicts with such in them."""
    if isinstance(value, nn.Module):
        return _module(value, known)
    if isinstance(value, Tensor):
        return _empty(value)
    if type(value) not in (list, tuple, dict):
        return value
    if id(value) not in known:
        known[id(value)] = value  # where it holds itself
        if type(value) is dict:
            known[id(value)] = {key: _value(item, known) for key, item in value.items()}
        else:
            known[id(value)] = type(value)(_value(item, known) for item in value)
    return known[id(value)]


def _empty(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta")
