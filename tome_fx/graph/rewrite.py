"""The pass: graph in, the same graph with match, merge and unmerge nodes, and the number of sites changed.

Nothing here knows diffusers. A graph is a `torch.fx.Graph`; the modules to act on are named by the caller.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from tome_fx import ops, plan

RATIO_SIZE = "ratio_size"  # the attribute that holds a ratio as a size: see NOTE [A ratio as a size]


class WithSlots:
    """A block together with its slot map, for functions that call a block with positional arguments alone.

    Not a `functools.partial`, whose `__call__` dynamo cannot trace.
    """

    def __init__(self, block: Callable[..., Any], slots: ops.SlotMap | None) -> None:
        self.block = block
        self.slots = slots

    def __call__(self, *args: Any) -> Any:
        """Call the block."""
        return self.block(*args, slots=self.slots)


def insert_match(
    graph: fx.Graph, blocks: Collection[str], *, image: str, ratio: float | None, sx: int, sy: int, seed: int | None
) -> int:
    """Plan a merge before each named block and hand the block its slot map.

    Before::

        x = self.block(tokens)

    After::

        height = image.size(2); width = image.size(3)
        kept = kept(height, width, 0.5)
        match = match(tokens, height, width, kept=kept, sx=2, sy=2, seed=7)
        x = self.block(tokens, slots=match)

    Args:
        graph: Changed in place.
        blocks: Their names in the graph.
        image: Name of the input `[B, C, H, W]` whose grid the tokens lie on.
        ratio: Share of the tokens to remove; None reads it off the module, by NOTE [A ratio as a size].
        sx: Width of a cell, in tokens.
        sy: Height of a cell, in tokens.
        seed: Of the destinations, for `match`.

    Returns:
        How many blocks were given a slot map.
    """
    calls = _calls(graph, blocks)
    if not calls:
        return 0
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    source = next(node for node in inputs if node.target == image)
    with graph.inserting_before(inputs[-1].next):
        height = graph.create_node("call_method", "size", (source, 2), name="height")
        width = graph.create_node("call_method", "size", (source, 3), name="width")
        if ratio is None:
            kept = graph.call_function(plan.kept_by_size, (height, width, graph.get_attr(RATIO_SIZE)))
        else:
            kept = graph.call_function(plan.kept, (height, width, ratio))
    for node, _, place in calls:
        with graph.inserting_before(node):
            slots = graph.call_function(
                ops.match,
                (node.args[place], height, width),
                {"kept": kept, "sx": sx, "sy": sy, "seed": seed},
            )
            if place:  # called through a function, which may pass positional arguments alone
                bound = graph.call_function(WithSlots, (node.args[place - 1], slots))
                node.update_arg(place - 1, bound)
            else:
                node.update_kwarg("slots", slots)
        slots.meta["shape"] = "[B, N], [B, N], [B, K]"
    _show_shapes(graph)
    return len(calls)


def insert_merge(graph: fx.Graph, modules: Collection[str], *, proportional: Collection[str] = ()) -> int:
    """Let each named module see merged tokens; adds the input `slots`.

    Before::

        y = self.module(x)

    After::

        merge = merge(x, slots)
        y = self.module(merge)
        unmerge = unmerge(y, slots)

    and where attention is to be proportional::

        log_sizes = log_sizes(x, slots)
        y = self.module(merge, attention_mask=log_sizes)

    Args:
        graph: Changed in place.
        modules: Names of modules that map tokens `[B, N, C]` to tokens, given as their first argument.
        proportional: Those of them that are self-attention and take an `attention_mask`, to weigh each key by the
            tokens that it stands for.

    Returns:
        How many modules were wrapped.
    """
    calls = _calls(graph, modules)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        slots = graph.placeholder("slots", default_value=None)
    for node, name, place in calls:
        with graph.inserting_before(node):
            merged = graph.call_function(ops.merge, (node.args[place], slots))
            if name in proportional:
                bias = graph.call_function(ops.log_sizes, (node.args[place], slots))
                node.update_kwarg("attention_mask", bias)
                bias.meta["shape"] = "[B, 1, K]"
        with graph.inserting_after(node):
            restored = graph.call_function(ops.unmerge, (node, slots))
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
