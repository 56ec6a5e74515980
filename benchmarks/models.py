"""Which models `Hooked` trains in blocks as they are, and what was checked of each: writes docs/models.md.

Run: python benchmarks/models.py  (25 minutes on one thread; needs timm, torchvision and transformers)
     python benchmarks/models.py swin vit  (those whose names contain one of these; prints, and writes nothing)

Nothing is downloaded: the weights are random, and the transformers are made small.
"""

from __future__ import annotations

import copy
import datetime
import gc
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MaxVit, VisionTransformer

import blocklocal as bll
from blocklocal.lab.models import build
from blocklocal.memory import MemoryTracker
from blocklocal.values import Inputs, call, one_more, prediction_of, tensors

PAGE = Path(__file__).parents[1] / "docs/models.md"
BATCH, CLASSES, TOKENS, VOCABULARY = 4, 10, 24, 80


@dataclass(frozen=True)
class Case:
    """A model and a batch for it. remark: what is not as the library has it by default, other than sizes."""

    name: str
    library: str
    make: Callable[[], nn.Module]
    x: Callable[[], Inputs]
    classes: int = CLASSES
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """What was found. difference: largest, of the outputs with borders from those without. moved: how many of the
    `learnable` parameters a local step changes, those that have a gradient other than zero in backpropagation. crosses:
    parameters that a loss other than their block's reaches. memory: peak of a step as a share of backpropagation's."""

    traced: bool
    cuts: list[str]
    difference: float
    moved: int
    learnable: int
    crosses: list[str]
    memory: float
    still: list[str]

    @property
    def works(self) -> bool:
        return self.difference == 0 and self.moved == self.learnable and not self.crosses


def images(side: int = 64) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, 3, side, side)


def tokens() -> Tensor:
    return torch.randint(5, VOCABULARY, (BATCH, TOKENS))


def masked_tokens() -> dict[str, Tensor]:
    """The last third of the first text is padding."""
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    mask[0, -TOKENS // 3 :] = 0
    return {"input_ids": tokens() * mask, "attention_mask": mask}


def own() -> list[Case]:
    def case(name: str) -> Case:
        return Case(name, "blocklocal.lab", lambda: build(name, channels=3, size=(32, 32), classes=CLASSES), images(32))

    return [case(name) for name in ("mlp", "cnn", "vgg8", "resnet20", "resnet18", "resnet50", "vit")]


def of_timm() -> list[Case]:
    small = {"img_size": 64}
    settings: dict[str, dict[str, object]] = {
        "resnet10t": {},
        "vit_tiny_patch16_224": small | {"depth": 6},
        "deit_tiny_distilled_patch16_224": small | {"depth": 6},
        "convnext_atto": {},
        "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 24, "depths": (2, 2, 2, 2)},
        "maxvit_rmlp_pico_rw_256": small,
        "mixer_s32_224": small,
        "resmlp_12_224": small,
        "gmlp_ti16_224": small,
        "efficientnet_lite0": {},
        "mobilenetv3_small_050": {},
        "densenet121": {"block_config": (2, 2, 2, 2)},
        "regnetx_002": {},
        "coat_lite_tiny": small,
        "pvt_v2_b0": {},
        "poolformer_s12": {},
        "edgenext_xx_small": {},
        "gcvit_xxtiny": small,
        "ghostnet_050": {},
        "mobilevit_xxs": {},
        "xcit_nano_12_p16_224": small,
        "levit_128s": {},
        "repvgg_a0": {},
        "efficientformer_l1": {},
        "twins_svt_small": small | {"depths": [1, 1, 2, 1]},
        "crossvit_tiny_240": {},
        "hrnet_w18_small": {},
        "focalnet_tiny_srf": {},
    }
    sides = {"levit_128s": 224, "efficientformer_l1": 224, "crossvit_tiny_240": 240}
    return [
        Case(
            name,
            "timm",
            lambda name=name, more=more: timm.create_model(name, num_classes=CLASSES, **more),
            images(sides.get(name, 64)),
        )
        for name, more in settings.items()
    ]


def of_torchvision() -> list[Case]:
    names = (
        "alexnet vgg11_bn resnet18 squeezenet1_1 googlenet mobilenet_v2 mobilenet_v3_small "
        "shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t"
    )
    plain = {"googlenet": {"aux_logits": False, "init_weights": True}}
    cases = [
        Case(
            name,
            "torchvision",
            lambda name=name: torchvision.models.get_model(
                name, weights=None, num_classes=CLASSES, **plain.get(name, {})
            ),
            images(),
            remark="aux_logits=False" if name in plain else "",
        )
        for name in names.split()
    ]
    vit = {"image_size": 64, "patch_size": 16, "num_layers": 6, "num_heads": 3, "hidden_dim": 96, "mlp_dim": 192}
    maxvit = {"input_size": (64, 64), "stem_channels": 16, "partition_size": 2, "block_layers": [1, 1, 2, 1]}
    maxvit |= {"block_channels": [16, 32, 64, 128], "head_dim": 16, "stochastic_depth_prob": 0.0}
    return [
        *cases,
        Case("VisionTransformer", "torchvision", lambda: VisionTransformer(num_classes=CLASSES, **vit), images()),
        Case("MaxVit", "torchvision", lambda: MaxVit(num_classes=CLASSES, **maxvit), images()),
    ]


def of_transformers() -> list[Case]:
    text = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 64}
    decoder = {**text, **sizes, "use_cache": False, "tie_word_embeddings": False}
    kv = {**decoder, "num_key_value_heads": 2}
    untied, cache = "tie_word_embeddings=False", "use_cache=False"

    def case(name: str, configuration: str, x: Callable[[], Inputs], *, remark: str = "", **settings: object) -> Case:
        def make() -> nn.Module:
            return getattr(transformers, name)(getattr(transformers, configuration)(**settings))

        classes = VOCABULARY if "CausalLM" in name or name in ("GPT2LMHeadModel",) else CLASSES
        return Case(name, "transformers", make, x, classes, remark)

    labels = {"num_labels": CLASSES}
    encoder = {**text, **sizes, **labels}
    gpt2 = {**text, "n_embd": 32, "n_layer": 6, "n_head": 4, "use_cache": False}
    picture = {"image_size": 64, "patch_size": 16, **sizes, **labels}
    audio = {"conv_dim": (16,) * 3, "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3}
    audio |= {
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
    }
    whisper = {"d_model": 32, "encoder_layers": 6, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    whisper |= {"num_mel_bins": 16, "max_source_positions": 50}
    t5 = {**text, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 6, "num_heads": 4, "use_cache": False}
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 32}
    distil = {**text, **labels, "dim": 32, "n_layers": 6, "n_heads": 4, "hidden_dim": 64}
    albert = {**encoder, "embedding_size": 16}
    bart = {**text, **labels, "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4}
    bart |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "use_cache": False}
    bart |= {"max_position_embeddings": 64}

    def sound() -> Tensor:
        return torch.randn(BATCH, 1200)

    def spectrogram() -> Tensor:
        return torch.randn(BATCH, 16, 100)

    return [
        case("BertForSequenceClassification", "BertConfig", masked_tokens, **encoder),
        case("BertForTokenClassification", "BertConfig", masked_tokens, **encoder),
        case("RobertaForSequenceClassification", "RobertaConfig", masked_tokens, **encoder),
        case("DistilBertForSequenceClassification", "DistilBertConfig", masked_tokens, **distil),
        case("ElectraForSequenceClassification", "ElectraConfig", masked_tokens, **encoder),
        case("AlbertForSequenceClassification", "AlbertConfig", masked_tokens, **albert),
        case("DebertaV2ForSequenceClassification", "DebertaV2Config", masked_tokens, **encoder, **deberta),
        case("GPT2ForSequenceClassification", "GPT2Config", tokens, remark=cache, **gpt2, **labels),
        case("GPT2LMHeadModel", "GPT2Config", tokens, remark=f"{cache}, {untied}", **gpt2, tie_word_embeddings=False),
        case("LlamaForCausalLM", "LlamaConfig", masked_tokens, remark=cache, **kv),
        case("MistralForCausalLM", "MistralConfig", tokens, remark=cache, **kv),
        case("Qwen2ForCausalLM", "Qwen2Config", tokens, remark=cache, **kv),
        case("Qwen2ForSequenceClassification", "Qwen2Config", tokens, remark=cache, **kv, **labels),
        case("GPTNeoXForCausalLM", "GPTNeoXConfig", tokens, remark=cache, **decoder),
        case("GemmaForCausalLM", "GemmaConfig", tokens, remark=f"{cache}, {untied}", **kv, head_dim=8),
        case(
            "T5ForSequenceClassification",
            "T5Config",
            lambda: _ending(tokens()),
            remark=cache,
            **t5,
            **labels,
            decoder_start_token_id=0,
        ),
        case("BartForSequenceClassification", "BartConfig", lambda: _ending(tokens()), remark=cache, **bart),
        case("ViTForImageClassification", "ViTConfig", images(), **picture),
        case("DeiTForImageClassification", "DeiTConfig", images(), **picture),
        case("BeitForImageClassification", "BeitConfig", images(), **picture),
        case(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            images(),
            hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 2, 1],
            **labels,
        ),
        case(
            "ResNetForImageClassification",
            "ResNetConfig",
            images(),
            embedding_size=16,
            hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 2, 1],
            layer_type="basic",
            **labels,
        ),
        case(
            "SwinForImageClassification",
            "SwinConfig",
            images(),
            image_size=64,
            embed_dim=16,
            depths=[2, 2, 2],
            num_heads=[2, 4, 8],
            window_size=4,
            **labels,
        ),
        case(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            sound,
            remark="layerdrop=0, mask_time_prob=0",
            **sizes,
            **labels,
            **audio,
        ),
        case("WhisperForAudioClassification", "WhisperConfig", spectrogram, **whisper, **labels),
    ]


def _ending(ids: Tensor) -> Tensor:
    """Texts that end with the token that ends texts."""
    ids[:, -1] = 2
    return ids


def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def returned(model: nn.Module, x: Inputs, pass_through: Callable[[], object]) -> Tensor:
    """The prediction that the model returns while pass_through() runs it."""
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, arguments, output: seen.append(prediction_of(output).detach()))
    seed()
    try:
        pass_through()
    finally:
        handle.remove()
    (prediction,) = seen
    return prediction


def reached(parameters: dict[str, nn.Parameter]) -> set[str]:
    """The names of those with a gradient, which is then deleted."""
    found = {name for name, parameter in parameters.items() if parameter.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def peak(step: Callable[[], object]) -> int:
    """Bytes, of the second step."""
    step()
    gc.collect()
    with MemoryTracker() as tracker:
        step()
    return tracker.timeline.peak


def examine(case: Case) -> Row:
    """ValueError and what else the learner raises, if it does not take the model."""
    seed()
    model, x = case.make().train(), case.x()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        if not parameter.any():  # nothing before such a weight has a gradient, in backpropagation either
            nn.init.normal_(parameter, std=0.02)
    state = copy.deepcopy(model.state_dict())

    def restore() -> None:
        model.load_state_dict(state)
        model.zero_grad(set_to_none=True)

    def loss() -> Tensor:
        return F.cross_entropy(prediction_of(call(model, x)).flatten(0, -2), y.flatten())

    plain = []
    for training in (True, False):
        model.train(training)
        plain.append(returned(model, x, lambda: call(model, x)))
        restore()
    model.train()
    y = torch.randint(case.classes, plain[0].shape[:-1])
    seed()
    loss().backward()
    learnable = {name for name, one in parameters.items() if one.grad is not None and one.grad.any()}
    restore()

    learner = bll.Hooked(model, blocks=4, classes=case.classes, example=x)
    difference = 0.0
    for training, before in zip((True, False), plain, strict=True):
        learner.train(training)
        after = returned(model, x, lambda: learner(x, y))
        difference = max(difference, (after - before).abs().max().item())
        restore()

    learner.train()
    crosses: list[str] = []
    known = {id(parameter): name for name, parameter in parameters.items()}
    for k, local in enumerate(learner(x, y)):
        local.backward()
        block = {known[id(p)] for p in learner.block_parameters(k) if id(p) in known}
        crosses += sorted(reached(parameters) - block)
    restore()

    own = [learner.block_parameters(k) for k in range(len(learner.cuts) + 1)]
    seed()
    # Adam, since its steps are larger than rounding where a gradient is tiny, as before a layer scale of 1e-6
    learner.backward(x, y, optimizers=[torch.optim.Adam(block, lr=0.01, eps=1e-20) for block in own])
    moved = {name for name in learnable if not torch.equal(parameters[name], state[name])}
    restore()

    optimizers = [torch.optim.SGD(block, lr=0.01) for block in own]
    blocks = peak(lambda: learner.backward(x, y, optimizers=optimizers))
    learner.remove()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Row(
        traced=_traced(case, x),
        cuts=learner.cuts,
        difference=difference,
        moved=len(moved),
        learnable=len(learnable),
        crosses=crosses,
        memory=blocks / peak(step),
        still=sorted(learnable - moved),
    )


def _traced(case: Case, x: Inputs) -> bool:
    """Whether the chain of traced blocks takes the model too, and predicts the same, also with one sample more."""
    model = case.make()
    try:
        learner = bll.BlockLocal(model, blocks=4, classes=case.classes, example=x).eval()
    except Exception:  # whatever the model raises while it is traced: it cannot be
        return False
    batches = x, one_more(x, batch=len(next(tensors(x))))
    with torch.no_grad():
        return all(torch.equal(learner.predict(one), prediction_of(call(model, one))) for one in batches)


def line(case: Case, found: Row | str) -> str:
    name = f"`{case.name}`" + (f" ({case.remark})" if case.remark else "")
    if isinstance(found, str):
        return f"| {name} | {case.library} | - | {found} | | | | |"
    path = "hooks, traced" if found.traced else "hooks"
    cuts = ", ".join(f"`{cut}`" for cut in found.cuts)
    crosses = ", ".join(found.crosses[:3]) if found.crosses else "none"
    figures = f"{found.difference:g} | {found.moved} of {found.learnable} | {crosses} | {found.memory:.2f}"
    return f"| {name} | {case.library} | {path} | {cuts} | {figures} |"


def page(rows: list[tuple[Case, Row | str]], *, commit: str) -> str:
    works = sum(isinstance(found, Row) and found.works for _, found in rows)
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "torchvision", "transformers"))
    table = "\n".join(line(case, found) for case, found in rows)
    return f"""# Models

Each row is a model of a library, many of them made smaller, with random weights, which `bll.Hooked(model, blocks=4,
classes=..., example=batch)` was asked to train in four blocks, with nothing else said. {works} of these {len(rows)}
models pass every check below; where one was refused, the row has the message.

`python benchmarks/models.py`, with {libraries},
on {datetime.date.today():%d %B %Y}, at commit {commit}, on a CPU in float32; batches of {BATCH}.
Parameters that begin as zeros were drawn from N(0, 0.02²), so that what is before them has a gradient.

- *path*: "traced" where `bll.BlockLocal(model, blocks=4)` takes the model too, with the same inputs, and its blocks
  predict the same to the bit, also with one sample more. T5 and BART are not traced since they count the tokens that
  end a text, CrossViT since it has two branches.
- *cuts*: the submodules after which the borders stand, as found.
- *difference*: the largest difference of the model's output in the learner's forward pass, with borders, from that
  before there was a learner; in training and in evaluation mode.
- *moved*: how many parameters one local step moves, of those that have a gradient other than zero in backpropagation.
- *crosses*: the model's parameters that a local loss other than that of their block reaches.
- *memory*: the most bytes alive in a step with one SGD optimizer for each block, gradients included, as a share of
  those in a step of backpropagation with one. In batches of {BATCH} the gradients of parameters are much of it.

Where all layers read one value with a gradient, such as the relative positions of DeBERTa and T5 or the word embeddings
of BART's encoder and decoder, or are one layer called again, as in ALBERT, borders stand only before and after them,
and a step takes about the memory of backpropagation.

| model | library | path | cuts | difference | moved | crosses | memory |
|---|---|---|---|---:|---:|---|---:|
{table}
"""


def main(only: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    cases = [*own(), *of_timm(), *of_torchvision(), *of_transformers()]
    chosen = [case for case in cases if not only or any(part.lower() in case.name.lower() for part in only)]
    version_control = ["git", "-C", str(PAGE.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(version_control, capture_output=True, text=True, check=True).stdout.strip()
    rows: list[tuple[Case, Row | str]] = []
    for case in chosen:
        start = time.perf_counter()
        try:
            found: Row | str = examine(case)
        except Exception as error:  # the table shows it
            found = f"{type(error).__name__}: {str(error).splitlines()[0]}".replace("|", "\\|")
        rows.append((case, found))
        print(f"{time.perf_counter() - start:5.1f} s {line(case, found)}", flush=True)
        if isinstance(found, Row) and found.still:
            print(f"        does not move: {', '.join(found.still[:8])}", flush=True)
        gc.collect()
    if not only:
        PAGE.write_text(page(rows, commit=commit))


if __name__ == "__main__":
    main(sys.argv[1:])
