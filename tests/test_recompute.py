"""A recomputed module against the same module as it is: equal to the bit, and smaller."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.candidates import candidates
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


def counted(module: nn.Module) -> list[int]:
    """Grows by one with every pass through `module`, recomputations among them."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def nested() -> nn.Sequential:
    """Two containers of containers between a stem and a head."""
    unit = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(unit, copy.deepcopy(unit)), nn.Linear(8, 3))


@pytest.mark.parametrize("name", ["1", "1.0", "1.0.1"])
def test_a_recomputed_container_is_not_cut(name: str) -> None:
    model, x = nested(), torch.randn(5, 4)
    bll.recompute(model.get_submodule(name))
    inside = f"{name}.{'0' if name != '1' else '0.0'}"
    for at in ([inside], [inside, "1"]):
        with pytest.raises(ValueError, match=f"'{name}' is recomputed as a whole .*: cut outside it"):
            bll.split(model, at=at)
    assert not any(place.startswith(f"{name}.") for place in candidates(model))
    count = counted(model.get_submodule(inside))
    for chain in (bll.split(model, at=[name]), bll.split(model, blocks=2, example=x), bll.split(model)):
        count.clear()
        chain(x).sum().backward()
        assert len(count) == 2


def test_a_recomputed_model_is_one_block() -> None:
    model, x = nested(), torch.randn(5, 4)
    bll.recompute(model)
    for cut in (
        lambda: bll.split(model),
        lambda: bll.split(model, at=["1"]),
        lambda: bll.split(model, blocks=2, example=x),
    ):
        with pytest.raises(ValueError, match=r"^Sequential is recomputed as a whole"):
            cut()
    count = counted(model[1])
    bll.split(model, blocks=1)[0](x).sum().backward()
    assert len(count) == 2


def test_a_forward_pass_of_its_own_is_not_lost() -> None:
    model, x = nested(), torch.randn(5, 4)
    plain = model[1].forward
    model[1].forward = lambda h: 2 * plain(h)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="'1' has a forward pass of its own, set on the instance: cut outside it"):
        bll.split(model, at=["1.0"])
    assert torch.equal(bll.split(model, at=["1"])(x), model(x))


def test_twice_is_once_and_units_may_contain_units() -> None:
    plain, (x, y) = network(), batch()
    ours = copy.deepcopy(plain)
    for unit in list(ours)[1:-1]:
        assert isinstance(unit, Unit)
        bll.recompute(unit.body)
        for _ in range(2):
            bll.recompute(unit)
    count = counted(ours.get_submodule("1.body.0"))
    for model in (plain, ours):
        torch.manual_seed(0)
        F.cross_entropy(model(x), y).backward()
    assert len(count) == 3  # once for the unit, and in there once for its body
    assert_equal_gradients(plain, ours)
    for theirs, mine in zip(plain.buffers(), ours.buffers(), strict=True):
        assert torch.equal(theirs, mine)


def test_under_autocast() -> None:
    """What is computed again is cast again, in the backward pass that leaves autocast."""
    plain, (x, y) = network().eval(), batch()
    ours = recomputed(plain)
    learners = [
        bll.BlockLocal(model, at=["3"], classes=5, example=x, loss=bll.Predictive("linear")) for model in (plain, ours)
    ]
    learners[1].borders.load_state_dict(learners[0].borders.state_dict())
    for learner in learners:
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                learner.backward(x, y)
            optimizer.step()
            optimizer.zero_grad()
    for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(theirs, mine)


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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch warns of itself
def test_traced_blocks_compiled_in_one() -> None:
    """As `bll bench --compile` does: torch 2.11 reads the code of a traced module's `forward`."""
    plain, (x, y) = network().eval(), batch()
    ours = bll.split(copy.deepcopy(plain), at=["2"])
    for block in ours:
        bll.recompute(block)
    for model in (plain, torch.compile(ours, backend="aot_eager")):
        F.cross_entropy(model(x), y).backward()
    for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
        assert_close(theirs.grad, mine.grad)
