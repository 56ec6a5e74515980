"""Block-local learning: train any network in blocks, each from its own local loss."""

from typing import TYPE_CHECKING, Any

from blocklocal import alignment
from blocklocal.collapse import CollapseWarning
from blocklocal.families import Bernoulli, Categorical, Family, Gaussian, GaussianMeanVariance, Poisson
from blocklocal.feedback import ClosedFormFeedback, Feedback, GradientFeedback, Targets
from blocklocal.hooked import Hooked
from blocklocal.learner import BlockLocal
from blocklocal.lookahead import Lookahead
from blocklocal.losses import BLL, BLL_PAPER, PRED_SIM, Posterior, Predictive, Similarity, Term, Variational
from blocklocal.messages import (
    BorderInput,
    BorderSpec,
    SpatialGrid,
    SpatialMoments,
    spatial_max,
    spatial_mean,
    spatial_std,
)
from blocklocal.offload import FileStore, HostStore
from blocklocal.recompute import recompute
from blocklocal.split import split
from blocklocal.unembedding import Unembedding

if TYPE_CHECKING:
    from blocklocal.pipeline import Pipeline

__all__ = [
    "BLL",
    "BLL_PAPER",
    "PRED_SIM",
    "Bernoulli",
    "BlockLocal",
    "BorderInput",
    "BorderSpec",
    "Categorical",
    "ClosedFormFeedback",
    "CollapseWarning",
    "Family",
    "Feedback",
    "FileStore",
    "Gaussian",
    "GaussianMeanVariance",
    "GradientFeedback",
    "Hooked",
    "HostStore",
    "Lookahead",
    "Pipeline",
    "Poisson",
    "Posterior",
    "Predictive",
    "Similarity",
    "SpatialGrid",
    "SpatialMoments",
    "Targets",
    "Term",
    "Unembedding",
    "Variational",
    "alignment",
    "recompute",
    "spatial_max",
    "spatial_mean",
    "spatial_std",
    "split",
]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":  # FSDP2 takes a second to import
        from blocklocal.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
