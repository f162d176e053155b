"""The same mathematics as tomesd: for the same destinations, outputs agree to 1e-5 relative in float32.

tomesd chooses the top left token of every cell with `use_rand=False`, and so do we: then nothing is random and the
outputs of whole UNets can be compared. Two sources that are almost equally similar to their destinations may change
places by a rounding error, which changes the output by about 1e-2. That is no fault of either side, so it is kept
apart from one: in float64 every case must agree to 1e-12 at the first seed, and in float32 a case may pass over a
seed with such a near-tie, which a defect would not let it.

Every pair of option values is compared in some case, for each kind of UNet; ratio, size and stride in all cases.
"""

import copy
import functools
import itertools
import math
from typing import Any, NamedTuple

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel
from support.models import inputs, output, relative_error, sd15, sd21, sdxl
from support.speed import slow_but

import tome_fx
from tome_fx.families.unet import find_sites

SEEDS = range(3)
UNETS = {"sd15": sd15, "sd21": sd21, "sdxl": sdxl}


class Case(NamedTuple):
    """One call of both libraries."""

    ratio: float
    latents: tuple[int, int]
    stride: tuple[int, int]  # sy x sx
    max_downsample: int
    scopes: int  # how many of attn, crossattn and mlp
    batch: int

    def options(self) -> dict[str, Any]:
        """What `tomesd.apply_patch` and `tome_fx.transform` are told alike; ours is told TOMESD as well."""
        sy, sx = self.stride
        return {
            "ratio": self.ratio,
            "max_downsample": self.max_downsample,
            "sx": sx,
            "sy": sy,
            "use_rand": False,
            "merge_attn": True,
            "merge_crossattn": self.scopes > 1,
            "merge_mlp": self.scopes > 2,
        }


def every_case(max_downsamples: tuple[int, ...]) -> list[Case]:
    values = (
        (0.1, 0.25, 0.5, 0.75),
        ((32, 32), (32, 24), (17, 23), (64, 16)),
        ((2, 2), (4, 4), (2, 3)),
        max_downsamples,
        (1, 2, 3),
        (1, 2, 3),
    )
    return [Case(*case) for case in itertools.product(*values)]


def pairs(case: Case) -> set[Any]:
    return set(itertools.combinations(enumerate(case), 2))


def covering(cases: list[Case]) -> list[Case]:
    """Few of the cases that cover every pair of option values that all of them do: the most new pairs first."""
    left = set().union(*map(pairs, cases))
    chosen = []
    while left:
        chosen.append(max(cases, key=lambda case: len(pairs(case) & left)))
        left -= pairs(chosen[-1])
    return chosen


COVERING = {
    "sd15": covering(every_case((1, 2, 8))),
    "sd21": covering(every_case((1, 2, 8))),
    "sdxl": covering(every_case((2, 4, 8))),  # 1 reaches nothing there, see the last test
}
COVERED = [(name, case) for name, cases in COVERING.items() for case in cases]
FEW = [(name, case) for name, cases in COVERING.items() for case in cases[:4]]  # which cover the most pairs
FULL = [case for case in every_case((1,)) if case.scopes == 1 and case.batch == 2]


@functools.cache
def in_float64(name: str) -> UNet2DConditionModel:
    return copy.deepcopy(UNETS[name]()).double()


def tomesd_serves(name: str, case: Case) -> bool:
    """Whether tomesd can run the case: it guesses each level's grid from its count of tokens, and needs a cell."""
    height, width = case.latents
    for factor in {site.downsample for site in find_sites(UNETS[name]())}:
        grid = math.ceil(height / factor), math.ceil(width / factor)
        guess = math.ceil(math.sqrt(height * width // math.prod(grid)))
        # or the two would differ on what to merge, not on how
        assert (guess > case.max_downsample) == (factor > case.max_downsample)
        if guess > case.max_downsample or int(math.prod(grid) * case.ratio) == 0:
            continue  # nothing to merge here for either
        guessed_wrong = grid != (math.ceil(height / guess), math.ceil(width / guess))
        if guessed_wrong or grid[0] < case.stride[0] or grid[1] < case.stride[1]:
            return False
    return True


def ours_of(model: UNet2DConditionModel, case: Case) -> UNet2DConditionModel:
    """Ours, with tomesd's mathematics."""
    return tome_fx.transform(model, **{**tome_fx.TOMESD, **case.options()})


def error(model: UNet2DConditionModel, case: Case, seed: int) -> float:
    """How far ours is from tomesd's, after making sure that merging did something to compare."""
    arguments = inputs(model, *case.latents, batch=case.batch, seed=seed)
    ours = output(ours_of(model, case), arguments)
    theirs = output(tomesd.apply_patch(copy.deepcopy(model), **case.options()), arguments)
    assert relative_error(theirs, output(model, arguments)) > 1e-3
    return relative_error(ours, theirs)


def check_float32(name: str, case: Case) -> None:
    model = UNETS[name]()
    errors = []
    for seed in SEEDS:
        errors.append(error(model, case, seed))
        if errors[-1] <= 1e-5:
            return
    pytest.fail(f"relative errors of {errors} at the seeds {list(SEEDS)}")


@pytest.mark.parametrize("name", UNETS)
def test_the_cases_cover_every_pair_of_option_values(name: str) -> None:
    expected = set().union(*map(pairs, every_case((2, 4, 8) if name == "sdxl" else (1, 2, 8))))
    assert set().union(*map(pairs, COVERING[name])) == expected
    assert len(expected) == 166
    assert len(COVERING[name]) < 30


def test_most_cases_are_ones_that_tomesd_can_run() -> None:
    served = {name: [tomesd_serves(name, case) for case in cases] for name, cases in COVERING.items()}
    assert {name: (sum(found), len(found)) for name, found in served.items()} == {
        "sd15": (16, 18),
        "sd21": (16, 18),
        "sdxl": (18, 18),
    }
    assert all(tomesd_serves("sd15", case) for case in FULL)
    assert len(FULL) == 48


@pytest.mark.parametrize("name, case", slow_but(FEW, COVERED))
def test_a_unet_agrees_with_tomesd_in_float32_or_runs_where_tomesd_does_not(name: str, case: Case) -> None:
    if tomesd_serves(name, case):
        check_float32(name, case)
        return
    model = UNETS[name]()
    arguments = inputs(model, *case.latents, batch=case.batch)
    with pytest.raises((RuntimeError, IndexError)):
        output(tomesd.apply_patch(copy.deepcopy(model), **case.options()), arguments)
    ours = output(ours_of(model, case), arguments)
    assert relative_error(ours, output(model, arguments)) > 1e-3  # the other levels merge


@pytest.mark.parametrize("name, case", slow_but(FEW, [covered for covered in COVERED if tomesd_serves(*covered)]))
def test_a_unet_agrees_with_tomesd_in_float64_to_the_last_digits(name: str, case: Case) -> None:
    assert error(in_float64(name), case, seed=0) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL)
def test_self_attention_agrees_with_tomesd_at_every_ratio_size_and_stride(case: Case) -> None:
    check_float32("sd15", case)


def test_sdxl_at_full_resolution_is_an_error_where_tomesd_does_nothing() -> None:
    model = sdxl()
    arguments = inputs(model)
    theirs = output(tomesd.apply_patch(copy.deepcopy(model), max_downsample=1), arguments)
    assert torch.equal(theirs, output(model, arguments))
    with pytest.raises(
        tome_fx.TransformError, match=r"max_downsample=1 reaches no block.*pass max_downsample=2 or more"
    ):
        tome_fx.transform(model, max_downsample=1)


@pytest.mark.parametrize("name", UNETS)
def test_tomesd_s_mathematics_by_its_name_is_what_tomesd_does_at_the_finest_level(name: str) -> None:
    model = in_float64(name)
    arguments = inputs(model)
    ours = output(tome_fx.transform(model, 0.5, use_rand=False, **tome_fx.TOMESD), arguments)
    finest = min(site.downsample for site in find_sites(model))
    theirs = output(tomesd.apply_patch(copy.deepcopy(model), 0.5, use_rand=False, max_downsample=finest), arguments)
    assert relative_error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("option, default", [("tile", 32), ("prop_attn", None), ("share_match", True)])
def test_none_of_tomesd_s_options_can_be_left_out(option: str, default: object) -> None:
    model, options = in_float64("sdxl"), {**tome_fx.TOMESD, "max_downsample": 4}
    arguments = inputs(model, 72, 72)
    theirs = output(tomesd.apply_patch(copy.deepcopy(model), 0.5, use_rand=False, max_downsample=4), arguments)
    same, other = (
        output(tome_fx.transform(model, 0.5, use_rand=False, **{**options, **more}), arguments)
        for more in ({}, {option: default})
    )
    assert relative_error(same, theirs) <= 1e-12
    assert relative_error(other, theirs) > 1e-4
