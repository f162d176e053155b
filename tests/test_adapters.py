"""Adapters and optional inputs: what is added to a UNet, or given to it, acts as in the stock model.

Steps change a UNet in place, and a call makes use of them. The transform may come before, between or after the steps:
it gives what wrapped children (`support.wrapped`) give after them, bit for bit. What cannot go together is an error.
"""

import copy
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import methodcaller as do
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import TextToVideoZeroPipeline
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    XFormersAttnProcessor,
)
from support import models
from support.models import (
    blocks,
    controlnet,
    gligen,
    inputs,
    mask,
    objects,
    output,
    relative_error,
    sd15,
    sdxl,
    two_stages,
)
from support.wrapped import wrapped
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tome_fx import TransformError, set_ratio, transform
from tome_fx.families.inputs import example_inputs
from tome_fx.families.unet import find_sites

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),  # of a second LoRA
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # torch's own
]

HEIGHT, WIDTH = 16, 24  # of the latents
Call = Callable[[], dict[str, Any]]


def supports(feature: str, condition: str = "", group: str = "Adapters") -> pytest.MarkDecorator:
    return pytest.mark.supports(group, feature, "works with a condition" if condition else "works", condition)


given = functools.partial(supports, group="Optional inputs")
LORA, FUSED = supports("PEFT LoRA"), supports("Fused LoRA")
IP, IP_MASKS = supports("IP-Adapter"), supports("IP-Adapter masks", "cross-attention is not merged")
SAG = supports("Self-attention guidance", "the mid block is not merged")
FREEU, PAG, GLIGEN = supports("FreeU"), supports("Perturbed-attention guidance"), supports("GLIGEN")
PROCESSORS, QKV = supports("Attention processors"), supports("Fused QKV projections", group="Other accelerators")
KEYWORDS, CONDITIONS = given("cross_attention_kwargs"), given("added_cond_kwargs")
merged: Callable[..., Any] = functools.partial(transform, ratio=0.5, use_rand=False)
ORDER = pytest.mark.parametrize("place", [1, 0], ids=["before", "after"])


@pytest.fixture
def seeded() -> Iterator[None]:
    """The random state of the process is the same for every test, and after it as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def like(**config: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel.from_config(two_stages().config, **config).eval()


def lora(seed: int = 1, rank: int = 4, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a LoRA for `two_stages()`, as if trained: B is zero in a new one, which does nothing."""
    weights = {}
    for path, module in two_stages().named_modules():
        if path.endswith(("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj")):
            outs, ins, *kernel = module.weight.shape
            weights[f"{prefix}{path}.lora_A.weight"] = random(rank, ins, *kernel, seed=seed) / ins**0.5
            weights[f"{prefix}{path}.lora_B.weight"] = random(outs, rank, *kernel, seed=seed + 100) / rank**0.5
    return weights


def load(unet: Any, name: str = "one", seed: int = 1, rank: int = 4, **options: Any) -> None:
    unet.load_lora_adapter(lora(seed, rank), prefix=None, adapter_name=name, **options)


def pipeline(unet: Any, kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")) | parts
    parts |= {"unet": unet, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)}
    pipe = getattr(diffusers, kind)(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ip_adapter(unet: Any) -> None:
    """Load an IP-Adapter, and set its scale, as a pipeline does."""
    paths = [path.removesuffix(".processor") for path in unet.attn_processors if "attn2" in path]
    widths = {f"{2 * i + 1}": unet.get_submodule(path).to_q.out_features for i, path in enumerate(paths)}
    weights = {f"{i}.to_{name}_ip.weight": random(widths[i], 16, seed=int(i)) / 4 for i in widths for name in "kv"}
    projection = {"proj.weight": random(4 * 16, 8), "proj.bias": random(4 * 16)}
    projection |= {"norm.weight": torch.ones(16), "norm.bias": torch.zeros(16)}
    pipe = pipeline(unet)
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": weights}, "", "", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.7)


def pag(unet: Any) -> None:
    pipe = pipeline(unet, "StableDiffusionPAGPipeline", pag_applied_layers=["mid", "down_blocks.0"])
    pipe._set_pag_attn_processor(pipe.pag_applied_layers, do_classifier_free_guidance=False)


def image(unet: Any, kind: str, **call: Any) -> Tensor:
    """The latents that a pipeline of this kind makes of the same prompts and noise every time."""
    call |= {"prompt_embeds": random(1, 5, 16), "negative_prompt_embeds": random(1, 5, 16, seed=1)}
    call |= {"latents": random(1, 4, HEIGHT, WIDTH), "height": 8 * HEIGHT, "width": 8 * WIDTH}
    options = {"pag_applied_layers": ["mid", "down_blocks.0"]} if "pag_scale" in call else {}
    return pipeline(unet, kind, **options)(**call, num_inference_steps=2, output_type="latent").images  # type: ignore[no-any-return]


def no_fuser(unet: Any) -> None:
    for block in blocks(unet).values():
        block.fuser.enabled = False


class Gain(AttnProcessor2_0):  # type: ignore[misc]
    """An attention processor with a keyword of its own."""

    def __call__(self, *args: Any, power: int = 1, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 0.7**power


@dataclass(frozen=True)
class Case:
    """Things done to a UNet, and a call that makes use of them."""

    steps: tuple[Callable[[Any], Any], ...] = ()  # each in place
    call: Call = dict  # makes arguments, besides those of `models.inputs`
    without: Call | None = None  # makes those of a call to differ from; None: of any call of a UNet without the steps
    build: Callable[[], Any] = two_stages

    def unet(self, place: int | None = None, **options: Any) -> Any:
        """A UNet after all steps, which is transformed after this many of them, or not at all."""
        model = copy.deepcopy(self.build())
        for i in range(len(self.steps) + 1):
            model = merged(model, **options) if i == place else model
            for step in self.steps[i : i + 1]:
                step(model)
        return model

    def arguments(self, call: Call | None = None) -> dict[str, Any]:
        return models.inputs(self.build(), HEIGHT, WIDTH) | (call or self.call)()

    def idle(self, **options: Any) -> Tensor:
        """What wrapped children give where nothing acts."""
        model = self.build() if self.without is None else self.unet()
        return output(wrapped(model, **options), self.arguments(self.without or dict))


PLAIN = Case()


def halved(model: Any, arguments: dict[str, Any], queries: bool = True) -> Tensor:
    """The output; asserts that self-attention saw half of the tokens at the finest level, and all of them at others.

    Where queries stay whole, that is half of the keys.
    """
    sides = {site.path: site.downsample for site in find_sites(model)}
    seen: dict[str, tuple[int, int]] = {}

    def note(path: str, tokens: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> None:
        seen[path] = tokens.shape[1], (tokens if encoder_hidden_states is None else encoder_hidden_states).shape[1]

    for path in sides:
        model.get_submodule(path).attn1.register_forward_pre_hook(
            lambda _, args, kwargs, path=path: note(path, *args, **kwargs), with_kwargs=True
        )
    result = output(model, arguments)
    everything = {path: (HEIGHT // side) * (WIDTH // side) for path, side in sides.items()}
    merged = {path: n // 2 if sides[path] == min(sides.values()) else n for path, n in everything.items()}
    assert seen == {path: (merged[path] if queries else n, merged[path]) for path, n in everything.items()}
    return result


def residuals() -> dict[str, Any]:
    with torch.no_grad():
        down, middle = controlnet()(**models.inputs(controlnet(), HEIGHT, WIDTH, seed=1), return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


@functools.cache
def spoken() -> dict[str, dict[str, Any]]:
    """What a text encoder makes of a word, and of a token of textual inversion."""
    words = {word: i for i, word in enumerate(("<|startoftext|>", "<|endoftext|>", "a</w>"))}
    widths = {"vocab_size": 3, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 5}
    config = CLIPTextConfig(num_hidden_layers=1, num_attention_heads=2, bos_token_id=0, eos_token_id=1, **widths)
    with tempfile.TemporaryDirectory() as folder:  # a tokenizer takes its words from files, whatever its version
        Path(folder, "vocab.json").write_text(json.dumps(words))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=5)
    parts = {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}
    pipe = pipeline(None, **parts)
    pipe.load_textual_inversion({"<cat>": random(1, 16)})
    states = {prompt: torch.cat(pipe.encode_prompt(prompt, "cpu", 1, True)).detach() for prompt in ("a", "a <cat>")}
    return {prompt: {"encoder_hidden_states": state} for prompt, state in states.items()}


def give(**arguments: Any) -> Call:
    return lambda: arguments


TWO = functools.partial(load, name="two", seed=2, rank=2)
WEIGHTED = (load, TWO, do("set_adapters", ["one", "two"], [0.7, -0.4]))
GAIN = do("set_attn_processor", Gain())
ENABLE_FREEU = do("enable_freeu", s1=0.9, s2=0.2, b1=1.5, b2=1.6)
OBJECTS = give(cross_attention_kwargs={"gligen": objects()})
IMAGES = give(added_cond_kwargs={"image_embeds": [random(2, 2, 8)]})
MASKED = {"ip_adapter_masks": [(random(1, 2, HEIGHT, WIDTH) > 0).float()]}  # one for each of two images
MASKED_IMAGES = give(**IMAGES(), cross_attention_kwargs=MASKED)
SIZES = {"text_embeds": random(2, 16), "time_ids": torch.arange(12.0).view(2, 6)}
CLASSES, GUIDED = functools.partial(like, num_class_embeds=2), functools.partial(like, time_cond_proj_dim=8)
CASES: dict[str, Any] = {
    "loras": (Case(WEIGHTED), LORA),
    "lora-switched": (Case((load, TWO, do("set_adapters", "two"))), LORA),
    "lora-fused": (Case((*WEIGHTED, do("fuse_lora"))), FUSED),
    "lora-scale": (Case((load,), give(cross_attention_kwargs={"scale": 0.5}), dict), LORA, KEYWORDS),
    "ip-adapter": (Case((ip_adapter,), IMAGES), IP, CONDITIONS),
    "ip-masks": (Case((ip_adapter,), MASKED_IMAGES, IMAGES), IP_MASKS, KEYWORDS),
    "ip-lora": (Case((ip_adapter, load), MASKED_IMAGES), IP, LORA),
    "gligen": (Case((), OBJECTS, build=gligen), GLIGEN, KEYWORDS),
    "token": (Case((), lambda: spoken()["a <cat>"], lambda: spoken()["a"]), supports("Textual inversion")),
    "freeu": (Case((ENABLE_FREEU,)), FREEU),
    "pag": (Case((pag,)), PAG),
    "processors": (Case((GAIN,)), PROCESSORS),
    "keyword": (Case((GAIN,), give(cross_attention_kwargs={"power": 2}), dict), PROCESSORS, KEYWORDS),
    "mask": (Case((), give(encoder_attention_mask=mask())), given("encoder_attention_mask")),
    "classes": (Case((), give(class_labels=torch.arange(2)), build=CLASSES), given("class_labels")),
    "guidance": (Case((), give(timestep_cond=random(2, 8)), build=GUIDED), given("timestep_cond")),
    "sizes": (Case((), give(added_cond_kwargs=SIZES), build=sdxl), CONDITIONS),
    "residuals": (Case((), residuals, build=sd15), given("ControlNet residuals")),
}
UNDONE: dict[str, Any] = {
    "lora-unloaded": (Case((*WEIGHTED, do("unload_lora"))), LORA),
    "lora-disabled": (Case((load, do("disable_lora"))), LORA),
    "lora-unfused": (Case((load, do("fuse_lora"), do("unfuse_lora"), do("unload_lora"))), FUSED),
    "ip-adapter-unloaded": (Case((ip_adapter, lambda unet: pipeline(unet).unload_ip_adapter()), dict), IP),
    "freeu-disabled": (Case((ENABLE_FREEU, do("disable_freeu"))), FREEU),
    "processors-reset": (Case((GAIN, do("set_attn_processor", AttnProcessor2_0()))), PROCESSORS),
    "gligen-off": (Case((no_fuser,), OBJECTS, build=gligen), GLIGEN),
    "qkv": (Case((do("fuse_qkv_projections"),)), QKV),
    "qkv-unfused": (Case((do("fuse_qkv_projections"), do("unfuse_qkv_projections"))), QKV),
}


ENDS, LAST = (lambda steps: {0, steps}), (lambda steps: {steps})  # places among so many steps


def everywhere(
    cases: dict[str, Any],
    places: Callable[[int], Iterable[int]] = lambda steps: range(steps + 1),
    fast: tuple[str, ...] = (),
) -> pytest.MarkDecorator:
    """Each case with each of these places for the transform among its steps, of which 0 is before the first.

    Where some are named fast, the others are slow.
    """
    rows = [(name, place) for name, (case, *_) in cases.items() for place in places(len(case.steps))]
    parameters = []
    for name, place in rows:
        case, *marks = cases[name]
        if fast and name not in fast:
            marks.append(pytest.mark.slow)
        parameters.append(pytest.param(case, place, id=f"{name}-{place}", marks=marks))
    return pytest.mark.parametrize("case, place", parameters)


def assert_acts_as_in_the_stock_model(case: Case, place: int, **options: Any) -> None:
    stock, result, arguments = case.unet(), case.unet(place, **options), case.arguments()
    ours = halved(result, arguments, options.get("merge_queries", True))
    assert torch.equal(ours, output(wrapped(stock, **options), arguments))
    assert relative_error(ours, output(stock, arguments)) > 1e-3
    assert relative_error(ours, case.idle(**options)) > 1e-3
    with torch.no_grad():
        assert torch.equal(result(**arguments).sample, ours)  # `output` asks for a tuple
    set_ratio(result, 0)
    assert torch.equal(output(result, arguments), output(stock, arguments))


@given("return_dict")
@everywhere(CASES, fast=("loras", "lora-scale", "ip-adapter", "gligen", "freeu", "processors", "mask", "residuals"))
def test_wherever_the_transform_comes_it_acts_as_in_the_stock_model(case: Case, place: int) -> None:
    assert_acts_as_in_the_stock_model(case, place)


FEW = ("lora-scale", "ip-adapter", "processors", "gligen")
MASKS = ("ip-masks", "ip-lora")


@everywhere({name: rows for name, rows in CASES.items() if name != "pag"}, ENDS, FEW)
def test_it_acts_as_in_the_stock_model_where_keys_and_values_alone_are_merged(case: Case, place: int) -> None:
    assert_acts_as_in_the_stock_model(case, place, merge_queries=False)


@everywhere({name: rows for name, rows in CASES.items() if name not in MASKS}, ENDS, FEW)
def test_it_acts_as_in_the_stock_model_where_whole_blocks_are_merged(case: Case, place: int) -> None:
    assert_acts_as_in_the_stock_model(case, place, merge_block=True)


@everywhere(UNDONE)
def test_what_was_undone_leaves_the_plain_model_merged(case: Case, place: int) -> None:
    assert relative_error(halved(case.unet(place), case.arguments()), case.idle()) < 1e-5


@IP_MASKS
@ORDER
@pytest.mark.parametrize("option, module", [("merge_crossattn", "attn2"), ("merge_block", r"transformer_blocks\.0")])
def test_image_masks_over_merged_cross_attention_are_refused_and_images_without_masks_are_served(
    place: int, option: str, module: str
) -> None:
    case, options = CASES["ip-masks"][0], {option: True}
    result, arguments = case.unet(place, **options), case.arguments()
    with pytest.raises(TransformError, match=rf"ip_adapter_masks was given to {module}, .*\({option}=True\)"):
        output(result, arguments)
    images, stock = case.arguments(IMAGES), case.unet()
    ours = halved(result, images)
    assert torch.equal(ours, output(wrapped(stock, **options), images))
    assert relative_error(ours, output(wrapped(stock), images)) > 1e-3
    assert relative_error(ours, output(wrapped(two_stages(), **options), PLAIN.arguments())) > 1e-3
    set_ratio(result, 0)
    assert torch.equal(output(result, arguments), output(stock, arguments))


@PAG
def test_perturbed_attention_beside_classifier_free_guidance_makes_the_image_of_wrapped_children() -> None:
    guided = functools.partial(image, kind="StableDiffusionPAGPipeline", pag_scale=3)
    result = merged(two_stages())
    ours = guided(result)
    assert torch.equal(ours, guided(wrapped(two_stages())))
    for other in (guided(two_stages()), guided(result, pag_scale=0), guided(result, guidance_scale=1)):
        assert relative_error(ours, other) > 1e-3
    assert all(type(processor) in (AttnProcessor2_0,) for processor in result.attn_processors.values())  # put back


# Its module has moved within diffusers: it is where the pipeline that uses it is.
CrossFrameAttnProcessor2_0 = sys.modules[TextToVideoZeroPipeline.__module__].CrossFrameAttnProcessor2_0
MIXING = [PAGIdentitySelfAttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0, CrossFrameAttnProcessor2_0]


@pytest.mark.parametrize("processor", MIXING)
def test_what_attends_across_the_batch_is_refused_where_attention_is_proportional(processor: Any) -> None:
    result = merged(two_stages(), prop_attn=True)
    options = {"batch_size": 1} if processor is CrossFrameAttnProcessor2_0 else {}
    for block in blocks(result).values():
        block.attn1.set_processor(processor(**options))
    with pytest.raises(TransformError, match=rf"{processor.__name__} attends in parts of the batch or across it, .*"):
        output(result, PLAIN.arguments())


@pytest.mark.parametrize("processor", MIXING)
def test_what_attends_across_the_batch_gets_plain_means_by_default(processor: Any) -> None:
    ours, plain = (merged(two_stages(), prop_attn=prop_attn) for prop_attn in (None, False))
    three = inputs(two_stages(), batch=3)  # as guidance by perturbed attention has them beside its own
    weighed = output(ours, three)
    options = {"batch_size": 1} if processor is CrossFrameAttnProcessor2_0 else {}
    for result in (ours, plain):
        for block in blocks(result).values():
            block.attn1.set_processor(processor(**options))
    assert torch.equal(output(ours, three), output(plain, three))
    assert relative_error(output(ours, three), weighed) > 1e-3


@PAG
@ORDER
def test_perturbed_attention_is_refused_where_attention_is_proportional(place: int) -> None:
    case = CASES["pag"][0]
    result = case.unet(place, prop_attn=True)
    with pytest.raises(TransformError, match=r"PAGIdentitySelfAttnProcessor2_0 attends in parts .*prop_attn=True"):
        output(result, case.arguments())
    set_ratio(result, 0)
    assert torch.equal(output(result, case.arguments()), output(case.unet(), case.arguments()))


@LORA
@FUSED
@pytest.mark.parametrize("loaded", [False, True], ids=["new", "loaded"])
def test_the_lora_verbs_of_a_pipeline_act_on_a_transformed_unet_as_on_a_stock_one(loaded: bool) -> None:
    ours, stock = pipeline(copy.deepcopy(two_stages())), pipeline(copy.deepcopy(two_stages()))
    found: dict[str, Tensor] = {}

    def step(name: str, *verbs: Callable[[Any], Any]) -> None:
        for verb in verbs:
            verb(ours)
            verb(stock)
        found[name] = output(wrapped(stock.unet), PLAIN.arguments())
        if name != "loaded" or not loaded:  # it is transformed after this step
            assert torch.equal(output(ours.unet, PLAIN.arguments()), found[name]), name

    ours.unet = ours.unet if loaded else merged(ours.unet)
    step(
        "loaded",
        do("load_lora_weights", lora(1, 4, "unet."), adapter_name="one"),
        do("load_lora_weights", lora(2, 2, "unet."), adapter_name="two"),
    )
    ours.unet = merged(ours.unet) if loaded else ours.unet
    step("weighted", do("set_adapters", ["one", "two"], [0.7, -0.4]))
    weight = ours.unet.mid_block.attentions[0].proj_in.base_layer.weight.clone()
    step("fused", do("fuse_lora", lora_scale=0.5))
    assert relative_error(ours.unet.mid_block.attentions[0].proj_in.weight, weight) > 1e-3
    step("unfused", do("unfuse_lora"))
    step("deleted", do("delete_adapters", "two"))
    step("switched", do("set_adapters", "one", 0.9))
    step("unloaded", do("unload_lora_weights"))
    assert relative_error(found["unfused"], found.pop("fused")) < 1e-5  # diffusers leaves it at the scale of the fusing
    for before, after in pairwise(found):
        assert relative_error(found[after], found[before]) > 1e-3, after
    assert relative_error(found["unloaded"], PLAIN.idle()) < 1e-5  # weights were fused into, and that taken out again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xFormers needs a GPU")
@supports("xFormers")
@ORDER
def test_xformers_gives_what_it_gives_in_the_stock_model(place: int) -> None:
    pytest.importorskip("xformers", reason="xFormers is not installed")
    case = Case((lambda unet: unet.to("cuda").set_attn_processor(XFormersAttnProcessor()),))
    arguments = {name: value.cuda() for name, value in PLAIN.arguments().items()}
    ours = halved(case.unet(place), arguments)
    assert relative_error(ours, output(wrapped(case.unet()), arguments)) < 1e-4
    assert relative_error(ours.cpu(), PLAIN.idle()) < 1e-3


@pytest.mark.usefixtures("fresh_dynamo")
@everywhere(CASES | {"qkv": UNDONE["qkv"]}, LAST, fast=("lora-scale",))
def test_compiled_it_is_one_graph_that_gives_what_eager_gives(case: Case, place: int) -> None:
    result, arguments = case.unet(place), case.arguments()
    compiled = torch.compile(result, backend="eager", fullgraph=True)
    assert torch.equal(output(compiled, arguments), output(result, arguments))
    assert counters["stats"]["unique_graphs"] == 1


@supports("LoRA hotswap")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("place", [0, *(pytest.param(place, marks=pytest.mark.slow) for place in (1, 2))])
def test_a_lora_is_swapped_for_another_in_a_compiled_model_without_a_recompile(place: int) -> None:
    case = Case((do("enable_lora_hotswap", target_rank=8), load))
    compiled: Any = torch.compile(case.unet(place), backend="eager", fullgraph=True)
    for seed, rank in ((1, 4), (2, 8), (3, 2)):
        other = functools.partial(load, seed=seed, rank=rank)
        if seed > 1:
            other(compiled, hotswap=True)
        assert relative_error(output(compiled, PLAIN.arguments()), Case((other,), without=dict).idle()) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@given("Gradient checkpointing")
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_lora_is_trained_with_checkpointing_by_the_gradients_of_wrapped_children(place: int) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        model(**PLAIN.arguments()).sample.square().mean().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    case = Case((do("train"), load, do("enable_gradient_checkpointing")))
    result, seen = case.unet(place), []
    for path, block in blocks(result).items():
        if "mid" not in path:
            block.attn1.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    ours, expected = gradients(result), gradients(wrapped(case.unet()))
    assert seen == 3 * 2 * [HEIGHT * WIDTH // 2]  # of each block once forward, once again for the backward
    assert ours.keys() == expected.keys()
    assert all(relative_error(gradient, expected[name]) < 1e-4 for name, gradient in ours.items())


@SAG
def test_self_attention_guidance_makes_its_image_and_is_refused_where_the_mid_block_is_merged() -> None:
    guided = functools.partial(image, kind="StableDiffusionSAGPipeline", sag_scale=2)
    ours = guided(merged(two_stages()))
    assert torch.equal(ours, guided(wrapped(two_stages())))
    assert relative_error(ours, guided(merged(two_stages()), sag_scale=0)) > 1e-3
    with pytest.raises(TransformError, match=r"CrossAttnStoreProcessor keeps .* in attn1, .*\(merge_attn=True\)"):
        guided(merged(sd15(), max_downsample=8))


@given("Chunked feed-forward")
@pytest.mark.parametrize("size, dim, chunks", [(None, 0, 6), (3, 1, 32)])
@ORDER
def test_a_feed_forward_in_chunks_gives_the_same(place: int, size: int | None, dim: int, chunks: int) -> None:
    clips = diffusers.UNetMotionModel.from_unet2d(two_stages())
    case = Case((do("enable_forward_chunking", size, dim),), build=lambda: clips)
    result, calls = case.unet(place), []
    result.mid_block.attentions[0].transformer_blocks[0].ff.register_forward_hook(lambda *args: calls.append(args))
    arguments = example_inputs(clips, HEIGHT, WIDTH, frames=3, text_tokens=5)
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].repeat_interleave(3, 0)
    assert relative_error(halved(result, arguments), output(merged(clips), arguments)) < 1e-5
    assert len(calls) == chunks  # of 2 clips of 3 frames, or of 96 tokens
