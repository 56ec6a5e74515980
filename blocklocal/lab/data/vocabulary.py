"""Vocabularies: the characters of a text, or pairs of bytes learned from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from blocklocal.lab.errors import UserError

BYTES = 256  # the smallest vocabulary of byte pairs


class Vocabulary(Protocol):
    """Text to tokens and back."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """What each token stands for."""
        ...

    def encode(self, text: str) -> list[int]:
        """UserError: a text with a character that the vocabulary does not have."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Characters:
    """Each character of a text is a token, in the order of their code points.

    >>> Characters("banana").encode("nab")
    [2, 0, 1]
    """

    def __init__(self, text: str) -> None:
        self.tokens = tuple(sorted(set(text)))
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UserError(f"the character {error.args[0]!r} is not in the text that the model has read") from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


class BytePairs:
    """Bytes, and the most frequent pairs of tokens within words of a text (Sennrich et al., 2016), `size` in all."""

    def __init__(self, text: str, *, size: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
        self._tokenizer.train_from_iterator([text], trainer)
        names = {i: name for name, i in self._tokenizer.get_vocab().items()}
        self.tokens = tuple(names[i] for i in range(len(names)))

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))
