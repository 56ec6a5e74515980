"""Language modelling: the next token at every position of a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from blocklocal.lab.data.batches import epoch_draws
from blocklocal.lab.data.dataset import Dataset, digest
from blocklocal.lab.data.text import read_text, windows
from blocklocal.lab.data.vocabulary import Vocabulary
from blocklocal.lab.errors import UserError
from blocklocal.lab.models import read_arguments, text
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.measure import ACCURACY, LOSS
from blocklocal.lab.tasks.task import Batch, Task

LOGITS = 2**24  # of the windows that are evaluated together


class LanguageModelling(Task):
    """Windows (T,) of a text, drawn from all places while training, and the token that follows each of theirs.

    The windows of the test part, and those held out from the end of the training part, lie one behind the other.
    tokens: of the training part, (N,).
    """

    unit, shown = "windows", (ACCURACY, LOSS)

    def __init__(self, dataset: Dataset, settings: Settings, *, vocabulary: Vocabulary | None, tokens: Tensor) -> None:
        super().__init__(dataset, settings)
        self._vocabulary, self.tokens = vocabulary, tokens

    @property
    def vocabulary(self) -> Vocabulary:
        assert self._vocabulary is not None, "a task without data has no words"
        return self._vocabulary

    @staticmethod
    def load(settings: Settings) -> LanguageModelling:
        """UserError: a file that is no text, or too short for its windows."""
        content = read_text(Path(settings.data.partition(":")[2]), vocabulary=settings.vocabulary)
        context = settings.context
        tokens, held_out = content.train, None
        if settings.validation:
            begin = len(tokens) - settings.validation * context - 1
            if begin <= context:
                raise UserError(f"--validation {settings.validation} leaves no window of {context} to train on")
            tokens, held_out = tokens[:begin], windows(tokens[begin:], context=context)
        if settings.train_size:
            tokens = tokens[: settings.train_size * context + 1]
        train, test = windows(tokens, context=context), windows(content.test, context=context)
        for use, split, size in (("train", train, settings.train_size), ("test", test, settings.test_size)):
            if len(split) < max(size, 1):
                raise UserError(
                    f"data {settings.data!r} has {len(split)} windows of {context} tokens to {use} on: lower "
                    f"--{use}-size or --context"
                )
        test = test.of(torch.arange(settings.test_size or len(test)))
        read = digest(tokens, test.labels)
        dataset = Dataset(settings.data, content.vocabulary.tokens, train, test, held_out, digest=read)
        return LanguageModelling(dataset, settings, vocabulary=content.vocabulary, tokens=tokens)

    def to(self, device: torch.device) -> Self:
        moved = super().to(device)
        moved.tokens = self.tokens.to(device)
        return moved

    @property
    def shape(self) -> str:
        return f"{self.settings.context} tokens, {len(self.dataset.classes)} different"

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"tokens": len(self.dataset.classes)}

    @property
    def epoch_size(self) -> int:
        return self.settings.windows or len(self.dataset.train)

    @property
    def evaluated_at_once(self) -> int:
        return max(1, LOGITS // (self.settings.context * len(self.dataset.classes)))

    def training_batches(self, epoch: int, *, begin: int = 0) -> Iterator[Batch]:
        for places in self._places(epoch, begin=begin):
            yield self.tokens[places], self.tokens[places + 1]

    def training_labels(self, epoch: int, *, begin: int = 0) -> Iterator[Tensor]:
        for places in self._places(epoch, begin=begin):
            yield self.tokens[places + 1]

    def build(self) -> nn.Module:
        return text.build(
            self.settings.model,
            tokens=len(self.dataset.classes),
            context=self.settings.context,
            arguments=read_arguments(self.settings.model_args),
        )

    def cuts(self) -> Sequence[str] | None:
        """The built-in decoders are cut between blocks of equal depth, the embeddings going with the first."""
        depth, blocks = text.depth(self.settings.model, read_arguments(self.settings.model_args)), self.settings.blocks
        if not depth or blocks > depth:
            return None
        return [f"blocks.{depth * k // blocks - 1}" for k in range(1, blocks)]

    def _places(self, epoch: int, *, begin: int) -> Iterator[Tensor]:
        """The places (B, T) in the text of the windows of each batch."""
        size, context, device = self.settings.batch_size, self.settings.context, self.tokens.device
        draws = epoch_draws(self.settings.seed, epoch)
        first = torch.randint(len(self.tokens) - context, (self.epoch_size, 1), generator=draws).to(device)
        steps = torch.arange(context, device=device)
        for batch in range(begin * size, self.epoch_size - size + 1, size):
            yield first[batch : batch + size] + steps
