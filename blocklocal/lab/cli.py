"""The command `bll`: finds the subcommand and turns what goes wrong into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from blocklocal.internals import UnsupportedTorch
from blocklocal.lab import subcommand
from blocklocal.lab.distributed.rank_log import LAUNCHED, report
from blocklocal.lab.environment import keep_freed_memory
from blocklocal.lab.errors import UserError, lacks_memory
from blocklocal.lab.names import sentence

# name: (module with main(args), what it does). The module is imported only when its command is called.
COMMANDS = {
    "train": ("blocklocal.lab.training.run", "train a network, in blocks or whole"),
    "launch": ("blocklocal.lab.commands.launch", "the same over several processes or machines"),
    "eval": ("blocklocal.lab.commands.eval", "test a trained network: last exit, an earlier one, all combined"),
    "blocks": ("blocklocal.lab.commands.blocks", "show where a model is cut, and what each block costs"),
    "compare": ("blocklocal.lab.commands.compare", "several rules with several seeds, laid side by side"),
    "study": ("blocklocal.lab.commands.study", "accuracy against cost, over a grid of settings"),
    "table1": ("blocklocal.lab.commands.table1", "the paper's Table 1, or a smaller stand-in for it"),
    "report": ("blocklocal.lab.commands.report", "tables, plots and a page of runs"),
    "bench": ("blocklocal.lab.commands.bench", "time and memory of a training step, rule by rule"),
    "timeline": ("blocklocal.lab.commands.timeline", "what each process of a run did when"),
    "demo": ("blocklocal.lab.commands.demo", "train four local blocks and plain backpropagation side by side"),
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
    except BrokenPipeError:  # who reads the output has enough of it, and knows
        return 1
    except OSError as error:
        return _fail(str(error), code=1)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return _fail(f"this takes more memory than there is: {str(error) or type(error).__name__}", code=1)
    return 0


def _fail(message: str, *, code: int) -> int:
    """Say it once: what has started this process says it, and of the processes of torchrun the first."""
    report(message)
    told = subcommand.report_to_parent(sentence(message))
    if LAUNCHED in os.environ:
        told = True
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        told = os.environ.get("LOCAL_RANK") != "0"
    if not told:
        _say(message)
    return code


# Where other people's code is, whose warnings say nothing to who calls a command.
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
OWN = str(Path(__file__).parents[1])


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    foreign = filename.startswith(LIBRARIES) and not filename.startswith(OWN)
    if not foreign and "Triggered internally at" not in str(message):  # a warning of torch that names its caller
        _say(f"warning: {message}")


def _say(message: str) -> None:
    print(f"bll: {sentence(message)}", file=sys.stderr)
