"""Rules that send one signal from the end of the model directly to every layer: its error (DFA) or targets (DRTP)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocklocal.arguments import describe, passes, require_factor, require_tensor

from .adjoint import Broadcast, Tap
from .rule import DEFAULT_GAIN, Alignment, Forward, feedback_seed, kaiming_uniform, rehearse


class DirectFeedbackAlignment(Alignment):
    """Direct feedback alignment (Nøkland 2016): each layer sends B'e to its input, where e is the error at the output.

    For a chain of Linear layers and activations f this is δ = B'e ⊙ f'(a). In any other model too, what lies between
    layers gets its true gradient. B has the shape (n, *features), where features is that of the layer's whole input,
    and standard deviation gain / √features: the norm of B'e is about gain times that of e.

    `example` is a batch of inputs, which shows the shapes. The model must be called as a whole, return (batch, n), and
    use each layer once.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> alignment = DirectFeedbackAlignment(model, example=torch.randn(4, 8))
    >>> alignment.backward(torch.randn(4, 8), torch.tensor([0, 2, 1, 0])).shape
    torch.Size([])
    """

    def __init__(self, model: nn.Module, *, example: Tensor, seed: int = 0, gain: float = DEFAULT_GAIN) -> None:
        super().__init__(model)
        require_tensor(example, name="example")
        if not example.numel():
            raise ValueError(f"example has shape {tuple(example.shape)}: pass a batch with samples in it")
        self.taps: list[Tensor] | None = None
        outputs, features = self._measure(example)
        generator = torch.Generator().manual_seed(feedback_seed(seed))
        for name, layer in self.layers.items():
            shape = torch.Size((outputs, *features[name]))
            self.feedback[name] = kaiming_uniform(shape, gain=gain, generator=generator).to(layer.weight)
        self.attach()
        self.replace(model, partial(self._run, model.forward))

    def route(self, name: str, forward: Forward, input: Tensor) -> Tensor:
        feedback = self.feedback[name]
        if self.taps is None:
            raise ValueError(f"{name} ran outside a call of the model, whose output {type(self).__name__} needs")
        if input.shape[1:] != feedback.shape[1:]:
            raise ValueError(
                f"{name} got {tuple(input.shape[1:])} per sample and {tuple(feedback.shape[1:])} in the example"
            )
        self.taps.append(Tap.apply(input, feedback))
        return forward(input.detach())

    def signal(self, prediction: Tensor) -> Tensor | None:
        """What goes to the layers (batch, n), or None for the error at the prediction."""
        return None

    def _run(self, forward: Forward, *args: Any, **kwargs: Any) -> Tensor:
        self.taps = taps = []
        try:
            prediction = forward(*args, **kwargs)
        finally:
            self.taps = None
        return Broadcast.apply(prediction, self.signal(prediction), *taps) if taps else prediction

    def _measure(self, example: Tensor) -> tuple[int, dict[str, torch.Size]]:
        """The number of the model's outputs, and for each layer the shape of one sample of its input."""
        features: dict[str, torch.Size] = {}

        def look(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name in features:
                raise ValueError(f"{name} is used twice in one forward pass: {type(self).__name__} allows one use")
            if len(args[0]) != len(example):
                raise ValueError(
                    f"{name} gets a batch of {len(args[0])} from one of {len(example)}: keep the batch first"
                )
            features[name] = args[0].shape[1:]

        handles = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in self.layers.items()]
        try:
            with torch.no_grad(), passes(example, name="example", through="the model"):
                prediction = rehearse(self.model, example)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(prediction, Tensor) or prediction.dim() != 2:
            found = tuple(prediction.shape) if isinstance(prediction, Tensor) else f"a {type(prediction).__name__}"
            raise ValueError(f"the model's output is {found}: {type(self).__name__} needs a tensor (batch, n)")
        if unused := self.layers.keys() - features.keys():
            raise ValueError(f"the model does not use {', '.join(sorted(unused))} for the example: remove it")
        return prediction.shape[1], features


class DirectRandomTargetProjection(DirectFeedbackAlignment):
    """Direct random target projection (Frenkel, Lefebvre & Bol 2021): each layer sends B'y to its input for targets y.

    Targets are labels (batch,), as one-hot vectors, or dense (batch, n). They are divided by the batch size, the scale
    of the error of a mean criterion. The last layer learns from its true error. Train with `alignment.backward(x, y)`,
    or call the model in `with alignment.with_targets(y):`; pass a factor on the loss to either as `scale`. Unlike
    errors, targets never fade: hidden activations must be bounded or normalised (tanh, batch norm), since plain ReLU
    layers diverge.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    >>> alignment = DirectRandomTargetProjection(model, example=torch.randn(4, 8))
    >>> alignment.backward(torch.randn(4, 8), torch.tensor([0, 2, 1, 0])).shape
    torch.Size([])
    """

    def __init__(self, model: nn.Module, *, example: Tensor, seed: int = 0, gain: float = DEFAULT_GAIN) -> None:
        self.targets: tuple[Tensor, float | Tensor] | None = None
        super().__init__(model, example=example, seed=seed, gain=gain)

    @contextmanager
    def with_targets(self, y: Tensor, *, scale: float | Tensor = 1.0) -> Iterator[None]:
        require_tensor(y, name="y")
        require_factor(scale, name="scale")
        self.targets = y, scale
        try:
            yield
        finally:
            self.targets = None

    def signal(self, prediction: Tensor) -> Tensor:
        if self.targets is None:
            raise ValueError(
                "DirectRandomTargetProjection needs the targets: train with alignment.backward(x, y), "
                "or call the model in `with alignment.with_targets(y):`"
            )
        y, scale = self.targets
        with passes(y, name="y", through=f"one_hot, of {prediction.shape[1]} classes"):
            vectors = y if y.is_floating_point() else F.one_hot(y.long(), prediction.shape[1])
        if vectors.shape != prediction.shape:
            raise ValueError(
                f"y is {describe(y)}, but the model returns {tuple(prediction.shape)}: labels (batch,) are needed, or "
                "targets of that shape"
            )
        return vectors.to(prediction.dtype) * scale / len(prediction)
