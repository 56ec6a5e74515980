"""Prediction after training: single exits, all exits combined, and either of them as a standalone module.

Exits are combined by log-linear pooling (Genest and Zidek, 1986),

    log p(y | x) = sum_k w_k log p_k(y | x) + const,

the product of their distributions, each to the power of its weight. For dense predictions it is the weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blocklocal.border import Border
from blocklocal.feedback import at_least_single
from blocklocal.messages import BorderInput, Criterion, add_belief
from blocklocal.side_inputs import SideInputs
from blocklocal.values import Inputs, prediction_of

RIDGE = 1e-3
"""Pull of the weights towards 1/K; it decides if all exits are right about all samples."""


class ExitPool(nn.Module):
    """Combines the predictions of K exits (logits for labels) into one. The weights are 1/K until they are fitted.

    They are plain numbers, unaffected by changes of device or dtype, and part of the state dict.

    >>> ExitPool(2, labels=False)([torch.tensor([1.0]), torch.tensor([3.0])])
    tensor([2.])
    """

    def __init__(self, exits: int, *, labels: bool) -> None:
        super().__init__()
        self.labels = labels
        self.weights = (1 / exits,) * exits

    def forward(self, predictions: Sequence[Tensor] | Tensor) -> Tensor:
        """Combine the predictions of all exits, (B, n) or (B, T, n) per token, at least in single precision."""
        return torch.stack([w * p for w, p in zip(self.weights, map(self._evidence, predictions), strict=True)]).sum(0)

    def fit(self, predictions: Sequence[Tensor] | Tensor, y: Tensor, *, criterion: Criterion) -> None:
        """Fit the weights: the K non-negative numbers that minimise the criterion on held-out samples, by L-BFGS.

        predictions: of each exit for all samples, (N, n) or (N, T, n). For cross-entropy and mean squared error the
        problem is convex. ValueError: the criterion is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            evidence = torch.stack([self._evidence(p.clone()).double() for p in predictions])
            y = y.double() if y.is_floating_point() else y  # criteria may require a single dtype
            equal = torch.full((len(evidence), *[1] * (evidence.dim() - 1)), 1 / len(evidence)).to(evidence)
            roots = equal.sqrt().requires_grad_()
            optimizer = torch.optim.LBFGS([roots], max_iter=100, line_search_fn="strong_wolfe")

            def loss() -> Tensor:
                optimizer.zero_grad()
                weights = roots.square()
                value = criterion((weights * evidence).sum(0), y) + RIDGE * (weights - equal).square().sum()
                value.backward()
                return value

            optimizer.step(loss)  # pyright: ignore[reportArgumentType] (a tensor works)
        weights = roots.detach().square()
        if not weights.isfinite().all():
            raise ValueError("the exits cannot be weighted: their predictions or the criterion are not finite")
        self.weights = tuple(weights.flatten().tolist())

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.weights = tuple(state.tolist())

    def _evidence(self, prediction: Tensor) -> Tensor:
        prediction = prediction.to(at_least_single(prediction.dtype))
        return prediction.log_softmax(-1) if self.labels else prediction


class Leaving:
    """Samples that leave at the first exit whose largest class probability reaches `confidence`, see `most_confident`.

    logits: of each sample from the exit where it left, or else from the last one seen.
    """

    logits: Tensor

    def __init__(self, confidence: float) -> None:
        self.confidence = confidence
        self._waiting: Tensor | None = None

    def all_left(self, logits: Tensor) -> bool:
        """Take the logits of the next exit; returns whether every sample has left now."""
        if self._waiting is None:
            self.logits = logits.clone()
            self._waiting = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        else:
            self.logits[self._waiting] = logits[self._waiting].to(self.logits.dtype)
        surest = logits.to(at_least_single(logits.dtype)).softmax(-1).amax(-1, keepdim=True)
        self._waiting = self._waiting & (surest.flatten(1).amin(1) < self.confidence)
        return not self._waiting.any()


def most_confident(exits: Iterable[Tensor], *, confidence: float) -> Tensor:
    """Each sample's logits from the first exit whose largest class probability reaches `confidence`, of its least sure
    token; later exits are not asked for once every sample has left."""
    leaving = Leaving(confidence)
    for logits in exits:
        if leaving.all_left(logits):
            break
    return leaving.logits


class Exit(nn.Module):
    """The prediction at a border, h -> (B, n): the part of a border that is still needed after training."""

    def __init__(self, border: Border) -> None:
        super().__init__()
        self.spec, self.statistic = border.spec, border.statistic
        self.term: Any = border.predictive
        reads_feedback = any(getattr(module, "reads_feedback", False) for module in self.term.modules())
        self.feedback = border.feedback if reads_feedback else None

    def forward(self, h: Tensor) -> Tensor:
        return self.term.predict(BorderInput(h, spec=self.spec, statistic=self.statistic, feedback=self.feedback))


class Predictor(nn.Module):
    """A trained chain as one module, x -> prediction: the blocks in order, and the exits that are used.

    x is what the model takes: a tensor, or a tuple or dict of its inputs. inputs: what each block takes of it. exits:
    one per block, None where a block's output is not read. pool: combines the predictions of all exits; without it the
    last block, or its exit, predicts. add_beliefs: see `BlockLocal`; every exit is then used.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        exits: Iterable[Exit | None],
        *,
        inputs: SideInputs,
        pool: ExitPool | None,
        add_beliefs: bool,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.exits = nn.ModuleList(nn.Identity() if exit is None else exit for exit in exits)
        self.inputs, self.pool, self.adds_beliefs = inputs, pool, add_beliefs

    def forward(self, x: Inputs) -> Tensor:
        predictions: list[Tensor] = []
        h, belief = None, None
        for k, (block, exit) in enumerate(zip(self.blocks, self.exits, strict=True)):
            args, kwargs = self.inputs.call(k, h, x)
            h = block(*args, **kwargs)
            h = h if isinstance(h, Tensor) else prediction_of(h)  # of a model that is one block
            predictions.append(add_belief(belief, exit(h)))
            belief = predictions[-1] if self.adds_beliefs else None
        return predictions[-1] if self.pool is None else self.pool(predictions)
