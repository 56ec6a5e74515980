"""Side inputs of blocks, such as masks: the blocks learn as in the model's own forward pass, to the bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import blocklocal as bll
from blocklocal.memory import MemoryTracker
from blocklocal.pipeline import Pipeline, balanced
from blocklocal.values import map_tensors

CLASSES, BATCH, LENGTH = 5, 6, 7
CUTS = ["layers.0", "layers.1", "layers.2"]


class Attention(nn.Module):
    """A pre-norm layer that reads a mask, and drops units."""

    def __init__(self, width: int, *, rate: float) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(rate)

    def forward(self, h: Tensor, *, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        return h + self.dropout(self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))


class Encoder(nn.Module):
    """As they are written: sizes read early and used late, a mask that every layer reads, an object returned."""

    def __init__(self, *, width: int = 8, rate: float = 0.1) -> None:
        super().__init__()
        self.rate = rate
        self.words, self.head = nn.Embedding(11, width), nn.Linear(width, CLASSES)
        self.places: Tensor
        self.register_buffer("places", torch.linspace(-1, 1, 16).unsqueeze(-1).expand(16, width).clone())
        self.layers = nn.ModuleList(Attention(width, rate=rate) for _ in range(4))

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor | None]:
        assert ids.dim() == 2
        batch, length = ids.shape
        h = self.words(ids)
        wide = h.shape
        if h.shape[1] > len(self.places):
            raise ValueError("too long")
        h = F.dropout(h + scale * self.places[:length], self.rate, training=self.training)
        kept = torch.ones(batch, length) if mask is None else mask.to(h.dtype)
        bias = torch.zeros(batch, 1, length).masked_fill(kept[:, None] == 0, torch.finfo(h.dtype).min)
        for layer in self.layers:
            h = layer(h, bias=bias)
        h = nn.Identity()(h).view(wide[0], wide[1], -1)
        pooled = (h * kept.view(batch, -1, 1)).sum(1) / kept.sum(1, keepdim=True)
        return {"loss": None, "logits": self.head(pooled)}


def batch(rows: int = BATCH, *, length: int = LENGTH, seed: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=draws)
    x = {
        "ids": torch.randint(11, (rows, length), generator=draws),
        "mask": (torch.arange(length) < lengths).long(),
    }
    return x, torch.randint(CLASSES, (rows,), generator=draws)


def learner(kind: type = bll.BlockLocal, *, x: Any = None, rate: float = 0.1, **settings) -> Any:
    torch.manual_seed(0)
    model = Encoder(rate=rate)
    torch.manual_seed(2)
    example = batch()[0] if x is None else x
    return kind(model, **{"at": CUTS, "classes": CLASSES, "example": example, **settings})


def as_dict(x: dict[str, Tensor]) -> Any:
    return x


def as_tuple(x: dict[str, Tensor]) -> Any:
    return x["ids"], x["mask"]


def with_constant(x: dict[str, Tensor]) -> Any:
    return {**x, "scale": 0.5}


def alone(x: dict[str, Tensor]) -> Any:
    return x["ids"]


FORMS = [as_dict, as_tuple, with_constant, alone]


def trained(ours: Any, form: Callable[[dict[str, Tensor]], Any], *, steps: int = 4) -> Tensor:
    """The losses of some steps, on batches of several sizes, the same numbers drawn for every learner."""
    torch.manual_seed(3)
    optimizers = [torch.optim.AdamW(ours.block_parameters(k), lr=0.01) for k in range(4)]
    losses = []
    for step in range(steps):
        x, y = batch(BATCH - step % 2, length=LENGTH + step % 3, seed=step)
        losses.append(ours.backward(form(x), y, optimizers=optimizers))
    return torch.stack(losses)


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{}, {"add_beliefs": True}], ids=["", "beliefs"])
def test_as_in_the_model_s_own_forward_pass(form: Callable, settings: dict) -> None:
    """Losses, weights after steps, every exit, diagnostics, at other batch sizes and lengths than the example's."""
    x, y = batch()
    chain, hooked = (learner(kind, x=form(x), **settings) for kind in (bll.BlockLocal, bll.Hooked))
    assert torch.equal(trained(chain, form), trained(hooked, form))
    assert equal(chain.model, hooked.model)
    assert equal(chain.borders, hooked.borders)
    for ours in (chain, hooked):
        ours.eval()
        ours.fit_exits([(form(x), y)])
    for exit in (0, 1, 2, 3, None, "all"):
        assert torch.equal(chain.predict(form(x), exit=exit), hooked.predict(form(x), exit=exit))
    assert torch.equal(chain.predict(form(x), confidence=0.25), hooked.predict(form(x), confidence=0.25))
    assert chain.diagnose(form(x), y) == hooked.diagnose(form(x), y)
    assert torch.equal(chain.predictor()(form(x)), chain.predict(form(x)))


def test_a_block_gets_what_it_reads() -> None:
    ours = learner()
    assert [ours.side_inputs.read_by(k) for k in range(4)] == [[], ["mask"], ["mask"], ["mask"]]
    plain = learner(x=alone(batch()[0]))
    assert plain.side_inputs.all() == []  # the sizes that the layers read are those of the features
    x, y = batch()
    _, h = ours.local(0, x, y)
    with pytest.raises(ValueError, match="block 1 reads 'mask' of the model's inputs: pass x="):
        ours.local(1, h, y)
    assert ours.local(1, h, y, x=x)[0].isfinite()


def test_blocks_are_isolated() -> None:
    ours = learner()
    for k, loss in enumerate(ours(*batch())):
        ours.zero_grad()
        loss.backward()
        reached = {id(p) for p in ours.parameters() if p.grad is not None}
        assert reached == {id(p) for p in ours.block_parameters(k)}


def test_memory_is_that_of_one_block() -> None:
    """The peak of a step beside that of the hooks, and beside backpropagation."""
    (x, y), peaks = batch(64), []
    for ours in (learner(), learner(bll.Hooked), learner(blocks=1, at=None)):
        blocks = len(ours.borders) + 1
        optimizers = [torch.optim.SGD(ours.block_parameters(k), lr=0.1) for k in range(blocks)]
        ours.backward(x, y, optimizers=optimizers)
        with MemoryTracker() as tracker:
            ours.backward(x, y, optimizers=optimizers)
        peaks.append(tracker.timeline.peak)
    assert peaks[0] <= 1.05 * peaks[1]
    assert peaks[0] < 0.7 * peaks[2]


def test_cuts_are_found_and_measured() -> None:
    x, y = batch()
    chain, hooked = learner(at=None, blocks=4), learner(bll.Hooked, at=None, blocks=4)
    assert len(chain.blocks) == len(hooked.cuts) + 1 == 4
    assert chain.backward(x, y).isfinite().all()


@pytest.mark.parametrize("context", [lambda: torch.autocast("cpu", torch.bfloat16)], ids=["autocast"])
def test_mixed_precision(context: Callable) -> None:
    with context():
        found = [trained(ours, as_dict) for ours in (learner(), learner(bll.Hooked))]
    assert torch.equal(*found)


def test_copies_and_files() -> None:
    """A copied and a pickled learner learn on as the first one does."""
    ours = learner()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    others = [copy.deepcopy(ours), torch.load(file, weights_only=False)]
    expected = trained(ours, as_dict)
    for other in others:
        assert torch.equal(trained(other, as_dict), expected)
        assert equal(other.model, ours.model)
        assert torch.equal(other.eval().predict(batch()[0]), ours.eval().predict(batch()[0]))


def test_an_exported_predictor() -> None:
    ours, (x, _) = learner().eval(), batch()
    exported = torch.export.export(ours.predictor(exit=1).eval(), (x,))
    assert torch.equal(exported.module()(x), ours.predict(x, exit=1))


@pytest.mark.slow
def test_compiled_blocks() -> None:
    x, y = batch()
    ours, plain = learner().eval(), learner().eval()
    ours.compile(backend="aot_eager")
    for loss, expected in zip(ours(x, y), plain(x, y), strict=True):
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.predict(x), plain.predict(x))


def test_inputs_unlike_the_example_are_refused() -> None:
    ours, (x, y) = learner(x=with_constant(batch()[0])), batch()
    before = [parameter.clone() for parameter in ours.parameters()]

    def refused(given: Any, match: str, kind: type[Exception] = ValueError) -> None:
        for use in (lambda: ours.backward(given, y), lambda: ours.predict(given)):
            with pytest.raises(kind, match=match):
                use()

    refused(x, "input 'scale' of x is None, but that of example= was 0.5")
    refused({**x, "scale": 2.0}, "input 'scale' of x is 2.0, but that of example= was 0.5")
    refused({"ids": x["ids"], "scale": 0.5}, "input 'mask' of x is None, but that of example= was a tensor")
    refused({**x, "scale": 0.5, "more": y}, "input 'more' of x is a tensor, but")
    refused({**x, "scale": 0.5, "mask": y}, r"input 'mask' of x has shape \(6,\), but example= had \(6, 7\)")
    refused(x["ids"], "x is a tensor of shape .*: pass a dict of inputs, as example= was", TypeError)
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def batches() -> list[tuple[dict[str, Tensor], Tensor]]:
    return [batch(BATCH - (step == 10), seed=step) for step in range(11)]


def quiet(kind: type = bll.BlockLocal) -> Any:
    """Without dropout, whose draws a pipeline makes from a seed of its own."""
    return learner(kind, rate=0.0)


def state(ours: Any, blocks: list[int]) -> dict[str, Tensor]:
    return {f"{k}.{i}": p.detach() for k in blocks for i, p in enumerate(ours.block_parameters(k))}


def in_processes(rank: int, options: dict) -> dict[str, Tensor]:
    mine = quiet()
    pipeline = Pipeline(mine, optimizer=optimizer, **options)
    losses = torch.cat(list(pipeline.train((x if pipeline.reads_inputs else None, y) for x, y in batches())))
    x, y = batch()
    predictions = next(iter(pipeline.predict([(x, y)])))
    reports = pipeline.diagnose(x, y)
    found = {f"loss{k}": losses[:, i] for i, k in enumerate(pipeline.blocks)}
    found |= {f"exit{k}": predictions[i] for i, k in enumerate(pipeline.blocks)}
    found |= {f"report{k}": torch.tensor(list(report.values())) for k, report in reports.items()}
    return found | state(mine, pipeline.blocks)


def in_one(kind: type) -> dict[str, Tensor]:
    mine = quiet(kind)
    optimizers = [optimizer(mine.block_parameters(k)) for k in range(4)]
    losses = torch.stack([mine.backward(x, y, optimizers=optimizers) for x, y in batches()])
    mine.eval()
    x, y = batch()
    found = {f"loss{k}": losses[:, k] for k in range(4)} | {f"exit{k}": mine.predict(x, exit=k) for k in range(4)}
    found |= {f"report{k}": torch.tensor(list(report.values())) for k, report in enumerate(mine.diagnose(x, y))}
    return found | state(mine, [0, 1, 2, 3])


@pytest.mark.parametrize(("count", "options"), [(1, {}), (2, {"window": 3}), (2, {"placement": [0, 1, 1, 1]})])
def test_processes_learn_as_one_to_the_bit(count: int, options: dict, tmp_path: Path) -> None:
    parts = processes.run(in_processes, processes=count, folder=tmp_path, arguments=(options,))
    found = {name: tensor for part in parts for name, tensor in part.items()}
    for kind in (bll.BlockLocal, bll.Hooked):
        expected = in_one(kind)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def misused(rank: int) -> Tensor:
    mine = quiet()
    pipeline = Pipeline(mine, optimizer=optimizer, timeout=60)
    assert pipeline.reads_inputs
    before = state(mine, pipeline.blocks)
    x, y = batch()
    with pytest.raises(ValueError, match=r"a minibatch without x: (the rank of block 0|rank 1, for its side inputs,)"):
        list(pipeline.train([(None, y)]))
    with pytest.raises(ValueError, match="input 'mask' of x is None, but"):
        list(pipeline.train([({"ids": x["ids"]}, y)]))
    assert balanced(mine, x, y).size == 2
    other = x if rank == 0 else {**x, "mask": torch.ones_like(x["mask"])}
    if rank == 0:  # whose message nobody takes
        with suppress(RuntimeError):
            list(pipeline.train([(x, y)]))
    else:
        with pytest.raises(ValueError, match="rank 0 reads other targets or side inputs"):
            list(pipeline.train([(other, y)]))
        assert all(torch.equal(p, before[name]) for name, p in state(mine, pipeline.blocks).items())
    return torch.tensor(rank)


def test_ranks_that_read_other_side_inputs_are_told(tmp_path: Path) -> None:
    assert processes.run(misused, processes=2, folder=tmp_path)


def replicated(rank: int) -> dict[str, Tensor]:
    """Two replicas of both ranks, each with its half of a minibatch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("block", "data"))
    mine = quiet()
    pipeline = Pipeline(mine, optimizer=optimizer, mesh=mesh)
    half = slice(rank % 2, None, 2)
    for _ in pipeline.train((map_tensors(lambda t: t[half], x), y[half]) for x, y in batches()[:8]):
        pass
    return state(mine, pipeline.blocks)


@pytest.mark.slow
def test_replicas_learn_from_their_shares(tmp_path: Path) -> None:
    parts = processes.run(replicated, processes=4, folder=tmp_path)
    mine = quiet()
    optimizers = [optimizer(mine.block_parameters(k)) for k in range(4)]
    for x, y in batches()[:8]:
        mine.backward(x, y, optimizers=optimizers)
    expected = state(mine, [0, 1, 2, 3])
    for part in parts:
        for name, tensor in part.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
