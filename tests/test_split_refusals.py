"""What is no chain, or would be frozen by tracing, is refused by name; what is inside uncut modules is left alone."""

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

import blocklocal as bll
from blocklocal.split import candidates


class Chain(nn.Module):
    """a, b, c in a row, by a given forward pass."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.extra = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def skip_connection(m: Chain, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(m.b(h)) + h


def second_skip(m: Chain, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(m.b(h)) + h


def input_again(m: Chain, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)) + x)


def size_again(m: Chain, x: Tensor) -> Tensor:
    n = x.shape[0]
    return m.c(m.b(m.a(x)).reshape(n, 2, 3).flatten(1))


@pytest.mark.parametrize(
    ("run", "value"),
    [
        (skip_connection, "the output of submodule 'a'"),
        (second_skip, r"the value tanh\(a\)"),
        (input_again, "the input 'x'"),
        (size_again, r"the value getitem\(getattr_1, 0\)"),
    ],
)
def test_a_value_that_bypasses_the_border_is_named(run: Callable[..., Tensor], value: str) -> None:
    with pytest.raises(ValueError, match=f"at='b': {value} bypasses the border, and only the output of 'b' may cross"):
        bll.split(Chain(run), at=["b"])


def test_a_skip_connection_inside_a_block_is_no_matter() -> None:
    assert len(bll.split(Chain(skip_connection), at=["a"])) == 2


def test_tied_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' of block 0 is also '2\.weight' of block 1: no border may"):
        bll.split(model, at=["1"])
    with pytest.raises(ValueError, match="'weight' of block 0 is also 'weight' of block 2"):
        bll.split(model)
    with pytest.raises(ValueError, match="can be cut at 0 places only, so 1 blocks at most"):
        bll.split(model, blocks=2, example=torch.randn(2, 6))


def test_a_parameter_of_a_container_read_on_both_sides_is_refused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(6))
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x @ self.weight)) @ self.weight

    with pytest.raises(ValueError, match="parameter 'weight' of block 0 is also 'weight' of block 1"):
        bll.split(Shared(), at=["a"])
    assert candidates(Shared()) == []


def test_a_submodule_called_twice_is_no_border() -> None:
    with pytest.raises(ValueError, match="at='a': a border needs a submodule called once, this one is called 2 times"):
        bll.split(Chain(lambda m, x: m.b(m.a(m.a(x)))), at=["a"])
    with pytest.raises(ValueError, match=r"at='extra': .* is called 0 times"):
        bll.split(Chain(lambda m, x: m.b(m.a(x))), at=["extra"])


def test_parameters_of_a_module_called_on_both_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\.weight' of block 0 is also 'a\.weight' of block 1"):
        bll.split(Chain(lambda m, x: m.a(m.b(m.a(x)))), at=["b"])


def test_where_no_border_can_stand() -> None:
    model = Chain(lambda m, x: m.c(m.b(m.a(x))))
    with pytest.raises(ValueError, match="at='d': Chain has no such submodule; it has a, b, c, extra"):
        bll.split(model, at=["d"])
    with pytest.raises(ValueError, match="at='c': no computation follows"):
        bll.split(model, at=["c"])
    with pytest.raises(ValueError, match="at='': Chain has no such submodule"):
        bll.split(model, at=[""])
    nested = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"at='0\.1': the same border as '0'"):
        bll.split(nested, at=["0", "0.1"])


def test_arguments_are_refused() -> None:
    model, x = zoo.perceptron()
    with pytest.raises(ValueError, match="at= and blocks= both say where to cut"):
        bll.split(model, at=["1"], blocks=2)
    with pytest.raises(ValueError, match=r"at='1': pass a list of submodules, at=\['1'\]"):
        bll.split(model, at="1")
    with pytest.raises(ValueError, match="where to cut Nested"):
        bll.split(zoo.Nested())
    with pytest.raises(ValueError, match="blocks=K measures the model: pass example="):
        bll.split(model, blocks=2)
    with pytest.raises(ValueError, match="Sequential can be cut at 2 places only, so 3 blocks at most"):
        bll.split(model, blocks=4, example=x)
    with pytest.raises(ValueError, match="balance='size': choose 'time', 'memory'"):
        bll.split(model, blocks=2, example=x, balance="size")  # type: ignore[arg-type]
    for blocks in (0, -1):
        with pytest.raises(ValueError, match="blocks >= 1"):
            bll.split(model, blocks=blocks, example=x)


def test_a_model_of_two_inputs_is_refused() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(x * mask))

    with pytest.raises(ValueError, match=r"Masked takes 2 inputs \(x, mask\): a chain has one"):
        bll.split(Masked(), at=["a"])


def test_training_dependent_forward_is_refused_where_cut_and_left_alone_elsewhere() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h + torch.randn_like(h) if self.training else h)

    with pytest.raises(ValueError, match=r"of Noisy takes another course in training.*nn\.Dropout"):
        bll.split(Noisy(), at=["a"])
    model = nn.Sequential(Noisy(), Noisy())
    with pytest.raises(ValueError, match="of Sequential or '0' takes another course"):
        bll.split(model, at=["0.a"])
    assert candidates(model) == ["0"]


@pytest.mark.parametrize("make", [lambda: torch.rand(6), lambda: torch.ones(6)], ids=["random", "constant"])
def test_a_tensor_out_of_nothing_would_be_frozen(make: Callable[[], Tensor]) -> None:
    model = Chain(lambda m, x: m.b(m.a(x) + make()))
    with pytest.raises(ValueError, match="of Chain makes a tensor that does not depend on its input: register it as a"):
        bll.split(model, at=["a"])
    assert not [name for name in vars(model) if "constant" in name]  # and the model is as it was
    assert candidates(nn.Sequential(model, nn.Linear(6, 4))) == ["0"]


def test_untraceable_containers_are_refused_by_name() -> None:
    model, _ = zoo.branching()
    with pytest.raises(
        ValueError, match=r"forward pass of Sequential or '1' cannot be traced .*cut outside it, or pass"
    ):
        bll.split(model, at=["1.relu"])
    with pytest.raises(ValueError, match="forward pass of Branching cannot be traced"):
        bll.split(zoo.Branching(6), blocks=2, example=torch.randn(2, 6))
