"""Models of text by name: built in, or any function."""

from __future__ import annotations

from contextlib import chdir
from functools import partial

from torch import nn

from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.models import is_own
from blocklocal.lab.models.gpt import GPT
from blocklocal.lab.own_code import own_function

MODELS = {
    "gpt-tiny": partial(GPT, width=64, depth=4, heads=4),
    "gpt-small": partial(GPT, width=128, depth=4, heads=4),  # nanoGPT's for a CPU
    "gpt-medium": partial(GPT, width=192, depth=6, heads=6),
}


def build(name: str, *, tokens: int, context: int) -> nn.Module:
    """Build a new model that gives logits (B, T, tokens) of the next token from ids (B, T), T at most `context`.

    name: one of `MODELS`, or `package.module:function`, a function that is called with tokens= and context= and returns
    the module. UserError: no such model or function, or one that fails.
    """
    with blame(f"model {name!r} cannot be made"):
        if name in MODELS:
            return MODELS[name](tokens=tokens, context=context)
        if not is_own(name):
            raise UserError(f"unknown model {name!r} for text: choose {', '.join(MODELS)}, or package.module:function")
        with chdir("."):  # restores the folder to which the relative paths of the command line refer
            function = own_function(name, kind="model", keywords=("tokens", "context"))
            model = function(tokens=tokens, context=context)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r}: its function returns a {type(model).__name__}, not a torch.nn.Module")
    return model
