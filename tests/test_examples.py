"""Every example runs as it is, without a model at hand, and shows what it says it shows.

Most run in the tests' process, with a compiler that counts graphs and writes no code. That nothing compiles again is
the examples' own check, by `torch.compiler.set_stance`: it would end them. Those in processes of their own are slow.
"""

import ast
import functools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForText2Image, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss

from tome_fx import set_ratio

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "tiny"]
Example = Callable[..., dict[str, Any]]

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # `dtype`, which diffusers asks for instead, is not known to the oldest that is supported
    pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:.*CLIPImageProcessor.*"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),  # in diffusers 0.36
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers' Euler scheduler
]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counter: Any) -> Example:
    """Runs an example in an empty folder, with words of a command line, and returns its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))

    def run(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        with torch.random.fork_rng(devices=[]):
            return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    return run


def pixels(path: str | Path) -> Tensor:
    """A picture as numbers from 0 to 1, [height, width, 3]; asserts that it is not of one colour."""
    with Image.open(path) as image:
        values = torch.tensor(list(image.convert("RGB").tobytes())).view(image.height, image.width, 3) / 255
    assert values.std() > 0
    return values


def test_an_image_is_made_by_a_merged_model_that_is_compiled_as_one_graph(
    example: Example, counter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    example("image", "--steps", "2", "--ratio", "0.25", "--output", "merged.png")
    assert counter.frame_count == 1
    assert "64 x 64 px, 25% of the tokens merged: merged.png" in capsys.readouterr().out
    example("image", "--steps", "2", "--ratio", "0", "--eager", "--output", "plain.png")
    assert counter.frame_count == 1
    assert "first image: " in capsys.readouterr().out
    assert not torch.equal(pixels("merged.png"), pixels("plain.png"))


@pytest.mark.slow
def test_a_pipeline_of_the_users_is_read_from_its_folder_and_has_the_size_and_the_type_asked_for(
    example: Example, tmp_path: Path
) -> None:
    pipe = example("image", "--steps", "1")["pipe"]
    pipe.unet = pipe.unet._orig_mod
    pipe.save_pretrained(tmp_path / "mine")
    size_and_type = ("--size", "48", "--dtype", "bfloat16", "--device", "cpu")
    found = example("image", "--steps", "1", "--model", str(tmp_path / "mine"), *size_and_type)
    assert pixels("image.png").shape == (48, 48, 3)
    assert found["pipe"].unet.dtype == found["pipe"].vae.dtype == torch.bfloat16


def test_sdxl_is_compiled_once_for_all_blocks(
    example: Example, counter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    example("sdxl_regional", "--steps", "2")
    assert pixels("sdxl.png").shape == (128, 128, 3)
    assert counter.frame_count == 1
    assert counter.op_count > 0
    printed = capsys.readouterr().out
    assert printed.count(".transformer_blocks.") == 8
    assert "no recompile: sdxl.png" in printed


def test_flux_is_compiled_once_for_each_kind_of_block(
    example: Example, counter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = example("flux", "--steps", "2", "--size", "64")
    assert found["pipe"].transformer.tome_fx.plan.merge_block
    assert found["schedule"].ratios == {0: 0, 0.5: 0.5}
    assert pixels("flux.png").shape == (64, 64, 3)
    # two kinds; of the second the first is given tokens of other strides, as in stock; and both ratios
    assert counter.frame_count == 2 * 3
    assert "no recompile: flux.png" in capsys.readouterr().out


def test_flux_is_offloaded_after_it_was_compiled(example: Example) -> None:
    pipe = example("flux", "--steps", "2", "--size", "64", "--offload", "--device", "cpu")["pipe"]
    assert hasattr(pipe.transformer, "_hf_hook")
    offloaded = pixels("flux.png")
    example("flux", "--steps", "2", "--size", "64", "--device", "cpu")
    assert torch.equal(offloaded, pixels("flux.png"))


def test_loras_are_swapped_in_one_graph_and_make_images_of_their_own(
    example: Example, counter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    example("lora_hotswap", "--steps", "2", "--rank", "8")
    assert counter.frame_count == 1
    first, second, third = (pixels(f"loras/{number}.png") for number in range(3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert not torch.equal(first, third)
    assert "no recompile for 2 more LoRAs" in capsys.readouterr().out


def test_a_schedule_gives_a_unet_and_its_controlnet_two_ratios_of_a_compile_each(
    example: Example, counter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = example("controlnet_schedule", "--steps", "2")
    assert counter.frame_count == 2 * 2
    assert "no recompile" in capsys.readouterr().out
    plans = [model.tome_fx.plan for model in found["schedule"].models]
    assert [plan.ratio for plan in plans] == [0, 0]  # as the next image begins
    scheduled = pixels("controlled.png")
    for model in found["schedule"].models:
        set_ratio(model, 0)
    found["schedule"] = None
    pipe, generator = found["pipe"], torch.Generator("cpu").manual_seed(1)
    plain = pipe("a red circle", image=found["control"], num_inference_steps=2, generator=generator).images[0]
    plain.save("plain.png")
    assert not torch.equal(scheduled, pixels("plain.png"))


def test_one_half_of_the_models_of_a_controlnet_is_a_usage_error(
    example: Example, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        example("controlnet_schedule", "--model", "somewhere")
    assert raised.value.code == 2
    assert "--model and --controlnet are for one another: give both or none" in capsys.readouterr().err


def test_two_threads_serve_what_one_thread_makes_from_one_copy_of_the_weights(example: Example, counter: Any) -> None:
    found = example("server", "--steps", "2", "--seeds", "3")
    images, pipes, stock = found["images"], found["pipes"], found["stock"]
    assert sorted(images) == [(quality, seed) for quality in ("best", "fast") for seed in range(3)]
    assert counter.frame_count == 2
    for quality, pipe in pipes.items():
        weights = dict(pipe.unet.named_parameters())
        assert all(weights[name] is parameter for name, parameter in stock.unet.named_parameters())
        for seed in range(3):
            generator = torch.Generator("cpu").manual_seed(seed)
            (alone,) = pipe(found["args"].prompt, num_inference_steps=2, generator=generator).images
            assert alone.tobytes() == images[quality, seed].tobytes()
    assert images["best", 0].tobytes() != images["fast", 0].tobytes()
    assert not torch.equal(pixels("served/best-2.png"), pixels("served/fast-2.png"))


def test_processes_share_out_the_prompts_and_make_the_images_of_one(
    example: Example, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example("distributed", "--steps", "2", "--output", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    Path("prompts.txt").write_text("a red circle\n\na blue circle\na green circle\n  \n")  # the example's own
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        example("distributed", "--steps", "2", "--output", "two", "--prompts", "prompts.txt")
        assert len(list(Path("two").iterdir())) == (2, 3)[rank]
    assert capsys.readouterr().out.count("process 0 of 2") == 2
    for number in range(3):
        assert torch.equal(pixels(f"one/{number}.png"), pixels(f"two/{number}.png"))


def test_a_lora_is_learnt_through_a_merged_unet_and_saved_for_a_plain_one(example: Example) -> None:
    found = example("train_lora", "--steps", "40", "--lr", "0.01")
    unet, scheduler, latents = found["unet"], found["scheduler"], found["latents"]
    assert unet.tome_fx.plan.ratio == 0.5
    assert {name.split(".")[-3] for name, p in unet.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}

    def loss() -> float:
        generator = torch.Generator().manual_seed(1)
        picture = latents.repeat(8, 1, 1, 1)
        noise = torch.randn(picture.shape, generator=generator)
        timestep = torch.randint(1000, (len(picture),), generator=generator)
        with torch.no_grad():
            prompts = found["prompt"].expand(len(picture), -1, -1)
            return float(mse_loss(unet(scheduler.add_noise(picture, noise, timestep), timestep, prompts).sample, noise))

    learnt = loss()
    unet.disable_lora()
    assert learnt < 0.98 * loss()

    def image(pipe: Any) -> bytes:
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        return bytes(pipe("a red circle", **options).images[0].tobytes())

    plain = StableDiffusionPipeline.from_pretrained(found["pipe"].config._name_or_path)
    before = image(plain)
    plain.load_lora_weights("lora")
    assert image(plain) != before


def test_pictures_to_learn_from_are_those_of_a_folder(example: Example, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number, colour in enumerate(("red", "blue")):
        picture = Image.new("RGB", (90, 30), "white")  # whose middle is kept, and as wide as high
        picture.paste(colour, (30, 0, 60, 30))
        picture.save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "captions.txt").write_text("no picture")
    found = example("train_lora", "--steps", "1", "--pictures", "pictures")
    assert found["pixels"].shape == (2, 3, 64, 64)
    assert found["pixels"][0, :, 5, 5].tolist() == [1, -1, -1]
    assert found["pixels"][1, :, 5, 5].tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    "name, arguments, words",
    [
        ("train_lora", ["--dtype", "float16"], "--dtype must be bfloat16 or float32"),
        (
            "train_lora",
            ["--pictures", "."],
            "--pictures must have files that end in .jpg, .jpeg, .png, .webp, found none",
        ),
        ("lora_hotswap", ["--loras", "one"], "--loras must be two or more"),
        ("benchmark", ["--ratios", "0", "0.5"], "--ratios must be above 0"),
        ("flux", ["--steps", "1"], "--steps must be at least 2, for the first half of them is not merged; got 1"),
    ],
)
def test_what_an_example_cannot_do_is_a_usage_error(
    example: Example, capsys: pytest.CaptureFixture[str], name: str, arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        example(name, *arguments)
    assert raised.value.code == 2
    assert words in capsys.readouterr().err


def test_a_benchmark_is_a_page_with_a_row_for_each_model(
    example: Example, counter: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    example("benchmark", "--steps", "3", "--sizes", "32", "--ratios", "0.5")
    assert counter.frame_count == 2
    heading, machine, columns, *rows = capsys.readouterr().out.splitlines()
    assert heading == "tiny, torch.float32, batch 1, merge_block=False"
    assert f"torch {torch.__version__}" in machine
    assert columns.split() == ["px", "model", "ms", "over", "compile", "bound", "first,", "s", "GiB"]
    number = r" +(\d+\.\d+)"
    found = [re.fullmatch(rf" +32 (.+?) *{number}{number}x(?: +-|{number}x){number} +-", row) for row in rows]
    assert [row and row[1] for row in found] == ["stock + compile", "stock", "merged 0.5 + compile", "merged 0.5"]
    assert next(row and float(row[3]) for row in found) == 1  # compile over itself
    assert [row and row[4] and float(row[4]) > 1 for row in found] == [None, None, True, True]


def test_a_benchmark_of_a_pipeline_that_tells_of_no_steps_is_a_usage_error(
    example: Example, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Older:
        def __call__(self, prompt: str) -> None: ...

    monkeypatch.setattr(AutoPipelineForText2Image, "from_pretrained", lambda *_, **__: Older())
    with pytest.raises(SystemExit):
        example("benchmark")
    assert (
        "--model must be of a pipeline with callback_on_step_end, to time it by; got Older" in capsys.readouterr().err
    )


def test_a_benchmark_goes_on_after_what_has_no_memory(
    example: Example, counter: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", compiled)
    example("benchmark", "--steps", "2", "--sizes", "32", "--ratios", "0.5")
    rows = [row.split() for row in capsys.readouterr().out.splitlines()[3:]]
    assert [row[-3:] == ["out", "of", "memory"] for row in rows] == [True, False, True, False]
    assert [rows[1][3], rows[3][4]] == ["-", "-"]  # with nothing to be over


def test_a_benchmark_of_one_step_is_a_usage_error(example: Example, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example("benchmark", "--steps", "1")
    assert "--steps must be at least 2, for the first one compiles; got 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_says_what_it_shows_and_how_to_run_it_and_needs_no_more_than_it_says(name: str) -> None:
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    summary, command, *more = (ast.get_docstring(tree) or "").split("\n\n")
    assert summary.endswith(".")
    assert re.match(r"    (python|torchrun .*) ?examples/" + name + r"\.py --model FOLDER_OR_ID", command)
    assert more
    modules = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [getattr(node, "module", None) or node.names[0].name for node in modules]
    allowed = {*sys.stdlib_module_names, "diffusers", "peft", "tiny", "tome_fx", "torch"}
    assert {found.partition(".")[0] for found in names} <= allowed
    assert f"[{name}.py]({name}.py)" in (EXAMPLES / "README.md").read_text()


@pytest.mark.slow
def test_torchrun_makes_the_images_of_one_process(example: Example, tmp_path: Path) -> None:
    example("distributed", "--steps", "2", "--output", "one")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(EXAMPLES / "distributed.py"), "--steps", "2", "--output", "two"]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # torch.compile then leaves a model as it is
    done = subprocess.run(
        [*run, *script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("process 0 of 2") == 2
    assert done.stdout.count("process 1 of 2") == 1
    for number in range(3):
        assert torch.equal(pixels(f"one/{number}.png"), pixels(f"two/{number}.png"))


@pytest.mark.slow
def test_a_package_compiled_ahead_of_time_makes_the_image_in_the_unets_place(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "aoti.py"), "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "unet.pt2").stat().st_size > 0
    (difference,) = re.findall(r"differs from the eager one by at most ([\d.]+)", done.stdout)
    assert float(difference) < 1e-3
