"""CUDA code without a GPU: what Inductor writes for a card, read as data, and what ptxas makes of its kernels."""

import ast
import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bench.cards import pretend

TORCH = "2.13"  # whose internals are known here
MODULE = tuple[nn.Module, dict[str, Any]]  # and what it is called with

# What a call in the written code is, by its name: the first pattern that fits.
KINDS = {
    "triton": re.compile(r"(triton_\w+)\.run"),
    "gemm": re.compile(r"extern_kernels\.(\w+)"),
    "aten": re.compile(r"(?:torch\.ops\.)?aten\.(\w+)(?:\.\w+)*"),
    # Allocates, views, checks or counts.
    "books": re.compile(r"(empty_strided_cuda|reinterpret_tensor|copy_if_misaligned|assert_\w+|get_raw_stream"
                        r"|torch\.cuda\.(?:_DeviceGuard|set_device)|args\.clear|max|min)"),
    "others": re.compile(r"(.+)"),
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A step of Inductor's schedule, for an estimate.

    Args:
        call: What is called, in ATen's name; empty for kernels of Inductor's own.
        bytes: Read and written.
        flops: Of a matrix product or of attention, whose heads are as wide as the kernel's; else 0.
    """

    call: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class Code:
    """What Inductor wrote for a graph. Launches are in order.

    Args:
        text: The module of Python that it is.
        triton: Launches of Inductor's own kernels, by name.
        gemm: Matrix products and convolutions, which are ATen's or a library's, by name.
        aten: Other calls of ATen, by name: nothing is fused with them, and some launch more than one kernel.
        others: Other calls: a copy from another device, say.
        devices: The types of all devices that tensors are on.
        obstacles: What would have CUDA graphs skipped, in torch's words.
        largest: Bytes of the largest tensor that is allocated; of those of a size that is a number.
        kernels: The sources of Inductor's own kernels, by name.
        nodes: The schedule.
    """

    text: str
    triton: tuple[str, ...]
    gemm: tuple[str, ...]
    aten: tuple[str, ...]
    others: tuple[str, ...]
    devices: tuple[str, ...]
    obstacles: tuple[str, ...]
    largest: int
    kernels: dict[str, str]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Kernel:
    """Machine code of a kernel in one of the configurations that Inductor would try.

    Args:
        name: The kernel's.
        configuration: Block sizes and warps.
        registers: Of a thread.
        spilled: Bytes of a thread that have no register.
        shared: Bytes of shared memory of a block.
        atomics: Those of the PTX's instructions that are atomic.
    """

    name: str
    configuration: str
    registers: int
    spilled: int
    shared: int
    atomics: tuple[str, ...]


def unavailable() -> str:
    """Why CUDA code cannot be written here; empty where it can."""
    if not torch.__version__.startswith(f"{TORCH}."):
        return f"torch {TORCH} is the one whose internals are known, this is {torch.__version__}"
    if find_spec("triton") is None:
        return "triton is not installed"
    return "" if which("g++") else "there is no g++"


def worker(card: str) -> ProcessPoolExecutor:
    """A process of its own that passes for having the card, for `write` and `build` to be submitted to.

    Args:
        card: One of `bench.cards.CARDS`.
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=pretend, initargs=(card,))


class _Written(Exception):
    """Ends a compiled module's first call: there is nothing to launch on."""

    def __init__(self, code: Code) -> None:
        self.code = code


def write(make: Callable[..., MODULE], *args: Any, **options: Any) -> Code:
    """Compile a module whole for the card that this process passes for having, without gradients.

    Args:
        make: Returns the module and its arguments. It is called where new tensors are fake, on the card and of fp16.
        args: Of `make`.
        options: Of `make`.

    Raises:
        torch._dynamo.exc.Unsupported: The module is not one graph.
        RuntimeError: Nothing was compiled.
    """
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    def compile_to_module(graph: Any) -> Any:
        code = _read(graph)

        def call(args: list[Any]) -> None:
            raise _Written(code)

        return SimpleNamespace(call=call)

    torch._dynamo.reset()
    lowering: Any = GraphLowering
    lowering.compile_to_module = compile_to_module
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device("cuda"):
                module, arguments = make(*args, **options)
        finally:
            torch.set_default_dtype(torch.float32)
        try:
            torch.compile(module, fullgraph=True)(**arguments)
        except _Written as written:
            return written.code
    raise RuntimeError(f"nothing was compiled of {type(module).__name__}: it has no operation on the card")


def _read(graph: Any) -> Code:
    """What Inductor writes for its lowered graph."""
    from torch._inductor import ir
    from torch._inductor.cudagraph_utils import check_lowering_disable_cudagraph
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    text = graph.codegen()[0].value
    unsafe = get_first_incompatible_cudagraph_node(graph.module)
    reasons = (
        graph.disable_cudagraphs_reason,
        check_lowering_disable_cudagraph(dict(graph.device_node_mapping)),
        unsafe and f"incompatible op {unsafe.target}",
    )
    module = ast.parse(text)
    (body,) = (node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == "call")
    launches: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, _ in _calls(body):
        kind, found = next((kind, found) for kind, pattern in KINDS.items() if (found := pattern.fullmatch(name)))
        launches[kind].append(found[1])
    return Code(
        text=text,
        triton=tuple(launches["triton"]),
        gemm=tuple(launches["gemm"]),
        aten=tuple(launches["aten"]),
        others=tuple(launches["others"]),
        devices=tuple(sorted(graph.device_types)),
        obstacles=tuple(reason for reason in reasons if reason),
        largest=max((_bytes(*call.args) for name, call in _calls(body) if name == "empty_strided_cuda"), default=0),
        kernels={
            ast.literal_eval(call.args[0]): ast.literal_eval(call.args[1])
            for name, call in _calls(module)
            if name == "async_compile.triton"
        },
        nodes=tuple(
            _node(node)
            for node in graph.scheduler.nodes
            if not isinstance(node.node, (ir.NopKernel, ir.MultiOutput))  # nothing runs for either
        ),
    )


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """All calls in the order of the text, with the dotted name of what is called."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(call.func), call) for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset))]


def _bytes(shape: ast.expr, strides: ast.expr, dtype: ast.expr) -> int:
    """Of a tensor that is allocated with these arguments; 0 where its size is not a number yet."""
    try:
        last = sum((size - 1) * stride for size, stride in zip(*map(ast.literal_eval, (shape, strides)), strict=True))
    except ValueError:
        return 0
    return int((last + 1) * getattr(torch, ast.unparse(dtype).removeprefix("torch.")).itemsize)


def _node(node: Any) -> Node:
    name = (node.node.python_kernel_name or type(node.node).__name__) if node.is_extern() else ""
    called = KINDS["gemm"].fullmatch(name) or KINDS["aten"].fullmatch(name)
    call = called[1] if called else name
    flops = _attention_flops(*node.node.inputs[:3]) if "attention" in call else node.estimate_flops() or 0
    return Node(call, int(node.get_read_write_buffers_sizes()), int(flops))


def _attention_flops(query: Any, key: Any, value: Any) -> int:
    """Of attention over `[B, H, L, E]`, `[B, H, S, E]` and `[B, H, S, V]`: kernels are for widths of whole 32."""
    from torch._inductor.virtualized import V

    batch, heads, queries, width = map(V.graph.sizevars.optimization_hint, query.get_size())
    keys, values = V.graph.sizevars.optimization_hint(key.get_size()[2]), int(value.get_size()[3])
    return int(2 * batch * heads * queries * keys * sum(-(-wide // 32) * 32 for wide in (width, values)))


def build(code: Code) -> list[Kernel]:
    """Compile Inductor's own kernels to machine code for the card that this process passes for having.

    Each in all of the configurations that Inductor would time before the first run.
    """
    return [
        replace(kernel, name=name)
        for name, source in code.kernels.items()
        for kernel in _built(source.replace(name, "k"))
    ]


@functools.cache
def _built(source: str) -> tuple[Kernel, ...]:
    """The configurations of a kernel that is called `k`, so that it is compiled once whatever number it has."""
    from torch._inductor.codecache import PyCodeCache

    kernel = PyCodeCache.load(source).k
    kernel.precompile(warm_cache_only=True)
    return tuple(_kernel(done.kernel, str(done.config)) for done in kernel.compile_results)


def _kernel(compiled: Any, configuration: str) -> Kernel:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {what: int(count) for what, count in re.findall(r"\b([A-Z]+):(\d+)", text)}
    atomics = sorted(set(re.findall(r"\b(?:atom|red)\.[\w.:]+", compiled.asm["ptx"])))
    spilled = usage["STACK"] + usage["LOCAL"]
    return Kernel("k", configuration, usage["REG"], spilled, compiled.metadata.shared, tuple(atomics))
