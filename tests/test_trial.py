"""Models of one's own that do everything wrong: one line names each, and nothing is left on the disk."""

import pickle
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import encode, picture, write_images
from torch import nn

from blocklocal.lab.cli import main
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.alone import prepare_alone
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.tasks.outline import task_without_data
from blocklocal.lab.training.experiment import prepare
from blocklocal.lab.training.rules import RULES, Learning, Problem, apply
from blocklocal.lab.training.trial import try_learning, try_model

HEAD = """
import torch
from torch import nn

def features(channels, size):
    return channels * size[0] * size[1]

class Wrapped(nn.Module):
    \"\"\"A linear classifier, and what a function makes of its logits and images.\"\"\"
    def __init__(self, channels, size, classes, change=lambda logits, x: logits):
        super().__init__()
        self.linear = nn.Linear(features(channels, size), classes)
        self.change = change

    def forward(self, x):
        return self.change(self.linear(x.flatten(1)), x)

class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no way back")
"""


def function(body: str) -> str:
    return f"def net(*, channels, size, classes):\n    {body}\n"


def changed(change: str) -> str:
    """A model whose output is an expression of its logits z and images x."""
    return function(f"return Wrapped(channels, size, classes, lambda z, x: {change})")


def module(forward: str, init: str = "") -> str:
    return (
        "class Net(nn.Module):\n"
        "    def __init__(self, channels, size, classes):\n"
        "        super().__init__()\n"
        "        self.linear = nn.Linear(features(channels, size), classes)\n"
        f"        {init}\n"
        f"    {forward}\n" + function("return Net(channels, size, classes)")
    )


FORWARD = "def forward(self, x): return self.linear(x.flatten(1))"


def extra(get: str) -> str:
    """A model with a state beside its parameters, and no way to take it back."""
    return module(f"{FORWARD}\n    def get_extra_state(self): {get}")


# What is in the file, and words of the line; the model is called sick:net where nothing else is said.
SICK = {
    "syntax": ("def net(:\n", ["SyntaxError", "sick.py, line"]),
    "indentation": ("def net():\nreturn\n", ["IndentationError"]),
    "null bytes": ("\0", ["cannot be made"]),
    "not UTF-8": (b"x = '\xff'\n", ["cannot be made"]),
    "missing import": ("import no_such_package_at_all\n", ["ModuleNotFoundError", "no_such_package_at_all", "line 1"]),
    "missing name": ("from torch import no_such_name\n", ["ImportError", "no_such_name"]),
    "raises at import": ("x = 1 / 0\n", ["ZeroDivisionError", "sick.py, line 1"]),
    "exits at import": ("import sys\nsys.exit(0)\n", ["SystemExit"]),
    "exits at import with words": ("raise SystemExit('usage: sick')\n", ["SystemExit: usage: sick"]),
    "ends at import": ("raise GeneratorExit\n", ["GeneratorExit"]),
    "no function": ("", ["no function 'net'"]),
    "a number": ("net = 3\n", ["no function 'net'"]),
    "a module": ("import torch as net\n", ["no function 'net'"]),
    "no arguments": ("def net():\n    pass\n", ["channels=, size=, classes="]),
    "by position": ("def net(channels, size, classes, /):\n    pass\n", ["channels=, size=, classes="]),
    "one more": ("def net(*, channels, size, classes, width):\n    pass\n", ["'width'"]),
    "one less": ("def net(*, channels, size):\n    pass\n", ["'classes'"]),
    "a class of others": (HEAD + "net = nn.Linear\n", ["channels=, size=, classes="]),
    "builtin": ("net = min\n", ["cannot be made"]),
    "raises": (function("raise RuntimeError('first\\nsecond')"), ["RuntimeError: first", "sick.py, line 2"]),
    "raises nothing said": (function("assert channels > 99"), ["AssertionError", "sick.py, line 2"]),
    "exits": (function("import sys; sys.exit(3)"), ["SystemExit: 3"]),
    "recurses": (function("return net(channels=1, size=size, classes=2)"), ["RecursionError"]),
    "gives none": (function("pass"), ["of type NoneType"]),
    "gives a number": (function("return 3"), ["of type int"]),
    "of type function": (function("return lambda x: x"), ["of type function"]),
    "gives a class": (HEAD + function("return Wrapped"), ["returns the class Wrapped"]),
    "of type list": (HEAD + function("return [nn.Flatten(), nn.Linear(64, classes)]"), ["of type list"]),
    "gives weights": (HEAD + function("return nn.Linear(4, 4).state_dict()"), ["of type OrderedDict"]),
    "is a generator": (HEAD + function("yield nn.Linear(64, 10)"), ["of type generator"]),
    "is async": (HEAD + f"async {function('return Wrapped(channels, size, classes)')}", ["async", "with def alone"]),
    "is async in forward": (HEAD + module(f"async {FORWARD}"), ["async forward()", "with def alone"]),
    "no parameters": (HEAD + function("return nn.Flatten()"), ["no parameters to train"]),
    "frozen": (HEAD + function("return Wrapped(channels, size, classes).requires_grad_(False)"), ["no parameters to"]),
    "expanded weights": (
        HEAD + module(FORWARD, "self.linear.weight = nn.Parameter(torch.zeros(1).expand(classes, 64))"),
        ["parameter 'linear.weight' shares memory with itself", "clone()"],
    ),
    "overlapping weights": (
        HEAD + module(FORWARD, "self.linear.bias = nn.Parameter(torch.zeros(10).as_strided((10,), (0,)))"),
        ["parameter 'linear.bias' shares memory with itself"],
    ),
    "a dictionary as state": (HEAD + extra("return {'calls': 3}"), ["_extra_state of the model is a dict", "tensors"]),
    "no state to give": (HEAD + extra("return self.nothing"), ["fails with its extra state", "AttributeError"]),
    "a state not taken back": (HEAD + extra("return torch.ones(3)"), ["_extra_state would not", "set_extra_state()"]),
    "a state that it fails with": (
        HEAD + extra("return torch.ones(3)\n    def set_extra_state(self, state): raise KeyError('calls')"),
        ["fails with its extra state", "KeyError"],
    ),
    "lazy": (HEAD + function("return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))"), ["without a shape"]),
    "meta": (HEAD + function("return Wrapped(channels, size, classes).to('meta')"), ["cannot be put on cpu"]),
    "double": (HEAD + function("return Wrapped(channels, size, classes).double()"), ["same dtype"]),
    "half": (HEAD + function("return Wrapped(channels, size, classes).half()"), ["same dtype"]),
    "no forward": (HEAD + module("pass"), ["forward"]),
    "two inputs": (HEAD + module("def forward(self, x, mask): pass"), ["TypeError", "mask"]),
    "no inputs": (HEAD + module("def forward(self): pass"), ["TypeError"]),
    "raises in forward": (HEAD + module("def forward(self, x): return self.nothing"), ["AttributeError", "nothing"]),
    "exits in forward": (HEAD + module("def forward(self, x): raise SystemExit"), ["SystemExit"]),
    "colours only": (HEAD + function("return nn.Conv2d(3, classes, 3)"), ["fails on images of shape (8, 1, 8, 8)"]),
    "larger images only": (HEAD + function("return nn.Conv2d(1, classes, 9)"), ["size"]),
    "another size": (HEAD + function("return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))"), ["shapes cannot be"]),
    "one image at a time": (HEAD + module("def forward(self, x): return self.linear(x.view(1, -1))"), ["RuntimeError"]),
    "13 outputs": (HEAD + function("return Wrapped(channels, size, 13)"), ["gives 13 logits per image for 10 classes"]),
    "1 output": (HEAD + function("return Wrapped(channels, size, 1)"), ["gives 1 logits per image for 10 classes"]),
    "a tuple": (HEAD + changed("(z, x)"), ["of type tuple"]),
    "a dictionary": (HEAD + changed("{'logits': z}"), ["of type dict"]),
    "nothing": (HEAD + changed("None"), ["of type NoneType"]),
    "an array": (HEAD + changed("z.detach().numpy()"), ["of type ndarray"]),
    "one vector": (HEAD + changed("z[0]"), ["shape (10,)", "must be (8, 10)"]),
    "a scalar": (HEAD + changed("z.sum()"), ["shape ()"]),
    "one logit each": (HEAD + changed("z[:, 0]"), ["(8,)"]),
    "a map": (HEAD + changed("z[:, :, None, None]"), ["(8, 10, 1, 1)"]),
    "tokens": (HEAD + changed("z[:, None]"), ["(8, 1, 10)"]),
    "fewer rows": (HEAD + changed("z[:-1]"), ["(7, 10)"]),
    "integers": (HEAD + changed("z.long()"), ["int64"]),
    "flags": (HEAD + changed("z > 0"), ["bool"]),
    "complex": (HEAD + changed("z.to(torch.complex64)"), ["complex64"]),
    "another device": (HEAD + changed("z.to('meta')"), ["on meta"]),
    "nan": (HEAD + changed("z * float('nan')"), ["not finite"]),
    "infinite": (HEAD + changed("z / 0"), ["not finite"]),
    "detached": (HEAD + changed("z.detach()"), ["does not depend on its parameters"]),
    "without gradient": (HEAD + changed("torch.no_grad()(lambda: z * 1)()"), ["does not depend on its parameters"]),
    "the images only": (HEAD + changed("x.flatten(1)[:, :10]"), ["does not depend on its parameters"]),
    "a tuple in training": (HEAD + changed("(z, z) if torch.is_grad_enabled() else z"), ["of type tuple"]),
    "a tuple in evaluation": (HEAD + changed("z if torch.is_grad_enabled() else (z, z)"), ["of type tuple"]),
    "nan gradient": (HEAD + changed("z + (z - z).sqrt()"), ["block 0", "not finite"]),
    "no backward": (HEAD + changed("Stop.apply(z)"), ["fails in a training step", "no way back"]),
    "in place": (HEAD + changed("z.exp().add_(1)"), ["fails in a training step", "inplace"]),
}


@pytest.fixture
def sick(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def put(content: str | bytes) -> None:
        file = tmp_path / "code" / "sick.py"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    yield put
    sys.modules.pop("sick", None)


def complaint(capsys, args: list[str]) -> str:
    code = main(args)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("bll: ")
    return captured.err


TINY = ["--train-size=64", "--test-size=20", "--batch-size=8", "--epochs=1"]


@pytest.mark.parametrize("name", SICK)
def test_a_model_is_refused_in_one_line_and_nothing_is_written(sick, tmp_path, capsys, name):
    content, words = SICK[name]
    sick(content)
    said = complaint(capsys, ["train", "--model=sick:net", "--rule=bp", "--out=run", *TINY])
    assert "'sick:net'" in said
    assert all(word in said for word in words), said
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


NAMES = [
    "sick",
    ":net",
    "sick:",
    "sick:net:net",
    ".sick:net",
    "sick.py:net",
    "code/sick:net",
    "sick.net:net",
    "s\0:net",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_no_function_is_refused(sick, tmp_path, capsys, name):
    sick(HEAD + function("return Wrapped(channels, size, classes)"))
    assert repr(name) in complaint(capsys, ["train", f"--model={name}", "--out=run", *TINY])
    assert not (tmp_path / "run").exists()


PACKAGES = {
    "timm": "def is_model(name): return name == 'net'\ndef create_model(name, in_chans, num_classes):\n    {body}\n",
    "torchvision": "class models:\n    @staticmethod\n    def list_models(module): return ['net']\n"
    "    @staticmethod\n    def get_model(name, weights, num_classes):\n        {body}\n",
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise TypeError('unexpected keyword')", ["cannot be made", "TypeError: unexpected keyword"]),
        ("from torch import nn; return nn.Conv2d(3, num_classes, 64)", ["fails on images of shape (4, 3, 8, 8)"]),
        (
            "from torch import nn; return nn.Sequential(nn.Flatten(), nn.Linear(192, 1000))",
            ["1000 logits per image"],
        ),
    ],
)
def test_models_of_packages_are_tried_too(sick, monkeypatch, tmp_path, capsys, package, body, words):
    names = [f"{part}/{name}/{i}.png" for part in ("train", "test") for name in ("cat", "dog") for i in range(4)]
    write_images(tmp_path / "data", {name: encode(picture()) for name in names})
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / "code" / f"{package}.py").write_text(PACKAGES[package].format(body=body))
    said = complaint(capsys, ["train", "data", f"--model={package}:net", "--rule=bp", "--batch-size=4", "--out=run"])
    assert f"'{package}:net'" in said
    assert all(word in said for word in words), said
    assert not (tmp_path / "run").exists()
    (tmp_path / "code" / f"{package}.py").write_text("from no_such_package_at_all import it\n")
    sys.modules.pop(package, None)
    said = complaint(capsys, ["train", "data", f"--model={package}:net", "--batch-size=4", "--out=run"])
    assert "no_such_package_at_all" in said
    sys.modules.pop(package, None)


@pytest.mark.parametrize("command", [["blocks", "sick:net", "--rule=bp"], ["bench", "--model=sick:net", "--size=8"]])
@pytest.mark.parametrize("name", ["13 outputs", "double", "a tuple", "raises in forward"])
def test_other_commands_try_the_model_too(sick, capsys, command, name):
    sick(SICK[name][0])
    assert "'sick:net'" in complaint(capsys, command)


LATE = """
calls = 0

def late(z, x):
    global calls
    calls += torch.is_grad_enabled()
    if calls > {calls}:
        {fault}
    return z
"""


@pytest.mark.parametrize(
    ("calls", "fault", "words"),
    [
        (3, "raise RuntimeError('too late')", ["of bp: RuntimeError: too late (sick.py, line "]),
        (3, "raise ValueError('too late')", ["of bp: ValueError: too late (sick.py, line "]),
        (3, "raise SystemExit", ["of bp: SystemExit (sick.py, line "]),
        (3, "open('no such file')", ["of bp: FileNotFoundError: "]),
        (40, "z[:, 99]", ["of bp", "IndexError: "]),
        (3, "z = z.exp(); z.add_(z)", ["of bp: RuntimeError: ", "inplace"]),
    ],
)
def test_a_benchmark_tells_what_a_model_fails_of_after_its_trial(sick, capsys, calls, fault, words):
    sick(HEAD + LATE.format(calls=calls, fault=fault) + changed("late(z, x)"))
    options = ["--rules=bp", "--size=8", "--batch-size=8", "--steps=40"]
    said = complaint(capsys, ["bench", "--model=sick:net", *options])
    assert "model 'sick:net' fails in a step " in said
    assert all(word in said for word in words), said


def test_a_benchmark_tells_of_memory_as_before(sick, capsys):
    sick(HEAD + LATE.format(calls=3, fault="raise MemoryError") + changed("late(z, x)"))
    assert main(["bench", "--model=sick:net", "--rules=bp", "--size=8", "--batch-size=8"]) == 1
    assert capsys.readouterr().err == "bll: not enough memory: MemoryError\n"


@pytest.mark.parametrize("place", ["function", "module"])
def test_a_model_that_changes_the_directory_moves_no_file(sick, tmp_path, place):
    change = f"import os; os.chdir({str(tmp_path / 'code')!r})"
    body = "return Wrapped(channels, size, classes)"
    sick(HEAD + (function(f"{change}; {body}") if place == "function" else f"{change}\n{function(body)}"))
    assert main(["train", "--model=sick:net", "--rule=bp", "--out=run", *TINY]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["sick.py"]


def test_a_state_that_goes_there_and_back_is_taken(sick):
    take = "def set_extra_state(self, state): self.taken = state"
    sick(HEAD + extra(f"return torch.ones(3)\n    {take}"))
    settings = Settings(model="sick:net", rule="bp", train_size=64, test_size=20, batch_size=8)
    model = prepare(settings).learner.model
    assert not hasattr(model, "taken"), "the trial leaves no trace"


class Restless(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.norm = nn.BatchNorm1d(64)
        self.register_buffer("replaced", torch.zeros(3))
        self.register_buffer("spread", torch.zeros(1).expand(4))
        self.steps, self.known = 0, {"steps": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        self.known["steps"] += 1
        self.replaced = self.replaced + 1
        with torch.no_grad():
            self.linear.weight.data.mul_(0.5)
        noise = torch.rand(()) + np.random.rand()
        return self.linear(self.norm(x.flatten(1))) * noise


def state(model: nn.Module, learning: Learning) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """All tensors, and all other things that a trial must not change."""
    learner, alignment = learning.learner, learning.alignment
    kept = alignment.state_dict() if alignment else {"feedback": {}}
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"learner.{name}": value for name, value in learner.state_dict().items()}
    tensors |= {f"feedback.{name}": value for name, value in kept["feedback"].items()}
    rest = [kept[name] for name in kept if name != "feedback"] + [module.training for module in learner.modules()]
    return {name: value.clone() for name, value in tensors.items()} | {"random": torch.get_rng_state()}, rest


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("bll-paper", "pred")])
def test_a_trial_leaves_everything_as_it_was(rule):
    norm = nn.BatchNorm1d(20)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), norm, nn.Dropout(), nn.Linear(20, 10))
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    learning = apply(rule, model, Problem(classes=10, example=x, blocks=2, at=None))
    norm.eval()
    tensors, rest = state(model, learning)
    try_learning(learning, x, y, name="it", context=torch.autocast("cpu", torch.bfloat16))
    after, rest_after = state(model, learning)
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[name], after[name]) for name in tensors)
    assert rest == rest_after
    assert all(parameter.grad is None for parameter in learning.learner.parameters())


def test_a_trial_takes_back_what_a_forward_pass_changes():
    model, random = Restless().eval(), pickle.dumps(np.random.get_state())
    x, before = torch.randn(8, 1, 8, 8), {name: value.clone() for name, value in model.state_dict().items()}
    torch_random = torch.get_rng_state()
    try_model(model, x, name="it", shape=(len(x), 10), context=nullcontext())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch_random, torch.get_rng_state())
    assert random == pickle.dumps(np.random.get_state())
    assert (model.steps, model.known, model.training) == (0, {"steps": 0}, False)


@pytest.mark.parametrize("causal", [True, False])
def test_a_language_model_must_not_see_what_it_is_to_predict(causal):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

        def forward(self, ids):
            h = self.words(ids)
            return self.head(h.cumsum(1) if causal else h + 1e-3 * h.mean(1, keepdim=True))

    ids = torch.randint(5, (3, 6))
    ahead = nullcontext() if causal else pytest.raises(UserError, match="model 'it' is not causal: its logits at a pos")
    with ahead:
        try_model(Mean(), ids, name="it", shape=(3, 6, 5), unit="windows", context=nullcontext())


def test_the_trial_is_under_the_settings_of_the_run(sick):
    """A model that bf16 breaks, and one that wants more than one image at once."""
    sick(HEAD + changed("z + 0 / (z.dtype == torch.float32)"))
    settings = Settings(model="sick:net", rule="bp", train_size=64, test_size=20, batch_size=8)
    assert prepare(settings)
    with pytest.raises(UserError, match="sick:net"):
        prepare(replace(settings, dtype="bf16"))


@pytest.mark.parametrize(
    ("layer", "wrong"), [("3, stride=2, padding=1", True), ("1, stride=2", False), ("3, padding=1", False)]
)
def test_convolutions_that_bf16_computes_wrongly_are_refused(sick, layer: str, wrong: bool) -> None:
    layers = f"nn.Conv2d(channels, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, {layer}), nn.Flatten()"
    sick(HEAD + function(f"return nn.Sequential({layers}, nn.Linear(8, classes))"))
    settings = Settings(model="sick:net", at=("0", "1"), train_size=64, test_size=20, batch_size=8)
    half = replace(settings, dtype="bf16")
    task = task_without_data(settings, load_task(settings, device=torch.device("cpu")).facts)
    prepare(settings)
    prepare_alone(settings, 2, task=task, device=torch.device("cpu"))
    prepare_alone(half, 0, task=task, device=torch.device("cpu"))
    for begin in (lambda: prepare(half), lambda: prepare_alone(half, 2, task=task, device=torch.device("cpu"))):
        refused = pytest.raises(UserError, match=r"has a stride of 2 on a map 1 wide, .* choose --dtype fp32")
        with refused if wrong else nullcontext():
            begin()
