"""The command `bll`: finds the subcommand and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version

from blocklocal.internals import UnsupportedTorch
from blocklocal.lab.environment import keep_freed_memory
from blocklocal.lab.errors import UserError

# name: (module with main(args), what it does). The module is imported only when its command is called.
COMMANDS = {
    "train": ("blocklocal.lab.train", "train a network, in blocks or whole"),
    "launch": ("blocklocal.lab.launch", "the same over several processes or machines"),
    "eval": ("blocklocal.lab.eval", "test a trained network: last exit, an earlier one, all combined"),
    "blocks": ("blocklocal.lab.blocks", "show where a model is cut, and what each block costs"),
    "compare": ("blocklocal.lab.compare", "several rules with several seeds, laid side by side"),
    "table1": ("blocklocal.lab.table", "the paper's Table 1, or a smaller stand-in for it"),
    "report": ("blocklocal.lab.report", "tables, plots and a page of runs"),
    "bench": ("blocklocal.lab.bench", "time and memory of a training step, rule by rule"),
    "timeline": ("blocklocal.lab.timeline", "what each process of a run did when"),
    "demo": ("blocklocal.lab.demo", "train four local blocks and plain backpropagation side by side"),
}

HELP = f"""bll trains neural networks in blocks, each from its own local loss.

  bll COMMAND --help      the options of a command

{"".join(f"  bll {name:<20}{text}{chr(10)}" for name, (_, text) in COMMANDS.items())}
Start with:  bll train            four blocks on handwritten digits, in seconds
             bll train cifar10 --model resnet18 --rule bll --blocks 4
Exit codes:  0 done, 2 unusable arguments or data, 130 interrupted, 1 anything else"""


def main(args: Sequence[str]) -> int:
    """Run `bll ARGS`. Returns the exit code."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if args[0] == "--version":
        print(f"blocklocal {version('blocklocal')}")
        return 0
    warnings.showwarning = _show_warning
    keep_freed_memory()
    try:
        command, *rest = args
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}: choose {', '.join(COMMANDS)}")
        importlib.import_module(COMMANDS[command][0]).main(rest)
    except (UserError, UnsupportedTorch) as error:
        return _fail(str(error), code=2)
    except KeyboardInterrupt as stop:
        return _fail(f"interrupted{f': {stop}' if str(stop) else ''}", code=130)
    except OSError as error:
        return _fail(str(error), code=1)
    return 0


def _fail(message: str, *, code: int) -> int:
    _say(message)
    return code


def _show_warning(message: Warning | str, *_: object) -> None:
    _say(f"warning: {message}")


def _say(message: str) -> None:
    print(f"bll: {' '.join(message.split())}", file=sys.stderr)
