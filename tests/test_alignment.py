"""What holds for every feedback alignment rule: it changes gradients only, is measured, saved and removed."""

import copy
import io
import math
import re

import pytest
import torch
from alignment_cases import RULES, Residual, batch, gradients
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from blocklocal.alignment import Alignment, FeedbackAlignment, SignSymmetry

every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@every_rule
def test_gradients_change_and_nothing_else(rule):
    model, (x, y) = Residual(), batch()
    keys, expected = list(model.state_dict()), gradients(model, x, y)
    before, prediction = copy.deepcopy(model.state_dict()), copy.deepcopy(model)(x)

    alignment = RULES[rule](model, x, 0)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with alignment.with_targets(y):
        aligned = model(x)
    assert torch.equal(aligned.view(torch.int32), prediction.view(torch.int32)), "to the bit"
    found = gradients(model, x, y, alignment)
    assert torch.equal(found["classifier.weight"], expected["classifier.weight"])
    assert not torch.allclose(found["stem.weight"], expected["stem.weight"])

    with alignment.suspended():
        assert all(torch.equal(g, expected[name]) for name, g in gradients(model, x, y).items())
    alignment.remove()
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model, x, y).items())
    assert not any("forward" in vars(module) for module in model.modules())


@every_rule
def test_usual_loop_and_scale(rule):
    model, (x, y) = Residual(), batch()
    alignment = RULES[rule](model, x, 0)
    with alignment.with_targets(y):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    usual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    other = copy.deepcopy(model)
    alignment.remove()
    alignment = RULES[rule](model, x, 0)
    model.zero_grad()
    assert alignment.backward(x, y, scale=0.25) == loss
    for name, p in model.named_parameters():
        assert_close(p.grad, usual[name] / 4)
    if rule != "drtp":  # a copy of the model keeps the rule, but no companion that it gets targets from
        other.zero_grad()
        assert all(torch.equal(g, usual[name]) or rule == "brsf" for name, g in gradients(other, x, y).items())


@every_rule
def test_angles(rule):
    model, (x, y) = nn.Sequential(Residual(), nn.Dropout(0.3)), batch()
    alignment = RULES[rule](model, x, 0)
    alignment.backward(x, y)
    before, feedback = copy.deepcopy(model.state_dict()), dict(alignment.feedback)
    held, rng = [(p, p.grad) for p in model.parameters()], torch.get_rng_state()
    angles = alignment.angles(x, y)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(p.grad is grad for p, grad in held)
    assert all(alignment.feedback[name] is tensor for name, tensor in feedback.items())

    alignment.measuring = True  # or brsf would draw other magnitudes
    found = gradients(model, x, y, alignment)
    alignment.remove()
    torch.set_rng_state(rng)
    true = gradients(model, x, y)
    assert angles.keys() == alignment.layers.keys()
    for name, angle in angles.items():
        a, b = (g[f"{name}.weight"].double().flatten() for g in (found, true))
        assert math.cos(math.radians(angle)) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
    assert angles["0.classifier"] == pytest.approx(0, abs=1e-6)


def test_angle_of_nothing_is_nan():
    model, (x, y) = Residual(), batch()
    nn.init.zeros_(model.classifier.weight)
    model.first.weight.requires_grad_(False)
    angles = FeedbackAlignment(model).angles(x, y)
    assert "first" not in angles, "a frozen layer"
    assert math.isnan(angles["stem"]), "the true gradient is zero"


@every_rule
def test_resumed_equals_uninterrupted(rule):
    x, y = batch()

    def train(model: nn.Module, alignment: Alignment) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            alignment.backward(x, y)
            optimizer.step()

    model, file = Residual(), io.BytesIO()
    alignment = RULES[rule](model, x, 1)
    train(model, alignment)
    torch.save({"model": model.state_dict(), "alignment": alignment.state_dict()}, file)
    train(model, alignment)

    file.seek(0)
    saved, resumed = torch.load(file, weights_only=True), Residual()
    resumed.load_state_dict(saved["model"])
    alignment = RULES[rule](resumed, x, 2)
    alignment.load_state_dict(saved["alignment"])
    train(resumed, alignment)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


@every_rule
def test_the_state_of_another_rule_is_refused(rule):
    x, _ = batch()
    alignment = RULES[rule](Residual(), x, 1)
    before = copy.deepcopy(alignment.feedback)
    for other in RULES.keys() - {rule}:
        state = RULES[other](Residual(), x, 2).state_dict()
        with pytest.raises(ValueError, match=re.escape(f"the state is of {state['rule']}, but this is ")):
            alignment.load_state_dict(state)
    with pytest.raises(ValueError, match="a rule without a name"):
        alignment.load_state_dict({"feedback": alignment.feedback})
    assert_close(alignment.feedback, before, rtol=0, atol=0)


@every_rule
def test_seeds(rule):
    model, (x, y) = Residual(), batch()
    rng, feedback = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        alignment = RULES[rule](model, x, seed)
        at_first = alignment.feedback["first"]
        alignment.backward(x, y)
        feedback.append((at_first, alignment.feedback["first"]))
        alignment.remove()
    assert torch.equal(torch.get_rng_state(), rng), "drawn from the global generator"
    for same, equal, other in zip(*feedback, strict=True):
        assert torch.equal(same, equal)
        assert torch.equal(same, other) == (rule == "usf"), "which is not random"


@every_rule
def test_autocast(rule):
    model, (x, y) = Residual(), batch(n=32)
    alignment = RULES[rule](model, x, 0)
    full = gradients(model, x, y, alignment)
    alignment.measuring = True  # or brsf would draw other magnitudes
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x, y, alignment)
        with torch.no_grad():
            assert model(x).dtype == torch.bfloat16
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, full[name]), "bfloat16 was not used"
        assert F.cosine_similarity(gradient.flatten(), full[name].flatten(), 0) > 0.98, name


@every_rule
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's, when it traces
def test_compiled_equals_eager(rule):
    model, (x, y) = Residual(), batch()
    copied = copy.deepcopy(model)
    alignment, other = RULES[rule](model, x, 0), RULES[rule](copied, x, 0)
    torch.compiler.reset()
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=rule != "brsf")
    for _ in range(2):
        expected = gradients(model, x, y, alignment)
        copied.zero_grad()
        with other.with_targets(y):
            F.cross_entropy(compiled(x), y).backward()
        for name, p in copied.named_parameters():
            assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


@every_rule
def test_learns_digits(rule):
    from sklearn.datasets import load_digits  # which takes a second to import

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    alignment = RULES[rule](model, x[:2], 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for _ in range(12):
        for rows in torch.randperm(1300).split(50):
            optimizer.zero_grad()
            alignment.backward(x[rows], y[rows])
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(x[1300:]).argmax(1) == y[1300:]).float().mean().item()
    angles = alignment.angles(x[:500], y[:500])
    assert accuracy > 0.75
    assert max(angles.values()) < 90


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU()), "no Linear and no Conv1d/2d/3d"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), "0 has padding_mode='circular'"),
        (Tied(), "a and b share one weight"),
        (nn.Sequential(nn.LSTM(4, 4)), "0 is a LSTM"),
        (nn.TransformerEncoderLayer(8, 2), "self_attn is a MultiheadAttention"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "0 is a ConvTranspose2d"),
        (nn.Sequential(nn.LazyLinear(4)), "0 is a lazy layer"),
    ],
    ids=["nothing", "padding", "tied", "recurrent", "attention", "transposed", "lazy"],
)
def test_models_that_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        FeedbackAlignment(model)


def test_uses_that_are_refused():
    model, (x, y) = Residual(), batch()
    alignment = FeedbackAlignment(model)
    with pytest.raises(ValueError, match="stem has its forward replaced"):
        SignSymmetry(model, magnitude="fixed")
    other = {**alignment.state_dict(), "feedback": {**alignment.feedback, "classifier": torch.zeros(1)}}
    with pytest.raises(ValueError, match="another model: the feedback of classifier"):
        alignment.load_state_dict(other)
    alignment.feedback["first"] = alignment.feedback["first"].to("meta")
    with pytest.raises(ValueError, match="first runs on cpu, but its feedback is on meta"):
        alignment.backward(x, y)
    with pytest.raises(ValueError, match="magnitude='random'"):
        SignSymmetry(Residual(), magnitude="random")  # pyright: ignore[reportArgumentType]
