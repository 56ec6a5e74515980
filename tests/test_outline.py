"""Containers that were cut are never called: what their users attach to them or change in them is refused by name."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import blocklocal as bll


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)
        self.offset = nn.Parameter(torch.zeros(4))
        self.shift: Tensor
        self.register_buffer("shift", torch.zeros(4))
        self.temperature, self.epoch = 2.0, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) / self.temperature + self.shift + self.offset)


X, Y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


def learner(model: nn.Module | None = None, **cuts) -> bll.BlockLocal:
    return bll.BlockLocal(model or Net(), classes=3, example=X, **(cuts or {"at": ["body.1"]}))


def watch(*_: object) -> None:
    """A hook."""


HOOKS: list[Callable[[nn.Module], object]] = [
    lambda module: module.register_forward_hook(watch),
    lambda module: module.register_forward_pre_hook(watch),
    lambda module: module.register_full_backward_hook(watch),
    lambda module: module.register_full_backward_pre_hook(watch),
]


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize(("name", "called"), [("", "Net"), ("body", "'body'")])
def test_hooks_on_containers_are_refused(register: Callable[[nn.Module], object], name: str, called: str) -> None:
    model = Net()
    register(model.get_submodule(name))
    with pytest.raises(ValueError, match=f"^{called} has hooks, and a module that is cut is never called: cut outside"):
        learner(model)
    ours = learner()
    register(ours.model.get_submodule(name))
    with pytest.raises(ValueError, match=f"^{called if name else 'the model'} has hooks.*build a new learner"):
        ours.backward(X, Y)


def test_cuts_are_found_around_a_container_with_hooks() -> None:
    model, calls = Net(), []
    model.body.register_forward_hook(lambda *_: calls.append(1))
    chain = bll.split(model, blocks=2, example=X)
    calls.clear()
    assert torch.equal(chain(X), model(X))
    assert len(calls) == 2


def test_hooks_of_modules_that_are_not_cut_run() -> None:
    model, calls = Net(), []
    ours = learner(model)
    model.body[1].register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    ours.backward(X, Y)
    assert calls == ["forward", "backward"]


def test_hooks_of_one_block_run() -> None:
    model, calls = Net(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    learner(model, blocks=1).backward(X, Y)
    assert calls == [1]


PASSES: list[Callable[[bll.BlockLocal], object]] = [
    lambda ours: ours(X, Y),
    lambda ours: ours.backward(X, Y),
    lambda ours: ours.exits(X),
    lambda ours: ours.predict(X),
    lambda ours: ours.predict(X, confidence=0.5),
    lambda ours: ours.diagnose(X, Y),
]


@pytest.mark.parametrize("run", PASSES)
def test_every_pass_notices(run: Callable[[bll.BlockLocal], object]) -> None:
    ours = learner()
    run(ours)
    ours.model.head = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"'head' of the model has changed since it was cut.*build a new learner"):
        run(ours)


def replace_layer(model: Net) -> None:
    model.body[2] = nn.Linear(4, 4)


def add_layer(model: Net) -> None:
    model.body.append(nn.Linear(4, 4))


def replace_parameter(model: Net) -> None:
    model.offset = nn.Parameter(torch.ones(4))


def replace_buffer(model: Net) -> None:
    model.shift = torch.ones(4)


def load_by_assignment(model: Net) -> None:
    model.load_state_dict(Net().state_dict(), assign=True)


def change_constant(model: Net) -> None:
    model.temperature = 1.0


def move_the_model(model: Net) -> None:
    model.double()


def replace_forward(model: Net) -> None:
    model.body.forward = lambda h: h  # type: ignore[method-assign]


def recompute_container(model: Net) -> None:
    bll.recompute(model.body)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_layer, "'2' of 'body' has changed"),
        (add_layer, "'3' of 'body' has changed"),
        (replace_parameter, "'offset' of the model has changed"),
        (replace_buffer, "'shift' of the model has changed.*change tensors in place"),
        (load_by_assignment, "'offset' of the model has changed"),
        (move_the_model, "'shift' of the model has changed.*move the learner, not the model"),
        (change_constant, "'temperature' of the model was 2.0 when it was cut"),
        (replace_forward, "'body' has a forward pass of its own"),
        (recompute_container, "'body' is recomputed as a whole"),
    ],
)
def test_changes_after_the_cut_are_refused(change: Callable[[Net], None], message: str) -> None:
    model = Net()
    ours = copy.deepcopy(learner(model))
    change(ours.model)  # type: ignore[arg-type]
    for use in (lambda: ours.backward(X, Y), lambda: ours.to(torch.float32)):
        with pytest.raises(ValueError, match=message):
            use()


def in_place(model: Net) -> None:
    with torch.no_grad():
        model.shift.add_(1)
        model.offset.copy_(torch.ones(4))
    model.load_state_dict(model.state_dict())


def inside_a_module(model: Net) -> None:
    model.body[1][0] = nn.Linear(4, 4)  # type: ignore[index]
    bll.recompute(model.body[1])


def what_forward_does_not_read(model: Net) -> None:
    model.epoch = 3
    model.name = "net"  # type: ignore[assignment]


@pytest.mark.parametrize("change", [in_place, inside_a_module, what_forward_does_not_read])
def test_changes_that_the_blocks_see_are_allowed(change: Callable[[Net], None]) -> None:
    model = Net()
    ours = learner(model)
    change(model)
    ours.backward(X, Y)
    assert torch.equal(ours.predict(X), model(X))


def test_a_sequential_and_a_list_are_watched_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    for ours in (learner(model, blocks=None), learner(list(model), blocks=None)):  # type: ignore[arg-type]
        ours.model.epoch = 3  # type: ignore[assignment]
        ours.backward(X, Y)
        ours.model.append(nn.Linear(3, 3))  # type: ignore[operator]
        with pytest.raises(ValueError, match="'2' of the model has changed"):
            ours.backward(X, Y)


def test_the_learner_moves_with_its_model() -> None:
    model = Net()
    ours = learner(model).double()
    ours.backward(X.double(), Y)
    assert torch.equal(ours.predict(X.double()), model(X.double()))


def test_the_model_follows_what_is_assigned_to_the_learner() -> None:
    model, state = Net(), learner().state_dict()
    ours = learner(model)
    ours.load_state_dict({name: value + 1 for name, value in state.items()}, assign=True)
    ours.backward(X, Y)
    assert torch.equal(ours.predict(X), model(X))
    assert torch.equal(model.offset, torch.ones(4))
