"""Models of text by name: built in, of transformers, or any function."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from blocklocal.lab.errors import UserError
from blocklocal.lab.models import is_own, make
from blocklocal.lab.models.gpt import GPT
from blocklocal.lab.models.hugging_face import language_model

MODELS = {
    "gpt-tiny": partial(GPT, width=64, depth=4, heads=4),
    "gpt-small": partial(GPT, width=128, depth=4, heads=4),  # nanoGPT's for a CPU
    "gpt-medium": partial(GPT, width=192, depth=6, heads=6),
}


def build(name: str, *, tokens: int, context: int, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a new model that gives logits (B, T, tokens) of the next token from ids (B, T), T at most `context`.

    name: one of `MODELS`, `hf:CONFIG`, or `package.module:function`, a function that is called with tokens= and
    context= and returns the module. arguments: more for the function that makes it. UserError: no such model, package
    or function, or one that fails.
    """
    source, _, configuration = name.partition(":")
    known = MODELS | ({name: partial(language_model, configuration)} if source == "hf" and configuration else {})
    if name not in known and not is_own(name):
        raise UserError(
            f"unknown model {name!r} for text: choose {', '.join(MODELS)}, hf:CONFIG or package.module:function"
        )
    return make(name, known, {"tokens": tokens, "context": context}, arguments)


def depth(name: str, arguments: Mapping[str, Any]) -> int:
    """The number of blocks of a built-in model; 0 for others."""
    return int({**MODELS[name].keywords, **arguments}["depth"]) if name in MODELS else 0
