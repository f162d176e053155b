"""The command line: `python -m tome_fx info`, and `explain` for what merging saves in the model of a folder."""

import argparse
import ast
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from tome_fx.api import transform
from tome_fx.families.folders import from_folder
from tome_fx.plan import TransformError, __version__
from tome_fx.tools.explain import Report, explain
from tome_fx.tools.info import info


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments, or those of the process, ask for; what is wrong with them ends with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tome_fx", description="Token merging for diffusers models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tome_fx {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    what = "versions, devices and backends, for a bug report"
    command = commands.add_parser("info", help=what, description=f"Print {what}.")
    command.set_defaults(command=command, run=info)
    command = commands.add_parser(
        "explain",
        help="what merging saves in the model of a folder, by its config alone",
        usage="%(prog)s FOLDER_OR_ID --height ROWS --width COLUMNS [--ratio RATIO] [options of tome_fx.transform]",
        description="What merging saves in a model, by its config alone: no weights are read.",
        allow_abbrev=False,
    )
    command.set_defaults(command=command, run=explain_folder)
    command.add_argument(
        "folder",
        metavar="FOLDER_OR_ID",
        help="of a pipeline with a UNet or a transformer, or of such a model; an id of what is in the hub's cache",
    )
    for name, side in (("height", "rows"), ("width", "columns")):
        command.add_argument(
            f"--{name}",
            type=value,
            required=True,
            metavar=side.upper(),
            help=f"latent {side}: for Stable Diffusion an eighth of the image's pixels, 128 for 1024 px",
        )
    add_options(command)
    parsed, unknown = parser.parse_known_args(arguments)
    given = vars(parsed)
    command, run = given.pop("command"), given.pop("run")
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        print(run(**given))
    except (TypeError, ValueError, TransformError) as error:
        command.error(str(error))


def explain_folder(folder: str, height: int, width: int, **options: Any) -> Report:
    """What `tome_fx.explain` says of the folder's model with these options of `transform`."""
    return explain(transform(from_folder(folder), **options), height, width)


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of `transform` by their names; one that is not given is left to it."""
    group = command.add_argument_group("options of tome_fx.transform", "See help(tome_fx.transform).")
    types, sentences = get_type_hints(transform), dict(described(transform))
    for name, parameter in inspect.signature(transform).parameters.items():
        if parameter.default is parameter.empty:  # the model
            continue
        how: dict[str, Any] = {"type": value}
        if bool in (types[name], *get_args(types[name])):
            how = {"action": argparse.BooleanOptionalAction}
        flag = f"--{name.replace('_', '-')}"
        first, *more = sentences.get(name, [""])
        default = [sentence for sentence in more if sentence.startswith(f"{parameter.default} ")]  # what it means
        told = " ".join([first, *default, f"Default: {parameter.default}"])
        group.add_argument(flag, **how, default=argparse.SUPPRESS, help=told.replace("%", "%%"))


def described(function: Any) -> Iterator[tuple[str, list[str]]]:
    """Each argument of a function and the sentences of its docstring about it; none under `python -OO`."""
    _, _, arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    for name, told in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.MULTILINE):
        yield name, re.split(r"(?<=\.) ", " ".join(told.split()))


def value(text: str) -> Any:
    """A number or None, as Python writes them, or else a word; `transform` and `explain` say whether it will do."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    main()
