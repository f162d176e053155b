"""The contract of `diagnose`: it counts what dynamo and Inductor did in two calls and says what to do about it.

What is planted is found: a graph break with its reason, a recompile with the guard that failed, a call left to ATen
that merging did not ask for. Where nothing is wrong it says so. The model, its results and torch's hooks stay.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook
from support.models import blocks, inputs, one_block, one_stage, two_stages
from support.speed import slow
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch.torch_version import TorchVersion

from tome_fx import Diagnosis, Finding, TransformError, diagnose, set_ratio, transform
from tome_fx.tools.diagnose import CALL_EAGERLY, _break, _fallbacks, _recompile

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # torch's own, on the first import of its compiler in a process
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def quick(model: Any, **options: Any) -> Any:
    """Compiled without code generation."""
    return torch.compile(model, backend=CompileCounterWithBackend("eager"), **options)


@pytest.mark.slow
def test_a_sound_model_is_said_to_be_one_and_what_inductor_leaves_to_aten_is_counted() -> None:
    model = transform(one_block(), ratio=0.5, merge_mlp=True)
    arguments = inputs(model, 16, 16)
    compiled: Any = torch.compile(model, fullgraph=True)
    with fresh_cache():
        found = diagnose(compiled, **arguments)
    assert (found.graphs_first_call, found.graphs_second_call, found.breaks, found.recompiles) == (1, 0, (), ())
    assert found.fallbacks == {"sort": 2, "searchsorted": 1, "_embedding_bag_forward_only": 2}
    assert found.healthy
    assert str(found).startswith("UNet2DConditionModel, ratio 0.5, merging around attn1, ff\n\n1 graph compiled in the")
    assert "None compiled in a second call" in str(found)
    assert "No graph breaks." in str(found)
    assert "two for each match" in str(found)
    assert str(found).endswith("All is well.")
    assert GraphLowering.save_output_code is None


def test_blocks_compiled_in_place_are_a_compiled_model_and_nothing_new_is_told_apart() -> None:
    model = transform(two_stages(), ratio=0.5)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    arguments = inputs(model, 16, 16)
    assert diagnose(model, **arguments).graphs_first_call == 2  # a merged level and an unmerged one
    found = diagnose(model, **arguments)
    assert (found.graphs_first_call, found.graphs_second_call, found.fallbacks, found.healthy) == (0, 0, None, True)
    assert "No graphs compiled in the first call." in str(found)


def test_a_graph_for_each_kind_of_block_is_expected_of_a_first_call() -> None:
    model = transform(two_stages(), ratio=0.5)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    found = diagnose(model, **inputs(model, 16, 16))
    assert (found.graphs_first_call, found.graphs_second_call, found.parts) == (2, 0, 4)
    (merged_or_not,) = found.recompiles
    assert merged_or_not.expected
    assert found.healthy
    assert "4 parts of the model are compiled; those of the same kind can share a graph." in str(found)
    assert "No recompiles.\n1 recompile as is to be expected:\n- " in str(found)
    assert "Advice: none is needed, as parts of different kinds have a graph each." in str(found)


def _whole_by_its_own_method(model: Any) -> None:
    model.compile(fullgraph=True, backend="eager")


def _its_forward(model: Any) -> None:
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")


def _its_forward_with_a_hook_around(model: Any) -> None:
    _its_forward(model)
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "offload")


def _one_block_of_it(model: Any) -> None:
    next(iter(blocks(model).values())).compile(fullgraph=True, backend="eager")


def _a_stage_by_its_own_method(model: Any) -> None:
    model.down_blocks[0].compile(fullgraph=True, backend="eager")


def _a_stage_replaced(model: Any) -> None:
    model.down_blocks[0] = torch.compile(model.down_blocks[0], fullgraph=True, backend="eager")


def _a_stage_and_a_block_within(model: Any) -> None:
    _one_block_of_it(model)
    _a_stage_by_its_own_method(model)


@pytest.mark.parametrize(
    "compile_it",
    [
        _whole_by_its_own_method,
        _its_forward_with_a_hook_around,
        _a_stage_replaced,
        _a_stage_and_a_block_within,
        *slow(_its_forward, _one_block_of_it, _a_stage_by_its_own_method),
    ],
)
def test_a_model_is_compiled_in_whatever_way_it_was_done(compile_it: Callable[[Any], None]) -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5)
    compile_it(model)
    found = diagnose(model, **inputs(model, 8, 8))
    assert (found.graphs_first_call, found.graphs_second_call, found.parts, found.eager_parts) == (1, 0, 1, 0)
    assert found.healthy


def test_a_first_compile_of_something_new_is_told_and_not_blamed() -> None:
    model = transform(one_block(), ratio=0.5)
    compiled = quick(model, fullgraph=True, dynamic=False)
    compiled(**inputs(model, 8, 8))
    for height, grad in ((8, True), (16, False)):
        with torch.set_grad_enabled(grad):
            found = diagnose(compiled, **inputs(model, height, 8))
        (recompile,) = found.recompiles
        assert recompile.expected
        assert found.healthy
        assert f"Advice: {recompile.advice}." in str(found)


def test_a_recompile_limit_that_fullgraph_makes_an_error_is_told_with_the_guard() -> None:
    model = transform(one_block(), ratio=0.5)
    compiled = quick(model, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(**inputs(model, 8, 8))
        found = diagnose(compiled, **inputs(model, 8, 16))
    guard, limit = found.recompiles
    assert "size mismatch" in guard.what
    assert "recompile limit" in limit.what
    assert (found.graphs_first_call, found.graphs_second_call, found.breaks, found.healthy) == (0, None, (), False)
    assert "An error ended the first call, so there was no second." in str(found)


def test_a_forward_that_is_kept_from_being_compiled_is_found_to_run_eagerly() -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5)
    model.forward = torch.compiler.disable(model.forward)
    with pytest.raises(ValueError, match="model is not compiled"):
        diagnose(model, **inputs(model, 8, 8))
    found = diagnose(quick(model), **inputs(model, 8, 8))
    assert (found.graphs_first_call, found.eager_parts, found.healthy) == (0, 1, False)


@pytest.mark.parametrize(
    ("guard", "advice"),
    [
        ("tensor 'sample' size mismatch at index 3. expected 32, actual 48", "or compile with dynamic=True"),
        ("kwargs['sample'].size()[3] == kwargs['sample'].size()[2]", "a square and a batch of one"),
        ("2 <= kwargs['sample'].size()[0] <= 15", "a square and a batch of one"),
        ("tensor 'sample' dtype mismatch. expected Float, actual Half", "the same dtype"),
        ("GLOBAL_STATE changed: grad_mode", "torch.no_grad()"),
        ("tensor 'sample' dispatch key set mismatch. expected DispatchKeySet(CPU), actual ...", "inference_mode()"),
        ("GLOBAL_STATE changed: autocast", "set what the guard names once"),
        ("self.training == False", "call eval() once"),
        ("self.num_upsamplers == 1", "change modules"),
        ("___check_obj_id(self._modules['proj_in'], 94)", "change modules"),
        ("KeyError on kwargs['encoder_attention_mask']", "the same inputs"),
        ("expected type of 'kwargs['timestep']' to be a tensor type, ' but found <class 'int'>", "the same inputs"),
        ("kwargs['conditioning_scale'] == 1.0", "the same inputs"),
        ("BACKEND_MATCH failure: torch.compile detected different backend callables.", "one backend"),
        ("something else", "TORCH_LOGS=recompiles"),
    ],
)
def test_what_is_advised_fits_the_guard(guard: str, advice: str) -> None:
    assert advice in _recompile(f"0/0: {guard}  # code of a model", expected=False).advice


def test_a_planted_graph_break_is_found_with_its_reason_and_advice() -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5)
    (block,) = blocks(model).values()
    block.attn2.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    found = diagnose(quick(model), **inputs(model, 16, 16))
    assert found.graphs_first_call > 1
    (broken,) = found.breaks
    assert "graph_break()" in broken.what
    assert broken.advice == "Remove the `torch._dynamo.graph_break()` call"
    assert not found.healthy
    assert " graph breaks:\n- " in str(found)
    assert "What to do: " in str(found)
    assert str(found).endswith("Something needs mending.")


def test_a_recompile_is_found_with_the_guard_that_failed_and_advice() -> None:
    model = transform(one_block(), ratio=0.5)
    compiled = quick(model, fullgraph=True, dynamic=False)
    compiled(**inputs(model, 16, 16))
    found = diagnose(compiled, **inputs(model, 16, 24))
    (recompile,) = found.recompiles
    assert recompile.what.endswith("size mismatch at index 3. expected 16, actual 24")
    assert "dynamic=True" in recompile.advice
    found = diagnose(compiled, **{**inputs(model, 16, 24), "timestep": 3})
    (recompile,) = found.recompiles
    assert "timestep" in recompile.what
    assert not found.healthy
    set_ratio(compiled, 0.25)
    found = diagnose(compiled, **inputs(model, 16, 16))
    assert (found.graphs_first_call, found.recompiles, found.healthy) == (1, (), True), "a new ratio is a first compile"


def test_a_call_left_to_aten_that_merging_does_not_ask_for_is_something_to_mend() -> None:
    found = Diagnosis("a model", 1, 0, 0, (), (), {"sort": 2, "scatter_reduce": 1})
    assert not found.healthy
    assert "please report it" in str(found)
    assert Diagnosis("a model", 1, 0, 0, (), (), {}).healthy
    assert "Merging leaves no call to ATen." in str(Diagnosis("a model", 1, 0, 0, (), (), {}))
    again = Diagnosis("a model", 2, 1, 0, (), (Finding("a guard", "an advice"),), None)
    assert not again.healthy
    assert "2 graphs compiled" in str(again)
    assert "1 compiled in a second call" in str(again)
    assert "1 recompile:\n- a guard\n  What to do: an advice." in str(again)


def test_calls_of_aten_are_found_in_generated_code_under_the_names_that_inductor_gives_them() -> None:
    code = "buf1 = torch.ops.aten.sort.stable(buf0)\n  aten.addmm(buf1, buf0)  # aten.sort(\nextern_kernels.mm(buf0)"
    assert _fallbacks([code]) == {"sort": 1}
    assert _fallbacks(["aten.scatter_(buf)", "torch.ops.aten.gather.default(buf)"]) == {"scatter_": 1, "gather": 1}


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.12", reason="before torch 2.12 dynamo leaves out the words")
def test_a_call_that_is_refused_is_told_in_the_words_of_the_refusal() -> None:
    model = transform(one_block(), ratio=0.5)
    found = diagnose(quick(model, fullgraph=True), **inputs(model, 16, 16), attention_mask=torch.ones(2, 256))
    (broken,) = found.breaks
    assert broken.what.startswith("TransformError: attention_mask was given to attn1, whose tokens are merged")
    assert broken.what.endswith("merge nothing, by ratio=0 and not dynamic_ratio")
    assert broken.advice == CALL_EAGERLY


@pytest.mark.parametrize(
    ("raised", "what"),
    [
        (ValueError('a\'s "b"'), 'ValueError: a\'s "b"'),
        (RuntimeError("x", "y"), "RuntimeError: ('x', 'y')"),
        (KeyError(Ellipsis), "Observed exception"),
    ],
)
def test_what_is_raised_is_told_in_its_own_words_if_dynamo_tells_them(raised: Exception, what: str) -> None:
    found = _break(f"Observed exception\n  Hint: Try.\n\n  Developer debug context: raised exception {raised!r}\n\n", 1)
    assert found == Finding(what, "Try" if what == "Observed exception" else CALL_EAGERLY)


def test_a_break_that_fullgraph_does_not_allow_is_told_like_one_that_is_allowed() -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5)
    (block,) = blocks(model).values()
    block.attn2.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    found = diagnose(quick(model, fullgraph=True), **inputs(model, 16, 16))
    (broken,) = found.breaks
    assert "graph_break()" in broken.what
    assert broken.advice == "Remove the `torch._dynamo.graph_break()` call"
    assert (found.graphs_first_call, found.healthy) == (0, False)


def test_what_is_compiled_in_the_second_call_is_counted() -> None:
    model = transform(copy.deepcopy(one_block()), ratio=0.5)
    (block,) = blocks(model).values()
    calls = itertools.count()
    model.register_forward_pre_hook(lambda *_: setattr(block, "turn", next(calls)))
    block.register_forward_hook(lambda block, args, result: result + block.turn)
    model.compile_repeated_blocks(fullgraph=True, backend="eager", dynamic=False)
    found = diagnose(model, **inputs(model, 16, 16))
    assert (found.graphs_second_call, found.eager_parts, found.healthy) == (1, 0, False)
    (recompile,) = found.recompiles
    assert "turn" in recompile.what


def test_a_model_that_runs_eagerly_is_found_to() -> None:
    model = transform(one_block(), ratio=0.5)
    arguments = inputs(model, 8, 8)
    compiled = quick(model)
    assert diagnose(compiled, **arguments).healthy
    with torch.compiler.set_stance("force_eager"):
        assert diagnose(compiled, **arguments).eager_parts == 1
    with torch._dynamo.config.patch(disable=True):
        found = diagnose(quick(model), **arguments)
    assert (found.graphs_first_call, found.eager_parts, found.healthy) == (0, 1, False)
    assert "Parts of the model that ran eagerly: 1.\n  What to do: see that torch.compile is not disabled" in str(found)


@pytest.mark.slow
def test_blocks_that_dynamo_has_given_up_on_are_found_to_run_eagerly() -> None:
    model = transform(one_stage(), ratio=0.5)
    model.compile_repeated_blocks(backend="eager", dynamic=False)
    for width in range(8, 16):
        assert diagnose(model, **inputs(model, 8, width)).eager_parts == 0
    found = diagnose(model, **inputs(model, 8, 16))
    assert (found.graphs_first_call, found.eager_parts, found.healthy) == (0, 3, False)


def test_what_is_not_compiled_or_not_transformed_is_an_error() -> None:
    model = transform(one_block(), ratio=0.5)
    with pytest.raises(ValueError, match="model is not compiled: compile it first"):
        diagnose(model, **inputs(model, 16, 16))
    with pytest.raises(TransformError, match="is not transformed"):
        diagnose(quick(one_block()), **inputs(model, 16, 16))
    with pytest.raises(TypeError, match=r"model must be a UNet2DConditionModel, .*, got Linear"):
        diagnose(torch.nn.Linear(1, 1))


def test_an_error_of_the_model_passes_through_and_leaves_torch_as_it_was() -> None:
    model = transform(one_block(), ratio=0.5)
    with pytest.raises(TypeError, match="timestep"):
        diagnose(quick(model), inputs(model, 16, 16)["sample"])
    assert GraphLowering.save_output_code is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_calls_of_aten_are_found_under_any_grad_mode(mode: Callable[[], Any]) -> None:
    code = ["aten._embedding_bag_forward_only.default(buf0)", "aten._embedding_bag.default(buf0)"]
    with mode():
        assert _fallbacks(code) == {"_embedding_bag_forward_only": 1, "_embedding_bag": 1}
