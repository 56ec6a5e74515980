"""Checks of what a learner is given, before anything changes: settings, batches, and the optimizers that step it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy

from blocklocal.arguments import describe, passes, require, require_factor, require_function, require_tensor
from blocklocal.feedback import Targets
from blocklocal.losses import LocalLoss

LOSS = (
    "pass weighted terms, such as 0.1 * bll.Variational() + bll.Predictive(), or your own bll.Term; the loss of the "
    "last block is criterion="
)


@dataclass(frozen=True)
class Example:
    """A learner's example= as it reached block k: the shape and dtype of a batch there."""

    k: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def check(self, h: Tensor) -> None:
        """ValueError: a batch with another number of dimensions."""
        if h.dim() != len(self.shape):
            there = f" at block {self.k}" if self.k else ""
            raise ValueError(
                f"{self.name} has shape {tuple(h.shape)}, but example= had {self.shape}{there}: a batch of "
                f"{len(self.shape)} dimensions is needed"
            )

    def explain(self, h: Tensor, error: Exception, *, block: nn.Module) -> None:
        """ValueError: h differs from the example or from the block's parameters, which is why the block failed."""
        own = next(block.parameters(), h)
        real = h.is_floating_point() and self.dtype.is_floating_point
        cast = real and torch.is_autocast_enabled(h.device.type)
        of_one_dtype = cast or h.dtype == (own.dtype if real else self.dtype)
        token = isinstance(error, IndexError) and not real  # one that an embedding does not have
        if of_one_dtype and h.shape[1:] == self.shape[1:] and h.device == own.device and not token:
            return
        through = f"block {self.k}, whose example= had shape {self.shape} and {self.dtype}"
        with passes(h, name=self.name, through=through):
            raise error

    @property
    def name(self) -> str:
        return "h" if self.k else "x"


def check_settings(*, loss: Any, feedback: Any, statistic: Any, criterion: Any, example: Any) -> None:
    """TypeError, ValueError: an invalid setting of a learner."""
    require(loss, LocalLoss, name="loss", needed=LOSS)
    if isinstance(feedback, type) or not callable(getattr(feedback, "build", None)):
        raise TypeError(f"feedback is {describe(feedback)}: pass settings, such as bll.ClosedFormFeedback()")
    require_function(statistic, name="statistic", needed="pass a function (B, C, P) -> (B, C), such as spatial_mean")
    require_function(criterion, name="criterion", needed="pass a function (prediction, y) -> scalar, such as mse_loss")
    if example is not None:
        require_tensor(example, name="example")
        if not example.numel():
            raise ValueError(f"example has shape {tuple(example.shape)}: pass a batch with samples in it")


def check_parameters(model: nn.Module) -> None:
    """ValueError: a parameter whose elements share memory, as after expand(), so that no optimizer can step it."""
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and parameter.layout is torch.strided and _overlaps(parameter):
            raise ValueError(f"parameter {name!r} shares memory with itself, as after expand(): clone() it first")


def check_batch(x: Tensor, y: Tensor, *, targets: Targets, examples: Sequence[Example]) -> None:
    """TypeError, ValueError: a batch that cannot be learnt from. examples: of all blocks, and the prediction."""
    require_tensor(x, name="x")
    if x.is_nested:
        raise ValueError(f"x is {describe(x)}, but must have a single shape: pad it")
    targets.check(y)
    if not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}: an empty batch has no loss, leave it out")
    for name, value in (("x", x), ("y", y)):
        if torch.is_grad_enabled() and value.is_inference():
            raise ValueError(
                f"{name} was made in torch.inference_mode() and cannot be learnt from: pass {name}.clone()"
            )
    if not examples:
        return
    example, prediction = examples[0].shape, examples[-1].shape
    examples[0].check(x)
    dimensions = len(prediction) - targets.labels
    if y.dim() != dimensions:
        raise ValueError(
            f"y has shape {tuple(y.shape)}, and the model predicts {prediction} for example=: targets of "
            f"{dimensions} dimension{'s' if dimensions > 1 else ''} are needed"
        )
    if prediction[0] == example[0] and len(x) != len(y):
        raise ValueError(f"x has {len(x)} samples and y has {len(y)} targets: one target per sample is needed")


def check_steps(optimizers: Any, *, scaler: Any, scale: Any, blocks: int) -> None:
    """TypeError, ValueError: arguments that cannot scale the losses of this number of blocks, or step them."""
    require_factor(scale, name="scale")
    if scaler is not None:
        require(scaler, GradScaler, name="scaler", needed="pass a torch.amp.GradScaler")
    if optimizers is None:
        return
    require(optimizers, Sequence, name="optimizers", needed="pass a list of optimizers, one per block")
    if len(optimizers) != blocks:
        raise ValueError(f"{len(optimizers)} optimizers for {blocks} blocks: pass one per block")
    if all(optimizer is None for optimizer in optimizers):
        raise ValueError("optimizers= holds None alone, and no block would learn: pass one for each that does")
    for k, optimizer in enumerate(optimizers):
        if optimizer is not None and not all(
            callable(getattr(optimizer, name, None)) for name in ("step", "zero_grad")
        ):
            raise TypeError(
                f"optimizers[{k}] is {describe(optimizer)}: pass a torch.optim.Optimizer, or None if block {k} "
                "does not learn"
            )
    if isinstance(scale, Tensor) or scale != 1:
        raise ValueError(
            f"scale={scale} with optimizers= would make steps with scaled gradients: pass scaler= for mixed "
            "precision, or leave optimizers= out and step them after the last batch"
        )


def check_owners(optimizers: Sequence[Any], parameters: Sequence[Sequence[nn.Parameter]]) -> None:
    """ValueError: an optimizer that does not step its own block, or steps another, which has no gradient then."""
    for k, optimizer in enumerate(optimizers):
        if optimizer is not None:
            check_closure(optimizer, name=f"optimizers[{k}]")
    owners = {id(parameter): k for k, own in enumerate(parameters) for parameter in own}
    remedy = "pass one optimizer per block, in the order of the blocks, made from learner.block_parameters(k)"
    for k, optimizer in enumerate(optimizers):
        if optimizer is None:
            continue
        stepped = [owners.get(parameter) for parameter in stepped_by(optimizer)]
        if stepped and k not in stepped:
            raise ValueError(f"optimizers[{k}] has no parameter of block {k}: {remedy}")
        for other in stepped:
            if other not in (k, None):
                raise ValueError(f"optimizers[{k}] has a parameter of block {other}: {remedy}")


def check_closure(optimizer: Any, *, name: str) -> None:
    """ValueError: an optimizer that needs a closure to step, as LBFGS does."""
    step = getattr(type(optimizer), "step", None)  # the class's: a learning rate schedule wraps the instance's
    if not inspect.isfunction(step):
        return
    try:
        inspect.signature(step).bind(optimizer)
    except TypeError as error:
        raise ValueError(
            f"{name} is {describe(optimizer)}, which computes the loss several times ({error}): pass an optimizer "
            "that steps without a closure, such as torch.optim.SGD"
        ) from error


def stepped_by(optimizer: Any) -> list[int]:
    """The ids of the parameters that an optimizer steps."""
    return [id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def check_frozen(parameters: Iterable[nn.Parameter], *, k: int) -> None:
    """ValueError: block k has parameters to train, but its loss has no gradient."""
    if any(parameter.requires_grad for parameter in parameters):
        raise ValueError(
            f"the loss of block {k} depends on none of its parameters: is criterion= differentiable, and does the "
            "block keep the graph?"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory: a step along some dimension does not lead past the dimensions within it."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False
