"""GPUs as far as code for them can be written without one, and a process that passes for having one.

NOTE [As if there was a card]
Inductor asks a card for its properties and for nothing else, as long as nothing is measured or launched. So `pretend`
answers for the card, until the process ends: what libraries have asked once, they remember. Where Inductor would
measure and choose it does not: matrix products are not padded, and kernels have all block sizes that would be tried.

NOTE [Attention as on a card]
Which kernel computes attention is decided in C++ that only a CUDA build has, by the card. So that is done again here,
as aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and attention.cpp beside it do it in torch 2.13 with cuDNN 9.15
or newer, for dense tensors without gradients.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten
CUDA = torch.library.Library("aten", "IMPL", "CUDA")  # kernels for tensors on a card, none until `pretend` adds some


@dataclass(frozen=True)
class Card:
    """A GPU: what code generation asks of it, and what an estimate needs.

    Args:
        name: What it is sold as.
        capability: Compute capability, major and minor.
        multiprocessors: How many.
        threads: That a multiprocessor holds.
        shared_memory: Bytes that a block may have.
        cache: Bytes of the second-level cache.
        bandwidth: Bytes per second, from and to memory.
        flops: Multiply-adds of fp16 summed in float32, times two, per second, without sparsity.

    Source: NVIDIA's data sheets, and the table of compute capabilities in the CUDA C++ Programming Guide.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads: int
    shared_memory: int
    cache: int
    bandwidth: float
    flops: float


CARDS = {
    "sm_80": Card("A100 SXM 80 GB", (8, 0), 108, 2048, 163 * 2**10, 40 * 2**20, 2.04e12, 312e12),
    "sm_89": Card("GeForce RTX 4090", (8, 9), 128, 1536, 99 * 2**10, 72 * 2**20, 1.01e12, 165e12),
    "sm_90": Card("H100 SXM 80 GB", (9, 0), 132, 2048, 227 * 2**10, 50 * 2**20, 3.35e12, 989e12),
}


def pretend(name: str) -> None:
    """Have this process pass for one with a card: see NOTE [As if there was a card].

    Args:
        name: One of `CARDS`.
    """
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of torch, about what is off here or could be faster
    import diffusers.loaders.peft  # noqa: F401  # first, for it imports what would open the card
    import triton
    from torch._inductor import config
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.nvidia.driver import CudaDriver

    card = CARDS[name]
    properties = SimpleNamespace(
        name=card.name,
        major=card.capability[0],
        minor=card.capability[1],
        multi_processor_count=card.multiprocessors,
        max_threads_per_multi_processor=card.threads,
        shared_memory_per_block_optin=card.shared_memory,
        L2_cache_size=card.cache,
        regs_per_multiprocessor=2**16,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",  # AMD's, which is asked of any card
    )

    class Driver(CudaDriver):  # type: ignore[misc]
        """What Triton asks before anything is launched; the rest it asks torch."""

        def __init__(self) -> None:
            memory = {"max_shared_mem": card.shared_memory}
            self.utils = SimpleNamespace(get_device_properties=lambda device: memory)
            super(CudaDriver, self).__init__()  # not the driver's own, which would open it

    answers: dict[Any, dict[str, Any]] = {
        torch._C: {
            "_cuda_getDeviceCount": lambda: 1,
            "_cuda_getDevice": lambda: 0,
            "_cuda_cudaCachingAllocator_is_enabled": lambda: True,
        },
        torch.cuda: {
            "_lazy_init": lambda: None,
            "_get_device_properties": lambda device: properties,
            "_exchange_device": lambda index: 0,
            "_maybe_exchange_device": lambda index: 0,
            "get_rng_state": lambda *device: torch.zeros(16, dtype=torch.uint8, device="cpu"),
            "set_rng_state": lambda *state: None,
        },
        FakeTensorMode: {"avoid_device_init": True},
        config: {
            "shape_padding": False,
            "graph_partition": False,
            "use_static_triton_launcher": False,  # its kernels do not keep their code
            "force_disable_caches": True,
            "compile_threads": 1,
        },
    }
    for owner, values in answers.items():
        for attribute, value in values.items():
            setattr(owner, attribute, value)
    triton.runtime.driver.set_active(Driver())
    for function in vars(torch.utils._triton).values():  # which remember that there was no card
        if hasattr(function, "cache_clear"):
            function.cache_clear()
    if not torch.backends.cuda.is_built():
        _load_guard()
    # To fold constants, Inductor computes a real element of them.
    CUDA.impl("empty.memory_format", partial(_on_cpu, torch.empty))
    CUDA.impl("empty_strided", partial(_on_cpu, torch.empty_strided))
    attention = aten.scaled_dot_product_attention.default
    attention.py_kernels[torch._C.DispatchKey.CompositeImplicitAutograd] = partial(_attention, card)
    attention._dispatch_cache.clear()


def _load_guard() -> None:
    """Register a guard of CUDA devices that does nothing. A CUDA build has one for machines without a card."""
    from torch._inductor.codecache import CppCodeCache

    class Guard(CppCodeCache):
        cpp_compile_command_flags = {"include_pytorch": True, "shared": True}  # noqa: RUF012

    source = """
        #include <c10/core/impl/DeviceGuardImplInterface.h>
        namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>); }
    """
    Guard.load(source, "cpu", extra_flags=("-Wl,--no-as-needed", "-lc10"))


def _on_cpu(factory: Callable[..., Any], *args: Any, **options: Any) -> Any:
    return factory(*args, **{**options, "device": "cpu"})


def attention_kernel(card: Card, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str:
    """The kernel that torch chooses: see NOTE [Attention as on a card].

    Args:
        card: Where it runs.
        query: `[B, H, L, E]`.
        key: `[B, H, S, E]`.
        value: `[B, H, S, V]`.
        mask: What is added to the scores, or None.

    Returns:
        "cudnn", "flash", "efficient" or "math".
    """
    widths = query.shape[-1], value.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    even = all(width % (8 if half else 4) == 0 for width in widths)
    if card.capability[0] in (9, 10) and half and even and max(widths) <= 128 and key.shape[-2] != 1:
        return "cudnn"
    if mask is None and half and widths[0] == widths[1] <= 256:
        return "flash"
    return "efficient" if even else "math"


def _attention(
    card: Card,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, on the card."""
    width, keys = query.shape[-1], key.shape[-2]
    scale = width**-0.5 if scale is None else scale
    kernel = attention_kernel(card, query, key, value, attn_mask)
    if kernel == "cudnn":
        operator = aten._scaled_dot_product_cudnn_attention.default
        result = operator(query, key, value, attn_mask, False, dropout_p, is_causal, False, scale=scale)[0]
    elif kernel == "flash":
        query, key, value = (pad(x, (0, -width % 8)) if width % 8 else x for x in (query, key, value))
        operator = aten._scaled_dot_product_flash_attention.default
        result = operator(query, key, value, dropout_p, is_causal, False, scale=scale)[0][..., :width]
    elif kernel == "efficient":
        if attn_mask is not None:
            *strides, last = attn_mask.stride()
            if last != 1 or any(not isinstance(stride, int) or stride % 8 for stride in strides):
                attn_mask = pad(attn_mask, (0, 8 - keys % 8))[..., :keys]
            attn_mask = attn_mask.expand(*query.shape[:-1], keys)
        operator = aten._scaled_dot_product_efficient_attention.default
        result = operator(query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale)[0]
    else:
        options: Any = {"scale": scale, "enable_gqa": enable_gqa}
        operator = aten._scaled_dot_product_attention_math.default
        result = operator(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]
    assert isinstance(result, Tensor)
    return result
