"""Rules whose feedback weights have the shape of the layer's own: feedback alignment and sign symmetry."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from blocklocal.arguments import require, require_choice, require_whole

from .adjoint import connect
from .rule import DEFAULT_GAIN, Alignment, Forward, feedback_seed, kaiming_uniform

Magnitude = Literal["uniform", "fixed", "batchwise"]


class FeedbackAlignment(Alignment):
    """Feedback alignment (Lillicrap et al. 2016): fixed random weights replace the true ones in the backward pass.

    They are Kaiming-uniform with standard deviation gain / √fan_in, by default as PyTorch draws a layer's own weights.

    >>> FeedbackAlignment(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))).feedback["1"].shape
    torch.Size([3, 16])
    """

    def __init__(self, model: nn.Module, *, seed: int = 0, gain: float = DEFAULT_GAIN) -> None:
        super().__init__(model)
        self.gain = gain
        self.feedback = self.draw(torch.Generator().manual_seed(feedback_seed(seed)))
        self.attach()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Feedback for each layer, in the device, dtype and memory format of its weight."""
        feedback = {}
        for name, layer in self.layers.items():
            drawn = kaiming_uniform(layer.weight.shape, gain=self.gain, generator=generator)
            feedback[name] = torch.empty_like(layer.weight, requires_grad=False).copy_(drawn)
        return feedback

    def route(self, name: str, forward: Forward, input: Tensor) -> Tensor:
        y = forward(input.detach())
        return connect(input, y, layer=self.layers[name], feedback=self.backward_weight(name))

    def backward_weight(self, name: str) -> Tensor:
        """What takes the place of the layer's weight in the backward pass."""
        return self.feedback[name]


class SignSymmetry(FeedbackAlignment):
    """Sign symmetry (Liao, Leibo & Poggio 2016): backward, the true weights' signs with other magnitudes.

    The magnitudes are "uniform" (uSF), gain / √fan_in throughout a layer; "fixed" (frSF), the absolute values of
    feedback alignment's weights; or "batchwise" (brSF), the same drawn again whenever the model runs forward with
    gradients recorded. All three have the same root mean square.

    >>> alignment = SignSymmetry(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), magnitude="uniform")
    """

    def __init__(self, model: nn.Module, *, magnitude: Magnitude, seed: int = 0, gain: float = DEFAULT_GAIN) -> None:
        require_choice(magnitude, get_args(Magnitude), name="magnitude")
        self.magnitude: Magnitude = magnitude
        self.next_seed = feedback_seed(seed) + 1
        super().__init__(model, seed=seed, gain=gain)
        if magnitude == "batchwise":
            # A random generator cannot be traced. As a decorator this would load torch's compiler with the library.
            redraw = cast("Callable[[SignSymmetry], object]", torch.compiler.disable(SignSymmetry._redraw))
            self.replace(model, partial(self._run, model.forward, partial(redraw, self)))  # so that a copy has its own

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = super().draw(generator)
        if self.magnitude == "uniform":
            return {name: torch.full_like(w, self.gain / math.sqrt(w[0].numel())) for name, w in drawn.items()}
        return {name: w.abs_() for name, w in drawn.items()}

    def backward_weight(self, name: str) -> Tensor:
        return self.feedback[name] * self.layers[name].weight.detach().sign()

    @property
    def rule(self) -> str:
        return f"{super().rule}(magnitude={self.magnitude!r})"

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "next_seed": self.next_seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require(state, dict, name="state", needed="pass what state_dict() returned")
        if state.get("rule") == self.rule:  # any other is refused below
            if "next_seed" not in state:
                raise ValueError("the state has no next_seed: pass what state_dict() returned")
            require_whole(state["next_seed"], name="state['next_seed']", least=0, most=2**63 - 1)
        super().load_state_dict(state)
        self.next_seed = int(state["next_seed"])

    def _run(self, forward: Forward, redraw: Callable[[], object], *args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and not self.measuring:
            redraw()
        return forward(*args, **kwargs)

    def _redraw(self) -> None:
        device = next(iter(self.feedback.values())).device
        self.feedback = self.draw(torch.Generator(device).manual_seed(self.next_seed))
        self.next_seed += 1
