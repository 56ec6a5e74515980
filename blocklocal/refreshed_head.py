"""A head with a frozen copy of weights that learn elsewhere in the model, taken again every so many training steps."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn


class RefreshedHead(nn.Module):
    """Counts the training steps in `steps`, and takes its copy again before every `refresh`-th; None: never.

    The learner calls `begin_step` before each forward pass of the block that is to learn, and so outside of what is
    compiled. The count is part of the state dict. settings: the class that makes such heads, for messages.
    """

    settings: ClassVar[str]

    def __init__(self, *, refresh: int | None) -> None:
        super().__init__()
        self.refresh = refresh
        self.steps = 0

    def refreshes(self, ahead: int = 0) -> bool:
        """Whether the next training step, or the one `ahead` steps later, begins with a refresh."""
        return self.refresh is not None and (self.steps + ahead) % self.refresh == 0

    @torch.no_grad()
    def begin_step(self, model: nn.Module) -> None:
        """Begin a training step of the border. model: what the learner trains."""
        if self.refreshes():
            self.take(model)
        self.steps += self.refresh is not None

    def take(self, model: nn.Module) -> None:
        """Take the copy from the weights as they are now."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)


def refreshed(module: nn.Module) -> list[RefreshedHead]:
    """The heads of a border, or of several, that copy weights from elsewhere in the model."""
    return [head for head in module.modules() if isinstance(head, RefreshedHead)]
