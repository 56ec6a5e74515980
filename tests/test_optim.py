"""Optimizers by name, against torch's own steps; averages of a schedule-free one."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from blocklocal.lab.settings import Settings
from blocklocal.lab.training.optim import OPTIMIZERS, averaged, make_optimizer

SETTINGS = Settings(lr=0.01, momentum=0.8, beta2=0.95, weight_decay=0.3, optimizer="adamw", schedule="constant")


def parameters() -> list[nn.Parameter]:
    draws = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(shape, generator=draws)) for shape in ((3, 4), (3,), (2, 3, 1, 1))]
    for parameter in found:
        parameter.grad = torch.randn(parameter.shape, generator=draws)
    return found


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_adamw_decays_matrices_and_kernels_alone():
    ours, theirs = parameters(), parameters()
    make_optimizer(ours, SETTINGS).step()
    for parameter in theirs:
        decay = 0.3 if parameter.dim() > 1 else 0.0
        torch.optim.AdamW([parameter], lr=0.01, betas=(0.8, 0.95), weight_decay=decay).step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_clipped_together(name):
    found = parameters()
    make_optimizer(found, replace(SETTINGS, optimizer=name, clip=0.1, weight_decay=0.0)).step()
    if name != "schedulefree":  # which divides the gradients in place
        assert torch.cat([gradient(p).flatten() for p in found]).norm() == pytest.approx(0.1, rel=1e-5)
    assert all(not torch.equal(one, other) for one, other in zip(found, parameters(), strict=True))


def test_schedule_free_averages_are_shown_and_taken_back():
    found = parameters()
    optimizer = make_optimizer(found, replace(SETTINGS, optimizer="schedulefree"))
    gradients = [gradient(p).clone() for p in found]
    for _ in range(3):
        for parameter, kept in zip(found, gradients, strict=True):
            parameter.grad = kept.clone()
        optimizer.step()
    before = [p.detach().clone() for p in found]
    with averaged([optimizer, None]):
        for parameter, y in zip(found, before, strict=True):
            z = optimizer.state[parameter]["z"]
            torch.testing.assert_close(parameter, (y - 0.2 * z) / 0.8)  # y = 0.8 x + 0.2 z
            assert not torch.equal(parameter, y)
    assert all(torch.equal(one, other) for one, other in zip(found, before, strict=True))
    optimizer.step()  # it trains again


def test_of_other_optimizers_nothing_is_averaged():
    found = parameters()
    optimizer = make_optimizer(found, SETTINGS)
    with averaged([optimizer]):
        assert all(torch.equal(one, other) for one, other in zip(found, parameters(), strict=True))
