"""Options of the commands: one that would do nothing is an error."""

import argparse
from collections.abc import Iterable
from typing import Any


class _Noting(argparse.Action):
    """Stores a value as argparse does, and notes the option among those that are `given`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, values)
        namespace.given += (self.dest,)


def note_given(parser: argparse.ArgumentParser) -> None:
    """Let the parser tell an option that is given from one that is not; before its options are added."""
    parser.set_defaults(given=())
    parser.register("action", None, _Noting)


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
