"""The pass: graph in, the same graph with match, merge and unmerge nodes, and the number of sites changed.

Nothing here knows diffusers. A graph is a `torch.fx.Graph`; the modules to act on are named by the caller.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, fx

from tome_fx import ops


class WithSlot:
    """A block together with its slot map, for functions that call a block with positional arguments alone.

    Not a `functools.partial`, whose `__call__` dynamo cannot trace.
    """

    def __init__(self, block: Callable[..., Any], slot: Tensor | None) -> None:
        self.block = block
        self.slot = slot

    def __call__(self, *args: Any) -> Any:
        """Call the block."""
        return self.block(*args, slot=self.slot)


def insert_match(
    graph: fx.Graph, seeds: Mapping[str, int | None], *, image: str, ratio: float, sx: int, sy: int
) -> int:
    """Plan a merge before each named block and hand the block its slot map.

    Before::

        x = self.block(tokens)

    After::

        height = image.size(2); width = image.size(3)
        match = match(tokens, height, width, ratio=0.5, sx=2, sy=2, seed=7)
        x = self.block(tokens, slot=match)

    Args:
        graph: Changed in place.
        seeds: The blocks' names in the graph, each with the seed of its destinations.
        image: Name of the input `[B, C, H, W]` whose grid the tokens lie on.
        ratio: Share of the tokens to remove.
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.

    Returns:
        How many blocks were given a slot map.
    """
    calls = _calls(graph, seeds)
    if not calls:
        return 0
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    source = next(node for node in inputs if node.target == image)
    with graph.inserting_after(inputs[-1]):
        width = graph.create_node("call_method", "size", (source, 3), name="width")
        height = graph.create_node("call_method", "size", (source, 2), name="height")
    for node, name, place in calls:
        with graph.inserting_before(node):
            slot = graph.call_function(
                ops.match,
                (node.args[place], height, width),
                {"ratio": ratio, "sx": sx, "sy": sy, "seed": seeds[name]},
            )
            if place:  # called through a function, which may pass positional arguments alone
                bound = graph.call_function(WithSlot, (node.args[place - 1], slot))
                node.update_arg(place - 1, bound)
            else:
                node.update_kwarg("slot", slot)
        slot.meta["shape"] = "[B, N]"
    _show_shapes(graph)
    return len(calls)


def insert_merge(graph: fx.Graph, modules: Collection[str], *, ratio: float) -> int:
    """Let each named module see merged tokens; adds the input `slot`.

    Before::

        y = self.module(x)

    After::

        merge = merge(x, slot, 0.5)
        y = self.module(merge)
        unmerge = unmerge(y, slot)

    Args:
        graph: Changed in place.
        modules: Names of modules that map tokens `[B, N, C]` to tokens, given as their first argument.
        ratio: Share of the tokens that the slot map removes.

    Returns:
        How many modules were wrapped.
    """
    calls = _calls(graph, modules)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        slot = graph.placeholder("slot", default_value=None)
    slot.meta["shape"] = "[B, N]"
    for node, _, place in calls:
        with graph.inserting_before(node):
            merged = graph.call_function(ops.merge, (node.args[place], slot, ratio))
        with graph.inserting_after(node):
            restored = graph.call_function(ops.unmerge, (node, slot))
        node.replace_all_uses_with(restored)
        restored.update_arg(0, node)
        node.update_arg(place, merged)
        merged.meta["shape"] = node.meta["shape"] = "[B, K, C]"
        restored.meta["shape"] = "[B, N, C]"
    _show_shapes(graph)
    return len(calls)


def _show_shapes(graph: fx.Graph) -> None:
    """Have the generated code end each line whose node's shape is known with that shape."""
    shapes = {node.name: node.meta["shape"] for node in graph.nodes if "shape" in node.meta}

    def annotate(body: list[str]) -> list[str]:
        lines = "".join(body).splitlines()
        return [
            f"{line}  # {shapes[name]}\n" if (name := line.split(" = ")[0].strip()) in shapes else f"{line}\n"
            for line in lines
        ]

    graph.on_generate_code(lambda before: lambda body: annotate(before(body) if before else body))


def _calls(graph: fx.Graph, modules: Collection[str]) -> list[tuple[fx.Node, str, int]]:
    """Every call of a named module: the node, the module's name, and the place of the tokens among its arguments.

    That is 0 where the module itself is called, and after the module where it is called through a function that takes
    it followed by its arguments, as checkpointing and chunking do.
    """
    found = []
    for node in graph.nodes:
        if node.op == "call_module" and node.target in modules:
            found.append((node, node.target, 0))
        for place, argument in enumerate(node.args):
            if isinstance(argument, fx.Node) and argument.op == "get_attr" and argument.target in modules:
                found.append((node, argument.target, place + 1))
    return found
