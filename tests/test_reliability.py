"""What holds whatever happens to a transformed model.

Threads do not disturb one another, a call that fails leaves no trace, any size is served, values that are no numbers
stay where they are, and what is dropped is freed.
"""

import contextlib
import gc
import linecache
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from support.models import (
    blocks,
    controlnet,
    inputs,
    mask,
    one_block,
    output,
    sdxl,
    transformers,
    two_stages,
)
from support.state import state
from support.wrapped import wrapped
from torch import Tensor, nn

from tome_fx import ops, set_ratio, transform
from tome_fx.graph import dispatch, specialize
from tome_fx.plan import downsampled


def holds(feature: str, verdict: str = "works", condition: str = "") -> pytest.MarkDecorator:
    return pytest.mark.supports("Reliability", feature, verdict, condition)


@contextlib.contextmanager
def usable(model: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Assert that the model is after the block what it was before: all that it is made of, and its output."""
    before, expected = state(model), output(model, arguments)
    yield
    assert torch.equal(output(model, arguments), expected)
    assert state(model) == before


@pytest.fixture
def no_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: nothing was transformed and no kind of call was met."""
    monkeypatch.setattr(specialize, "_classes", {})


# ------------------------------------------------------------------------------------------------ threads


@holds("Two threads, two sizes")
def test_two_threads_and_two_sizes_do_not_disturb_one_another(no_classes: None) -> None:
    result = transform(two_stages())
    calls = [inputs(result, 16, 16), {**inputs(result, 12, 20), "encoder_attention_mask": mask()}]
    outputs: list[list[Tensor]] = [[], []]
    start = threading.Barrier(2)

    def work(which: int) -> None:
        start.wait()
        for i in range(100):  # the first call of each traces, in both at once
            outputs[which].append(output(result, calls[(which + i) % 2]))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        sys.setswitchinterval(interval)
    expected = [output(result, call) for call in calls]
    assert [len(found) for found in outputs] == [100, 100]
    for which, found in enumerate(outputs):
        assert all(torch.equal(ours, expected[(which + i) % 2]) for i, ours in enumerate(found))


# ------------------------------------------------------------------------------------------------ failures


class FailsOnce(AttnProcessor2_0):  # type: ignore[misc]
    """Raises in its first call."""

    failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.failed:
            self.failed = True
            raise ArithmeticError("once")
        return super().__call__(*args, **kwargs)


@holds("Errors and interrupts in a call")
@pytest.mark.parametrize("extra", [{}, {"encoder_attention_mask": mask()}], ids=["known", "new"])
def test_an_error_in_the_middle_of_a_forward_changes_nothing(extra: dict[str, Any], no_classes: None) -> None:
    result = transform(two_stages())
    arguments = inputs(result)
    result.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(FailsOnce())
    with pytest.raises(ArithmeticError):
        output(result, {**arguments, **extra})
    with usable(result, arguments):
        expected = output(transform(two_stages()), {**arguments, **extra})
        assert torch.equal(output(result, {**arguments, **extra}), expected)


@holds("Errors and interrupts in a call")
@pytest.mark.parametrize(
    "wrong",
    [
        {"encoder_hidden_states": torch.ones(2, 5, 17)},
        {"encoder_hidden_states": torch.ones(2, 16)},
        {"sample": torch.ones(2, 4, 16)},
        {"sample": torch.ones(3, 4, 16, 16)},
        {"encoder_attention_mask": torch.ones(3, 4)},
        {"attention_mask": torch.ones(2, 256)},
    ],
    ids=lambda wrong: "-".join(f"{name}-{tuple(value.shape)}" for name, value in wrong.items()),
)
def test_an_input_of_the_wrong_shape_changes_nothing(wrong: dict[str, Any], no_classes: None) -> None:
    result = transform(two_stages())
    arguments = inputs(result, 16, 16)
    with usable(result, arguments), pytest.raises((RuntimeError, ValueError, IndexError)):
        output(result, {**arguments, **wrong})


def free(lock: Any) -> bool:
    """Whether a thread other than the one that holds a lock, if one does, could take it."""
    taken: bool = lock.acquire(blocking=False)
    if taken:
        lock.release()
    return taken


@holds("Errors and interrupts in a call")
@pytest.mark.parametrize("ratio", [0.5, 0])
def test_an_interrupt_at_any_line_that_python_has_one_at_while_a_new_kind_of_call_is_served_leaves_the_next_call_right(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = inputs(one_block(), 8, 8)
    new = {**arguments, "encoder_attention_mask": mask()}
    expected = output(transform(one_block(), ratio), arguments), output(transform(one_block(), ratio), new)

    def interrupted_at(line: int) -> bool:
        """Interrupt the first call of a new kind at its so-many-th line of these files; whether it had that many."""
        monkeypatch.setattr(specialize, "_classes", {})
        result = transform(one_block(), ratio)
        left = line

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            file = frame.f_code.co_filename
            if file not in (specialize.__file__, dispatch.__file__):
                return None
            # Python itself never interrupts at the line of a `with`, where a lock is taken and given back.
            here = linecache.getline(file, frame.f_lineno).strip()
            if event == "line" and not here.startswith("with "):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            output(result, new)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert torch.equal(output(result, new), expected[1])
        assert torch.equal(output(result, arguments), expected[0])
        with ThreadPoolExecutor(1) as other:
            assert other.submit(free, specialize._lock).result(), "a lock is kept that other threads wait for"
        return left <= 0

    lines = 1
    while interrupted_at(lines):
        lines += 1
    assert lines > 30, "the trace no longer sees the code that serves a new kind of call"


# ------------------------------------------------------------------------------------------------ sizes


@holds("Odd, tiny and wide images")
@pytest.mark.parametrize("size", [(1, 64), (64, 1), (7, 5), (128, 16), (1, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("build", [one_block, two_stages, sdxl])
def test_odd_tiny_and_wide_latents_are_merged_as_by_wrapped_children(
    build: Callable[[], Any], size: tuple[int, int]
) -> None:
    model = build()
    arguments = inputs(model, *size)
    ours = output(transform(model, use_rand=False), arguments)
    assert torch.equal(ours, output(wrapped(model), arguments))
    merges = min(downsampled(side, 2 if build is sdxl else 1) for side in size) >= 2
    assert torch.equal(ours, output(model, arguments)) != merges


@pytest.mark.parametrize("build", [one_block, two_stages, controlnet])
@pytest.mark.parametrize("options", [{}, {"dynamic_ratio": True}], ids=str)
def test_an_empty_batch_is_an_error_that_names_the_batch(build: Callable[[], Any], options: dict[str, Any]) -> None:
    result = transform(build(), **options)
    with usable(result, inputs(result, 16, 16)), pytest.raises(ValueError, match=r"batch.*got 0"):
        output(result, inputs(result, 16, 16, batch=0))


# ------------------------------------------------------------------------------------------------ no numbers
EXTREMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "zero": 0.0, "large": 6e4, "small": 2.0**-24}


def is_a_map(slots: ops.SlotMap, kept: int) -> bool:
    """Whether each image's tokens are spread over all of its slots and no other."""
    batch, count = slots.slot.shape
    spread = all(torch.equal(slot.unique(), torch.arange(kept)) for slot in slots.slot)
    rows = torch.equal(slots.order.flatten().sort().values, torch.arange(batch * count))
    return spread and rows and bool((slots.start[:, 1:] > slots.start[:, :-1]).all())


@holds("NaN and infinite tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("where", ["one", "some", "all", "image"])
@pytest.mark.parametrize("value", EXTREMES)
def test_tokens_of_any_value_give_a_whole_slot_map(value: str, where: str, dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    chosen: Any = {"one": (0, 5), "some": (slice(None), slice(None, None, 3)), "all": (...,), "image": (1,)}[where]
    tokens[chosen] = EXTREMES[value]
    for kept in (16, 40, 64):
        slots = ops.match(tokens, 8, 8, kept=kept, sx=2, sy=2, seed=1)
        assert slots is not None
        assert is_a_map(slots, kept)
        merged = ops.unmerge(ops.merge(tokens, slots), slots)
        assert merged.shape == tokens.shape
        assert merged.dtype == dtype
        if math.isfinite(EXTREMES[value]):
            assert merged.isfinite().all()
        if where in ("all", "image"):
            torch.testing.assert_close(merged[1], tokens[1], rtol=0, atol=0, equal_nan=True)


@holds("Tokens too long for fp16 sums")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 2e4])
def test_similarity_does_not_depend_on_how_long_tokens_are(scale: float, dtype: torch.dtype) -> None:
    tokens = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).to(dtype)
    power = 2.0 ** round(math.log2(scale))  # exact in any dtype
    expected = ops.match(tokens, 8, 8, kept=40, sx=2, sy=2, seed=None)
    slots = ops.match(tokens * power, 8, 8, kept=40, sx=2, sy=2, seed=None)
    assert slots is not None
    assert expected is not None
    assert (tokens * power).isfinite().all()
    same = (slots.slot == expected.slot).float().mean()
    assert same > 0.9  # ties within rounding may fall otherwise


@holds("NaN and infinite tokens")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("build", [one_block, sdxl])
def test_an_image_that_is_no_number_leaves_the_others_of_its_batch_alone(
    build: Callable[[], Any], value: float
) -> None:
    result = transform(build(), merge_crossattn=True, merge_mlp=True)
    arguments = inputs(result, 16, 16)
    expected = output(result, arguments)
    sample = arguments["sample"].clone()
    sample[1, 0, 3, 3] = value
    ours = output(result, {**arguments, "sample": sample})
    assert torch.equal(ours[0], expected[0])
    assert not ours[1].isfinite().all()
    assert torch.equal(output(result, arguments), expected)


# ------------------------------------------------------------------------------------------------ leaks


@pytest.mark.slow
@holds("Freeing what is dropped", "works with a condition", "classes and code of each plan stay")
def test_what_is_dropped_is_freed(request: pytest.FixtureRequest) -> None:
    model = two_stages()
    arguments = inputs(model, 16, 16)
    process = psutil.Process()
    dropped: list[Any] = []

    def once(ratio: float) -> None:
        result = transform(model, ratio)
        output(result, arguments)
        set_ratio(result, 0.25)
        output(result, {**arguments, "encoder_attention_mask": mask()})
        dropped.extend(
            weakref.ref(module) for module in (result, *blocks(result).values(), *transformers(result).values())
        )

    def live() -> tuple[int, ...]:
        gc.collect()  # of what was made after the freeze: what others have left may be freed at any time
        found = gc.get_objects()
        return (
            sum(issubclass(type(item), Tensor) for item in found),
            sum(issubclass(type(item), nn.Module) for item in found),
            len(specialize._classes),
            len(linecache.cache),
        )

    gc.collect()
    gc.freeze()
    request.addfinalizer(gc.unfreeze)
    for _ in range(20):
        once(0.5)
    before, memory = live(), process.memory_info().rss
    for _ in range(200):
        once(0.5)
    assert live() == before
    assert all(reference() is None for reference in dropped)
    assert process.memory_info().rss - memory < 16 * 2**20
