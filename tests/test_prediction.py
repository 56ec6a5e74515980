"""Prediction at every exit, and what diagnose tells of each border."""

import copy
import warnings

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll

CLASSES = 4


def perceptron(**options) -> bll.BlockLocal:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Sequential(nn.Linear(16, 8), nn.ReLU()), nn.Linear(8, 4)]
    return bll.BlockLocal(blocks, **({"classes": CLASSES, "example": torch.randn(2, 6)} | options))


def vectors(samples: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 6, generator=generator), torch.arange(samples) % CLASSES


@pytest.mark.parametrize("make", zoo.MODELS, ids=lambda make: make.__name__)
def test_prediction_is_the_models_own(make) -> None:
    model, x = make()
    learner = bll.BlockLocal(model, blocks=3, classes=CLASSES, example=x, balance="memory").eval()
    assert learner.model is model
    prediction = learner.predict(x)
    assert torch.equal(prediction, model(x))
    assert torch.equal(prediction, learner.exits(x)[-1])
    assert not prediction.requires_grad


def test_an_exit_is_the_head_of_its_block_and_later_blocks_do_not_run() -> None:
    learner, (x, _) = perceptron().eval(), vectors()
    h = learner.blocks[1](learner.blocks[0](x))
    expected = learner.borders[1].get_submodule("terms.1.head.layers")(h)
    ran = []
    for block in learner.blocks:
        block.register_forward_hook(lambda module, inputs, output: ran.append(module))
    assert torch.equal(learner.predict(x, exit=1), expected)
    assert ran == list(learner.blocks)[:2]
    assert torch.equal(learner.exits(x)[1], expected)


def test_all_exits_are_averaged() -> None:
    learner, (x, _) = perceptron().eval(), vectors()
    probabilities = torch.stack([learner.predict(x, exit=k).softmax(-1) for k in range(3)])
    assert_close(learner.predict(x, exit="all"), (probabilities.prod(0) ** (1 / 3)).log())
    regression = perceptron(classes=None, outputs=4, criterion=F.mse_loss, loss=bll.Predictive()).eval()
    assert_close(regression.predict(x, exit="all"), sum(regression.exits(x)) / 3)


def test_confidence_is_a_loop_over_samples() -> None:
    learner, (x, _) = perceptron().eval(), vectors()
    with torch.no_grad():  # the later an exit, the surer
        learner.borders[1].get_parameter("terms.1.head.layers.1.weight").mul_(5)
    used = []
    for confidence in (0.01, 0.3, 0.35, 0.4, 0.6, 0.8, 1.0):
        expected, left_at = [], set()
        for sample in x.split(1):
            for k in range(3):
                logits = learner.predict(sample, exit=k)
                if logits.softmax(-1).max() >= confidence or k == 2:
                    expected.append(logits)
                    left_at.add(k)
                    break
        assert_close(learner.predict(x, confidence=confidence), torch.cat(expected))
        used.append(left_at)
    assert used[0] == {0}
    assert {0, 1} in used
    assert {1, 2} in used


def test_confidence_of_a_sequence_is_that_of_its_least_sure_token() -> None:
    model, x = zoo.transformer()
    learner = bll.BlockLocal(model, at=["layers.0", "layers.1"], classes=CLASSES, example=x).eval()
    exits = learner.exits(x)
    sure = torch.stack([exit.softmax(-1).amax(-1).amin(-1) for exit in exits])
    confidence = sure[0].median().item()
    chosen = [next(k for k in range(3) if sure[k, i] >= confidence or k == 2) for i in range(len(x))]
    assert 0 in chosen
    assert chosen != [0, 0, 0]
    expected = torch.stack([exits[k][i] for i, k in enumerate(chosen)])
    assert_close(learner.predict(x, confidence=confidence), expected)


def test_confidence_with_exits_of_different_precision() -> None:
    learner, (x, y) = perceptron(loss=bll.Predictive("evidence")), vectors()
    learner.backward(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert {exit.dtype for exit in learner.exits(x)} == {torch.float32, torch.bfloat16}
        assert learner.predict(x, confidence=1.0).shape == learner.predict(x, exit="all").shape == (40, CLASSES)


def test_no_sample_is_no_problem() -> None:
    learner = perceptron().eval()
    assert (
        learner.predict(torch.empty(0, 6)).shape == learner.predict(torch.empty(0, 6), confidence=0.9).shape == (0, 4)
    )


def test_exits_are_refused() -> None:
    learner, (x, _) = perceptron(), vectors()
    for exit in (3, -1, "last", 1.5):
        with pytest.raises(ValueError, match=r'exit=.*: choose a block 0 to 2 or "all"'):
            learner.predict(x, exit=exit)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence= chooses the exit"):
        learner.predict(x, exit=1, confidence=0.9)
    with pytest.raises(ValueError, match="only with labels"):
        perceptron(classes=None, outputs=4, criterion=F.mse_loss).predict(x, confidence=0.9)
    with pytest.raises(ValueError, match="predicts nothing"):
        perceptron(loss=bll.Variational()).predict(x, exit=0)


def test_diagnosis_is_that_of_each_border_on_its_blocks_output() -> None:
    learner, (x, y) = perceptron(), vectors()
    learner.backward(x, y)
    before = copy.deepcopy(learner.state_dict())
    reports = learner.diagnose(x, y)
    assert learner.training
    assert all(module.training for module in learner.modules())
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())
    learner.eval()
    h, expected = x, []
    for k in range(2):
        h = learner.blocks[k](h)
        expected.append(learner._border(k).diagnose(learner._border(k).message(h), y))
    assert reports == expected
    assert set(reports[0]) == {"variational", "predictive", "agreement", "variance_ratio"}


def test_collapse_is_told() -> None:
    learner, (x, y) = perceptron(), vectors()
    learner.backward(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.diagnose(x, y)
    with torch.no_grad():
        learner.blocks[1].get_parameter("0.weight").zero_()
        learner.blocks[1].get_parameter("0.bias").fill_(1.0)
    with pytest.warns(
        bll.CollapseWarning, match=r"block 1 has collapsed.*raise the weight of bll.Predictive\(\)"
    ) as told:
        reports = learner.diagnose(x, y)
    assert len(told) == 1
    assert reports[0]["variance_ratio"] > 1e-3 > reports[1]["variance_ratio"]


def test_the_variational_term_alone_collapses() -> None:
    """Known trap: where the target follows the activations, a constant output is the optimum."""
    learner, (x, y) = perceptron(loss=bll.Variational(), feedback=bll.ClosedFormFeedback(forgetting=0.0)), vectors()
    optimizer = torch.optim.Adam(learner.block_parameters(0), lr=0.02)
    start = learner.blocks[0](x).var(0).sum()
    for _ in range(300):
        optimizer.zero_grad()
        learner.local(0, x, y)[0].backward()
        optimizer.step()
    assert learner.blocks[0](x).var(0).sum() < 1e-2 * start
