"""What is no chain, or would be frozen by tracing, is refused by name; what is inside uncut modules is left alone."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import zoo
from torch import Tensor, nn

import blocklocal as bll
from blocklocal.candidates import candidates


class Chain(nn.Module):
    """a, b, c in a row, by a given forward pass."""

    steps: int
    total: Tensor

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
    with pytest.raises(ValueError, match=r"at 0 places only, .*two uses of '0.weight', which is '2.weight' too"):
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
    with pytest.raises(
        ValueError, match="at='a': a border needs a submodule called once, but this one is called 2 times"
    ):
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


def test_a_model_of_two_inputs_needs_an_example() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.b(self.a(x * mask))

    with pytest.raises(ValueError, match=r"Masked takes 2 inputs \(x, mask\): pass example="):
        bll.split(Masked(), at=["a"])


def test_training_dependent_forward_is_refused_where_cut_and_left_alone_elsewhere() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h + torch.randn_like(h) if self.training else h)

    with pytest.raises(ValueError, match=r"of Noisy differs between training and evaluation.*nn\.Dropout"):
        bll.split(Noisy(), at=["a"])
    model = nn.Sequential(Noisy(), Noisy())
    with pytest.raises(ValueError, match="of Sequential or '0' differs between training"):
        bll.split(model, at=["0.a"])
    assert candidates(model) == ["0"]


def test_a_tensor_out_of_nothing_would_be_frozen() -> None:
    """From a function that nobody sees; those of torch are recorded, see test_tracer.py."""
    ones = torch.ones
    model = Chain(lambda m, x: m.b(m.a(x) + ones(6)))
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


def stepping(m: Chain, x: Tensor) -> Tensor:
    m.steps += 1
    return m.b(m.a(x))


def remembering(m: Chain, x: Tensor) -> Tensor:
    m.last = m.a(x)
    return m.b(m.last)


def counting(m: Chain, x: Tensor) -> Tensor:
    m.total += 1
    return m.b(m.a(x) * m.total)


@pytest.mark.parametrize(
    ("run", "name"), [(stepping, "steps"), (remembering, "last"), (counting, "total")], ids=["steps", "last", "total"]
)
def test_an_attribute_that_is_changed_would_be_lost(run: Callable[..., Tensor], name: str) -> None:
    model = Chain(run)
    model.steps = 0
    model.register_buffer("total", torch.zeros(6))
    with pytest.raises(ValueError, match=f"of Chain changes its attribute '{name}', which a traced block would not"):
        bll.split(model, at=["a"])
    assert model.steps == 0
    assert not hasattr(model, "last")
    assert torch.equal(model.total, torch.zeros(6))
    assert candidates(nn.Sequential(model, nn.Linear(6, 4))) == ["0"]


rand = torch.rand  # as it was imported, which no trace sees


@pytest.mark.parametrize("draw", [random.random, lambda: rand(1).item()], ids=["python", "torch"])
def test_a_draw_would_be_frozen(draw: Callable[[], float]) -> None:
    """As of which layers to skip in this step: no trace shows it where nothing happens to be skipped."""
    model = Chain(lambda m, x: m.c(m.b(m.a(x)) if not m.training or draw() > 0 else m.a(x)))
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(ValueError, match="of Chain draws random numbers that a trace would freeze"):
        bll.split(model, at=["a"])
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "half": lambda: torch.autocast("cpu", torch.float16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.parametrize(
    "around", [nullcontext, torch.no_grad, CONTEXTS["autocast"]], ids=["no", "no_grad", "autocast"]
)
def test_a_context_would_be_lost(name: str, around: Callable[[], AbstractContextManager]) -> None:
    """A frozen stem would train, and a layer in single precision compute in half."""

    def run(m: Chain, x: Tensor) -> Tensor:
        with CONTEXTS[name]():
            h = m.a(x).float()
        return m.c(m.b(h))

    with around(), pytest.raises(ValueError, match=r"Chain cannot be traced \(it enters a context, such as torch.no_g"):
        bll.split(Chain(run), at=["b"])
    model, x = nn.Sequential(Chain(run), nn.Linear(6, 4)), torch.randn(2, 6)
    assert candidates(model) == ["0"]
    with torch.no_grad():
        assert torch.equal(bll.split(model, at=["0"])(x), model(x))


def test_a_decorated_forward_pass_is_a_context_too() -> None:
    class Frozen(Chain):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    with pytest.raises(ValueError, match="it enters a context"):
        bll.split(Frozen(lambda m, x: m.b(m.a(x))), at=["a"])


def test_running_statistics_on_both_sides_are_refused() -> None:
    norm = nn.BatchNorm1d(6, affine=False)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 6), norm, nn.Linear(6, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match="running statistics '1' of block 0 is also '1' of block 1: no border may"):
        bll.split(model, at=["2"])
    assert candidates(model) == ["0", "4"]  # none between the two uses
    norm.track_running_stats = False
    assert len(bll.split(model, at=["2"])) == 2


def test_a_sequential_with_a_forward_pass_of_its_own_is_no_chain() -> None:
    class Doubled(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(ValueError, match="where to cut Doubled"):
        bll.split(Doubled(nn.Linear(6, 6), nn.Linear(6, 4)))
    model, x = Doubled(nn.Linear(6, 6), nn.Linear(6, 4)), torch.randn(2, 6)
    assert torch.equal(bll.split(model, at=["0"])(x), model(x))


def test_blocks_that_predict_otherwise_than_the_model_are_refused() -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        return m.b(m.a(x if isinstance(x, Tensor) else 2 * x))  # traced, x is no Tensor

    with pytest.raises(ValueError, match=r"the blocks' prediction for example= differs from the model's by up to"):
        bll.BlockLocal(Chain(run), at=["a"], classes=6, example=torch.randn(2, 6))


def test_a_model_that_draws_is_compared_on_the_same_draws() -> None:
    def run(m: Chain, x: Tensor) -> Tensor:
        return m.b(nn.functional.dropout(m.a(x), 0.5))

    x = torch.ones(2, 6)
    assert not torch.equal(Chain(run)(x), Chain(run)(x))
    learner = bll.BlockLocal(Chain(run), at=["a"], classes=6, example=x)
    assert learner.backward(x, torch.tensor([0, 5])).isfinite().all()


class Keeps(nn.Module):
    def __init__(self, kept: dict[str, Tensor], *, writes: bool, detach: bool = False) -> None:
        super().__init__()
        self.linear, self.kept, self.writes, self.detach = nn.Linear(6, 6), kept, writes, detach

    def forward(self, h: Tensor) -> Tensor:
        h = self.linear(h)
        if self.writes:
            self.kept["h"] = h.detach() if self.detach else h
            return h
        return h + self.kept["h"]


def test_a_gradient_beside_the_features_is_refused() -> None:
    kept: dict[str, Tensor] = {}
    blocks = [Keeps(kept, writes=True), nn.Linear(6, 6), Keeps(kept, writes=False), nn.Linear(6, 4)]
    for model in (blocks, nn.Sequential(*blocks)):
        with pytest.raises(ValueError, match=r"block 2 reads a value that depends on parameter 'linear.weight' of blo"):
            bll.BlockLocal(model, classes=4, example=torch.randn(2, 6))
    assert bll.BlockLocal(nn.Sequential(*blocks), at=["2"], classes=4, example=torch.randn(2, 6))
    blocks[0] = Keeps(kept, writes=True, detach=True)
    assert bll.BlockLocal(blocks, classes=4, example=torch.randn(2, 6))
