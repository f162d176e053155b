"""The command line says what the library says, and in words what is wrong with its arguments.

That it explains transformers is in test_transformer_tools.py.
"""

import inspect
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from support.models import controlnet, one_stage, sdxl

import tome_fx
from tome_fx.__main__ import main
from tome_fx.families.facts import FACTS
from tome_fx.families.registry import FAMILIES
from tome_fx.tools.info import info

pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning")

SIZE = ("--height", "16", "--width", "24")
MODELS = {"sdxl": sdxl, "controlnet": controlnet}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """That of a pipeline, with the config of its UNet alone."""
    one_stage().save_config(tmp_path / "unet")
    return str(tmp_path)


def refused(capsys: Any, *arguments: str) -> str:
    """What is said of arguments that end the process with 2, in one line."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return " ".join(err.split())


@pytest.mark.parametrize("name", MODELS)
def test_explain_prints_the_report_of_a_model_that_is_known_by_its_config(
    name: str, tmp_path: Path, capsys: Any
) -> None:
    MODELS[name]().save_config(tmp_path)
    main(["explain", str(tmp_path), *SIZE, "--ratio", "0.25"])
    assert capsys.readouterr().out == f"{tome_fx.explain(tome_fx.transform(MODELS[name](), 0.25), 16, 24)}\n"


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((), {}),
        (("--tile", "None"), {"tile": None}),
        (("--max-downsample", "finest", "--merge-mlp"), {"max_downsample": "finest", "merge_mlp": True}),
        (("--max-downsample", "8", "--no-share-match"), {"max_downsample": 8, "share_match": False}),
        (("--merge-block", "--no-prop-attn"), {"merge_block": True, "prop_attn": False}),
        (("--sx", "4", "--ratio", "0.8"), {"sx": 4, "ratio": 0.8}),
    ],
)
def test_explain_takes_the_options_of_transform_by_name(
    given: tuple[str, ...], options: dict[str, Any], folder: str, capsys: Any
) -> None:
    main(["explain", folder, *SIZE, *given])
    assert capsys.readouterr().out == f"{tome_fx.explain(tome_fx.transform(one_stage(), **options), 16, 24)}\n"


def test_explain_takes_the_id_of_what_is_in_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cached = tmp_path / "models--somebody--something"
    one_stage().save_config(cached / "snapshots" / "0a1b" / "unet")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    main(["explain", "somebody/something", *SIZE])
    assert capsys.readouterr().out == f"{tome_fx.explain(tome_fx.transform(one_stage()), 16, 24)}\n"
    assert "cache; got 'somebody/else'" in refused(capsys, "explain", "somebody/else", *SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ratio", "0.8"), "ratio must be between 0 and 0.75, the share of sources at a stride of 2 x 2; got 0.8"),
        (("--ratio", "half"), "ratio must be a number, got 'half' of type str"),
        (("--tile", "none"), "tile must be an int or None, got 'none' of type str"),
        (("--height", "0"), "height must be at least 1 latent, got 0"),
        (("--height", "tall"), "height must be an int, got 'tall' of type str"),
        (("--no-merge-attn",), "nothing to merge: at least one of merge_attn, merge_crossattn, merge_mlp must be True"),
        (("--max-downsample", "3"), "max_downsample must be None, 'finest' or one of (1, 2, 4, 8), got 3"),
        (("--rati", "0.5"), "unrecognized arguments: --rati 0.5"),
    ],
)
def test_arguments_that_will_not_do_are_refused_in_words(
    arguments: tuple[str, ...], message: str, folder: str, capsys: Any
) -> None:
    assert refused(capsys, "explain", folder, *SIZE, *arguments).endswith(f"error: {message}")


def test_an_unknown_option_is_refused_with_the_usage_of_its_command(folder: str, capsys: Any) -> None:
    said = refused(capsys, "explain", folder, *SIZE, "--tiles", "3")
    assert said.startswith("usage: python -m tome_fx explain FOLDER_OR_ID --height")
    assert said.endswith("python -m tome_fx explain: error: unrecognized arguments: --tiles 3")


def test_help_describes_each_option_by_its_sentence_in_transform(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["explain", "--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--tile TILE Side of the squares of tokens within which tokens are matched and ranked. 32 is the largest"
        in said
    )
    assert "None does so wherever it can be done" in said
    assert '1, 2, 4 or 8; "finest" is the finest level that has attention' in said
    assert "--merge-mlp, --no-merge-mlp Merge around the feed-forward as well. Default: False" in said
    assert said.count("Default: ") == len(inspect.signature(tome_fx.transform).parameters) - 1


def test_the_version_is_told(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"tome_fx {tome_fx.__version__}\n"


def test_what_is_missing_is_named(folder: str, capsys: Any) -> None:
    assert refused(capsys, "explain", folder).endswith("the following arguments are required: --height, --width")
    assert refused(capsys).endswith("the following arguments are required: COMMAND")
    assert "invalid choice: 'explan'" in refused(capsys, "explan")


def test_a_model_that_cannot_be_transformed_is_refused_in_words(tmp_path: Path, capsys: Any) -> None:
    sdxl().save_config(tmp_path)
    assert refused(capsys, "explain", str(tmp_path), *SIZE, "--max-downsample", "1").endswith(
        "max_downsample=1 reaches no block of UNet2DConditionModel: its finest attention is at a downsampling of 2; "
        "pass max_downsample=2 or more, or 'finest' for the finest"
    )
    AutoencoderKL().save_config(tmp_path)
    assert refused(capsys, "explain", str(tmp_path), *SIZE).endswith(f"or {list(FACTS)[-1]}, got AutoencoderKL")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json' is not a valid JSON file."),
        ("[]", "folder must have the config of a model of diffusers, got '{folder}', whose config names none"),
        ("{}", "folder must have the config of a model of diffusers, got '{folder}', whose config names none"),
        ('{"_class_name": "DDIMScheduler"}', "got '{folder}', whose config names DDIMScheduler"),
        ('{"_class_name": "AModelToCome"}', "got '{folder}', whose config names AModelToCome"),
        (
            '{"_class_name": "UNet2DConditionModel", "down_block_types": ["NoBlock"]}',
            "builds no UNet2DConditionModel by the config in {folder}: ValueError: ",
        ),
    ],
    ids=["no JSON", "no object", "no class", "a scheduler", "no class of that name", "a config that fits no model"],
)
def test_a_folder_without_a_model_is_refused_in_words(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(text)
    assert message.replace("{folder}", str(tmp_path)) in refused(capsys, "explain", str(tmp_path), *SIZE)


def test_what_is_no_folder_of_a_model_is_refused_in_words(tmp_path: Path, capsys: Any) -> None:
    message = (
        "error: folder must be that of a pipeline of diffusers with a unet or a transformer, that of such a model, or "
        "the id of one in the hub's cache; got "
    )
    assert f"{message}'{tmp_path}': Error no file named config.json" in refused(capsys, "explain", str(tmp_path), *SIZE)
    assert refused(capsys, "explain", "no/such/folder", *SIZE).endswith(f"{message}'no/such/folder'")


def test_no_values_are_made_of_a_model_of_real_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    made: list[torch.device] = []
    register = torch.nn.Module.register_parameter

    def watched(self: Any, name: str, parameter: Any) -> None:
        made.extend([] if parameter is None else [parameter.device])
        register(self, name, parameter)

    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768})  # Stable Diffusion 1
    )
    monkeypatch.setattr(torch.nn.Module, "register_parameter", watched)
    main(["explain", str(tmp_path), "--height", "64", "--width", "64"])
    assert "64 x 64" in capsys.readouterr().out
    assert {device.type for device in made} == {"meta"}


def test_info_names_versions_backends_and_models(monkeypatch: pytest.MonkeyPatch) -> None:
    table = info()
    lines = [line.split() for line in table.splitlines()]
    assert ["tome_fx", tome_fx.__version__] in lines
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft"):
        assert [package, version(package)] in lines
    assert all(name in table for family in FAMILIES for name in family.NAMES)
    assert "math" in table
    monkeypatch.setattr(torch.backends.cuda, "math_sdp_enabled", lambda: False)
    assert "math" not in info()


def test_info_names_the_cards_that_there_are_and_packages_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="A card", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: card)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr("tome_fx.tools.info.PACKAGES", ("no-such-package",))
    table = info()
    assert table.count("A card, capability 9.0, 80 GiB") == 2
    assert "ROCm 6.4" in table
    assert "no-such-package" in table
    assert "not installed" in table


@pytest.mark.slow
def test_the_module_is_a_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tome_fx", "info"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == ["tome_fx", tome_fx.__version__]
