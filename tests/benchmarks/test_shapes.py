"""The shapes pipeline and its judge: scenes are what their captions say, training goes on where it was stopped, the
reader reads what it has not seen, and what is committed is an ordinary pipeline of at most 40 MB that draws captions.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from bench import documents, report, shapes
from bench.images import generate
from bench.shapes import blank, train
from bench.shapes import reader as judge
from bench.shapes.fit import fit
from bench.shapes.scenes import COLOURS, HELD_OUT, SHAPES, SIDE, THINGS, Scene, draw, numbered
from bench.shapes.tokenizer import word_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*"),
]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return shapes.pipeline()


def test_a_scene_is_a_function_of_its_number() -> None:
    assert numbered(5, 3) == numbered(5, 3)
    assert len({scene.caption for scene in numbered(0, 300)}) > 150
    assert torch.equal(draw(numbered(5, 3), 32), draw(numbered(5, 3), 32))


def test_an_image_has_the_colour_of_each_shape_at_its_place() -> None:
    for scene in numbered(0, 50):
        (image,) = draw([scene], SIDE) / 2 + 0.5
        for thing in scene.things:
            pixel = image[:, int(thing.y * SIDE), int(thing.x * SIDE)]
            assert torch.allclose(pixel, torch.tensor(COLOURS[thing.colour]), atol=1e-5)


def test_shapes_lie_within_the_image_and_apart() -> None:
    for scene in numbered(0, 500):
        places = [(thing.x, thing.y, thing.radius) for thing in scene.things]
        for x, y, radius in places:
            assert min(x, y, 1 - x, 1 - y) >= radius
        for i, (x, y, radius) in enumerate(places):
            for x2, y2, radius2 in places[:i]:
                assert ((x - x2) ** 2 + (y - y2) ** 2) ** 0.5 > radius + radius2


def test_a_caption_tells_shapes_colours_and_order() -> None:
    for scene in numbered(0, 300):
        words = scene.caption.replace(",", "").split()
        assert [w for w in words if w in SHAPES] == [thing.shape for thing in scene.things]
        assert [w for w in words if w in COLOURS] == [thing.colour for thing in scene.things]
        line = [thing.y if scene.relation == "above" else thing.x for thing in scene.things]
        assert line == sorted(line)
        assert ("above" in words) == (scene.relation == "above")


def test_a_window_is_a_part_of_the_image() -> None:
    scenes = numbered(7, 4)
    whole = draw(scenes, SIDE)
    assert torch.equal(draw(scenes, SIDE, window=(10, 20, 48)), whole[:, :, 20:68, 10:58])


def test_the_reader_reads_real_scenes_that_it_has_not_seen() -> None:
    scenes = numbered(HELD_OUT + 5000, 500)
    assert judge.load().right(scenes, draw(scenes, SIDE)).float().mean() >= 0.99


def test_the_reader_is_not_content_with_another_picture() -> None:
    scenes = [scene for scene in numbered(HELD_OUT, 300) if len(scene.things) > 1]
    swapped = [Scene(scene.things[::-1], scene.relation, scene.ground) for scene in scenes]
    fewer = [Scene(scene.things[:-1], scene.relation, scene.ground) for scene in scenes]
    images = draw(scenes, SIDE)
    for wrong in (swapped, fewer, scenes[1:] + scenes[:1]):
        assert judge.load().right(wrong, images).float().mean() < 0.05


def test_the_reader_is_not_content_with_a_spoilt_image() -> None:
    scenes = numbered(HELD_OUT, 100)
    images = draw(scenes, SIDE)
    noisy = images + 3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert judge.load().right(scenes, noisy).float().mean() < 0.5


@pytest.mark.slow
def test_shapes_are_counted_from_pixels() -> None:
    scenes = numbered(HELD_OUT + 5000, 200)
    wanted = torch.tensor([len(scene.things) for scene in scenes])
    assert (judge.counts(draw(scenes, SIDE)) == wanted).float().mean() >= 0.99


@pytest.mark.slow
def test_a_shape_that_is_drawn_twice_is_counted_though_the_reader_lets_it_pass() -> None:
    scenes = [scene for scene in numbered(HELD_OUT, 200) if len(scene.things) == 1]
    twice = []
    for scene in scenes:
        (thing,) = scene.things
        things = tuple(replace(thing, x=x, y=0.5, radius=0.18) for x in (0.25, 0.75))
        twice.append(replace(scene, things=things))
    images = draw(twice, SIDE)
    assert (judge.load().right(scenes, images) & (judge.counts(images) == 1)).float().mean() < 0.1
    assert judge.load().right(scenes, images).float().mean() > 0.9


def test_training_that_is_stopped_ends_where_training_that_is_not_ends(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 3)

    def go(path: Path, stop: int | None = None) -> nn.Module:
        module = model()

        def loss(step: int) -> Tensor:
            if step == stop:
                raise KeyboardInterrupt
            value: Tensor = module(torch.randn(8, 3)).square().mean()
            return value

        fit(path, module, loss, steps=30, rate=1e-2, decay=0.9, every=10)
        return module

    whole = go(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "stopped.pt", stop=25)
    resumed = go(tmp_path / "stopped.pt")
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad
    assert (tmp_path / "whole.log").read_text() == (tmp_path / "stopped.log").read_text()


def test_a_transformer_is_trained_for_the_trained_pipeline_and_loaded_with_its_other_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipe: StableDiffusionPipeline
) -> None:
    monkeypatch.setattr(train, "sample", lambda pipe, scenes, side: draw(scenes, side))
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)  # which would take longer than all else
    folder, run = tmp_path / "transformer", tmp_path / "run"
    command = ["train", "--transformer", str(folder), "--run", str(run), "--coarse-steps", "1", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    trained, fresh = shapes.transformer_pipeline(folder), blank.transformer_pipeline(pipe)
    assert trained.text_encoder is trained.text_encoder_2
    for part in ("transformer", "text_encoder"):
        new, old = (getattr(one, part).state_dict() for one in (trained, fresh))
        rounded = {name: value.half().float() for name, value in old.items()}
        assert not all(torch.equal(new[name].half().float(), rounded[name]) for name in new)
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert len(sizes) == 2
    assert sum(sizes) <= 12e6
    assert "right: " in (run / "transformer.log").read_text()
    image = generate(
        trained,
        trained.transformer,
        ["a red circle"],
        steps=1,
        guidance=3.0,
        height=32,
        width=32,
        **shapes.inputs(trained),
    ).pixels
    assert image.shape == (1, 3, 32, 32)


def test_tokens_in_another_order_are_trained_at_their_places(pipe: StableDiffusionPipeline) -> None:
    transformer = blank.transformer_pipeline(pipe).transformer
    for parameter in transformer.parameters():  # of which many begin as zeros
        nn.init.normal_(parameter, std=0.1)
    latents, kept = torch.randn(2, 4, 32, 32), torch.randperm(32 * 32)
    width = transformer.config.joint_attention_dim
    others = {
        "timestep": torch.tensor([200.0, 900.0]),
        "encoder_hidden_states": torch.randn(2, 5, width),
        "pooled_projections": torch.randn(2, width),
    }

    def result(latents: Tensor) -> Tensor:
        return transformer(latents, **others).sample.detach()  # type: ignore[no-any-return]

    expected = train.part(result(latents), kept)
    with train.places(transformer.pos_embed, kept):
        found = result(train.part(latents, kept))
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max().item())
    assert not torch.allclose(result(train.part(latents, kept)), expected, atol=0.1 * expected.abs().max().item())


def test_every_caption_fits_the_tokenizer_and_every_word_is_one_token(pipe: StableDiffusionPipeline) -> None:
    for scene in numbered(0, 200):
        words = scene.caption.replace(",", " ,").split()
        assert [token.removesuffix("</w>") for token in pipe.tokenizer.tokenize(scene.caption)] == words
        assert len(words) + 2 <= pipe.tokenizer.model_max_length


@pytest.mark.slow
def test_a_tokenizer_for_training_is_the_same_in_every_process_and_has_each_word_as_one_token() -> None:
    program = (
        "from bench.shapes import blank; from bench.shapes.tokenizer import tokens; "
        "tokenizer = blank.pipeline(blank.vae()).tokenizer; "
        "print(sorted(tokenizer.get_vocab().items()), tokens(tokenizer, ['a red circle above a blue square']).tolist())"
    )
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in "ab"]
    assert runs[0].stdout == runs[1].stdout != ""
    captions = [scene.caption for scene in numbered(0, 1000)]
    tokenizer = word_tokenizer([word for caption in captions for word in caption.split()])
    for caption in captions[:200]:
        words = caption.replace(",", " ,").split()
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(caption)] == words


def test_the_committed_pipeline_is_ordinary_small_and_fine() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(shapes.PIPELINE)
    files = [path for path in shapes.PIPELINE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}
    assert pipe.unet.config.sample_size >= 32
    assert "CrossAttn" in pipe.unet.config.down_block_types[0]
    assert {
        parameter.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for parameter in part.parameters()
    } == {torch.float32}


def test_the_committed_transformer_is_ordinary_and_small_and_as_it_would_be_made_now(
    pipe: StableDiffusionPipeline,
) -> None:
    files = [path for path in shapes.TRANSFORMER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files if path.suffix == ".safetensors") <= 12e6
    trained, fresh = shapes.transformer_pipeline(), blank.transformer_pipeline(pipe)
    for part in ("transformer", "text_encoder"):
        new, old = getattr(trained, part), getattr(fresh, part)
        assert {n: w.shape for n, w in new.state_dict().items()} == {n: w.shape for n, w in old.state_dict().items()}
        assert {parameter.dtype for parameter in new.parameters()} == {torch.float32}
    assert trained.transformer.config.sample_size >= 32


@pytest.mark.slow
def test_the_committed_pipeline_draws_what_its_captions_say(pipe: StableDiffusionPipeline) -> None:
    scenes = numbered(HELD_OUT + 9000, 16)
    images = train.sample(pipe, scenes, SIDE)
    assert judge.load().right(scenes, images).sum() >= 10  # 16 are too few to show 85 %: see the test below


def test_the_measured_share_of_right_captions_is_the_one_asked_for() -> None:
    rows = documents.read(report.RESULTS / "quality.json")["rows"]
    assert rows[0]["case"]["variant"] == "stock"
    assert sum(rows[0]["right"]) / len(rows[0]["right"]) >= 0.85


def test_there_is_a_thing_for_every_colour_and_shape() -> None:
    assert len(THINGS) == len(COLOURS) * len(SHAPES)
