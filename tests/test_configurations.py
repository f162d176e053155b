"""Every valid configuration at every size keeps the contract, and no invalid one changes anything."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import (
    inputs,
    one_block,
    output,
    relative_error,
    two_stages,
)
from support.state import state
from support.wrapped import wrapped

from tome_fx import TransformError, set_ratio, transform
from tome_fx.graph import specialize

SCOPES = ("merge_attn", "merge_crossattn", "merge_mlp")
THOROUGH = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def holds(feature: str, verdict: str = "works", condition: str = "") -> pytest.MarkDecorator:
    return pytest.mark.supports("Reliability", feature, verdict, condition)


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Any options that `transform` takes for a model of 32 x 32 whose finest attention is at 1."""
    sx, sy = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)).filter(lambda strides: strides != (1, 1)))
    options: dict[str, Any] = {"sx": sx, "sy": sy, "dynamic_ratio": draw(st.booleans())}
    highest = 1 - 1 / (sx * sy)
    some = st.floats(0, highest)
    thousandths = st.integers(0, math.floor(highest * 1000)).map(lambda n: n / 1000)
    options["ratio"] = draw(st.sampled_from([0, 0.0]) | (thousandths if options["dynamic_ratio"] else some))
    options["use_rand"] = draw(st.booleans())
    options["seed"] = draw(st.integers(0, 2**32 - 1)) if options["use_rand"] else 0
    options |= draw(st.fixed_dictionaries({name: st.booleans() for name in SCOPES}).filter(lambda s: any(s.values())))
    options["prop_attn"] = draw(st.booleans()) if options["merge_attn"] else False
    options["max_downsample"] = draw(st.sampled_from([None, 1, 2, 4, 8]))
    return options


DRAWS = given(
    st.sampled_from([one_block, two_stages]), valid(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)
)


def keeps_the_contract(build: Callable[[], Any], options: dict[str, Any], height: int, width: int, batch: int) -> None:
    """Assert all that a transform promises, of one configuration."""
    model = build()
    arguments, before = inputs(model, height, width, batch=batch, text_tokens=1), state(model)
    result = transform(model, **options)
    ours = output(result, arguments)
    assert ours.shape == (batch, 4, height, width)
    expected = output(wrapped(model, **options), arguments)
    if options["prop_attn"]:
        assert relative_error(ours, expected) < 1e-5
    else:
        assert torch.equal(ours, expected)
    assert all(a is b for a, b in zip(result.parameters(), model.parameters(), strict=True))
    assert state(model) == before
    if options["ratio"] == 0:
        plain = output(model, arguments)
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))
        assert options["dynamic_ratio"] or torch.equal(ours, plain)


@settings(THOROUGH, max_examples=40)
@DRAWS
def test_some_valid_configurations_keep_the_contract(
    build: Callable[[], Any], options: dict[str, Any], height: int, width: int, batch: int
) -> None:
    keeps_the_contract(build, options, height, width, batch)


@pytest.mark.slow
@holds("Valid options, 500 drawn")
@settings(THOROUGH, max_examples=500)
@DRAWS
def test_any_valid_configuration_keeps_the_contract(
    build: Callable[[], Any], options: dict[str, Any], height: int, width: int, batch: int
) -> None:
    keeps_the_contract(build, options, height, width, batch)


WORDS: st.SearchStrategy[Any] = st.sampled_from(["2", None, 2.5, [2], {}, 1j])
FLAGS: st.SearchStrategy[Any] = st.sampled_from([0, 1, 0.0, "yes", "", None, [], [True]])
STRIDES: st.SearchStrategy[Any] = st.integers(max_value=0) | st.integers(33) | WORDS | st.booleans()
BAD: dict[str, st.SearchStrategy[Any]] = {
    "ratio": st.sampled_from([math.nan, math.inf, -math.inf, "0.5", None, True, False, [0.5], 0.5j])
    | st.floats(max_value=0, exclude_max=True)
    | st.floats(min_value=1)
    | st.integers(1),
    "sx": STRIDES,
    "sy": STRIDES,
    "seed": st.integers(max_value=-1) | st.integers(2**32) | WORDS | st.booleans(),
    "max_downsample": st.integers().filter(lambda n: n not in (1, 2, 4, 8)) | st.sampled_from(["1", 1.0, [1], True]),
    "use_rand": FLAGS,
    "dynamic_ratio": FLAGS,
    "prop_attn": FLAGS.filter(lambda value: value is not None),
    **dict.fromkeys(SCOPES, FLAGS),
}
BAD_DRAWS = given(valid(), st.sampled_from(sorted(BAD)).flatmap(lambda name: st.tuples(st.just(name), BAD[name])))


def is_refused_by_name(options: dict[str, Any], bad: tuple[str, Any]) -> None:
    """Assert that the error names the argument, and that nothing is changed."""
    name, value = bad
    model, before = one_block(), state(one_block())
    classes = len(specialize._classes)
    with pytest.raises((ValueError, TypeError, TransformError), match=rf"\b{name}\b"):
        transform(model, **{**options, name: value})
    assert state(model) == before
    assert len(specialize._classes) == classes
    if name == "ratio":
        result = transform(model, **options)
        before = state(result)
        with pytest.raises((ValueError, TypeError), match=r"\bratio\b"):
            set_ratio(result, value)
        assert state(result) == before


@settings(THOROUGH, max_examples=40)
@BAD_DRAWS
def test_some_invalid_configurations_are_errors_that_name_the_argument_and_change_nothing(
    options: dict[str, Any], bad: tuple[str, Any]
) -> None:
    is_refused_by_name(options, bad)


@pytest.mark.slow
@settings(THOROUGH, max_examples=500)
@BAD_DRAWS
def test_any_invalid_configuration_is_an_error_that_names_the_argument_and_changes_nothing(
    options: dict[str, Any], bad: tuple[str, Any]
) -> None:
    is_refused_by_name(options, bad)
