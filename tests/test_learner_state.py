"""A learner as a module: state, precision, memory format, compilation and modes."""

import copy
import pickle

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from torch.optim import SGD
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.feedback import Targets

CLASSES = 4


def transformer(**options) -> tuple[bll.BlockLocal, zoo.Transformer, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = zoo.Transformer(pooled=True), torch.randint(11, (6, 5))
    learner = bll.BlockLocal(model, at=["embedding", "layers.0"], classes=CLASSES, example=x, **options)
    return learner, model, x, torch.arange(6) % CLASSES


def vision(**options) -> tuple[bll.BlockLocal, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x = zoo.residual()
    learner = bll.BlockLocal(model, at=["stem", "stages.1.0"], classes=CLASSES, example=x, **options)
    return learner, model, x, torch.arange(5) % CLASSES


def train(learner: bll.BlockLocal, x: Tensor, y: Tensor, *, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.05)
    for _ in range(steps):
        learner.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [transformer, vision])
def test_state_goes_to_another_learner(make) -> None:
    torch.manual_seed(0)
    learner, model, x, y = make()
    keys = list(model.state_dict())
    train(learner, x, y)
    state = learner.state_dict()
    mine = {name.split(".", 2)[2] for name in state if name.startswith("blocks.")}
    assert mine == set(keys)
    assert all(name.startswith(("blocks.", "borders.", "pool.")) for name in state)
    assert list(model.state_dict()) == keys
    assert "borders.0.feedback.second" in state  # the feedback's statistics go on where they were
    other, _, _, _ = make()
    other.load_state_dict(state)
    assert_close(other.eval().exits(x), learner.eval().exits(x), rtol=0, atol=0)
    assert torch.equal(other.model(x), model(x))
    learner.train()
    other.train()
    torch.manual_seed(1)
    losses = learner.backward(x, y)
    torch.manual_seed(1)
    assert torch.equal(other.backward(x, y), losses)


@pytest.mark.parametrize("make", [transformer, vision])
def test_the_model_passed_in_is_the_trained_one(make) -> None:
    learner, model, x, y = make()
    names = {p: name for name, p in model.named_parameters()}
    for k, block in enumerate(learner.blocks):
        for name, p in block.named_parameters():
            assert names[p] == name, k
    before = copy.deepcopy(model.state_dict())
    train(learner, x, y)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if p.dim() > 1)
    learner.eval()
    assert torch.equal(model(x), learner.predict(x))


@pytest.mark.parametrize("make", [transformer, vision])
def test_conversion_keeps_everything_shared(make) -> None:
    learner, model, x, y = make()
    keys = list(learner.state_dict()), list(model.state_dict())
    for dtype in (torch.float64, torch.float32):
        learner.to(dtype)
        assert (list(learner.state_dict()), list(model.state_dict())) == keys
        tensors = {name: value for name, value in learner.state_dict().items() if name != "pool._extra_state"}
        assert {value.dtype for value in tensors.values()} <= {dtype, torch.int64}
        shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        assert {id(t) for block in learner.blocks for t in (*block.parameters(), *block.buffers())} == shared
        inputs = x.to(dtype) if x.is_floating_point() else x
        train(learner, inputs, y, steps=1)
        learner.eval()
        assert torch.equal(model(inputs), learner.predict(inputs))
        learner.train()


def test_conversion_through_the_meta_device_keeps_everything_shared() -> None:
    learner, model, x, _ = transformer(loss=bll.BLL + bll.Predictive("evidence"))
    before, state = learner.eval().exits(x), copy.deepcopy(learner.state_dict())
    learner.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert_close(learner.exits(x), before, rtol=0, atol=0)
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert {id(t) for block in learner.blocks for t in (*block.parameters(), *block.buffers())} == shared


def test_single_and_double_precision_agree() -> None:
    for make in (transformer, vision):
        learner, _, x, y = make()
        double = copy.deepcopy(learner).double()
        learner.eval()
        double.eval()
        losses = learner.backward(x, y)
        exact = double.backward(x.double() if x.is_floating_point() else x, y)
        assert exact.dtype == torch.float64
        assert_close(losses, exact.float(), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(learner.parameters(), double.parameters(), strict=True):
            assert_close(ours.grad, None if theirs.grad is None else theirs.grad.float(), rtol=1e-2, atol=1e-4)


def test_a_given_chain_of_cut_blocks_converts() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    chain = bll.split(model, at=["1"])
    learner = bll.BlockLocal(chain, classes=CLASSES, example=torch.randn(2, 6)).double()
    assert "running_mean" not in dict(learner.blocks[1].named_buffers())
    learner.backward(torch.randn(8, 6).double(), torch.arange(8) % CLASSES)
    assert model[1].running_mean.dtype == torch.float64


def test_a_copy_is_a_learner_of_its_own() -> None:
    learner, model, x, y = vision()
    twin = copy.deepcopy(learner)
    before = copy.deepcopy(model.state_dict())
    assert set(twin.model.parameters()) == {p for block in twin.blocks for p in block.parameters()}
    train(twin, x, y)
    twin.double()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not set(twin.parameters()) & set(learner.parameters())


def test_modes_reach_every_module() -> None:
    learner, model, _, _ = vision()
    for training in (False, True):
        learner.train(training)
        assert all(module.training is training for owner in (learner, model) for module in owner.modules())


@pytest.mark.parametrize("make", [transformer, vision])
def test_autocast_learns_the_same_within_rounding(make) -> None:
    learner, _, x, y = make(loss=bll.BLL + 0.5 * bll.Similarity())
    cast = copy.deepcopy(learner)
    learner.eval()  # no dropout
    cast.eval()
    losses = learner.backward(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = cast.backward(x, y)
    assert_close(rounded.float(), losses, rtol=0.05, atol=0.05)
    ours, theirs = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (learner, cast)
    )
    assert theirs.dtype == torch.float32
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98


@pytest.mark.parametrize("make", [transformer, vision])
def test_a_half_precision_model_learns(make) -> None:
    learner, model, x, y = make(loss=bll.BLL + bll.Similarity() + bll.Predictive("evidence"))
    learner.to(torch.bfloat16)
    half = x.bfloat16() if x.is_floating_point() else x
    train(learner, half, y, steps=2)
    assert model(half).isfinite().all()
    assert all(exit.isfinite().all() for exit in learner.exits(half))


def test_channels_last() -> None:
    learner, _, x, y = vision()
    last = copy.deepcopy(learner).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    losses = learner.eval().backward(x, y)
    assert_close(last.eval().backward(x.to(memory_format=torch.channels_last), y), losses)
    for ours, theirs in zip(learner.parameters(), last.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    kernel = last.get_parameter("blocks.0.stem.0.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("given", [True, False], ids=["given", "cut"])
def test_compiled_blocks_learn_the_same(given: bool) -> None:
    torch.manual_seed(0)
    model, _ = zoo.perceptron()
    assert isinstance(model, nn.Sequential)
    blocks = [model[:2], model[2:5], model[5:]] if given else model
    at = None if given else ["1", "4"]
    learner = bll.BlockLocal(blocks, at=at, classes=CLASSES, example=torch.randn(2, 6)).eval()
    compiled = copy.deepcopy(learner)
    frames = []

    def backend(graph: fx.GraphModule, inputs):
        frames.append(graph)
        return graph

    compiled.compile(backend=backend)
    x, y = torch.randn(8, 6), torch.arange(8) % CLASSES
    assert_close(compiled.backward(x, y), learner.backward(x, y))
    assert len(frames) == 3
    for ours, theirs in zip(learner.parameters(), compiled.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
    assert list(compiled.state_dict()) == list(learner.state_dict())


@pytest.mark.parametrize("add_beliefs", [False, True])
def test_a_compiled_region_holds_block_border_and_loss(add_beliefs: bool) -> None:
    """One graph for each block, and the steps of eager training; a copy trains weights of its own."""
    torch.manual_seed(0)
    torch.compiler.reset()
    loss = bll.BLL + bll.Predictive("evidence") + bll.Posterior("linear", softness=0.1, power=0.5)
    blocks = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))]
    blocks += [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))]
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % CLASSES
    learner = bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=loss, add_beliefs=add_beliefs)
    compiled, graphs = copy.deepcopy(learner), []

    def backend(graph: fx.GraphModule, inputs):
        graphs.append(graph)
        return graph

    compiled.compile(backend=backend)
    copied = copy.deepcopy(compiled)
    for one in (compiled, copied, learner):
        optimizers = [SGD(one.block_parameters(k), lr=0.1, momentum=0.9) for k in range(3)]
        for _ in range(3):
            one.backward(x, y, optimizers=optimizers)
    assert len(graphs) == 3
    for one in (compiled, copied):
        for name, ours in one.state_dict().items():
            assert_close(ours, learner.state_dict()[name])
    assert_close(compiled.eval().exits(x), learner.eval().exits(x))


def test_a_step_draws_no_random_numbers_but_the_models() -> None:
    learner, _, x, y = transformer(loss=bll.BLL + bll.Similarity() + bll.Predictive("evidence"))
    learner.eval()
    before = torch.get_rng_state()
    learner.train()
    for module in learner.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    learner.backward(x, y)
    learner.predict(x)
    assert torch.equal(torch.get_rng_state(), before)


HALF = [torch.bfloat16, torch.float16]


def statistics(learner: bll.BlockLocal) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in learner.named_buffers() if ".feedback." in name}


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_feedback_stays_in_single_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    built = bll.BlockLocal(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).to(dtype), **learned(dtype))
    moved = bll.BlockLocal(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), **learned(torch.float32))
    x, y = torch.randn(64, 6), torch.arange(64) % CLASSES
    moved.backward(x, y)
    before = copy.deepcopy(statistics(moved))
    moved.to(dtype)
    assert all(torch.equal(value, before[name]) for name, value in statistics(moved).items())
    for learner in (built, moved):
        assert next(learner.parameters()).dtype == dtype
        for _ in range(20):  # counts beyond 256 have no bfloat16
            learner.backward(x.to(dtype), y)
        assert {value.dtype for value in statistics(learner).values()} == {torch.float32}
        assert statistics(learner)["borders.0.feedback.second"].sum() > 500
    state = {name: value.to(dtype) for name, value in built.state_dict().items()}
    for assign in (False, True):
        moved.load_state_dict(state, assign=assign)
        assert {value.dtype for value in statistics(moved).values()} == {torch.float32}
    assert {value.dtype for value in statistics(moved.double()).values()} == {torch.float64}
    assert {value.dtype for value in statistics(moved.half()).values()} == {torch.float32}


def learned(dtype: torch.dtype) -> dict:
    return {"classes": CLASSES, "example": torch.randn(2, 6, dtype=dtype)}


def test_a_default_of_half_precision_reaches_no_statistics() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        feedback = bll.ClosedFormFeedback().build(Targets(CLASSES, labels=True), channels=8)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in feedback.buffers()} == {torch.float32}


@pytest.mark.parametrize("make", [transformer, vision])
def test_a_state_that_is_taken_over_is_the_models_too(make) -> None:
    learner, model, x, _ = make()
    state = {name: value + 1 if value.is_floating_point() else value for name, value in learner.state_dict().items()}
    learner.load_state_dict(state, assign=True)
    assert {id(t) for t in model.parameters()} == {id(t) for block in learner.blocks for t in block.parameters()}
    learner.eval()
    assert torch.equal(model(x), learner.predict(x))


@pytest.mark.parametrize("make", [transformer, vision])
def test_a_stored_learner_is_a_learner(make) -> None:
    learner, _, x, y = make()
    train(learner, x, y)
    learner.share_feedback(False)
    stored = pickle.loads(pickle.dumps(learner))
    assert {id(t) for t in stored.model.parameters()} == {id(t) for b in stored.blocks for t in b.parameters()}
    torch.manual_seed(1)
    losses = learner.backward(x, y)
    torch.manual_seed(1)
    assert torch.equal(stored.backward(x, y), losses)


def test_predictions_in_half_precision_are_compared_in_single() -> None:
    learner, _, x, _ = vision()
    learner.eval().bfloat16()
    x = x.bfloat16()
    expected = torch.stack([exit.float().log_softmax(-1) for exit in learner.exits(x)]).mean(0)
    assert learner.predict(x, exit="all").dtype == torch.float32
    assert_close(learner.predict(x, exit="all"), expected)
    logits = torch.tensor([[8.0, 0.0, 0.0, 0.0]]).bfloat16()
    assert logits.softmax(-1).max() == 1.0  # rounded: it is 0.9990
    sure = nn.Sequential(nn.Identity(), nn.Identity())
    certain = bll.BlockLocal(sure, classes=CLASSES, example=logits.float()).eval()
    certain.borders[0].get_submodule("terms.1").head = nn.Module()  # type: ignore[assignment]
    certain.borders[0].get_submodule("terms.1").head.forward = lambda message: message.h  # type: ignore[union-attr]
    left: list[int] = []
    certain.blocks[1].register_forward_hook(lambda *_: left.append(1))
    certain.predict(logits, confidence=0.9995)
    assert left


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_criterion_that_is_a_module_moves_along(blocks: int) -> None:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, CLASSES))
    example, y = torch.randn(8, 6), torch.arange(8) % CLASSES
    learner = bll.BlockLocal(model, blocks=blocks, classes=CLASSES, example=example, criterion=criterion)
    losses = learner.eval().backward(example, y)
    assert_close(learner.double().backward(example.double(), y).float(), losses)


def test_a_criterion_that_learns_is_refused() -> None:
    class Scaled(nn.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

    blocks = [nn.Linear(6, 8), nn.Linear(8, CLASSES)]
    with pytest.raises(ValueError, match="criterion has parameters, which every border would train"):
        bll.BlockLocal(blocks, **learned(torch.float32), criterion=Scaled())
    bll.BlockLocal(nn.Linear(6, CLASSES), blocks=1, classes=CLASSES, criterion=Scaled())
