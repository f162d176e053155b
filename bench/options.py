"""Options of the commands: one that would do nothing is an error."""

import argparse
from collections.abc import Iterable
from typing import Any

from bench.cases import DEFAULTS, Options, options
from tome_fx.__main__ import value


class _Noting(argparse.Action):
    """Stores a value as argparse does, and notes the option among those that are `given`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given += (self.dest,)


def note_given(parser: argparse.ArgumentParser) -> None:
    """Let the parser tell an option that is given from one that is not; before its options are added."""
    parser.set_defaults(given=())
    parser.register("action", None, _Noting)


def add_merging(parser: argparse.ArgumentParser) -> None:
    """The option that takes those of `tome_fx.transform`; `merging` reads it."""
    described = ", ".join(f"{name}={value!r}" for name, value in DEFAULTS.items())
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=f"of tome_fx.transform, whose own are {described}",
    )


def merging(texts: Iterable[str]) -> Options:
    """Options of `tome_fx.transform` from texts such as `tile=None`.

    Raises:
        ValueError: It has none of that name.
    """
    found = {}
    for text in texts:
        name, _, given = text.partition("=")
        if name not in DEFAULTS:
            raise ValueError(f"options must be NAME=VALUE of {', '.join(DEFAULTS)}; got {text!r}")
        found[name] = value(given)
    return options(**found)


def refuse_idle(arguments: argparse.Namespace, option: str, others: Iterable[str]) -> None:
    """Where the option is given, refuse all but these others.

    Raises:
        ValueError: One is given that would do nothing.
    """
    given = [*arguments.given, *(name for name, value in vars(arguments).items() if value is True)]
    idle = ", ".join(_flag(name) for name in given if name not in (option, *others))
    if option in given and idle:
        raise ValueError(f"{_flag(option)} goes with {', '.join(map(_flag, others))} alone; {idle} would do nothing")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
