"""Wrong calls: each is told by the library itself, which names the argument and what is allowed, and moves nothing."""
# pyright: reportArgumentType=false, reportOptionalOperand=false, reportOperatorIssue=false, reportCallIssue=false

import copy
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from refusals import assert_refused
from torch import Tensor, nn
from torch.nn import functional as F

import blocklocal as bll
from blocklocal import alignment
from blocklocal.feedback import Targets

CLASSES = 4
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % CLASSES
ARRAY = X.numpy()
NOT_WHOLE = [1.5, True, "4", math.nan, math.inf, None, [2], torch.tensor(True), np.float64(2.0)]
NOT_FINITE = [math.nan, math.inf, -math.inf]
NOT_A_NUMBER = ["1", None, [1.0], True, ARRAY]
NO_TENSOR = [None, X.tolist(), ARRAY, "x", 3, X.__class__]
NO_MODULE = [None, "resnet", 3, ARRAY, nn.Linear, X]


def layers() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, CLASSES)]


def make(model: Any = None, **options) -> bll.BlockLocal:
    return bll.BlockLocal(layers() if model is None else model, **({"classes": CLASSES, "example": X[:2]} | options))


class Calls:
    """What the calls are made on."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.learner = make()
        self.learner.backward(X, Y)
        self.dense = make(classes=None, outputs=CLASSES, criterion=F.mse_loss)
        self.alone = bll.BlockLocal(nn.Linear(6, CLASSES), blocks=1, classes=CLASSES)
        self.tokens = bll.BlockLocal(
            [nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)], classes=11, example=torch.randint(11, (2, 5))
        )
        self.optimizers = [torch.optim.SGD(self.learner.block_parameters(k), lr=0.1) for k in range(3)]
        self.fa = alignment.FeedbackAlignment(nn.Sequential(*layers()))
        self.brsf = alignment.SignSymmetry(nn.Sequential(*layers()), magnitude="batchwise")
        self.drtp = alignment.DirectRandomTargetProjection(nn.Sequential(*layers()), example=X[:2])

    def state(self) -> list[Tensor]:
        found: list[Tensor] = []
        for one in (self.learner, self.dense, self.alone, self.tokens, self.fa.model, self.brsf.model, self.drtp.model):
            found += [tensor.detach().clone() for tensor in (*one.parameters(), *one.buffers())]
            found += [p.grad.clone() for p in one.parameters() if p.grad is not None]
        for rule in (self.fa, self.brsf, self.drtp):
            found += [tensor.clone() for tensor in rule.feedback.values()]
        return [*found, torch.tensor(self.brsf.next_seed)]


@cache
def calls() -> Calls:
    return Calls()


CASES: list[Any] = []


def case(call: Callable[[Calls], object], *, names: str, label: object = "") -> None:
    CASES.append(pytest.param(call, names, id=f"{names}-{len(CASES)}-{type(label).__name__}"))


def cases(values: list, call: Callable[[Calls, Any], object], *, names: str) -> None:
    """The call with each of the values."""
    for value in values:
        case(lambda c, value=value: call(c, value), names=names, label=value)


# The learner.
cases([*NO_MODULE[:5], [], [None], [nn.Linear(6, 4), 3], nn.Sequential()], lambda c, v: make_of(v), names="model")
cases([1.5, True, "4", 0, -1, math.nan, [2]], lambda c, v: make(nn.Sequential(*layers()), blocks=v), names="blocks")
cases([*NOT_WHOLE[:5], 0, -3, [4]], lambda c, v: make(classes=v), names="classes")
cases([*NOT_WHOLE[:5], 0, -3], lambda c, v: dense_of(v), names="outputs")
cases(["1", 3, [3], [None], ["no.such"]], lambda c, v: make(nn.Sequential(*layers()), at=v), names="at")
cases(["speed", None, 3], lambda c, v: make(nn.Sequential(*layers()), blocks=2, balance=v), names="balance")
cases([X.tolist(), ARRAY, "x", 3], lambda c, v: make(example=v), names="example")
cases([X[:0], torch.randn(2, 7), X[:2].double(), X[:2].long()], lambda c, v: make(example=v), names="example")
case(lambda c: make(nn.Sequential(*layers()), blocks=2, example=torch.randn(2, 7)), names="example")
case(lambda c: make(example=None), names="example")
cases([None, "bll", 0.1, bll.Variational, bll.Gaussian(), []], lambda c, v: make(loss=v), names="loss")
cases([None, "closed", bll.ClosedFormFeedback, 0.9, nn.Linear(2, 2)], lambda c, v: make(feedback=v), names="feedback")
cases([None, "mean", 3, nn.AvgPool1d], lambda c, v: make(image(), statistic=v, example=MAPS), names="statistic")
cases(
    [lambda p: p, lambda p: p.mean(), lambda p: p.sum(2).repeat(1, 2), lambda p: None],
    lambda c, v: make(image(), statistic=v, example=MAPS, loss=bll.Variational()),
    names="statistic",
)
cases(["mse", 3, [F.cross_entropy], nn.CrossEntropyLoss], lambda c, v: make(criterion=v), names="criterion")
case(lambda c: make(classes=None, outputs=CLASSES), names="criterion")
case(lambda c: make(criterion=lambda p, y: F.cross_entropy(p, y, reduction="none")).backward(X, Y), names="criterion")
case(lambda c: make(criterion=lambda p, y: 1.0).backward(X, Y), names="criterion")
case(
    lambda c: bll.BlockLocal(nn.Linear(6, 4), blocks=1, classes=4, criterion=lambda p, y: p).backward(X, Y),
    names="criterion",
)
BAD_CRITERIA: list[Any] = [
    lambda p, y: raises(RuntimeError("two\nlines")),
    lambda p, y: raises(KeyError("weights")),
    lambda p, y: raises(AssertionError()),
    lambda p: p.mean(),
    lambda p, y: F.cross_entropy(p.T, y),
    lambda p, y: None,
    lambda p, y: (F.cross_entropy(p, y),),
    lambda p, y: F.cross_entropy(p, y)[None],
    lambda p, y: (p.argmax(-1) == y).sum(),
    lambda p, y: (p > 0).all(),
    lambda p, y: p.sum() + 0j,
    nn.CosineSimilarity(),
]
cases(BAD_CRITERIA, lambda c, v: make(criterion=v).backward(X, Y), names="criterion")
cases(BAD_CRITERIA, lambda c, v: make(criterion=v).diagnose(X, Y), names="criterion")
cases(BAD_CRITERIA, lambda c, v: make(nn.Linear(6, CLASSES), blocks=1, criterion=v)(X, Y), names="criterion")
cases(
    [*BAD_CRITERIA, lambda p, y: F.cross_entropy(p, y).detach()],
    lambda c, v: c.fa.backward(X, Y, criterion=v),
    names="criterion",
)
cases([lambda p, y: F.cross_entropy(p, y).detach()], lambda c, v: c.fa.angles(X, Y, criterion=v), names="criterion")
cases(
    [
        lambda p: p.argmax(2),
        lambda p: p.amax(2) > 0,
        lambda p: p.sum(2) + 0j,
        lambda p: p.sum(2).to("meta"),
        lambda p: p.sum(2).to_sparse(),
        lambda p: p.sum(2).tolist(),
    ],
    lambda c, v: make(image(), statistic=v, example=MAPS),
    names="statistic",
)
cases(
    [
        lambda y: y[:, None].expand(-1, 8),
        lambda y: torch.ones(len(y), 9),
        lambda y: torch.ones(1, 8),
        lambda y: torch.ones(()),
        lambda y: torch.ones(len(y), 8, device="meta"),
        lambda y: 3,
        lambda y, h: h,
    ],
    lambda c, v: make(feedback=Given(Function(v))),
    names="feedback",
)
cases([None, lambda y: y, nn.Linear, "linear"], lambda c, v: make(feedback=Given(v)), names="feedback")
cases(
    [lambda m: m.statistics[:, :4].long(), lambda m: m.statistics[:, :4] > 0],
    lambda c, v: make(loss=bll.Predictive(head=lambda site: Function(v))),
    names="head",
)

# Its batches.
for act in ("backward", "forward", "diagnose"):
    cases(NO_TENSOR[:4], lambda c, v, act=act: getattr(c.learner, act)(v, Y), names="x")
    cases(NO_TENSOR[:4], lambda c, v, act=act: getattr(c.learner, act)(X, v), names="y")
    cases(
        [X[:, :5], X[:0], X[:4], X[0], X[None], X.double(), X.long(), X.half(), X.to("meta"), X > 0],
        lambda c, v, act=act: getattr(c.learner, act)(v, Y),
        names="x",
    )
    cases(
        [Y[:0], Y[:4], Y[:, None], Y + 1, Y - 1, Y.float(), Y.int(), Y > 1, F.one_hot(Y), Y.to("meta"), Y[0]],
        lambda c, v, act=act: getattr(c.learner, act)(X, v),
        names="y|labels",
    )
cases([Y.to_sparse(), F.one_hot(Y).to_sparse()], lambda c, v: c.learner.backward(X, v), names="y")
cases([Y.to_sparse()], lambda c, v: c.alone(X, v), names="y")
cases([Y.to_sparse()], lambda c, v: c.fa.backward(X, v), names="y")
cases([X[:, :4].to_sparse()], lambda c, v: c.dense.backward(X, v), names="y")
cases(
    [torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged)],
    lambda c, v: c.learner.backward(v, Y[:2]),
    names="x",
)
cases([Y, X[:, :3], X[:4, :4], X[:1, :4], X[:, :4].long(), X[0, :4]], lambda c, v: c.dense.backward(X, v), names="y")
cases([Y[:4], Y[:, None], Y.float(), Y + 1, None], lambda c, v: c.alone.backward(X, v), names="y|labels")
TOKENS = torch.randint(11, (4, 5))
cases([TOKENS[:, :4], TOKENS[:, 0], TOKENS[:2], TOKENS.float()], lambda c, v: c.tokens.backward(TOKENS, v), names="y")
cases([TOKENS.float(), TOKENS[0], TOKENS + 11], lambda c, v: c.tokens.backward(v, TOKENS), names="x")
cases(
    [*NOT_FINITE, "1", None, True, torch.ones(2), [1.0]], lambda c, v: c.learner.backward(X, Y, scale=v), names="scale"
)
cases([True, 3, "cuda", torch.amp.GradScaler], lambda c, v: c.learner.backward(X, Y, scaler=v), names="scaler")
cases([3, "sgd", [1, 2, 3], [None] * 3, []], lambda c, v: c.learner.backward(X, Y, optimizers=v), names="optimizers")
case(lambda c: c.learner.backward(X, Y, optimizers=c.optimizers[0]), names="optimizers")
case(lambda c: c.learner.backward(X, Y, optimizers=c.optimizers[:2]), names="optimizers")
case(lambda c: c.learner.backward(X, Y, optimizers=c.optimizers, scale=0.5), names="scale")
case(lambda c: c.learner.backward(X, Y, optimizers=c.optimizers[::-1]), names="optimizers")
case(
    lambda c: c.learner.backward(X, Y, optimizers=[torch.optim.LBFGS(c.learner.block_parameters(k)) for k in range(3)]),
    names="optimizers[0]",
)

# Its other methods.
cases([*NOT_WHOLE[:5], None, 3, -1], lambda c, v: c.learner.local(v, X, Y), names="k")
cases([1.5, True, "0", None, 3, -1], lambda c, v: c.learner.exit(v, X), names="k")
cases([1.5, True, "0", None, 3, -1], lambda c, v: c.learner.block_parameters(v), names="k")
cases([None, X.tolist(), ARRAY], lambda c, v: c.learner.local(0, v, Y), names="h")
cases([None, X.tolist(), ARRAY], lambda c, v: c.learner.exit(0, v), names="h")
cases([None, Y.tolist(), Y.numpy()], lambda c, v: c.learner.local(0, X, v), names="y")
WIDE = torch.randn(8, 8)
for k in (1, 2):
    cases(
        [X, WIDE[0], WIDE[:, None], WIDE.double(), WIDE.long(), WIDE.to_sparse(), WIDE.to("meta")],
        lambda c, v, k=k: c.learner.local(k, v, Y),
        names="h|x",
    )
    cases([X, WIDE[0], WIDE[:, None], WIDE.double()], lambda c, v, k=k: c.learner.exit(k, v), names="h")
for k, h in enumerate((X, WIDE, WIDE)):
    cases(
        [Y.float(), Y.int(), Y > 1, Y + 1, Y - 1, Y[:, None], Y.to_sparse(), Y.to("meta"), Y[:0], F.one_hot(Y)],
        lambda c, v, k=k, h=h: c.learner.local(k, h, v),
        names="y",
    )
for options in ({}, {"exit": 0}, {"exit": "all"}, {"confidence": 0.5}):
    cases([X[0], X[0, 0], X[None]], lambda c, v, options=options: c.learner.predict(v, **options), names="x")
cases([X[0]], lambda c, v: c.learner.exits(v), names="x")
cases([{}, {"confidence": 0.5}, {"exit": "all"}], lambda c, v: c.alone.predict(X[0], **v), names="x")
for act in ("exits", "predict"):
    cases(NO_TENSOR[:4], lambda c, v, act=act: getattr(c.learner, act)(v), names="x")
    cases([X[:, :5], X.double(), X.to("meta")], lambda c, v, act=act: getattr(c.learner, act)(v), names="x")
cases([1.5, True, "last", 3, -1, np.float64(1), [0]], lambda c, v: c.learner.predict(X, exit=v), names="exit")
cases(
    [*NOT_FINITE, 0, -0.1, 1.1, "0.9", True, [0.9]], lambda c, v: c.learner.predict(X, confidence=v), names="confidence"
)
case(lambda c: c.learner.predict(X, exit=1, confidence=0.9), names="confidence")
case(lambda c: c.dense.predict(X, confidence=0.9), names="confidence")
cases([None, 3, [nn.Linear], "fast", "", "Inductor"], lambda c, v: c.learner.compile(backend=v), names="backend")
cases(["yes", 3, 0.5], lambda c, v: c.learner.compile(backend="eager", dynamic=v), names="dynamic")
case(lambda c: make([*layers()[:2], scripted(layers()[2])]).compile(backend="eager"), names="block 2 is a ScriptModule")
cases(["world", 0, True, 3.5], lambda c, v: c.learner.share_feedback(v), names="group")

# Cutting and recomputing.
cases(NO_MODULE[:4], lambda c, v: bll.split(v, blocks=2, example=X), names="model")
cases(
    [1.5, True, "2", 0, -1, math.nan],
    lambda c, v: bll.split(nn.Sequential(*layers()), blocks=v, example=X),
    names="blocks",
)
cases([X.tolist(), ARRAY, "x"], lambda c, v: bll.split(nn.Sequential(*layers()), blocks=2, example=v), names="example")
cases(
    [torch.randn(2, 5), X.long()],
    lambda c, v: bll.split(nn.Sequential(*layers()), blocks=2, example=v),
    names="example",
)
cases(["1", 3, [3]], lambda c, v: bll.split(nn.Sequential(*layers()), at=v), names="at")
cases(NO_MODULE, lambda c, v: bll.recompute(v), names="module")
cases(
    [{"blocks": 2}, {"at": ["0"]}, {"at": ["0.0"]}, {}], lambda c, v: make(scripted(net()), **v), names="ScriptModule"
)
case(
    lambda c: make(nn.Sequential(*layers()[:1], scripted(net()[1]), layers()[2]), at=["1.0"]),
    names="'1' is a ScriptModule",
)
case(lambda c: make(nn.Sequential(*layers()[:1], scripted(net()[1])), blocks=3), names="blocks=3")
case(lambda c: bll.recompute(scripted(nn.Linear(6, 4))), names="module is a ScriptModule")

# Losses, families, feedback.
cases([*NOT_FINITE, *NOT_A_NUMBER, X], lambda c, v: bll.Variational() * v, names="weight")
cases([math.nan, "2", None, True], lambda c, v: v * bll.BLL, names="weight")
case(lambda c: 1e200 * (1e200 * bll.BLL), names="weight")
case(lambda c: dense_of(1, model=[nn.Linear(6, 8), nn.Linear(8, 1)], loss=bll.Similarity()), names="Similarity")
case(lambda c: make([nn.Linear(6, 1), nn.Linear(1, CLASSES)], loss=bll.Similarity()), names="Similarity")
cases([3, None, "bll", bll.Predictive, 0], lambda c, v: bll.Variational() + v, names="local loss")
cases([3, None, 0], lambda c, v: v + bll.Variational(), names="local loss")
cases([None, "gaussian", bll.Gaussian, 1.0], lambda c, v: bll.Variational(family=v), names="family")
cases([1, None, "yes"], lambda c, v: bll.Variational(fixed_posterior=v), names="fixed_posterior")
cases(["fancy", 3, ["mlp"], "", True, nn.Linear(8, 4)], lambda c, v: bll.Predictive(head=v), names="head")
cases(
    [
        nn.Linear,
        lambda: nn.Identity(),
        lambda site: None,
        lambda site: "mlp",
        lambda site: Scores(3),
        lambda site: Scores(None),
    ],
    lambda c, v: make(loss=bll.Predictive(head=v)),
    names="head",
)
cases([*NOT_FINITE, *NOT_A_NUMBER, 0, -1.0], lambda c, v: bll.Gaussian(variance=v), names="variance")
cases([*NOT_WHOLE, 1, 0, -2], lambda c, v: bll.Categorical(categories=v), names="categories")
cases([*NOT_FINITE, *NOT_A_NUMBER, 0, -1e-3], lambda c, v: bll.ClosedFormFeedback(ridge=v), names="ridge")
cases([*NOT_FINITE, *NOT_A_NUMBER, 1, -0.1], lambda c, v: bll.ClosedFormFeedback(forgetting=v), names="forgetting")
cases([*NOT_WHOLE, 0, -1], lambda c, v: bll.GradientFeedback(depth=v), names="depth")
cases([*NOT_WHOLE, 0, -1], lambda c, v: bll.GradientFeedback(width=v), names="width")
cases([*NOT_WHOLE, 0, -1], lambda c, v: Targets(v, labels=True), names="size")
for statistic in (bll.spatial_mean, bll.spatial_max, bll.spatial_std):
    cases([None, ARRAY, [[1.0]], X, X[0]], lambda c, v, statistic=statistic: statistic(v), names="positions")
FAMILIES = [bll.Gaussian(), bll.GaussianMeanVariance(), bll.Bernoulli(), bll.Categorical(2), bll.Poisson()]
A, OTHERS = torch.zeros(3, 4), [torch.zeros(4), torch.zeros(1, 4), torch.zeros(3, 1, 4), torch.zeros(3, 2)]
for family in FAMILIES:
    eta = family.natural(A)
    for other in OTHERS:
        for pair in ((eta, family.natural(other)), (family.natural(other), eta)):
            case(lambda c, family=family, pair=pair: family.kl_divergence(*pair), names="eta_p")
    cases([None, 3.0, ARRAY, A], lambda c, v, family=family, eta=eta: family.kl_divergence(eta, v), names="eta_q")
    for other in OTHERS:
        case(
            lambda c, family=family, other=other: family.variational_loss(A, other, fixed_posterior=False),
            names="alpha",
        )

# Feedback alignment.
RULES: dict[str, Callable[..., alignment.Alignment]] = {
    "fa": alignment.FeedbackAlignment,
    "usf": lambda model, **options: alignment.SignSymmetry(model, magnitude="uniform", **options),
    "dfa": lambda model, **options: alignment.DirectFeedbackAlignment(model, **({"example": X[:2]} | options)),
}
for rule in RULES.values():
    cases([*NO_MODULE, layers()], lambda c, v, rule=rule: rule(v), names="model")
    cases([*NOT_WHOLE[:6], -1, 2**70], lambda c, v, rule=rule: rule(nn.Sequential(*layers()), seed=v), names="seed")
    cases(
        [*NOT_FINITE, *NOT_A_NUMBER, 0, -1],
        lambda c, v, rule=rule: rule(nn.Sequential(*layers()), gain=v),
        names="gain",
    )
cases([None, ARRAY, X[:0], X.tolist(), torch.randn(2, 7)], lambda c, v: RULES["dfa"](net(), example=v), names="example")
cases([None, "random", 3, True], lambda c, v: alignment.SignSymmetry(net(), magnitude=v), names="magnitude")
for act in ("backward", "angles"):
    cases([None, ARRAY, X[:0], X[:4], X[:, :5], X.double()], lambda c, v, act=act: getattr(c.fa, act)(v, Y), names="x")
    cases([None, Y.tolist(), Y[:4], Y.numpy(), Y + 1, Y > 0], lambda c, v, act=act: getattr(c.fa, act)(X, v), names="y")
    cases([None, "ce", nn.MSELoss], lambda c, v, act=act: getattr(c.fa, act)(X, Y, criterion=v), names="criterion")
    cases([lambda p, y: p], lambda c, v, act=act: getattr(c.fa, act)(X, Y, criterion=v), names="criterion")
    cases([X[0, 0]], lambda c, v, act=act: getattr(c.fa, act)(v, Y), names="x")
    cases([Y[0]], lambda c, v, act=act: getattr(c.fa, act)(X, v), names="y")
case(
    lambda c: alignment.FeedbackAlignment(nn.Sequential(scripted(nn.Linear(6, 4)), nn.Linear(4, 4))),
    names="ScriptModule",
)
cases([*NOT_FINITE, "1", None, torch.ones(2)], lambda c, v: c.fa.backward(X, Y, scale=v), names="scale")
cases([math.nan, "1", None], lambda c, v: c.drtp.with_targets(Y, scale=v).__enter__(), names="scale")
cases([None, Y.tolist(), Y.numpy()], lambda c, v: c.drtp.with_targets(v).__enter__(), names="y")
cases([Y + 1, X[:, :3], X[:, :1], F.one_hot(Y)], lambda c, v: c.drtp.backward(X, v), names="y")
cases([None, [], "state", {}, {"rule": "FeedbackAlignment"}], lambda c, v: c.fa.load_state_dict(v), names="state")
case(lambda c: c.fa.load_state_dict({"rule": "FeedbackAlignment", "feedback": [X]}), names="state")
for name in ("fa", "brsf", "drtp"):
    cases(
        [
            lambda w: w * math.nan,
            lambda w: w / 0,
            Tensor.double,
            Tensor.half,
            Tensor.bfloat16,
            Tensor.long,
            lambda w: w + 0j,
            Tensor.to_sparse,
            lambda w: w.to("meta"),
        ],
        lambda c, v, name=name: altered(getattr(c, name), v),
        names="state",
    )
cases(
    ["3", None, -1, 1.5, math.nan, 2**63],
    lambda c, v: c.brsf.load_state_dict(c.brsf.state_dict() | {"next_seed": v}),
    names="next_seed",
)
case(lambda c: c.fa.load_state_dict(c.fa.state_dict() | {"feedback": {**c.fa.feedback, 3: X}}), names="state")
cases(
    ["next_seed", "gain", "feedback.0.0", 3],
    lambda c, v: c.fa.load_state_dict(c.fa.state_dict() | {v: 3}),
    names="state: next_seed|state: gain|state: feedback.0.0|state: 3",
)

MAPS = torch.randn(2, 3, 4, 4)


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


class Given:
    """Settings of a feedback that build what was given."""

    def __init__(self, built: Any) -> None:
        self.built = built

    def build(self, targets: Targets, *, channels: int) -> Any:
        return self.built


def raises(error: Exception) -> None:
    raise error


def scripted(module: nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, by one class or another
        return torch.jit.script(module)


def altered(rule: alignment.Alignment, change: Callable[[Tensor], Tensor]) -> None:
    """Load a rule's own state, the last tensor of its feedback changed and the others negative."""
    feedback = {name: -tensor for name, tensor in rule.feedback.items()}
    last = list(feedback)[-1]
    rule.load_state_dict({**rule.state_dict(), "feedback": {**feedback, last: change(feedback[last])}})


class Scores(nn.Module):
    """A head that gives scores for another number of classes, or none."""

    def __init__(self, classes: int | None) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, message) -> Tensor | None:
        return None if self.classes is None else message.statistics[:, : self.classes]


def make_of(model: Any) -> bll.BlockLocal:
    return bll.BlockLocal(model, classes=CLASSES, example=X[:2])


def dense_of(outputs: Any, **options) -> bll.BlockLocal:
    return make(classes=None, outputs=outputs, criterion=F.mse_loss, **options)


def net() -> nn.Sequential:
    return nn.Sequential(*layers())


def image() -> list[nn.Module]:
    return [nn.Conv2d(3, 8, 3), nn.Sequential(nn.Flatten(), nn.Linear(32, CLASSES))]


@pytest.mark.parametrize(("call", "names"), CASES)
def test_a_wrong_call_is_told(call: Callable[[Calls], object], names: str) -> None:
    on = calls()
    before = on.state()
    assert_refused(lambda: call(on), names=names)
    after = on.state()
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_what_is_a_whole_number_is_taken() -> None:
    for classes in (np.int64(CLASSES), torch.tensor(CLASSES), np.uint8(CLASSES)):
        one = make(classes=classes)
        assert type(one.targets.size) is int
        one.backward(X, Y)
    one = make(nn.Sequential(*layers()), blocks=np.int64(2))
    for exit in (np.int64(1), torch.tensor(1)):
        assert torch.equal(one.predict(X, exit=exit), one.predict(X, exit=1))
    assert bll.ClosedFormFeedback(ridge=np.float32(0.5)).ridge == 0.5


def test_a_copy_of_a_model_has_its_own_alignment() -> None:
    model = net()
    rule = alignment.SignSymmetry(model, magnitude="batchwise")
    twin, seed = copy.deepcopy(model), rule.next_seed
    F.cross_entropy(twin(X), Y).backward()
    assert rule.next_seed == seed
    F.cross_entropy(model(X), Y).backward()
    assert rule.next_seed == seed + 1
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
