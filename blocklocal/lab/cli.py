"""The command `bll`: runs a subcommand, and turns errors into one line and an exit code."""

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
    "train": ("blocklocal.lab.commands.train", "train a network, in blocks or as a whole"),
    "launch": ("blocklocal.lab.commands.launch", "the same over several processes or machines"),
    "eval": ("blocklocal.lab.commands.eval", "test a trained network: last exit, an earlier one, all combined"),
    "sample": ("blocklocal.lab.commands.sample", "continue a text with a trained language model, at any of its exits"),
    "blocks": ("blocklocal.lab.commands.blocks", "show where a model is cut, and what each block costs"),
    "cache": ("blocklocal.lab.commands.cache", "store the activations behind a block, for training the next one alone"),
    "merge": ("blocklocal.lab.commands.merge", "put blocks that were trained alone together into a run"),
    "plan-memory": ("blocklocal.lab.commands.plan_memory", "predict the memory of each way to train a model"),
    "compare": ("blocklocal.lab.commands.compare", "compare several rules, each with several seeds"),
    "study": ("blocklocal.lab.commands.study", "measure accuracy against cost over a grid of settings"),
    "table1": ("blocklocal.lab.commands.table1", "measure the paper's Table 1, or a smaller version of it"),
    "report": ("blocklocal.lab.commands.report", "make tables, plots and an HTML page from runs"),
    "bench": ("blocklocal.lab.commands.bench", "measure time and memory of a training step, rule by rule"),
    "timeline": ("blocklocal.lab.commands.timeline", "draw what each process of a run did and when"),
    "demo": ("blocklocal.lab.commands.demo", "compare four local blocks with backpropagation, in seconds"),
}

HELP = f"""bll trains neural networks in blocks, each with its own local loss.

  bll COMMAND --help      the options of a command

{"".join(f"  bll {name:<20}{text}{chr(10)}" for name, (_, text) in COMMANDS.items())}
Start with:  bll train            four blocks on handwritten digits, in seconds
             bll train cifar10 --model resnet18 --rule bll --blocks 4
             bll train text:FILE --model gpt-small --blocks 4
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
    except BrokenPipeError:  # the reader of the output closed it on purpose
        return 1
    except OSError as error:
        return _fail(str(error), code=1)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return _fail(f"not enough memory: {str(error) or type(error).__name__}", code=1)
    return 0


def _fail(message: str, *, code: int) -> int:
    """Print the message once: by the parent of this process if it listens, and by the first process of torchrun."""
    report(message)
    told = subcommand.report_to_parent(sentence(message))
    if LAUNCHED in os.environ:
        told = True
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        told = os.environ.get("LOCAL_RANK") != "0"
    if not told:
        _say(message)
    return code


# Where third-party code is, whose warnings mean nothing to the user of a command.
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
OWN = str(Path(__file__).parents[1])


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    foreign = filename.startswith(LIBRARIES) and not filename.startswith(OWN)
    if not foreign and "Triggered internally at" not in str(message):  # a warning of torch, attributed to its caller
        _say(f"warning: {message}")


def _say(message: str) -> None:
    print(f"bll: {sentence(message)}", file=sys.stderr)
