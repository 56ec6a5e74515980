"""All exits as one predictor: the weights of the exits, and predictors as modules of their own."""

import copy
import io

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.exits import ExitPool

CLASSES = 3


def opinions(samples: int = 200) -> tuple[list[Tensor], Tensor]:
    """Logits of three exits: one that knows the labels well, one badly, and one that says the opposite."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (samples,), generator=generator)
    truth = F.one_hot(y, CLASSES).float()
    noise = torch.randn(3, samples, CLASSES, generator=generator)
    return [2 * truth + noise[0], 0.5 * truth + noise[1], -truth + noise[2]], y


def test_weights_are_those_of_another_optimizer() -> None:
    from scipy.optimize import minimize  # which takes a second to import

    exits, y = opinions()
    pool = ExitPool(3, labels=True)
    pool.fit(exits, y, criterion=F.cross_entropy)
    evidence = torch.stack(exits).log_softmax(-1).double().numpy()

    def loss(weights) -> float:
        pooled = torch.from_numpy((weights[:, None, None] * evidence).sum(0))
        return F.cross_entropy(pooled, y).item() + 1e-3 * ((weights - 1 / 3) ** 2).sum()

    expected = minimize(loss, [1 / 3] * 3, bounds=[(0, None)] * 3, method="L-BFGS-B", tol=1e-12).x
    assert_close(torch.tensor(pool.weights), torch.tensor(expected), rtol=1e-3, atol=1e-4, check_dtype=False)
    assert pool.weights[0] > pool.weights[1] > pool.weights[2] == pytest.approx(0.0, abs=1e-4)


def test_dense_predictions_are_added() -> None:
    y = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    pool = ExitPool(2, labels=False)
    pool.fit([4 * y, torch.zeros_like(y)], y, criterion=F.mse_loss)
    assert_close(pool([4 * y, 0 * y]), y, rtol=0.01, atol=0.01)


def test_a_prediction_that_is_not_finite_cannot_be_weighed() -> None:
    exits, y = opinions()
    exits[1][3, 0] = torch.nan
    pool = ExitPool(3, labels=True)
    with pytest.raises(ValueError, match="not finite"):
        pool.fit(exits, y, criterion=F.cross_entropy)
    assert pool.weights == (1 / 3,) * 3


def perceptron(**options) -> bll.BlockLocal:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU()), nn.Linear(16, 8), nn.Linear(8, CLASSES)]
    return bll.BlockLocal(blocks, **({"classes": CLASSES, "example": torch.randn(4, 6)} | options))


def samples(count: int = 60) -> tuple[Tensor, Tensor]:
    y = torch.arange(count) % CLASSES
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1)) + F.one_hot(y, 6), y


def test_exits_are_weighed_over_batches_in_evaluation_mode() -> None:
    learner, (x, y) = perceptron(), samples()
    before = copy.deepcopy(learner.state_dict())
    weights = learner.fit_exits([(x[:20], y[:20]), (x[20:], y[20:])])
    assert learner.training
    for name, value in learner.state_dict().items():
        assert name == "pool._extra_state" or torch.equal(value, before[name])
    again = perceptron()
    assert again.fit_exits([(x, y)]) == pytest.approx(weights)
    learner.eval()
    pooled = sum(w * exit.log_softmax(-1) for w, exit in zip(weights, learner.exits(x), strict=True))
    assert_close(learner.predict(x, exit="all"), pooled)
    equal = torch.stack([exit.log_softmax(-1) for exit in learner.exits(x)]).mean(0)
    assert F.cross_entropy(learner.predict(x, exit="all"), y) < F.cross_entropy(equal, y)


def test_weights_are_part_of_the_state() -> None:
    learner, (x, y) = perceptron(), samples()
    learner.fit_exits([(x, y)])
    kept = io.BytesIO()
    torch.save(learner.state_dict(), kept)
    kept.seek(0)
    other = perceptron()
    other.load_state_dict(torch.load(kept))
    assert other.pool.weights == learner.pool.weights
    blocks = {name: value for name, value in perceptron().state_dict().items() if not name.startswith("pool.")}
    other.load_state_dict(blocks)
    other.half().float().to_empty(device="cpu")
    assert other.pool.weights == learner.pool.weights


def test_no_held_out_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        perceptron().fit_exits([])


@pytest.mark.parametrize("loss", [bll.BLL, bll.Predictive("evidence")], ids=["BLL", "evidence"])
@pytest.mark.parametrize("exit", [None, 0, 1, 2, "all"])
def test_a_predictor_predicts_what_the_learner_does(loss, exit) -> None:
    learner, (x, y) = perceptron(loss=loss), samples()
    learner.backward(x, y)
    learner.fit_exits([(x, y)])
    predictor = learner.eval().predictor(exit=exit)
    expected = learner.predict(x, exit=exit)
    assert torch.equal(predictor(x), expected)
    owned = set(predictor.parameters())
    assert owned <= set(learner.parameters())
    assert len(predictor.blocks) == (exit + 1 if isinstance(exit, int) else 3)
    exported = torch.export.export(predictor, (x,)).module()
    assert_close(exported(x), expected)


def test_a_predictor_of_a_traced_network() -> None:
    model, x = zoo.MODELS[0]()
    learner = bll.BlockLocal(model, blocks=3, classes=4, example=x).eval()
    assert torch.equal(learner.predictor()(x), model(x))
    assert torch.equal(learner.predictor(exit="all")(x), learner.predict(x, exit="all"))


def test_a_predictor_without_heads_is_refused() -> None:
    learner = perceptron(loss=bll.Variational())
    with pytest.raises(ValueError, match="predicts nothing"):
        learner.predictor(exit="all")
    with pytest.raises(ValueError, match="choose a block 0 to 2"):
        learner.predictor(exit=3)
