"""A recomputed module against the same module as it is: equal to the bit, and smaller."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.memory import MemoryTracker


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 8, 3, padding=1)
        )

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h + self.body(h))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(stem, *(Unit() for _ in range(6)), head)


def recomputed(model: nn.Sequential) -> nn.Sequential:
    model = copy.deepcopy(model)
    for unit in list(model)[1:-1]:
        bll.recompute(unit)
    return model


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 4, 2])


def peak(step: Callable[[], object]) -> int:
    with MemoryTracker() as tracker:
        step()
    return tracker.timeline.peak


def assert_equal_gradients(plain: nn.Module, ours: nn.Module) -> None:
    for (name, theirs), mine in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert_close(theirs.grad, mine.grad, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_gradients_and_statistics_stay_what_they_are(momentum: float | None) -> None:
    plain = network()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    ours = copy.deepcopy(recomputed(plain))
    x, y = batch()
    peaks = []
    for model in (plain, ours):
        for seed in range(2):
            torch.manual_seed(seed)
            peaks.append(peak(lambda: F.cross_entropy(model(x), y).backward()))  # noqa: B023
    assert peaks[3] < 0.6 * peaks[1]
    assert_equal_gradients(plain, ours)
    for (name, theirs), mine in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(theirs, mine), name
    assert all(module.momentum == momentum for module in ours.modules() if isinstance(module, nn.BatchNorm2d))
    assert torch.equal(plain.eval()(x), ours.eval()(x))


def test_inside_blocks() -> None:
    plain = network().eval()
    ours, (x, y) = recomputed(plain), batch()
    learners = [
        bll.BlockLocal(model, at=["3"], classes=5, example=x, loss=bll.Predictive("linear")) for model in (plain, ours)
    ]
    learners[1].borders.load_state_dict(learners[0].borders.state_dict())
    peaks = [peak(lambda: learner.backward(x, y)) for learner in learners]  # noqa: B023
    assert peaks[1] < 0.75 * peaks[0]
    assert_equal_gradients(plain, ours)


def test_balance_counts_what_is_kept() -> None:
    """Blocks of recomputed units hold more units than blocks of plain ones beside them."""
    x, _ = batch()
    chain = network()
    for unit in list(chain)[3:-1]:
        bll.recompute(unit)
    blocks = bll.split(chain, blocks=2, example=x, balance="memory")
    units = [sum(isinstance(module, nn.BatchNorm2d) for module in block.modules()) for block in blocks]
    assert units[0] < units[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch warns of itself
def test_compiled() -> None:
    ours, (x, y) = recomputed(network()), batch()
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    compiled = copy.deepcopy(ours)
    compiled.compile(backend="aot_eager")
    for model in (ours, compiled):
        F.cross_entropy(model(x), y).backward()
    for theirs, mine in zip(ours.parameters(), compiled.parameters(), strict=True):
        assert_close(theirs.grad, mine.grad)
    for (name, theirs), mine in zip(ours.named_buffers(), compiled.buffers(), strict=True):
        assert_close(theirs, mine, msg=name)
