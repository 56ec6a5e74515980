"""The base class of the rules: feedback weights for a model, attached to its layers, measured, saved and removed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from blocklocal.arguments import (
    describe,
    loss_of,
    passes,
    require,
    require_dense,
    require_factor,
    require_function,
    require_gradients,
    require_module,
    require_number,
    require_tensor,
    require_whole,
)

from .layers import find_layers

Criterion = Callable[[Tensor, Tensor], Tensor]
Forward = Callable[..., Tensor]

DEFAULT_GAIN = 1 / math.sqrt(3)  # PyTorch's for Linear and convolutions, and Nøkland's (2016) for direct feedback


class Alignment(ABC):
    """A backward pass of `model` through feedback weights; `feedback` maps the name of each layer to a tensor.

    From construction to `remove()`, `loss.backward()` computes the rule's gradients. The same seed gives the same fixed
    feedback weights on every device and in every process.

    >>> from blocklocal.alignment import FeedbackAlignment
    >>> isinstance(FeedbackAlignment(nn.Linear(8, 3)), Alignment)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        require_module(model, name="model")
        self.model = model
        self.layers = find_layers(model)
        self.feedback: dict[str, Tensor] = {}
        self.active = True
        self.measuring = False
        self.replaced: list[tuple[nn.Module, Forward | None]] = []

    @abstractmethod
    def route(self, name: str, forward: Forward, input: Tensor) -> Tensor:
        """Run a layer, whose own forward pass is `forward`, on an input that requires grad."""

    def attach(self) -> None:
        for name, layer in self.layers.items():
            self.replace(layer, partial(self._enter, name, layer.forward))

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Run `forward` in place of the module's own, until `remove()`."""
        self.replaced.append((module, vars(module).get("forward")))
        vars(module)["forward"] = forward

    def remove(self) -> None:
        """Restore the model's own backward pass. Its parameters stay as they are."""
        while self.replaced:
            module, forward = self.replaced.pop()
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward

    def with_targets(self, y: Tensor, *, scale: float | Tensor = 1.0) -> AbstractContextManager[None]:
        """A context for the forward pass of a batch with targets y, whose loss will be multiplied by `scale`.

        Only rules that project targets need it.
        """
        return nullcontext()

    def backward(
        self, x: Tensor, y: Tensor, *, criterion: Criterion = F.cross_entropy, scale: float | Tensor = 1.0
    ) -> Tensor:
        """Add the rule's gradients of scale * loss to those of the parameters. Returns the detached loss."""
        require_gradients("backward")
        self._check(x, y, criterion)
        require_factor(scale, name="scale")
        with self.with_targets(y, scale=scale):
            loss = self._loss(self.model, x, y, criterion)
        with torch.autocast(loss.device.type, enabled=False):
            (loss * scale).backward()
        return loss.detach()

    def angles(self, x: Tensor, y: Tensor, *, criterion: Criterion = F.cross_entropy) -> dict[str, float]:
        """Degrees between the rule's gradient and the true one, for the weight of each layer that is trained.

        Below 90, a small step along the rule's gradient lowers the loss. NaN if a gradient is zero. The model stays as
        it is: buffers, parameters, their gradients and the random state.
        """
        self._check(x, y, criterion)
        parameters = {name: dict(layer.named_parameters(recurse=False)) for name, layer in self.layers.items()}
        weights = {name: own["weight"] for name, own in parameters.items() if "weight" in own}
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        given = self._gradients(list(trained.values()), x, y, criterion)
        with self.suspended():
            true = self._gradients(list(trained.values()), x, y, criterion)
        return {name: _angle(a, b) for name, a, b in zip(trained, given, true, strict=True)}

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """A context in which the model has its own backward pass."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    @property
    def rule(self) -> str:
        """The name under which its state is saved."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's own state dict."""
        return {"rule": self.rule, "feedback": dict(self.feedback)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state. ValueError: it is that of another rule or of another model; nothing is loaded then."""
        require(state, dict, name="state", needed="pass what state_dict() returned")
        if state.get("rule") != self.rule:
            other = state.get("rule", "a rule without a name")
            raise ValueError(f"the state is of {other}, but this is {self.rule}: pass a state of the same rule")
        if unknown := sorted(map(str, state.keys() - self.state_dict().keys())):
            raise ValueError(f"state: {', '.join(unknown)} is unknown to {self.rule}: pass what state_dict() returned")
        feedback, own = state.get("feedback"), self.feedback
        if not isinstance(feedback, dict) or not all(isinstance(tensor, Tensor) for tensor in feedback.values()):
            raise ValueError("state: its feedback is not a dict of tensors: pass what state_dict() returned")
        shapes = {name: tensor.shape for name, tensor in feedback.items()}
        expected = {name: tensor.shape for name, tensor in own.items()}
        if shapes != expected:
            names = sorted(str(name) for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
            raise ValueError(
                f"the state is of another model: the feedback of {', '.join(names)} differs, pass that of this one"
            )
        for name, tensor in feedback.items():
            require_dense(tensor, name=f"state['feedback'][{name!r}]")
            if tensor.dtype != own[name].dtype:
                raise ValueError(
                    f"state: the feedback of {name} is {tensor.dtype}, but this has {own[name].dtype}: pass what "
                    "state_dict() returned for a model of this dtype"
                )
            if not tensor.isfinite().all():
                raise ValueError(f"state: the feedback of {name} is not finite: pass what state_dict() returned")
        for name, tensor in own.items():
            tensor.copy_(feedback[name])

    def _enter(self, name: str, forward: Forward, input: Tensor) -> Tensor:
        if not (self.active and torch.is_grad_enabled() and input.requires_grad):
            return forward(input)
        if self.feedback[name].device != input.device:
            raise ValueError(
                f"{name} runs on {input.device}, but its feedback is on {self.feedback[name].device}: "
                f"make the {type(self).__name__} once the model is on its device"
            )
        return self.route(name, forward, input)

    def _check(self, x: Tensor, y: Tensor, criterion: Criterion) -> None:
        for name, value in (("x", x), ("y", y)):
            require_tensor(value, name=name)
            if not value.dim():
                raise ValueError(f"{name} is {describe(value)}: a batch is needed, such as {name}.unsqueeze(0)")
            if not value.numel():
                raise ValueError(f"{name} has shape {tuple(value.shape)}: an empty batch has no loss, leave it out")
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y has {len(y)} targets: one target per sample is needed")
        require_function(criterion, name="criterion", needed="pass a function (prediction, y) -> scalar")

    def _loss(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, criterion: Criterion) -> Tensor:
        with passes(x, name="x", through="the model"):
            prediction = model(x)
        loss = loss_of(criterion, prediction, y)
        if not loss.requires_grad:
            raise ValueError("the loss depends on no parameter that is trained: is criterion= differentiable?")
        return loss

    def _gradients(
        self, weights: list[Tensor], x: Tensor, y: Tensor, criterion: Criterion
    ) -> tuple[Tensor | None, ...]:
        self.measuring = True
        try:
            with torch.enable_grad(), self.with_targets(y):
                loss = self._loss(partial(rehearse, self.model), x, y, criterion)
                return torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            self.measuring = False


def feedback_seed(seed: int) -> int:
    """Another seed: if the model was drawn from this one, its feedback would repeat its initial weights."""
    seed = require_whole(seed, name="seed", least=0, most=2**40)
    return 1_000_003 * (seed + 1)


def kaiming_uniform(shape: torch.Size, *, gain: float, generator: torch.Generator) -> Tensor:
    """Uniform with standard deviation gain / √fan_in (He et al. 2015), where fan_in is the number of values per row."""
    require_number(gain, name="gain", above=0)
    bound = gain * math.sqrt(3 / math.prod(shape[1:]))
    drawn = torch.empty(shape, dtype=torch.float32, device=generator.device)
    return drawn.uniform_(-bound, bound, generator=generator)


def rehearse(model: nn.Module, x: Tensor) -> Tensor:
    """Run model(x) without changing the model's buffers and the random state."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        return functional_call(model, buffers, (x,))


def _angle(a: Tensor | None, b: Tensor | None) -> float:
    """Degrees between two tensors, by half-angles: the arc cosine loses half the digits near 0."""
    if a is None or b is None or not (a.any() and b.any()):
        return math.nan
    a, b = F.normalize(a.double().flatten(), dim=0), F.normalize(b.double().flatten(), dim=0)
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))
