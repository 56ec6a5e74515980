"""Prediction heads: shapes, training of every parameter, and the evidence against its closed form."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal import families
from blocklocal.families import Family
from blocklocal.feedback import Feedback
from blocklocal.heads import (
    HEADS,
    ConvHead,
    EvidenceHead,
    LinearHead,
    NormalisedHead,
    PooledResidualHead,
    ResidualHead,
    ResidualUnit,
    StridedConv2d,
    halved,
)
from blocklocal.memory import MemoryTracker
from blocklocal.messages import BorderInput, BorderSpec
from blocklocal.operations import operations

CLASSES, CHANNELS, BATCH = 4, 6, 5
spec = partial(zoo.spec, classes=CLASSES)


def message(h: Tensor, at: BorderSpec, feedback: Feedback | None = None) -> BorderInput:
    built = feedback.build(at.targets, channels=at.channels) if feedback else None
    return BorderInput(h, spec=at, statistic=bll.spatial_mean, feedback=built)


@pytest.mark.parametrize("head", [name for name in HEADS if name != "evidence"])
@pytest.mark.parametrize("shape", [(CHANNELS, 8, 8), (CHANNELS, 1, 1), (CHANNELS,), (7, CHANNELS)], ids=str)
def test_heads_give_logits_and_every_parameter_learns(head: str, shape: tuple[int, ...]) -> None:
    at = spec(*shape)
    if head not in ("linear", "normalised", "mlp") and len(shape) < 3:
        with pytest.raises(ValueError, match=f'head="{head}" needs feature maps .* has shape .*"normalised"'):
            HEADS[head](at)
        return
    module = HEADS[head](at)
    h = torch.randn(BATCH, *shape, requires_grad=True)
    logits = module(message(h, at))
    assert logits.shape == (BATCH, CLASSES)
    F.cross_entropy(logits, torch.arange(BATCH) % CLASSES).backward()
    assert h.grad is not None
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or name.endswith("weight"), name  # a 1x1 map shows a kernel its centre


@pytest.mark.parametrize("head", ["linear", "normalised", "mlp"])
def test_tokens_are_predicted_one_by_one(head: str) -> None:
    at = spec(7, CHANNELS, tokens=True)
    module, h = HEADS[head](at), torch.randn(BATCH, 7, CHANNELS)
    logits = module(message(h, at))
    single = spec(CHANNELS)
    assert_close(logits, torch.stack([module(message(h[:, t], single)) for t in range(7)], 1))


def test_linear_head_reads_the_statistics() -> None:
    at = spec(CHANNELS, 3, 3)
    module, h = LinearHead(at), torch.randn(BATCH, CHANNELS, 3, 3)
    assert_close(module(message(h, at)), h.mean((2, 3)) @ module.linear.weight.T + module.linear.bias)


def plain(unit: ResidualUnit, h: Tensor) -> Tensor:
    """The same unit, with a strided convolution as its shortcut and gradients added by autograd."""
    convolution, norm = unit.shortcut
    assert isinstance(convolution, torch.nn.Conv2d)
    return torch.relu(unit.branch(h) + norm(F.conv2d(h, convolution.weight, stride=unit.stride)))


@pytest.mark.parametrize("size", [1, 6, 7])
def test_residual_units_are_the_plain_ones(size: int) -> None:
    unit = ResidualUnit(3, 5, stride=2).double()
    h = torch.randn(4, 3, size, size, dtype=torch.float64, requires_grad=True)
    wanted = [h, *unit.parameters()]
    output, expected = unit(h), plain(unit, h)
    assert_close(output, expected)
    upstream = torch.randn_like(output)
    for gradients in zip(*(torch.autograd.grad(o, wanted, upstream) for o in (output, expected)), strict=True):
        assert_close(*gradients)
    assert torch.autograd.gradgradcheck(unit.eval(), h)


def test_residual_units_make_one_map_in_the_backward_pass() -> None:
    """Where autograd alone makes one for each convolution, and their sum."""
    unit = ResidualUnit(64, 2, stride=2)

    def most(run: Callable[[Tensor], Tensor]) -> int:
        h = torch.randn(2, 64, 16, 16, requires_grad=True)
        output = run(h).sum()
        with MemoryTracker() as tracker:
            output.backward()
        return tracker.timeline.peak

    a_map, gradients = 4 * 2 * 64 * 16 * 16, sum(parameter.nbytes for parameter in unit.parameters())
    assert a_map < most(unit) < 1.5 * a_map + gradients
    assert most(lambda h: plain(unit, h)) > 3 * a_map


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_heads_in_other_precisions(head: str, dtype: torch.dtype) -> None:
    at = spec(CHANNELS, 4, 4)
    given = message(torch.randn(BATCH, CHANNELS, 4, 4, dtype=dtype), at, bll.ClosedFormFeedback())
    assert HEADS[head](at).to(dtype)(given).shape == (BATCH, CLASSES)


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5), (2, 2), (3, 4)], ids=str)
def test_strides_beyond_the_map_change_nothing(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, h = StridedConv2d(CHANNELS, 8, 3, stride=2, padding=1, bias=False), torch.randn(BATCH, CHANNELS, *size)
    theirs = nn.Conv2d(CHANNELS, 8, 3, stride=2, padding=1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    outputs = [ours(h), theirs(h)]
    assert_close(*outputs)
    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("head", ["conv", "residual", "pooled", "patches", "depthwise"])
@pytest.mark.parametrize("size", [(1, 1), (4, 1), (2, 2), (2, 3)], ids=str)
def test_gradients_on_small_maps_are_computed_in_autocast(head: str, size: tuple[int, int]) -> None:
    """PyTorch returned memory that was never written, for convolutions with strides beyond the map: freed memory is not
    a number here."""
    torch.manual_seed(0)
    at = spec(32, *size)
    module, h = HEADS[head](at), torch.randn(64, 32, *size)
    found = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(module(message(h, at)).float(), torch.arange(64) % CLASSES)
        zoo.leave_behind(math.nan)
        found.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, [*module.parameters()])]))
    assert found[1].isfinite().all()
    assert torch.cosine_similarity(*found, dim=0) > 0.95


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)], ids=str)
def test_patches_are_predicted_one_by_one(size: tuple[int, int]) -> None:
    at = spec(CHANNELS, *size)
    head, h = HEADS["patches"](at).eval(), torch.randn(BATCH, CHANNELS, *size)
    whole = ResidualHead(at).eval()
    whole.load_state_dict(head.state_dict())
    (height, width), (rows, columns) = size, (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    corners = [(0, 0), (0, width - columns), (height - rows, 0), (height - rows, width - columns)]
    patches = [h[:, :, top : top + rows, left : left + columns] for top, left in corners]
    expected = torch.stack([whole(message(patch, at)) for patch in patches]).mean(0)
    assert_close(head(message(h, at)), expected)


def test_depthwise_layers_look_at_one_channel_and_then_at_one_pixel() -> None:
    head, h = HEADS["depthwise"](spec(CHANNELS, 8, 8)).eval(), torch.randn(BATCH, CHANNELS, 8, 8)
    for layer in head.get_submodule("features").children():
        assert isinstance(layer, torch.nn.Sequential)
        own, norm, _, across, last, _ = layer
        assert isinstance(own, torch.nn.Conv2d)
        assert isinstance(across, torch.nn.Conv2d)
        weights = zip(h.split(1, 1), own.weight.split(1), strict=True)
        maps = torch.cat([F.conv2d(channel, weight, stride=2, padding=1) for channel, weight in weights], 1)
        mixed = torch.einsum("bchw,dc->bdhw", torch.relu(norm(maps)), across.weight[..., 0, 0])
        expected = torch.relu(last(mixed))
        assert_close(layer(h), expected)
        h = expected


@pytest.mark.parametrize("s2", [0.5, 1.0])
def test_evidence_is_minus_the_squared_distance_to_the_prototypes(s2: float) -> None:
    at = spec(CHANNELS)
    head, h = EvidenceHead(at, family=bll.Gaussian(s2)), torch.randn(BATCH, CHANNELS)
    given = message(h, at, bll.GradientFeedback())
    assert given.feedback is not None
    logits = head(given)
    prototypes = given.feedback(torch.arange(CLASSES)).detach()
    expected = -(torch.cdist(h, prototypes) ** 2) / (4 * s2)
    assert_close(logits, expected - CHANNELS / 2 * math.log(2 * s2), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits.argmax(1), torch.cdist(h, prototypes).argmin(1))


def test_evidence_leaves_feedback_to_its_own_fit() -> None:
    at = spec(CHANNELS)
    h = torch.randn(BATCH, CHANNELS, requires_grad=True)
    given = message(h, at, bll.GradientFeedback())
    HEADS["evidence"](at)(given).sum().backward()
    assert h.grad is not None
    assert given.feedback is not None
    assert all(parameter.grad is None for parameter in given.feedback.parameters())


def test_evidence_per_token() -> None:
    at = spec(7, CHANNELS, tokens=True)
    head, h = HEADS["evidence"](at), torch.randn(BATCH, 7, CHANNELS)
    given = message(h, at, bll.GradientFeedback())
    flat = BorderInput(h.flatten(0, 1), spec=spec(CHANNELS), statistic=bll.spatial_mean, feedback=given.feedback)
    assert_close(head(given).flatten(0, 1), head(flat))


FAMILIES = [
    bll.Gaussian(0.5),
    bll.GaussianMeanVariance(),
    bll.Bernoulli(),
    bll.Categorical(4),
    bll.Poisson(),
]


def every_pair(family: Family, alpha: Tensor, beta: Tensor) -> Tensor:
    """Every message with every other, (B, n, C, P), and the evidence of each pair."""
    return family.evidence(family.natural(alpha).unsqueeze(-3), family.natural(beta)).sum(-1)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_evidence_of_all_pairs(family: Family, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "CHUNK", 60)  # one and two of five classes at a time
    alpha, beta = torch.randn(*shape, 8).double().requires_grad_(), 5 + torch.randn(5, 8).double()
    found, expected = family.evidence_matrix(alpha, beta), every_pair(family, alpha, beta)
    assert_close(found, expected)
    upstream = torch.randn_like(found)
    assert_close(*(torch.autograd.grad(e, alpha, upstream) for e in (found, expected)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(family.evidence_matrix(alpha, beta), found)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_evidence_never_holds_all_pairs(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "CHUNK", 2**14)
    alpha, beta = torch.randn(16, 256, requires_grad=True), torch.randn(500, 256)

    def peak(evidence: Callable[[], Tensor]) -> int:
        with MemoryTracker() as tracker:
            evidence().sum().backward()
        return tracker.timeline.peak

    product = isinstance(family, bll.Gaussian | bll.Poisson)
    assert peak(lambda: family.evidence_matrix(alpha, beta)) < (4 * beta.nbytes if product else 2**21)
    assert peak(lambda: every_pair(family, alpha, beta)) > 4 * 16 * 500 * 256


def test_evidence_needs_labels() -> None:
    with pytest.raises(ValueError, match=r"evidence.*needs labels"):
        HEADS["evidence"](spec(CHANNELS, labels=False))
    assert not HEADS["evidence"](spec(CHANNELS)).state_dict()


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [(2.0, PooledResidualHead), (0.4, PooledResidualHead), (0.35, ConvHead), (0.2, ConvHead), (0.1, NormalisedHead)],
)
def test_a_budget_buys_the_best_head_that_it_pays_for(budget: float, chosen: type) -> None:
    """Of the multiplications and additions of one residual unit of 16 channels, 2 x 2 x 9 x 16^2 per pixel."""
    blocks = [zoo.Residual(16, 16, stride=1), nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(16, CLASSES))]
    x = torch.randn(2, 16, 16, 16)
    learner = bll.BlockLocal(blocks, classes=CLASSES, example=x, loss=bll.Predictive(budget=budget))
    border = learner._border(0)
    assert type(border.predictive.head) is chosen
    assert border.spec.operations == 2 * 2 * 9 * 16**2 * 16**2
    with torch.no_grad():
        message = border.message(learner.blocks[0](x))
    assert operations(lambda h: border.predictive.head(message), x) <= budget * border.spec.operations


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (2, 3, 7, 6), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_halved_maps_are_means_of_squares(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    h = torch.randn(shape, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    found = halved(h)
    for i in range(found.shape[2]):
        for j in range(found.shape[3]):
            assert_close(found[:, :, i, j], h[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)))
    assert torch.autograd.gradcheck(halved, h)
