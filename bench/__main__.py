"""The command line: `python -m bench`, and a command: `latency`, `cold`, `code`, `bounds`, `quality`, ..."""

import argparse
import logging


def main() -> None:
    """Parse the arguments and run the command."""
    logging.disable(logging.WARNING)  # libraries warn while they load of optional parts that are not installed
    from bench import bounds, code, cold, demo, gpu, latency, quality, report, weights

    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure tome_fx beside its peers.")
    commands = parser.add_subparsers(required=True)
    for module in (latency, cold, code, bounds, quality, weights, gpu, demo, report):
        command = commands.add_parser(module.__name__.split(".")[-1], help=(module.__doc__ or "").split(": ")[-1])
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    arguments = parser.parse_args()
    run = vars(arguments).pop("main")
    run(arguments)


if __name__ == "__main__":
    main()
