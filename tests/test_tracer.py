"""What people write in forward, cut into blocks that compute the same, also for batches unlike the example's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import blocklocal as bll
from blocklocal.balance import measure
from blocklocal.block import Block
from blocklocal.candidates import candidates
from blocklocal.graph import deepest
from blocklocal.interpreter import Reads, storage_of
from blocklocal.split import cut
from blocklocal.values import arguments_of

Run = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Maps (B, 4, S, S) through a, b and c, one after the other, by a given forward pass."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.table: Tensor
        self.register_buffer("table", torch.linspace(0, 1, 12))
        self.rate = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def end(m: Net, h: Tensor) -> Tensor:
    return m.c(h.mean((2, 3)))


def asserts(m: Net, x: Tensor) -> Tensor:
    assert x.dim() == 4
    if x.shape[1] != 4 or x.dtype is None:
        raise ValueError("four channels are needed")
    return end(m, m.b(m.a(x)))


def rows(m: Net, x: Tensor) -> Tensor:
    batch, channels, *sides = x.shape
    h = m.a(x).flatten(2).transpose(1, 2)
    side = int(h.shape[1] ** 0.5)
    assert len(sides) == 2
    return end(m, m.b(h.transpose(1, 2).reshape(batch, channels, side, side)))


def functional_dropout(m: Net, x: Tensor) -> Tensor:
    return end(m, m.b(F.dropout(m.a(x), m.rate, training=m.training)))


def rate_of_the_mode(m: Net, x: Tensor) -> Tensor:
    h = m.a(x).flatten(2)
    return end(m, m.b(F.scaled_dot_product_attention(h, h, h, dropout_p=0.5 if m.training else 0.0).view_as(x)))


def zeros(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    pad = torch.zeros(h.shape[0], 4, 1, h.shape[3], device=h.device, dtype=h.dtype)
    return end(m, m.b(torch.cat([h, pad + torch.ones(1), torch.full_like(pad, 2.0)], 2)))


def positions(m: Net, x: Tensor) -> Tensor:
    where = torch.arange(x.shape[3], device=x.device)
    return end(m, m.b(m.a(x) + m.table[where] + m.table[: x.shape[2]].view(-1, 1)))


def made_on_the_fly(m: Net, x: Tensor) -> Tensor:
    return end(m, nn.ReLU(inplace=True)(m.b(nn.AvgPool2d(2)(m.a(x)))))


def assignment(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    h[:, 0] = 0
    h[:, 1] += h[:, 2]
    h = m.b(h)
    h[:, :, 0] *= 2
    return end(m, h)


def length_of_batch(m: Net, x: Tensor) -> Tensor:
    return end(m, m.b(m.a(x).view(len(x), 4, *x.shape[2:]) + m.table[:4].expand(len(x), -1).view(-1, 4, 1, 1)))


def input_again(m: Net, x: Tensor) -> Tensor:
    return end(m, F.interpolate(m.b(F.avg_pool2d(m.a(x), 2)), size=x.shape[2:]) + x)


def square_root(m: Net, x: Tensor) -> Tensor:
    h = m.b(m.a(x) / math.sqrt(x.shape[1]))
    return end(m, h * torch.finfo(h.dtype).eps ** 0.1)


def data_written_in_place(m: Net, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], x.shape[3])
    mask[0] = 0
    h = m.a(x) + mask
    mask.mul_(3)
    return end(m, m.b(h) + mask)


def unrolled(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    parts = [part * (i + 1) for i, part in enumerate(h.unbind(2))]
    return end(m, m.b(torch.stack(parts, 2)))


def sizes_and_device(m: Net, x: Tensor) -> Tensor:
    return end(m, m.b(m.a(x)) * torch.ones(x.shape[:2], device=x.device).cumsum(1)[..., None, None])


IDIOMS: list[Run] = [
    *(asserts, rows, functional_dropout, rate_of_the_mode, zeros, positions, made_on_the_fly, assignment),
    *(length_of_batch, input_again, square_root, data_written_in_place, unrolled),
    sizes_and_device,
]
FIXED = {rows, unrolled}  # in which the sides of the image are part of the course


def example(rows: int = 5, *, side: int = 6) -> Tensor:
    return torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(rows + side))


def composed(blocks: nn.Sequential, x: Any) -> Tensor:
    """What the blocks compute one after the other, each with the inputs that it asks for."""
    given, h = {"x": x} if isinstance(x, Tensor) else x, None
    for k, block in enumerate(blocks):
        assert isinstance(block, Block)
        h = block(*([] if k == 0 else [h]), *(given[name] for name in block.inputs[k > 0 :]))
    assert h is not None
    return h


def results(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    """Output and gradients of one pass with the same random numbers."""
    model.zero_grad()
    torch.manual_seed(0)
    y = call()
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("run", IDIOMS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("at", [["a"], ["b"], ["a", "b"]], ids="".join)
def test_blocks_compute_what_the_model_does(run: Run, at: list[str]) -> None:
    """In both modes, with gradients, for other batches than the example."""
    torch.manual_seed(0)
    model = Net(run)
    blocks = cut(model, at=at, example=example())
    for side in (6,) if run in FIXED else (6, 8):
        for count in (1, 5, 7):
            x = example(count, side=side)
            for training in (True, False):
                model.train(training)
                blocks.train(training)
                ours, plain = (
                    results(model, lambda x=x: composed(blocks, x.clone())),
                    results(model, lambda x=x: model(x)),
                )
                assert len(ours) == len(plain) == 7
                assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("run", IDIOMS, ids=lambda run: run.__name__)
def test_all_places_are_found(run: Run) -> None:
    assert candidates(Net(run), example=example()) == ["a", "b"]


@pytest.mark.parametrize("run", [rows, unrolled], ids=["rows", "unrolled"])
def test_another_course_than_the_example_s_is_refused(run: Run) -> None:
    blocks = cut(Net(run), at=["b"], example=example())
    with pytest.raises(ValueError, match=r"was traced with .* = (6|36|6\.0), as for example=, and .* this batch has"):
        composed(blocks, example(side=8))


def test_sizes_that_no_later_block_needs_the_input_for() -> None:
    """A size of the input is one of the features where it can be: then no other rank reads the input."""
    taken = {run.__name__: cut(Net(run), at=["b"], example=example())[1].inputs for run in IDIOMS}
    assert {name: inputs for name, inputs in taken.items() if inputs != ["h"]} == {
        "input_again": ["h", "x"],
        "data_written_in_place": ["h", "x"],
    }


def of_contents(m: Net, x: Tensor) -> Tensor:
    return end(m, m.b(m.a(x) if x.sum() > 0 else x))


def of_batch(m: Net, x: Tensor) -> Tensor:
    return end(m, m.b(torch.cat([m.a(part) for part in x.unbind(0)]).view_as(x)))


def of_item(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    return end(m, m.b(h) * (2 if h.mean().item() > 0 else 1))


def draws_for_all(m: Net, x: Tensor) -> Tensor:
    noise = torch.rand(4, 1, 1)
    return end(m, m.b(m.a(x) + noise) + noise)


def writes_its_input(m: Net, x: Tensor) -> Tensor:
    x.mul_(2)
    return end(m, m.b(m.a(x)) + x)


def filled_with_features(m: Net, x: Tensor) -> Tensor:
    kept = torch.zeros_like(x)
    kept[:, 1:] = m.a(x)[:, 1:]
    return end(m, m.b(m.a(x)) + kept)


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (of_contents, r"it asks for the value of gt\(x.sum\(\), 0\), which differs from batch to batch"),
        (of_item, r"it asks for the value of gt\(.*mean.*item\(\), 0\), which differs from batch to batch"),
        (of_batch, r"decides on len\(x.unbind\(0\)\), which differs with the size of the batch, 2 for example= and 3"),
        (draws_for_all, r"at='b': the value rand\(4, 1, 1\) bypasses the border"),
        (writes_its_input, r"at='b': the input 'x', the value mul_\(x, 2\) bypasses the border"),
        (filled_with_features, r"at='b': the value zeros_like\(x\) bypasses the border"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_what_is_refused(run: Run, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cut(Net(run), at=["b"], example=example())


class Rotary(nn.Module):
    """Reads the type of the features, and no value of them."""

    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, h: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        angles = where[..., None].to(h.dtype) + (h.mean() if self.reads else 0)
        return angles.cos(), angles.sin()


class Decoder(nn.Module):
    def __init__(self, *, reads: bool = False) -> None:
        super().__init__()
        self.words, self.rotary = nn.Embedding(11, 4), Rotary(reads=reads)
        self.layers, self.head = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, ids: Tensor, *, where: Tensor) -> dict[str, Any]:
        h = self.words(ids)
        cos, sin = self.rotary(h, where)
        for layer in self.layers:
            h = layer(h * cos).relu() + sin
        return {"logits": self.head(h), "hidden": h}


def decoder_inputs(rows: int = 2) -> dict[str, Tensor]:
    return {"ids": torch.randint(11, (rows, 5)), "where": torch.arange(5).expand(rows, 5).clone()}


def test_a_module_that_reads_no_values_of_the_features_gives_data() -> None:
    model, x = Decoder().eval(), decoder_inputs()
    assert candidates(model, example=x) == ["words", "layers.0", "layers.1", "layers.2"]
    blocks = cut(model, at=["layers.0", "layers.1"], example=x)
    assert [block.inputs for block in blocks] == [["ids", "where"], ["h", "where"], ["h", "where"]]  # type: ignore[union-attr]
    for given in (x, decoder_inputs(4)):
        assert torch.equal(composed(blocks, given), model(**given)["logits"])
    with pytest.raises(ValueError, match=r"at='layers.0': the value getitem\(rotary, 0\), .* bypasses the border"):
        cut(Decoder(reads=True), at=["layers.0"], example=x)


def test_freed_memory_is_not_taken_for_that_of_another_tensor() -> None:
    with Reads() as reads:
        for _ in range(50):
            _ = torch.zeros(1) + 1
    later = [torch.zeros(1) for _ in range(50)]
    assert reads.storages
    assert not reads.storages & {storage_of(tensor) for tensor in later}


class Scaled(nn.Module):
    """Returns its features in a tuple, with data that it passes on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, h: Tensor, mask: Tensor | None = None, *, twice: bool = False) -> tuple[Tensor, None]:
        h = self.linear(h)
        return (h if mask is None else h * mask * (2 if twice else 1)), None


class Wrapped(nn.Module):
    """Containers whose arguments have defaults, which are not those that they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.ModuleList(Scaled() for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x, mask=mask, twice=True)[0]
        return self.head(x)


def test_containers_are_traced_with_the_arguments_that_they_get() -> None:
    model, x = Wrapped(), {"x": torch.randn(3, 4), "mask": torch.ones(3, 4)}
    longer = {name: torch.cat([tensor, tensor[:1]]) for name, tensor in x.items()}
    assert deepest(model, arguments=arguments_of(model, x)).outputs.keys() >= {"inner.0", "inner.0.linear"}
    found = candidates(model, example=x)
    assert len(found) == 3
    for at in (found, ["inner.0", "inner.2"], ["inner.1.linear"]):
        blocks = cut(model, at=at, example=x)
        for given in (x, longer):
            assert torch.equal(composed(blocks, given), model(**given))


def test_a_block_that_is_cut_again() -> None:
    """As for a head behind a copy of its first unit."""
    loss = 0.1 * bll.Variational() + bll.Predictive(bll.Lookahead(refresh=2))
    x, y = example(), torch.tensor([0, 1, 2, 0, 1])
    for run in (asserts, functional_dropout):
        learner = bll.BlockLocal(Net(run), at=["a"], classes=3, example=x, loss=loss)
        assert learner.backward(x, y).isfinite().all()
    with pytest.raises(ValueError, match=r"Lookahead\(\) copies a unit of the next block, but the blocks read 'x'"):
        bll.BlockLocal(Net(input_again), at=["a"], classes=3, example=x, loss=loss)


def test_costs_of_segments_with_side_inputs() -> None:
    model, x = Wrapped(), {"x": torch.randn(3, 4), "mask": torch.ones(3, 4)}
    blocks = cut(model, at=["inner.0"], example=x)
    profile = measure(list(blocks), x["x"], sides=[[x["mask"]], [x["mask"]]], repetitions=1)
    assert all(cost.peak > 0 for cost in profile.segments)


def test_the_blocks_learn_what_the_model_would() -> None:
    """A stem that learns nothing in the model, since its values are detached, is told from one that a trace lost."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = h.detach() if isinstance(x, Tensor) else h  # traced, x is no Tensor
            return self.c(self.b(h).relu())

    with pytest.raises(
        ValueError, match=r"parameter 'a.(bias|weight)' gets a gradient in the blocks, but not in the m"
    ):
        bll.BlockLocal(Stem(), at=["b"], classes=3, example=torch.randn(3, 4))


def test_tensors_of_torch_are_made_as_before() -> None:
    """After a trace, and after one that fails."""
    functions = torch.zeros, torch.arange, torch.tensor, torch.finfo
    cut(Net(zeros), at=["a"], example=example())
    with pytest.raises(ValueError, match="asks for the value"):
        cut(Net(of_contents), at=["a"], example=example())
    assert functions == (torch.zeros, torch.arange, torch.tensor, torch.finfo)
    assert "len" not in globals()
