"""Every form of merging compiles whole to code for GPUs, and launches what was recorded and no more.

Inductor writes the code and ptxas compiles it, for cards that are not there. That it runs, and gives what eager gives,
is for the tests with the mark gpu. What was recorded stands beside this file: see `cases`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import cuda_code
from bench.cards import CARDS, attention_kernel
from bench.cases import STOCK
from bench.code import best, counted, launches
from bench.cuda_code import MODULE, Kernel, build, unavailable, write
from cuda_code.cases import RECORD, TRANSFORMERS, Case, cards, cases, differences

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=unavailable())


@pytest.fixture(scope="session")
def on_card() -> Iterator[Callable[..., Any]]:
    with cards() as run:
        yield run


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RECORD.read_text())
    return result


def spills(kernels: list[Kernel]) -> Counter[str]:
    """Bytes that kernels spill, by their names without the number that Inductor gives each."""
    found: Counter[str] = Counter()
    for kernel in best(kernels):
        found[kernel.name.rstrip("0123456789")] += kernel.spilled
    return +found


@pytest.mark.slow
@pytest.mark.parametrize(
    "card, case", [pytest.param(card, case, id=f"{card}, {case}") for card in CARDS for case in cases(card)]
)
def test_a_form_compiles_to_what_was_recorded_without_atomics_or_spills(
    card: str, case: Case, on_card: Callable[..., Any], recorded: dict[str, Any]
) -> None:
    code = on_card(card, write, *case.order())
    assert not code.others
    assert not code.obstacles
    assert code.devices == ("cuda",)
    assert not differences(recorded[card][str(case)], code), "record it if it is meant: see cuda_code.cases"
    kernels = on_card(card, build, code)
    assert {kernel.name for kernel in kernels} == set(code.kernels) >= set(code.triton)
    assert not {kernel.name: kernel.atomics for kernel in kernels if kernel.atomics}
    if spilled := spills(kernels):  # torch's own kernels of a sine do, of the stock model as well
        assert spilled <= spills(on_card(card, build, on_card(card, write, *replace(case, form=STOCK).order())))


def test_what_is_recorded_is_what_is_compiled(recorded: dict[str, Any]) -> None:
    assert {card: list(rows) for card, rows in recorded.items()} == {
        card: [str(case) for case in cases(card)] for card in CARDS
    }


@pytest.mark.parametrize("card, side", [*((card, 64) for card in CARDS), ("sm_90", 128)])
def test_a_site_of_stable_diffusion_adds_at_most_ten_launches_however_large(
    card: str, side: int, recorded: dict[str, Any]
) -> None:
    stock, ours = (recorded[card][str(Case("sd15", form, (side, side)))] for form in (STOCK, "default"))
    assert launches(ours) - launches(stock) <= 10
    assert ours["aten"].keys() - stock["aten"].keys() == {"_embedding_bag_forward_only"}
    assert ours["gemm"].keys() - stock["gemm"].keys() == {"bmm"}


def test_tiles_that_are_counted_add_as_many_launches_as_those_that_inductor_sorts(recorded: dict[str, Any]) -> None:
    by_counting, by_sorting = (
        recorded["sm_90"][str(Case("sd15", form, (64, 64)))] for form in ("default", "tiles of 16")
    )
    assert launches(by_counting) == launches(by_sorting)
    assert by_counting["aten"] == by_sorting["aten"]


@pytest.mark.parametrize("model", TRANSFORMERS)
def test_whole_blocks_of_a_transformer_are_merged_once_and_call_nothing_of_atens_for_a_block(
    model: str, recorded: dict[str, Any]
) -> None:
    stock, attention, blocks = (
        Counter(recorded["sm_90"][str(Case(model, form, None))]["aten"]) for form in (STOCK, "default", "whole block")
    )
    assert (blocks - stock)["_embedding_bag_forward_only"] == 1
    assert (attention - stock)["_embedding_bag_forward_only"] == sum(
        count for name, count in stock.items() if name == "_scaled_dot_product_cudnn_attention"
    ) // (2 if model == "pixart-shallow" else 1)  # whose other attention is to the prompt
    # Inductor leaves what is complex to ATen, as Qwen-Image's table of places is.
    assert (blocks - stock).keys() <= {"_embedding_bag_forward_only", *(["index"] if model == "qwen-shallow" else [])}


class Planted(nn.Module):
    """Does what a form of merging must not."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor, host: Tensor) -> Tensor:
        """Take `[N, C]` and a row that is not on the card."""
        if self.what == "nothing":
            return x + 1
        if self.what == "fallback":
            return torch.zeros(x.shape, dtype=torch.int64, device=x.device).scatter_(0, x.long(), x.long())
        if self.what == "atomics":
            return torch.zeros_like(x.float()).index_add_(0, x[:, 0].long(), x.float())
        return x + host.to(x.device)


def planted(what: str) -> MODULE:
    return Planted(what), {"x": torch.empty(64, 64), "host": torch.empty(64, device="cpu")}


@pytest.mark.slow
def test_what_must_not_be_is_seen(on_card: Callable[..., Any]) -> None:
    """A fallback, atomics and a tensor on the host, each beside a module that does without."""
    clean = on_card("sm_90", write, planted, "nothing")
    assert (len(clean.triton), clean.gemm, clean.aten) == (1, (), ())
    assert not any(kernel.atomics for kernel in on_card("sm_90", build, clean))

    fallback = on_card("sm_90", write, planted, "fallback")
    assert "aten: recorded {}, now {'scatter_': 1}" in differences(counted(clean), fallback)

    atomics = on_card("sm_90", write, planted, "atomics")
    assert any(kernel.atomics for kernel in on_card("sm_90", build, atomics))

    host = on_card("sm_90", write, planted, "host")
    assert host.obstacles
    assert host.others


def test_where_the_harness_cannot_work_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert "this is 2.8.0" in unavailable()
    monkeypatch.undo()
    monkeypatch.setattr(cuda_code, "find_spec", lambda name: None)
    assert unavailable() == "triton is not installed"


@pytest.mark.parametrize(
    "card, width, masked, expected",
    [
        ("sm_80", 40, False, "flash"),
        ("sm_80", 40, True, "efficient"),
        ("sm_89", 64, True, "efficient"),
        ("sm_90", 40, True, "cudnn"),
        ("sm_90", 160, False, "flash"),
        ("sm_90", 160, True, "efficient"),
        ("sm_90", 41, False, "flash"),
        ("sm_90", 41, True, "math"),
    ],
)
def test_attention_is_computed_by_the_kernel_that_torch_chooses(
    card: str, width: int, masked: bool, expected: str
) -> None:
    query = torch.empty(2, 8, 64, width, dtype=torch.float16, device="meta")
    mask = torch.empty(64, 64, device="meta") if masked else None
    assert attention_kernel(CARDS[card], query, query, query, mask) == expected
