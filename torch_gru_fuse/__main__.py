"""``python -m torch_gru_fuse <command>``.

A command is a module of ``torch_gru_fuse.tools`` with SUMMARY (one line), ``add_arguments(parser)`` and
``run(arguments) -> int``, the exit status. Heavy imports belong inside ``run``: every module is loaded to print the help.
"""

import argparse
import sys
from collections.abc import Sequence

from torch_gru_fuse.tools import bench, demo, plan, tune

COMMANDS = {"demo": demo, "plan": plan, "bench": bench, "tune": tune}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m torch_gru_fuse", description="Fused GRUs for torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
