"""Blocks that live elsewhere learn the same to the bit; what would need them all at once is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

import blocklocal as bll
from blocklocal.offload import Offloaded, Store
from blocklocal.pipeline.materialize import materialize
from blocklocal.pipeline.stage import LocalStep

CLASSES = 3
Make = Callable[[], bll.BlockLocal]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices, others = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-2)


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
OPTIMIZERS = {
    "sgd": SGD,
    "adamw": adamw,
    "amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),  # it has a state before its first step
    "adafactor": partial(torch.optim.Adafactor, lr=0.1),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "rprop": partial(torch.optim.Rprop, lr=1e-2),
}


def convolutions() -> nn.Sequential:
    def unit(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1))

    return nn.Sequential(unit(2), unit(8), unit(8), nn.Flatten(), nn.Linear(8 * 16, CLASSES))


class Traced(nn.Module):
    """A model that is cut within a container, which holds a parameter and a buffer of its own."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, CLASSES)
        self.shift = nn.Parameter(torch.randn(16))
        self.register_buffer("scale", torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.second((self.first(x) + self.shift).relu() * self.scale)
        return self.last(h.tanh() * self.scale)


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return torch.randn(12, *shape, generator=draws), torch.arange(12) % CLASSES


IMAGES, ROWS = batch(2, 4, 4), batch(8)


def built(build: Callable[[], nn.Module], x: Tensor, **settings) -> bll.BlockLocal:
    torch.manual_seed(3)
    return bll.BlockLocal(build(), classes=CLASSES, example=x, **settings)


def channels_last() -> bll.BlockLocal:
    return images().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


images = partial(built, convolutions, IMAGES[0], at=["0", "1", "2"])
rows = partial(built, Traced, ROWS[0], at=["first", "second"])


@pytest.fixture(params=["host", "files"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = bll.HostStore() if request.param == "host" else bll.FileStore(tmp_path / "blocks")
    yield made
    if isinstance(made, bll.FileStore):
        made.close()


def in_memory(learner: bll.BlockLocal, optimizer) -> list[torch.optim.Optimizer]:
    return [optimizer(learner.block_parameters(k)) for k in range(len(learner.blocks))]


def stepping(offloaded: Offloaded) -> list[torch.optim.Optimizer]:
    return [one for one in offloaded.optimizers if one is not None]


def assert_same_state(ours: bll.BlockLocal, optimizers, plain: bll.BlockLocal, others) -> None:
    """Weights, buffers and the states of all optimizers, to the bit."""
    state = plain.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    names = {p: name for name, p in ours.named_parameters()}
    parameters = dict(plain.named_parameters())
    for own, other in zip(optimizers, others, strict=True):
        assert own.state.keys() or not other.state.keys()
        for parameter, kept in own.state.items():
            known = other.state[parameters[names[parameter]]]
            assert kept.keys() == known.keys()
            for key, value in kept.items():
                same = torch.equal(value, known[key]) if isinstance(value, Tensor) else value == known[key]
                assert same, (names[parameter], key)


def assert_learns_the_same(make: Make, data: tuple[Tensor, Tensor], store: Store, optimizer, *, steps: int = 4) -> None:
    plain, ours = make(), make()
    others = in_memory(plain, optimizer)
    offloaded = ours.offload(store, optimizer=optimizer)
    losses = []
    for learner, optimizers in ((plain, others), (ours, offloaded.optimizers)):
        torch.manual_seed(7)  # of dropout
        losses.append([learner.backward(*data, optimizers=optimizers) for _ in range(steps)])
    assert torch.equal(*map(torch.stack, losses))
    offloaded.end()
    assert_same_state(ours, offloaded.optimizers, plain, others)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_the_same(name: str, store: Store) -> None:
    assert_learns_the_same(images, IMAGES, store, OPTIMIZERS[name])


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (rows, ROWS),
        (partial(images, loss=bll.BLL_PAPER), IMAGES),
        (partial(rows, loss=bll.Variational() + bll.Predictive(), feedback=bll.GradientFeedback()), ROWS),
        (partial(rows, add_beliefs=True, loss=bll.Predictive() + bll.Posterior()), ROWS),
        (partial(images, loss=bll.PRED_SIM), IMAGES),
        (
            channels_last,
            (IMAGES[0].to(memory_format=torch.channels_last), IMAGES[1]),
        ),
        (lambda: rows().to(torch.bfloat16), (ROWS[0].bfloat16(), ROWS[1])),
    ],
    ids=["traced", "paper", "gradient feedback", "beliefs", "pred-sim", "channels last", "bf16"],
)
def test_every_kind_of_border_learns_the_same(make: Make, data: tuple[Tensor, Tensor], store: Store) -> None:
    assert_learns_the_same(make, data, store, adamw)


def test_schedules_autocast_and_a_scaler(store: Store) -> None:
    plain, ours = images(), images()
    others = in_memory(plain, SGD)
    offloaded = ours.offload(store, optimizer=SGD)
    for learner, optimizers in ((plain, others), (ours, stepping(offloaded))):
        torch.manual_seed(7)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        schedules = [torch.optim.lr_scheduler.ExponentialLR(one, gamma=0.5) for one in optimizers]
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                learner.backward(*IMAGES, optimizers=optimizers, scaler=scaler)
            scaler.update()
            for schedule in schedules:
                schedule.step()
    offloaded.end()
    assert stepping(offloaded)[0].param_groups[0]["lr"] == 0.1 / 8
    assert_same_state(ours, offloaded.optimizers, plain, others)


def test_predictions_and_diagnoses_are_those_of_the_whole_learner(store: Store) -> None:
    plain, ours = images(), images()
    ours.offload(store)  # with nothing to train
    for learner in (plain, ours):
        torch.manual_seed(7)
        learner.predict(IMAGES[0])  # in training mode, which changes statistics of batch normalisation
        learner.eval()
    held_out = [(IMAGES[0][:8], IMAGES[1][:8])]
    assert plain.fit_exits(held_out) == ours.fit_exits(held_out)
    choices: list[dict[str, Any]] = [{}, {"exit": 1}, {"exit": "all"}, {"confidence": 0.36}]
    for choice in choices:
        assert torch.equal(plain.predict(IMAGES[0], **choice), ours.predict(IMAGES[0], **choice))
    assert all(map(torch.equal, plain.exits(IMAGES[0]), ours.exits(IMAGES[0])))
    assert plain.diagnose(*IMAGES) == ours.diagnose(*IMAGES)
    with torch.inference_mode():
        assert torch.equal(plain.predict(IMAGES[0]), ours.predict(IMAGES[0]))
    with torch.no_grad():
        assert all(map(torch.equal, plain(*IMAGES), ours(*IMAGES)))
    assert ours.offloaded is not None
    ours.offloaded.end()
    assert_same_state(ours, [], plain, [])


def test_a_loop_of_ones_own(store: Store) -> None:
    plain, ours = rows(), rows()
    others = in_memory(plain, SGD)
    offloaded = ours.offload(store, optimizer=SGD)
    for learner, optimizers in ((plain, others), (ours, stepping(offloaded))):
        for _ in range(3):
            h = ROWS[0]
            for k, one in enumerate(optimizers):
                loss, h = learner.local(k, h, ROWS[1])
                loss.backward()
                nn.utils.clip_grad_norm_(learner.block_parameters(k), 0.5)
                one.step()
                one.zero_grad()
    offloaded.end()
    assert_same_state(ours, offloaded.optimizers, plain, others)


def in_memory_bytes(learner: bll.BlockLocal, optimizers) -> int:
    tensors = [*learner.parameters(), *learner.buffers(), *(p.grad for p in learner.parameters() if p.grad is not None)]
    tensors += [t for one in optimizers for kept in one.state.values() for t in kept.values() if isinstance(t, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    def wide() -> nn.Sequential:
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)), nn.Linear(64, CLASSES))

    ours = built(wide, torch.randn(2, 64), loss=bll.Predictive("linear"))
    offloaded = ours.offload(bll.FileStore(tmp_path / "blocks"), optimizer=adamw)
    seen: list[int] = []
    for one in stepping(offloaded):
        one.register_step_post_hook(lambda *_: seen.append(in_memory_bytes(ours, offloaded.optimizers)))
    for _ in range(3):
        ours.backward(torch.randn(4, 64), torch.tensor([0, 1, 2, 0]), optimizers=offloaded.optimizers)
    largest = max(sum(p.nbytes for p in ours.block_parameters(k)) for k in range(7))
    assert 3 * largest < max(seen) < 4 * largest + 2000  # weights, gradients, two moments; some numbers of the others
    assert [p.shape for p in ours.parameters()] == [
        p.shape for p in built(wide, torch.randn(2, 64), loss=bll.Predictive("linear")).parameters()
    ]


def on_meta(build: Callable[[], nn.Module], x: Tensor, **settings) -> bll.BlockLocal:
    with torch.device("meta"):
        model = build()
    return bll.BlockLocal(model, classes=CLASSES, example=x.to("meta"), **settings)


meta_images = partial(on_meta, convolutions, IMAGES[0], at=["0", "1", "2"])


def test_a_model_on_meta_begins_as_in_a_pipeline(store: Store) -> None:
    plain, ours = meta_images(), meta_images()
    for k in range(4):
        materialize(LocalStep(plain, k), device=torch.device("cpu"), seed=11)
    others = in_memory(plain, adamw)
    offloaded = ours.offload(store, optimizer=adamw, seed=11)
    for learner, optimizers in ((plain, others), (ours, offloaded.optimizers)):
        torch.manual_seed(7)
        for _ in range(3):
            learner.backward(*IMAGES, optimizers=optimizers)
    offloaded.end()
    assert_same_state(ours, offloaded.optimizers, plain, others)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True))


def test_a_model_on_meta_begins_with_given_weights(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(4)
    weights = convolutions().state_dict()
    torch.save(weights, tmp_path / "weights.pt")
    ours = meta_images()
    ours.offload(store, weights=torch.load(tmp_path / "weights.pt", mmap=True))
    model = convolutions()
    model.load_state_dict(weights)
    assert torch.equal(ours.eval().predict(IMAGES[0]), model.eval()(IMAGES[0]))


REFUSED_WEIGHTS = {
    "missing": (lambda state: state.pop("0.0.weight"), "'0.0.weight'"),
    "unknown": (lambda state: state.update(other=torch.zeros(1)), "'other'"),
    "another shape": (lambda state: state.update({"4.bias": torch.zeros(7)}), "4.bias"),
}


@pytest.mark.parametrize("name", REFUSED_WEIGHTS)
def test_weights_of_another_model_are_refused(name: str) -> None:
    change, said = REFUSED_WEIGHTS[name]
    state, ours = convolutions().state_dict(), meta_images()
    change(state)
    with pytest.raises(ValueError, match=said):
        ours.offload(bll.HostStore(), weights=state)
    assert ours.offloaded is None
    assert all(tensor.is_meta for tensor in ours.parameters())


def offloaded_rows(store: Store | None = None) -> tuple[bll.BlockLocal, Offloaded]:
    ours = rows()
    return ours, ours.offload(bll.HostStore() if store is None else store, optimizer=SGD)


REFUSED: dict[str, Callable[[bll.BlockLocal, Offloaded], object]] = {
    "all graphs at once": lambda ours, _: ours(*ROWS),
    "no optimizers": lambda ours, _: ours.backward(*ROWS),
    "accumulation": lambda ours, _: ours.backward(*ROWS, scale=0.5),
    "other optimizers": lambda ours, _: ours.backward(*ROWS, optimizers=in_memory(ours, SGD)),
    "the model": lambda ours, _: ours.model(ROWS[0]),
    "a predictor": lambda ours, _: ours.predictor(),
    "compiling": lambda ours, _: ours.compile(),
    "conversion": lambda ours, _: ours.double(),
    "again": lambda ours, _: ours.offload(bll.HostStore()),
    "the state dict": lambda ours, _: ours.state_dict(),
    "the model's state dict": lambda ours, _: ours.model.state_dict(),
    "a block's state dict": lambda ours, _: ours.blocks[0].state_dict(),
    "loading": lambda ours, _: ours.load_state_dict(rows().state_dict()),
    "loading the model": lambda ours, _: ours.model.load_state_dict(Traced().state_dict()),
    "a step out of turn": lambda _, offloaded: stepping(offloaded)[0].step(),
    "a copy": lambda ours, _: copy.deepcopy(ours),
    "a copy of the model": lambda ours, _: copy.deepcopy(ours.model),
    "pickling": lambda ours, _: pickle.dumps(ours),
    "saving what does not last": lambda _, offloaded: offloaded.save(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_all_blocks_is_refused_and_changes_nothing(name: str) -> None:
    plain, (ours, offloaded) = rows(), offloaded_rows()
    others = in_memory(plain, SGD)
    plain.backward(*ROWS, optimizers=others)
    ours.backward(*ROWS, optimizers=offloaded.optimizers)
    with pytest.raises((ValueError, TypeError), match=r"offload|outlive") as caught:
        REFUSED[name](ours, offloaded)
    assert "\n" not in str(caught.value)
    plain.backward(*ROWS, optimizers=others)
    ours.backward(*ROWS, optimizers=offloaded.optimizers)
    offloaded.end()
    assert_same_state(ours, offloaded.optimizers, plain, others)
    assert torch.equal(ours.model(ROWS[0]), plain.model(ROWS[0]))
    copy.deepcopy(ours)  # nothing is left of it
    with pytest.raises(ValueError, match="ended"):
        offloaded.save()


def test_gradients_that_no_optimizer_used_do_not_leave() -> None:
    ours, offloaded = offloaded_rows()
    loss, h = ours.local(0, *ROWS)
    loss.backward()
    with pytest.raises(ValueError, match=r"'blocks\.0\.\S+' has a gradient"):
        ours.local(1, h, ROWS[1])
    stepping(offloaded)[0].step()
    stepping(offloaded)[0].zero_grad()
    ours.local(1, h, ROWS[1])


def test_weights_written_while_elsewhere_are_not_lost_without_a_word() -> None:
    ours, offloaded = offloaded_rows()
    nn.init.zeros_(ours.blocks[1].get_parameter("second.bias"))
    with pytest.raises(ValueError, match=r"'blocks\.1\.second\.bias' was written to"):
        ours.backward(*ROWS, optimizers=offloaded.optimizers)


def shared() -> bll.BlockLocal:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight.data = first.weight.data
    return built(lambda: nn.Sequential(first, nn.ReLU(), second, nn.Linear(8, CLASSES)), ROWS[0], at=["2"])


class Stuck(nn.Linear):
    reset_parameters = None  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = nn.Parameter(torch.ones(8, 8)), None
        self.in_features = self.out_features = 8


class Replacing(nn.Linear):
    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.ones(8, 8))


def with_gradient() -> bll.BlockLocal:
    ours = rows()
    ours.backward(*ROWS)
    return ours


def chain_of(*modules: Callable[[], nn.Module]) -> Make:
    return partial(
        on_meta, lambda: nn.Sequential(*(make() for make in modules), nn.Linear(8, CLASSES)), ROWS[0], at=["0"]
    )


UNFIT: dict[str, tuple[Make, dict, str]] = {
    "no store": (rows, {"store": "folder"}, "store"),
    "a class": (rows, {"store": bll.HostStore}, "store"),
    "no optimizer": (rows, {"optimizer": "sgd"}, "optimizer"),
    "a function of something else": (rows, {"optimizer": lambda parameters: parameters}, "optimizer"),
    "an optimizer with a closure": (rows, {"optimizer": torch.optim.LBFGS}, "optimizer"),
    "a missing device": (rows, {"device": "nowhere"}, "device"),
    "a seed": (rows, {"seed": -1}, "seed"),
    "nothing to resume": (rows, {"resume": True}, "resume"),
    "weights for a real model": (rows, {"weights": {}}, "weights"),
    "shared memory": (shared, {}, "share memory"),
    "a gradient": (with_gradient, {}, "gradient"),
    "lookahead": (partial(images, at=["0", "1"], loss=1.0 * bll.Predictive(bll.Lookahead())), {}, "Lookahead"),
    "no reset_parameters": (chain_of(Stuck), {}, "reset_parameters"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_cannot_be_offloaded_is_refused_and_changes_nothing(name: str) -> None:
    make, settings, said = UNFIT[name]
    ours = make()
    before = {name: tensor.clone() for name, tensor in (*ours.named_parameters(), *ours.named_buffers())}
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        ours.offload(**{"store": bll.HostStore(), "optimizer": SGD} | settings)
    assert "\n" not in str(caught.value)
    assert ours.offloaded is None
    for name, tensor in (*ours.named_parameters(), *ours.named_buffers()):
        assert tensor.is_meta or torch.equal(tensor, before[name])
        assert tensor.is_meta == before[name].is_meta
    if not before["blocks.0." + next(iter(ours.blocks[0].state_dict()))].is_meta:
        data = IMAGES if "convolutions" in str(make) else ROWS
        ours.zero_grad()
        ours.backward(*data)


def test_a_reset_that_replaces_tensors_is_refused() -> None:
    ours = chain_of(lambda: Replacing(8, 8))()
    offloaded = ours.offload(bll.HostStore(), optimizer=SGD)
    with pytest.raises(ValueError, match="replaces"):
        ours.backward(*ROWS, optimizers=offloaded.optimizers)


def test_a_pipeline_refuses_an_offloaded_learner() -> None:
    ours, _ = offloaded_rows()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"offloaded: end\(\) it"):
            bll.Pipeline(ours, optimizer=SGD)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("make", [images, meta_images], ids=["real", "meta"])
def test_on_a_gpu(make: Make) -> None:
    x, y = (tensor.cuda() for tensor in IMAGES)
    results = []
    for elsewhere in (False, True):
        ours = make()
        offloaded = ours.offload(bll.HostStore(), optimizer=SGD, device="cuda")
        if not elsewhere:
            offloaded.end()
        torch.manual_seed(7)
        losses = [ours.backward(x, y, optimizers=offloaded.optimizers) for _ in range(5)]
        if elsewhere:
            offloaded.end()
        results.append((torch.stack(losses), ours.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())
