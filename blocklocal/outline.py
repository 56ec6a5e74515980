"""The containers of a model that was cut. They are no longer called, so a change in one must not go unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from torch import nn
from torch.utils.hooks import RemovableHandle

from blocklocal.graph import few, obstacle, trace
from blocklocal.modes import Training
from blocklocal.values import Inputs, arguments_of, tensors


class Outline:
    """What the containers of `model`, the modules that are in no block themselves, held when it was cut into `blocks`.

    `check` is cheap and belongs at the beginning of each pass; `note` records the containers as they are now.
    example: what the model takes, None if it was traced without. refuse: a function that a call of a container runs
    first, to raise an error, see `guard`.
    """

    refuse: Callable[..., None] | None = None

    def __init__(self, model: nn.Module, blocks: Iterable[nn.Module], *, example: Inputs | None = None) -> None:
        blocks = list(blocks)
        inside = {module for block in blocks for module in block.modules()}
        self.containers = {
            name: module
            for name, module in model.named_modules()
            if module not in inside and not inside.isdisjoint(module.modules())
        }
        self.traced = bool(self.containers) and not set(blocks) <= set(model.modules())
        self._guards: list[RemovableHandle] = []
        self.arguments = None
        if self.traced and example is not None:
            self.arguments = arguments_of(model, few(model, example)).zeros(device=next(tensors(example)).device)
        self.graph = self._graph()
        self.note()

    def guard(self, refuse: Callable[..., None] | None) -> None:
        """Run `refuse` first wherever a container is called, which the blocks never do; None: no longer."""
        for handle in self._guards:
            handle.remove()
        self.refuse = refuse
        self._guards = [] if refuse is None else [m.register_forward_pre_hook(refuse) for m in self.containers.values()]

    def note(self) -> None:
        self.members = {name: _members(module) for name, module in self.containers.items()}
        self.constants = {name: _constants(module) for name, module in self.containers.items()}

    def check(self) -> None:
        """ValueError: a container has hooks, or its submodules, tensors or constants have changed since it was cut."""
        refuse = self.refuse
        self.guard(None)  # it is no hook of the user's
        try:
            self._check()
        finally:
            self.guard(refuse)

    def _check(self) -> None:
        for name, module in self.containers.items():
            if found := obstacle(module):
                raise ValueError(f"{_called(name)} {found}: build a new learner, cut outside it")
            then, now = self.members[name], _members(module)
            changed = [member for member in {**then, **now} if then.get(member) is not now.get(member)]
            if changed:
                raise ValueError(
                    f"{changed[0]!r} of {_called(name)} has changed since it was cut, and the blocks do not see it: "
                    "build a new learner; change tensors in place, and move the learner, not the model"
                )
        constants = {name: _constants(module) for name, module in self.containers.items()}
        if constants != self.constants:
            if self._graph() != self.graph:
                raise ValueError(f"{self._difference(constants)}, and the blocks do not see it: build a new learner")
            self.constants = constants

    def _graph(self) -> str:
        """The graph as text, including its constants; empty for a chain that was not traced."""
        if not self.traced:
            return ""
        model, arguments = self.containers[""], self.arguments
        if arguments is not None:
            held = islice((*model.parameters(), *model.buffers()), 1)
            arguments = arguments.zeros(device=next((tensor.device for tensor in held), "cpu"))
        return str(trace(model, containers=frozenset(self.containers) - {""}, arguments=arguments).graph)

    def _difference(self, constants: dict[str, dict[str, object]]) -> str:
        for name, now in constants.items():
            for constant, then in self.constants[name].items():
                if now.get(constant) != then:
                    return f"{constant!r} of {_called(name)} was {then!r} when it was cut"
        return "the forward pass has changed since the model was cut"


def stand_ins(model: nn.Module, block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a block cut from `model` that are not the model's own: empty stand-ins for its containers."""
    parts = [(path, module) for path, module in block.named_modules() if not isinstance(module, Training)]
    return [(path, module) for path, module in parts if module is not model.get_submodule(path)]


def share(model: nn.Module, block: nn.Module) -> None:
    """Make a block cut from `model` hold the parameters and buffers that the model's containers hold now.

    A submodule is itself part of its block. A container that was cut is represented in a block by an empty module with
    the tensors that the block reads, which become outdated as soon as the container replaces its own.
    """
    for path, stand_in in stand_ins(model, block):
        container = model.get_submodule(path)
        for name, _ in [*stand_in.named_parameters(recurse=False), *stand_in.named_buffers(recurse=False)]:
            setattr(stand_in, name, getattr(container, name))


def adopt(model: nn.Module, block: nn.Module) -> None:
    """Make the model's containers hold the parameters and buffers that a block cut from `model` holds now."""
    for path, stand_in in stand_ins(model, block):
        container = model.get_submodule(path)
        for name, tensor in [*stand_in.named_parameters(recurse=False), *stand_in.named_buffers(recurse=False)]:
            setattr(container, name, tensor)


def _members(module: nn.Module) -> dict[str, object]:
    parts = (module.named_children(), module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return {name: value for part in parts for name, value in part}


def _constants(module: nn.Module) -> dict[str, object]:
    simple = bool | int | float | str
    return {name: value for name, value in vars(module).items() if isinstance(value, simple) and name != "training"}


def _called(name: str) -> str:
    return repr(name) if name else "the model"
