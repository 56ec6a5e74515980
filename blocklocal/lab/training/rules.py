"""Learning rules by name: each makes a learner from a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, chdir, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Literal

from torch import Tensor, nn

from blocklocal import (
    BLL,
    BLL_PAPER,
    PRED_SIM,
    BlockLocal,
    ClosedFormFeedback,
    Lookahead,
    Predictive,
    SpatialGrid,
    SpatialMoments,
    Unembedding,
    Variational,
    spatial_mean,
)
from blocklocal.alignment import (
    Alignment,
    DirectFeedbackAlignment,
    DirectRandomTargetProjection,
    FeedbackAlignment,
    SignSymmetry,
)
from blocklocal.border import Border
from blocklocal.feedback import Feedback
from blocklocal.lab.errors import UserError, blame
from blocklocal.lab.own_code import own_function
from blocklocal.losses import LocalLoss, Posterior, Term, WeightedSum
from blocklocal.messages import Criterion, Statistic

STATISTICS: dict[str, Statistic] = {"mean": spatial_mean, "moments": SpatialMoments(), "grid": SpatialGrid()}


@dataclass(frozen=True)
class Changes:
    """Changes to a rule's own local loss.

    head, budget: of all predictions at borders, where "unembedding" is `Unembedding`; lookahead: behind copies of the
    next unit, see `Lookahead`; refresh: of either's copies.
    statistic: of those in STATISTICS.
    variational: the weight of that term, 0 being without it; estimate_variance: with the variance of each channel from
    the batch. power, softness: see `Posterior`.
    """

    head: str | None = None
    budget: float | None = None
    lookahead: str = "none"
    refresh: int = 100
    statistic: str = "mean"
    variational: float | None = None
    estimate_variance: bool = False
    power: float = 1.0
    softness: float = 0.0

    def __bool__(self) -> bool:
        return self != Changes()

    def made(self, loss: LocalLoss) -> LocalLoss:
        """The loss with these changes. ValueError: it has no such term, or the change does not apply to it."""
        variational = any(isinstance(term, Variational) for _, term in loss.terms)
        if not variational and (self.variational is not None or self.estimate_variance):
            raise ValueError("it has no variational term: leave --variational and --estimate-variance out")
        terms = [self._term(weight, term) for weight, term in loss.terms]
        return WeightedSum(tuple((w, term) for w, term in terms if w or not isinstance(term, Variational)))

    def _term(self, weight: float, term: Term) -> tuple[float, Term]:
        if isinstance(term, Variational):
            weight = weight if self.variational is None else self.variational
            return weight, replace(term, estimate_variance=self.estimate_variance)
        if isinstance(term, Predictive):
            head = Unembedding(self.refresh) if self.head == "unembedding" else self.head
            if self.lookahead != "none":
                refresh = None if self.lookahead == "trained" else self.refresh
                lookahead = Lookahead(head, refresh=refresh, trainable=self.lookahead == "both")
                term = replace(term, head=lookahead, budget=None)
            elif head or self.budget:
                term = replace(term, head=head, budget=self.budget)
            if self.softness or self.power < 1:
                term = Posterior(term.head, term.budget, power=self.power, softness=self.softness)
        return weight, term


@dataclass(frozen=True)
class Problem:
    """What a model learns, and where it is cut: at submodules, or else into this number of blocks; a list of modules is
    cut between them.

    example: a batch of samples as the model gets them. balance: see `split`; memory, unlike time, is the same at every
    measurement. seed: of what a rule draws besides the model's weights.
    classes, outputs, add_beliefs: see `BlockLocal`.
    """

    example: Tensor
    classes: int | None = None
    outputs: int | None = None
    blocks: int | None = None
    at: Sequence[str] | None = None
    criterion: Criterion | None = None
    seed: int = 0
    balance: Literal["time", "memory"] = "memory"
    changes: Changes = Changes()
    add_beliefs: bool = False


@dataclass(frozen=True)
class Learning:
    """A learner, with the replacement for its true backward pass if the rule has one."""

    learner: BlockLocal
    alignment: Alignment | None = None

    def with_targets(self, y: Tensor, *, scale: float = 1.0) -> AbstractContextManager[None]:
        """A context for the learner's step on a batch with targets y, whose losses are multiplied by `scale`."""
        return nullcontext() if self.alignment is None else self.alignment.with_targets(y, scale=scale)


@dataclass(frozen=True)
class Rule:
    """How a model learns. build: makes its learner. in_blocks: whether borders cut it. over_processes: whether it can
    train in a pipeline, which places, saves and moves only blocks and borders."""

    build: Callable[[nn.Module | Sequence[nn.Module], Problem], Learning]
    in_blocks: bool = True
    over_processes: bool = True


def block_local(loss: LocalLoss, *, feedback: Feedback = ClosedFormFeedback()) -> Rule:  # noqa: B008 (frozen settings)
    """Blocks that learn from the same local loss at every border."""

    def build(model: nn.Module | Sequence[nn.Module], problem: Problem) -> Learning:
        learner = BlockLocal(
            model,
            at=problem.at,
            blocks=None if problem.at else problem.blocks,
            classes=problem.classes,
            outputs=problem.outputs,
            example=problem.example,
            balance=problem.balance,
            loss=problem.changes.made(loss),
            feedback=feedback,
            statistic=STATISTICS[problem.changes.statistic],
            criterion=problem.criterion,
            add_beliefs=problem.add_beliefs,
        )
        specs = [border.spec for border in learner.borders if isinstance(border, Border)]
        if specs and problem.changes.statistic != "mean" and not any(spec.reduces for spec in specs):
            raise ValueError(
                f"--statistic {problem.changes.statistic} has no effect: what crosses the borders has no positions"
            )
        return Learning(learner)

    return Rule(build)


def backpropagation(model: nn.Module | Sequence[nn.Module], problem: Problem) -> Learning:
    """One block, no border."""
    if problem.changes or problem.add_beliefs:
        options = ", ".join(f"--{field.name.replace('_', '-')}" for field in fields(Changes))
        raise ValueError(f"it trains the model whole: {options} and --add-beliefs are for rules in blocks")
    learner = BlockLocal(model, blocks=1, classes=problem.classes, outputs=problem.outputs, criterion=problem.criterion)
    return Learning(learner)


def aligned(align: Callable[[nn.Module, Problem], Alignment]) -> Rule:
    """One block, in which other feedback weights propagate the gradient."""

    def build(model: nn.Module | Sequence[nn.Module], problem: Problem) -> Learning:
        learner = backpropagation(model, problem).learner
        return Learning(learner, align(learner.model, problem))

    return Rule(build, in_blocks=False, over_processes=False)


def random_targets(model: nn.Module, problem: Problem) -> DirectRandomTargetProjection:
    if problem.classes is None:
        raise ValueError("it takes targets for the sign of the error, which is right for classes alone")
    return DirectRandomTargetProjection(model, example=problem.example, seed=problem.seed)


RULES: dict[str, Rule] = {
    "bll": block_local(BLL),
    "bll-paper": block_local(BLL_PAPER, feedback=ClosedFormFeedback(forgetting=0.0)),  # the optimum of each batch alone
    "pred": block_local(Predictive()),
    "predsim": block_local(PRED_SIM),
    "bp": Rule(backpropagation, in_blocks=False),
    "fa": aligned(lambda model, given: FeedbackAlignment(model, seed=given.seed)),
    "usf": aligned(lambda model, given: SignSymmetry(model, magnitude="uniform", seed=given.seed)),
    "brsf": aligned(lambda model, given: SignSymmetry(model, magnitude="batchwise", seed=given.seed)),
    "frsf": aligned(lambda model, given: SignSymmetry(model, magnitude="fixed", seed=given.seed)),
    "dfa": aligned(lambda model, given: DirectFeedbackAlignment(model, example=given.example, seed=given.seed)),
    "drtp": aligned(random_targets),
}
"""The rules of every command. One of the user's own is package.module:function, see `own`."""
WHOLE = {name for name, rule in RULES.items() if not rule.in_blocks}

OWN_ARGUMENTS = ("classes", "blocks", "at", "example", "criterion", "seed")


def is_own(name: str) -> bool:
    """Whether the name is that of the user's own function, package.module:function."""
    return name not in RULES and ":" in name


def own(name: str) -> Rule:
    """A rule from the user's own function, which is called with the model and `OWN_ARGUMENTS` and returns a BlockLocal.

    UserError: see `own_function`.
    """

    def build(model: nn.Module | Sequence[nn.Module], problem: Problem) -> Learning:
        if problem.changes or problem.add_beliefs:
            raise ValueError("it is a function, which sets its own local loss: leave --head and such options out")
        if problem.classes is None:
            raise ValueError("it is a function of classes=, and the target is a number: choose another rule")
        with blame(f"rule {name!r} cannot be applied"), chdir("."):
            learner = function(model, **{argument: getattr(problem, argument) for argument in OWN_ARGUMENTS})
        if not isinstance(learner, BlockLocal) or (isinstance(model, nn.Module) and learner.model is not model):
            raise ValueError("its function must return a bll.BlockLocal of the model that it is given")
        return Learning(learner)

    with blame(f"rule {name!r} cannot be imported"), chdir("."):
        function = own_function(name, kind="rule", positional=1, keywords=OWN_ARGUMENTS)
    return Rule(build)


def find(name: str) -> Rule:
    """UserError: no such rule."""
    if is_own(name):
        return own(name)
    if name not in RULES:
        raise UserError(f"unknown rule {name!r}: choose {', '.join(RULES)}, or package.module:function")
    return RULES[name]


def check_over_processes(name: str) -> None:
    """Check that a rule can train over processes. UserError: no such rule, or one that trains the model as a whole."""
    if not find(name).over_processes:
        raise UserError(f"--rule {name} trains the model whole, in one process: use bll train")


def check_offloaded(name: str) -> None:
    """Check that a rule trains blocks one by one. UserError: no such rule, or one that trains the model as a whole."""
    if not find(name).over_processes:
        raise UserError(
            f"--rule {name} trains the model whole, and --offload its blocks one by one: leave --offload out"
        )


def apply(name: str, model: nn.Module | Sequence[nn.Module], problem: Problem) -> Learning:
    """Apply the rule of that name to a model. UserError: no such rule, or a model that does not fit it."""
    rule = find(name)
    try:
        return rule.build(model, problem)
    except ValueError as error:  # the library's own, for arguments that do not fit the model
        raise UserError(f"rule {name!r}: {error}") from error
