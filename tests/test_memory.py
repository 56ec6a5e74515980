"""Bytes alive, against counting by hand."""

import gc

import torch
from torch import nn

from blocklocal.memory import MemoryTracker

KIB = 1024


def test_storages_count_from_their_making_until_their_last_owner_lets_go() -> None:
    before = torch.zeros(256)
    with MemoryTracker() as tracker:
        a = before + 1
        assert tracker.alive == KIB
        view = a.reshape(16, 16).T  # no storage of its own
        assert tracker.alive == KIB
        a.add_(1)
        del a
        assert tracker.alive == KIB
        del view
        assert tracker.alive == 0
        torch.cat([before, before])
    assert tracker.timeline.bytes == [KIB, 0, 2 * KIB, 0]
    assert tracker.timeline.peak == 2 * KIB
    assert tracker.timeline.seconds == sorted(tracker.timeline.seconds)


def test_what_autograd_saves_lives_until_the_backward_pass() -> None:
    x = torch.zeros(16, 16, requires_grad=True)
    with MemoryTracker() as tracker:
        y = x.exp().exp().sum()  # each saves its output
        assert tracker.alive == 2 * KIB + 4
        y.backward()
        del y
        gc.collect()
        assert tracker.alive == KIB  # x.grad
    assert x.grad is not None


def test_gradients_of_parameters_count() -> None:
    linear, x = nn.Linear(16, 16, bias=False), torch.zeros(16, 16)
    with MemoryTracker() as tracker:
        linear(x).sum().backward()
    assert tracker.alive == KIB
