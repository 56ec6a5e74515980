"""One border: weighted parts, when feedback is fitted, and what it reports, against NumPy."""

import numpy as np
import pytest
import torch
import zoo
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import blocklocal as bll
from blocklocal.border import Border
from blocklocal.feedback import LinearFeedback
from blocklocal.local_learner import cross_entropy
from blocklocal.losses import LocalLoss
from blocklocal.messages import BorderSpec

CLASSES, CHANNELS, BATCH = 3, 6, 30


def spec(*shape: int, labels: bool = True, tokens: bool = False) -> BorderSpec:
    criterion = cross_entropy if labels else F.mse_loss
    return zoo.spec(*shape, classes=CLASSES, labels=labels, tokens=tokens, criterion=criterion)


def border(at: BorderSpec, loss: LocalLoss = bll.BLL, **options) -> Border:
    settings = {"feedback": bll.ClosedFormFeedback(), "statistic": bll.spatial_mean} | options
    return Border(at, loss=loss, **settings)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, CHANNELS, generator=generator), torch.arange(BATCH) % CLASSES


def test_loss_is_the_weighted_sum_of_its_parts() -> None:
    h, y = batch()
    both = border(spec(CHANNELS), 0.3 * bll.Variational() + 2 * bll.Predictive("linear")).eval()
    variational, predictive = both.parts(both.message(h), y)
    assert_close(both(both.message(h), y), 0.3 * variational + 2 * predictive)
    assert_close(predictive, F.cross_entropy(both.predict(both.message(h)), y))
    alone = border(spec(CHANNELS), bll.Variational()).eval()
    assert_close(variational, alone(alone.message(h), y))  # neither has seen a batch: beta is 0


def test_feedback_is_fitted_before_its_message_in_training_only() -> None:
    (h, y), one = batch(), border(spec(CHANNELS))
    assert isinstance(one.feedback, LinearFeedback)
    one.eval()
    one(one.message(h), y)
    assert not one.feedback.weight.any()
    one.train()
    variational = one.parts(one.message(h), y)[0]
    means = torch.stack([h[y == c].mean(0) for c in range(CLASSES)])
    assert_close(one.feedback.weight, means, atol=1e-3, rtol=1e-3)
    constant = CHANNELS * (np.log(2) / 2 - 1 / 4 + np.log(2 * np.pi * np.e) / 2)
    assert_close(variational, ((h - means[y]) ** 2).sum(1).mean() / 8 + constant, atol=1e-4, rtol=1e-4)


def test_feedback_is_made_where_a_term_reads_it() -> None:
    assert border(spec(CHANNELS), bll.Predictive()).feedback is None
    assert border(spec(CHANNELS), bll.Similarity() + bll.Predictive("linear")).feedback is None
    assert border(spec(CHANNELS), bll.Predictive("evidence")).feedback is not None
    assert border(spec(CHANNELS), bll.Variational()).feedback is not None


def test_feedback_that_no_loss_trains_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GradientFeedback\(.*\) would never learn: only bll.Variational\(\) trains"):
        border(spec(CHANNELS), bll.Predictive("evidence"), feedback=bll.GradientFeedback())
    border(spec(CHANNELS), bll.Predictive("evidence") + bll.Variational(), feedback=bll.GradientFeedback())


def test_evidence_learns_from_the_class_means() -> None:
    (h, y), one = batch(), border(spec(CHANNELS), bll.Predictive("evidence"))
    one(one.message(h), y)
    means = torch.stack([h[y == c].mean(0) for c in range(CLASSES)])
    assert torch.equal(one.predict(one.message(h)).argmax(1), torch.cdist(h, means).argmin(1))


def test_prediction_needs_a_head() -> None:
    with pytest.raises(ValueError, match=r"predicts nothing: add bll.Predictive\(\)"):
        _ = border(spec(CHANNELS), bll.Variational()).predictive


@pytest.mark.parametrize(
    ("h", "y", "tokens", "message"),
    [
        ((4, 6), (4, 1), False, r"y has shape \(4, 1\), and alpha at this border \(4, 6\): one target per sample"),
        ((4, 6), (3,), False, "one target per sample"),
        ((4, 5, 6), (4,), True, "one target per token"),
        ((4, 5, 6), (4, 5), False, "one target per sample"),
    ],
)
def test_targets_of_the_wrong_shape_are_refused(h: tuple, y: tuple, tokens: bool, message: str) -> None:
    one = border(spec(*h[1:], tokens=tokens), bll.BLL)
    with pytest.raises(ValueError, match=message):
        one(one.message(torch.randn(h)), torch.zeros(y, dtype=torch.long))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(0), b - b.mean(0)
    return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def test_report_of_labels() -> None:
    h, y = batch()
    h = h + 2.0 * F.one_hot(y, CHANNELS)
    one = border(spec(CHANNELS), bll.Variational() + bll.Predictive("linear"))
    one(one.message(h), y)
    one.eval()
    report = one.diagnose(one.message(h), y)
    rows, labels = h.numpy(), y.numpy()
    means = np.stack([rows[labels == c].mean(0) for c in range(CLASSES)])[labels]
    between, within = ((means - rows.mean(0)) ** 2).sum(1).mean(), ((rows - means) ** 2).sum(1).mean()
    np.testing.assert_allclose(report["variance_ratio"], between / within, rtol=1e-4)
    assert one.feedback is not None
    np.testing.assert_allclose(report["agreement"], cosine(rows, one.feedback(y).numpy()), rtol=1e-4)
    variational, predictive = one.parts(one.message(h), y)
    assert report["variational"] == variational.item()
    assert report["predictive"] == predictive.item()
    assert set(report) == {"variational", "predictive", "agreement", "variance_ratio"}


def test_report_of_dense_targets() -> None:
    h, _ = batch()
    y = torch.randn(BATCH, CLASSES) + 1
    h = h + y @ torch.randn(CLASSES, CHANNELS) + 5  # a mean that no multiple of the targets explains
    one = border(spec(CHANNELS, labels=False), bll.Predictive("linear")).eval()
    report = one.diagnose(one.message(h), y)
    rows, targets = h.numpy(), np.hstack([y.numpy(), np.ones((BATCH, 1))])
    fit = targets @ np.linalg.lstsq(targets, rows, rcond=None)[0]
    between, within = ((fit - fit.mean(0)) ** 2).sum(1).mean(), ((rows - fit) ** 2).sum(1).mean()
    np.testing.assert_allclose(report["variance_ratio"], between / within, rtol=1e-3)
    np.testing.assert_allclose(report["agreement"], cosine(rows, fit), rtol=1e-3)  # no feedback: with the fit


def test_report_of_tokens_and_maps() -> None:
    tokens = border(spec(7, CHANNELS, tokens=True)).eval()
    flat = border(spec(CHANNELS)).eval()
    flat.load_state_dict(tokens.state_dict())
    h, y = torch.randn(4, 7, CHANNELS), torch.randint(CLASSES, (4, 7))
    assert tokens.diagnose(tokens.message(h), y) == pytest.approx(
        flat.diagnose(flat.message(h.flatten(0, 1)), y.flatten()), rel=1e-4
    )
    maps, vectors = (border(spec(*shape), bll.Variational()).eval() for shape in [(CHANNELS, 3, 3), (CHANNELS,)])
    h, y = torch.randn(8, CHANNELS, 3, 3), torch.randint(CLASSES, (8,))
    assert maps.diagnose(maps.message(h), y) == pytest.approx(vectors.diagnose(vectors.message(h.mean((2, 3))), y))


def test_equal_terms_are_all_reported() -> None:
    h, y = batch()
    one = border(spec(CHANNELS), bll.Predictive("linear") + bll.Predictive("mlp") + bll.Variational()).eval()
    names = "predictive0", "predictive1", "variational"
    report, parts = one.diagnose(one.message(h), y), one.parts(one.message(h), y)
    assert [report[name] for name in names] == [part.item() for part in parts]


@pytest.mark.parametrize("collapsed", [torch.zeros(BATCH, CHANNELS), torch.full((BATCH, CHANNELS), 3.7)])
def test_collapse_shows_as_no_variance_between_classes(collapsed: Tensor) -> None:
    _, y = batch()
    one = border(spec(CHANNELS)).eval()
    assert one.diagnose(one.message(collapsed), y)["variance_ratio"] < 1e-3
