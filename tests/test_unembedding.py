"""Heads that read out through the model's own output layer: what they compute, copy and learn, and what they refuse."""

import copy
import io
import math
import zipfile

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam

import blocklocal as bll
from blocklocal.unembedding import unembeddings

TOKENS, WIDTH, LENGTH = 11, 8, 5


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(torch.tanh(self.mix(h.cumsum(1))))


class Decoder(nn.Module):
    """A small language model. Its logits are multiplied by `scale`, unless that is None."""

    def __init__(self, *, tied: bool = False, bias: bool = False, scale: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=bias)
        self.scale = scale
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        for layer in self.layers:
            h = layer(h)
        logits = self.lm_head(self.norm(h))
        return logits if self.scale is None else logits * self.scale


IDS = torch.randint(TOKENS, (4, LENGTH + 1), generator=torch.Generator().manual_seed(1))
X, Y = IDS[:, :-1], IDS[:, 1:]
AT = ["layers.0", "layers.1"]


def made(kind: type = bll.BlockLocal, /, *, refresh: int = 3, model: nn.Module | None = None, **settings):
    head = settings.pop("head", bll.Unembedding(refresh=refresh, layer=settings.pop("layer", None)))
    loss = bll.Predictive(head)
    model = Decoder() if model is None else model
    return kind(model, **{"at": AT, "classes": TOKENS, "example": X[:2], "loss": loss, **settings})


def optimizers_of(learner) -> list[torch.optim.Optimizer]:
    return [Adam(learner.block_parameters(k), lr=0.05) for k in range(len(learner.borders) + 1)]


@pytest.mark.parametrize("kind", [bll.BlockLocal, bll.Hooked])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradients_are_those_of_the_formula_with_the_copied_weights(kind: type, bias: bool) -> None:
    model = Decoder(bias=bias)
    learner = made(kind, model=model, refresh=2)
    learner.model.eval()  # no dropout
    for head in unembeddings(learner):  # not where they begin
        for own in (head.norm.weight, head.norm.bias):
            nn.init.normal_(own)
        nn.init.constant_(head.log_temperature, 0.3)
    then = copy.deepcopy(model.lm_head).requires_grad_(False)
    learner.backward(X, Y, optimizers=[SGD(learner.block_parameters(k), lr=0.5) for k in range(3)])
    plain = copy.deepcopy(learner)
    losses = learner.backward(X, Y)  # with the copy of before the first step

    h, again = X, plain.model
    for k in range(2):
        h = again.layers[k](again.embedding(h) if k == 0 else h)
        head = unembeddings(plain)[k]
        normalised = F.layer_norm(h, (WIDTH,), head.norm.weight, head.norm.bias)
        logits = then(normalised) / head.log_temperature.exp()
        loss = F.cross_entropy(logits.flatten(0, 1), Y.flatten())
        loss.backward()
        torch.testing.assert_close(losses[k], loss.detach())
        h = h.detach()
    F.cross_entropy(again.lm_head(again.norm(h)).flatten(0, 1), Y.flatten()).backward()
    named = dict(plain.named_parameters())
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, msg=name)
    assert all(parameter.grad is not None for parameter in learner.parameters())


def test_a_border_has_2_d_and_1_parameters_and_moves_the_output_layer_by_none_of_its_losses() -> None:
    learner = made()
    for border in learner.borders:
        assert sum(parameter.numel() for parameter in border.parameters()) == 2 * WIDTH + 1
    for k in range(2):
        loss, _ = learner.local(k, X if k == 0 else torch.randn(4, LENGTH, WIDTH), Y)
        loss.backward()
    assert learner.model.lm_head.weight.grad is None
    learner.local(2, torch.randn(4, LENGTH, WIDTH), Y)[0].backward()
    assert learner.model.lm_head.weight.grad is not None


@pytest.mark.parametrize("kind", [bll.BlockLocal, bll.Hooked])
def test_the_copy_is_taken_again_after_so_many_training_steps(kind: type) -> None:
    learner, weights = made(kind, refresh=3), []
    optimizers = optimizers_of(learner)
    for step in range(7):
        weights.append(learner.model.lm_head.weight.detach().clone())
        learner.backward(X, Y, optimizers=optimizers)
        for head in unembeddings(learner):
            assert torch.equal(head.weight, weights[step // 3 * 3])
        assert not torch.equal(learner.model.lm_head.weight, weights[-1])
        learner.predict(X, exit=0)
        with torch.no_grad():
            learner(X, Y)
        learner.eval()(X, Y)
        learner.train()
    assert [head.steps for head in unembeddings(learner)] == [7, 7]


@pytest.mark.parametrize("kind", [bll.BlockLocal, bll.Hooked])
def test_state_goes_on_to_the_bit_in_the_middle_of_an_interval(kind: type) -> None:
    learner = made(kind)
    optimizers = optimizers_of(learner)
    for _ in range(4):
        learner.backward(X, Y, optimizers=optimizers)
    file = io.BytesIO()
    torch.save([learner.state_dict(), [one.state_dict() for one in optimizers]], file)
    file.seek(0)
    weights, states = torch.load(file)
    other, copied = made(kind), copy.deepcopy(learner)
    other.load_state_dict(weights)
    others, copies = optimizers_of(other), optimizers_of(copied)
    for one, two, state in zip(others, copies, states, strict=True):
        one.load_state_dict(copy.deepcopy(state))
        two.load_state_dict(state)
    for step in range(4):
        found = []
        for one, its in ((learner, optimizers), (other, others), (copied, copies)):
            torch.manual_seed(step)  # of dropout
            found.append(one.backward(X, Y, optimizers=its))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_both_kinds_of_learners_learn_the_same_to_the_bit() -> None:
    for dtype, autocast in ((torch.float64, False), (torch.float32, True)):
        found = []
        for kind in (bll.BlockLocal, bll.Hooked):
            learner = made(kind, refresh=2, add_beliefs=autocast).to(dtype)
            optimizers = optimizers_of(learner)
            for step in range(4):
                torch.manual_seed(step)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    found.append(learner.backward(X, Y, optimizers=optimizers))
            found += [learner.eval().predict(X, exit=1), learner.predict(X, exit="all")]
        assert all(map(torch.equal, found[:6], found[6:]))


@pytest.mark.slow
@pytest.mark.parametrize("head", [bll.Unembedding(refresh=2), bll.Lookahead(refresh=2)])
def test_compiled_blocks_learn_as_plain_ones_and_are_not_compiled_again_at_every_step(head) -> None:
    torch.manual_seed(0)
    plain = made(head=head, at=AT[:1])
    learner = copy.deepcopy(plain)
    graphs, made_by = [], []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    learner.compile(backend=backend)
    optimizers = [optimizers_of(one) for one in (plain, learner)]
    for step in range(6):
        losses = []
        for one, its in zip((plain, learner), optimizers, strict=True):
            torch.manual_seed(step)  # of dropout
            losses.append(one.backward(X, Y, optimizers=its))
        assert torch.equal(*losses)
        made_by.append(len(graphs))
    assert made_by == [2] * 6


def test_tied_embeddings_learn_from_both_losses_and_their_copies_follow() -> None:
    learner = made(bll.Hooked, model=Decoder(tied=True), tied=True, refresh=2)
    optimizer = SGD(learner.parameters(), lr=0.1)
    before = learner.model.embedding.weight.detach().clone()
    for _ in range(3):
        learner.backward(X, Y)
        assert len({id(head.weight) for head in unembeddings(learner)} | {id(learner.model.lm_head.weight)}) == 3
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(before, learner.model.embedding.weight)
    learner.model.lm_head.weight.data.copy_(before)
    copied = unembeddings(learner)[0].weight.clone()
    assert not torch.equal(copied, before)
    learner.backward(X, Y)
    assert torch.equal(unembeddings(learner)[0].weight, copied)  # in the middle of an interval
    learner.backward(X, Y)
    assert torch.equal(unembeddings(learner)[0].weight, before)


@pytest.mark.parametrize("kind", [bll.BlockLocal, bll.Hooked])
def test_an_early_exit_goes_without_the_output_layer(kind: type) -> None:
    learner = made(kind).eval()
    early = learner.predictor(exit=0).eval()
    assert not any("lm_head" in name for name in early.state_dict())
    assert torch.equal(early(X), learner.predict(X, exit=0))
    torch.save(early, file := io.BytesIO())
    saved = [part.file_size for part in zipfile.ZipFile(file).infolist() if "/data/" in part.filename]
    assert sum(saved) == sum(tensor.nbytes for tensor in (*early.parameters(), *early.buffers()))
    program = torch.export.export(early, (X,))
    torch.testing.assert_close(program.module()(X), early(X))


def test_the_layer_is_found_or_named_and_never_guessed() -> None:
    with pytest.raises(ValueError, match=r"output of no nn.Linear of 11 outputs \(there are lm_head\): pass layer="):
        made(model=Decoder(scale=0.5))
    named = made(model=Decoder(scale=0.5), layer="lm_head")
    assert torch.equal(unembeddings(named)[0].weight, named.model.lm_head.weight)
    with pytest.raises(ValueError, match=r"layer='head': Decoder has no such .*its linear layers are .*lm_head"):
        made(layer="head")
    with pytest.raises(ValueError, match=r"layer='layers.0.mix' is a Linear of 8 outputs: name an nn.Linear of 11"):
        made(layer="layers.0.mix")
    hooked = Decoder()
    hooked.lm_head.register_forward_hook(lambda module, args, output: output.mul_(0.5))
    with pytest.raises(ValueError, match="is the output of no"):
        made(model=hooked)
    with pytest.raises(ValueError, match=r"reads 8 features, the inputs of '2', but a border has 6 statistics"):
        made(model=nn.Sequential(nn.Embedding(TOKENS, 6), nn.Linear(6, 8), nn.Linear(8, TOKENS)), at=["0"])
    with pytest.raises(ValueError, match="refresh=0"):
        bll.Unembedding(refresh=0)
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device"):
        made(model=Decoder(), example=X[:2].to("meta"))


def test_cuts_are_searched_where_the_model_is_as_wide_as_its_output_layer() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, TOKENS)]
    model = nn.Sequential(nn.Embedding(TOKENS, 8), *layers)
    for kind in (bll.BlockLocal, bll.Hooked):
        learner = made(kind, model=model, at=None, blocks=3, balance="memory")
        assert set(learner.cuts) <= {"0", "2", "4"}


def test_a_layer_that_was_replaced_is_followed_or_noticed() -> None:
    learner = made(bll.Hooked, refresh=1)
    learner.model.lm_head = nn.Linear(WIDTH, TOKENS, bias=False)
    learner.backward(X, Y)
    assert torch.equal(unembeddings(learner)[0].weight, learner.model.lm_head.weight)
    learner.model.lm_head = nn.Linear(WIDTH, TOKENS)
    with pytest.raises(RuntimeError, match="'lm_head' was replaced by another kind: build a new learner"):
        learner.backward(X, Y)


def test_what_needs_the_last_block_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Unembedding\(\) reads weights of a later block"):
        made().offload(bll.HostStore(), optimizer=lambda weights: SGD(weights, lr=0.1))


def test_a_new_border_reads_out_as_the_model_would() -> None:
    """With the norm of the model in its place, the exit of a last layer that adds nothing is the prediction."""
    model = Decoder(bias=True)
    for parameter in model.get_submodule("layers.1.mix").parameters():
        nn.init.zeros_(parameter)
    learner = made(model=model, at=["layers.0"]).eval()
    assert torch.equal(learner.predict(X, exit=0), learner.predict(X))
    (head,) = unembeddings(learner)
    nn.init.constant_(head.log_temperature, math.log(2))
    torch.testing.assert_close(learner.predict(X, exit=0), learner.predict(X) / 2)
