"""Texts as tokens: the first nine tenths are for training, the last tenth is for testing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from blocklocal.lab.data.dataset import Split
from blocklocal.lab.data.vocabulary import BYTES, BytePairs, Characters, Vocabulary
from blocklocal.lab.errors import UserError

TEST = 10  # one part in this number is for testing


@dataclass(frozen=True)
class Text:
    """A text in tokens. train, test: int64 (N,)."""

    vocabulary: Vocabulary
    train: Tensor
    test: Tensor


def read_text(file: Path, *, vocabulary: int = 0) -> Text:
    """Read a file of UTF-8 text. vocabulary: number of byte pairs, or 0 for characters.

    Byte pairs are learned from the training part alone. UserError: no such file, not text, or too short.
    """
    if vocabulary and vocabulary <= BYTES:
        raise UserError(f"--vocabulary {vocabulary} holds no pair: take more than {BYTES}, or 0 for characters")
    if file.is_dir():
        raise UserError(f"data 'text:{file}' is a folder: name a file of text")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{str(file)!r} cannot be read ({error.strerror}): name a file of text") from error
    begin = len(content) - len(content) // TEST
    if vocabulary:
        words: Vocabulary = BytePairs(content[:begin], size=vocabulary)
    else:
        words = Characters(content)
    if len(words.tokens) < 2:
        raise UserError(f"{str(file)!r} has fewer than two different characters, and nothing to learn")
    train, test = (torch.tensor(words.encode(part), dtype=torch.int64) for part in (content[:begin], content[begin:]))
    return Text(words, train, test)


def windows(tokens: Tensor, *, context: int) -> Split:
    """The windows (N, context) of a text one behind the other, and the token that follows each of theirs."""
    count = max(len(tokens) - 1, 0) // context
    return Split(tokens[: count * context].view(count, context), tokens[1 : count * context + 1].view(count, context))
