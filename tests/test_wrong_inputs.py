"""Wrong inputs to every command: exit code 2, one line that names what is wrong, and nothing is left behind."""

import functools
import importlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from run_folders import write_run

from blocklocal.lab import ranges
from blocklocal.lab.bench.options import Options as BenchOptions
from blocklocal.lab.cli import COMMANDS, main
from blocklocal.lab.commands.launch import Options as LaunchOptions
from blocklocal.lab.pipeline_bench.options import Options as PipelineOptions
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.images import Images
from blocklocal.lab.training.rules import RULES

IN_ONE_PROCESS = [name for name, rule in RULES.items() if not rule.over_processes]

for module, _ in COMMANDS.values():
    importlib.import_module(module)

# Every command with its options, behind what it cannot do without.
OPTIONS = {
    "train": Settings,
    "launch": LaunchOptions,
    "bench": BenchOptions,
    "bench --pipeline": PipelineOptions,
    **{
        command: importlib.import_module(COMMANDS[name][0]).Options
        for name, command in {
            "blocks": "blocks mlp",
            "compare": "compare",
            "study": "study grid.py",
            "table1": "table1",
            "timeline": "timeline run",
            "demo": "demo",
            "eval": "eval run",
            "sample": "sample run",
            "report": "report run",
            "cache": "cache run",
            "plan-memory": "plan-memory mlp",
        }.items()
    },
}


@dataclass(frozen=True)
class Case:
    """args: of `bll`. words: of the line. code: the exit code. long: says again what another case says."""

    args: tuple[str, ...]
    words: tuple[str, ...]
    code: int = 2
    long: bool = False

    @property
    def name(self) -> str:
        text = ascii(" ".join(self.args)) if self.args else "nothing"
        return text if len(text) < 80 else f"{text[:60]}... of {len(text)}"


def case(text: str | Sequence[str], *words: str, code: int = 2, long: bool = False) -> Case:
    return Case(tuple(shlex.split(text) if isinstance(text, str) else text), words, code, long)


def wrong_numbers() -> Iterator[Case]:
    """Of every number of every command: no number, and one on each side of its range; below it alone where another
    command takes its settings from `bll train`. Long, but for one int and one float of each command: text that is no
    number, and, except for `bll train`, a number that is not finite or not whole."""
    for command, kind in OPTIONS.items():
        seen: set[bool] = set()
        for name, (hint, beside) in ranges.declared(kind).items():
            bounds = next((bound for bound in beside if isinstance(bound, ranges.Range)), None)
            if bounds is None:
                continue
            option = ranges.called(name, beside)
            below = bounds.least - 1 if bounds.least > float("-inf") else bounds.above
            above = f"{max(bounds.most, ranges.LARGEST) + 1:.0f}"
            texts = ["x", "0x10", "1_0"]
            values = ["nan", *texts, f"{below:g}"]
            values += ["1.5", above] if "int" in str(hint) else ["1e400", "-inf"]
            again = texts if command == "train" else [*texts, "nan", "1.5", "1e400"]
            inherited = kind is not Settings and name in ranges.declared(Settings) and issubclass(kind, Settings)
            for value in [f"{below:g}"] if inherited else values:
                yield case(f"{command} {option}={value}", option, long=value in again and ("int" in str(hint)) in seen)
            if not inherited:
                seen.add("int" in str(hint))


def no_text() -> Iterator[Case]:
    """For every option that is a name or a path: text that cannot be one."""
    for command, kind in OPTIONS.items():
        for name, (hint, beside) in ranges.declared(kind).items():
            option = ranges.called(name, beside)
            if "str" in str(hint) and "--" in option and (command, name) != ("compare", "rule"):  # which has --rules
                for value in ("\udcff", "a\0b"):
                    args = [*shlex.split(command), f"{option}={value}"]
                    yield case(args, option, "is not text", long=command != "train" and "\0" in value)


LONG = "x" * 5000

BY_HAND = [
    # bll itself
    case("sing", "'sing'", "train"),
    case("Train", "'Train'", "train"),
    case("--epochs=3", "'--epochs=3'"),
    case([""], "''"),
    case([LONG], "xxx", "unknown command"),
    case(["tr\x1b[31main"], "x1b"),
    case("--", "'--'"),
    # options that do not exist, or not so
    *[case(f"{command} --speed=3", "--speed") for command in OPTIONS],
    *[case(f"{command} -z", "-z") for command in OPTIONS],
    case("train --epoch=3", "--epoch"),
    case("train --EPOCHS=3", "--EPOCHS"),
    case("train -epochs=3", "-epochs"),
    case("train --no-epochs", "--no-epochs"),
    case("train --no-lr=1", "--no-lr"),
    case("train —lr=1", "—lr=1"),
    case("train digits digits", "digits"),
    case("train digits mlp 4", "mlp"),
    case("eval run run", "run"),
    case("cache", "RUN"),
    case("cache run", "holds a whole run"),
    case("cache nowhere", "holds no block"),
    case("cache run run", "run"),
    case("cache run --yes", "holds a whole run"),
    case("cache run --dtype=fp16", "--dtype"),
    case("cache run --out=", "--out"),
    case("merge", "--out"),
    case("merge run", "--out"),
    case("merge --out=x", "RUN_0"),
    case("merge nowhere --out=x", "'nowhere' holds no block"),
    case("merge run nowhere --out=x", "holds a whole run"),
    case("merge run run --out=x", "holds a whole run"),
    case("merge run --out=", "--out"),
    case("merge run --out=x --out=y", "--out", "twice"),
    case("merge run --out=x --trust=1", "--trust takes no value"),
    case("merge run --out=x --blocks=2", "--blocks"),
    case("plan-memory", "MODEL"),
    case("plan-memory nothing", "unknown model"),
    case("plan-memory gpt-small", "add --tokens"),
    case("plan-memory mlp --optimizer=lion", "--optimizer"),
    case("plan-memory mlp --at=nowhere", "nowhere"),
    case("plan-memory mlp --batch-size=6", "--accumulate 4 does not divide"),
    case("train --only=0 --rule=bp", "--only trains a block of a rule in blocks"),
    case("train --only=1", "--only"),
    case("sample", "RUN"),
    case("sample run", "only a text can be sampled"),
    case("sample nowhere", "holds no run"),
    case("sample run --exit=0.5", "choose last, all, or a block"),
    case("sample run --exit=first", "--exit first"),
    case("sample run --tokens=0", "--tokens"),
    case("sample run --tokens=many", "--tokens"),
    case("sample run --temperature=-1", "--temperature"),
    case("sample run --temperature=nan", "--temperature"),
    case("sample run --top=-1", "--top"),
    case("sample run --seed=1 --seed=2", "--seed", "twice"),
    case("sample run --prompt=", "--prompt"),
    case("blocks mlp cnn", "cnn"),
    case("timeline run run", "run"),
    case("compare digits cifar10", "cifar10"),
    case("demo digits", "digits"),
    case("table1 tiny", "tiny"),
    case("bench resnet20", "resnet20"),
    case("bench --pipeline mlp", "mlp"),
    case("bench --processes=2", "--processes"),
    case("bench --pipeline --steps=3", "--steps"),
    case("compare --rule=bp", "--rule"),
    case("study", "GRID"),
    case("study grid.py", "--validation"),
    case("study nothing.py --validation=100", "nothing.py"),
    case("study a_file --validation=100", "a_file", "not a grid"),
    case("study empty --validation=100", "empty", "not a regular file"),
    case("study grid.py --validation=100 --out=a_file", "--out"),
    case("train --validation=5000", "--validation"),
    case("train --rule=bp --head=linear", "--head"),
    case("train --rule=bp --add-beliefs", "--add-beliefs"),
    case("train --head=none", "none", "linear"),
    case("train --rule=pred --variational=1", "--variational"),
    case("train --statistic=max", "max", "moments"),
    case("train --rule=bp --statistic=grid", "--statistic"),
    case("train --model=mlp --statistic=moments", "--statistic moments", "no positions"),
    case("train --model=vit --statistic=grid", "SpatialGrid", "feature maps", "SpatialMoments"),
    case("launch --statistic=max", "max", "moments"),
    case("compare --statistic=max", "max", "moments"),
    case("compare --resume", "--resume"),
    case("eval run --resume", "--resume"),
    case("launch --nodes=2", "--nodes"),
    # without a value
    *[case(f"train --{name}", f"--{name}") for name in ("epochs", "lr", "at", "model", "dtype", "out", "seed")],
    case("train --epochs --lr=1", "--epochs"),
    case("train --at --lr=1", "--at"),
    case("train --lr=", "--lr"),
    case("train --dtype=", "--dtype"),
    case("blocks mlp --plan", "--plan"),
    case("blocks mlp --plan=2 --speeds", "--speeds"),
    case("eval", "RUN"),
    case("timeline", "RUN"),
    case("blocks", "MODEL"),
    case("blocks --plan=2", "MODEL"),
    case("report", "report"),
    case("report --out=x", "report"),
    case("launch --processes", "--processes"),
    case("bench --pipeline --microbatches", "--microbatches"),
    # with one where none belongs
    case("train --flip=yes", "--flip"),
    case("train --resume=true", "--resume"),
    case("train --no-compile=1", "--no-compile"),
    case("bench --json=1", "--json"),
    case("bench --no-json", "--no-json"),
    # twice
    case("train --lr=1 --lr=2", "--lr", "twice"),
    case("train --lr 1 --lr 1", "--lr", "twice"),
    case("train --batch-size=8 --batch_size=8", "--batch-size", "twice"),
    case("train --flip --no-flip", "--flip", "twice"),
    case("train --at layer1 --at layer2", "--at", "twice"),
    case("launch --processes=2 --processes=3", "--processes", "twice"),
    case("launch --seed=2 --seed=2", "--seed", "twice"),
    case("blocks mlp --plan=2 --plan=2", "--plan", "twice"),
    case("bench --json --json", "--json", "twice"),
    case("eval run --exit=0 --exit=1", "--exit", "twice"),
    # choices
    case("train --dtype=fp8", "fp8", "bf16"),
    case("train --dtype=FP32", "FP32", "fp32"),
    case("train --schedule=linear", "linear", "onecycle"),
    case("train --message-dtype=fp16", "fp16", "bf16"),
    case("train --rule=hebb", "hebb", "bll-paper"),
    case("train --rule=BLL", "BLL", "bll-paper"),
    case("train --rule=bll,bp", "bll,bp"),
    case("train --model=resnet19", "resnet19", "resnet20"),
    case("train --model=timm:no-such-model", "timm:no-such-model"),
    case("train --model=torchvision:no-such-model", "torchvision"),
    case("train --model=nowhere:net", "nowhere"),
    case("train --model=json:nothing", "nothing"),
    case("train --model=a:b:c", "a:b:c"),
    case(["train", f"--model={LONG}"], "--model", "too long"),
    case(["train", "--model=[red]x[/red]"], "[red]x[/red]"),
    case(["train", "--model=\x1b]0;title\x07"], "x1b"),
    case("blocks resnet19", "resnet19"),
    case("blocks mlp --rule=hebb", "hebb"),
    case("blocks mlp --plan=2 --message-dtype=fp8", "fp8"),
    case("bench --model=resnet19", "resnet19"),
    case("bench --rules=hebb", "hebb", "bp-checkpoint"),
    case("bench --rules=bp,", "--rules"),
    case("bench --rules=bp;bll", "--rules"),
    case("bench --head=round", "round"),
    case("bench --balance=luck", "luck"),
    case("bench --dtype=int8", "int8"),
    case("bench --pipeline --model=resnet20", "resnet20"),
    case("bench --pipeline --rule=bp", "bp"),
    case("bench --pipeline --message-dtype=int8", "int8"),
    case("compare --rules=bp,backprop", "backprop"),
    case("compare --rules=bp,bp", "--rules"),
    case("compare --rules=,", "--rules"),
    case("table1 --scale=huge", "huge"),
    case("table1 --rules=fa,fa", "--rules"),
    case("table1 --rules=bp,,fa", "--rules"),
    case("table1 --datasets=cifar10,cifar10", "--datasets"),
    case("launch --rule=hebb", "hebb"),
    # numbers that are no numbers to a person
    case("train --lr=1,5", "--lr"),
    case("train --lr=0.1f", "--lr"),
    case("train --lr=1e", "--lr"),
    case("train --lr=½", "--lr"),
    case("train --epochs=٣", "--epochs"),
    case("train --epochs=1e3", "--epochs"),
    case("train --epochs=True", "--epochs"),
    case("train --epochs=None", "--epochs"),
    case("train --lr=-0.0", "--lr"),
    case("train --momentum=1", "--momentum"),
    case("train --momentum=0", "--momentum"),
    case("train --label-smoothing=1", "--label-smoothing"),
    case("train --weight-decay=-1e-9", "--weight-decay"),
    case("train --batch-size=1", "--batch-size"),
    case(["train", f"--seed={'9' * 5000}"], "--seed"),
    case("train --seed=9223372036854775808", "--seed"),
    case("train --threads=1000000", "--threads"),
    case("train --timeout=1e300", "--timeout"),
    case("bench --blocks=1.5", "--blocks"),
    case("bench --blocks=0", "--blocks"),
    case("bench --blocks=2,,4", "--blocks"),
    case("bench --blocks=2,x", "--blocks"),
    case("bench --blocks=99999999999", "--blocks"),
    case("bench --blocks=-1", "--blocks"),
    case("bench --blocks=4_0", "--blocks"),
    case("compare --seeds=1000000000", "--seeds"),
    case("compare --seed=9223372036854775807 --seeds=2", "--seed"),
    case("eval run --exit=nan", "--exit"),
    case("eval run --exit=1.5", "--exit"),
    case("eval run --exit=-0.5", "--exit"),
    case("eval run --exit=inf", "--exit"),
    case("eval run --exit=1e-3", "--exit"),
    case("eval run --exit=1.0001", "--exit"),
    case("eval run --exit=last,all", "--exit"),
    case("eval run --exit=9", "--exit", "0 to 3"),
    # what does not go together
    case("train --warmup=16", "--warmup", "--epochs"),
    case("train --warmup=3 --schedule=onecycle", "--warmup", "--schedule"),
    case("train --at layer1 --blocks=7", "--blocks", "--at"),
    case("train --at layer1 layer1", "--at", "layer1"),
    case("train --shard", "--shard", "--replicas"),
    case("train --replicas=2", "--replicas", "bll launch"),
    case("train --replicas=2 --shard", "--replicas", "bll launch"),
    case("train --message-dtype=bf16", "--message-dtype", "bll launch"),
    case("train --trace", "--trace", "bll launch"),
    case("train --timeout=5", "--timeout", "bll launch"),
    case("compare --trace", "--trace"),
    case("compare --replicas=2", "--replicas"),
    case("compare --shard --replicas=2", "--replicas"),
    case("train --replicas=3", "--replicas", "--batch-size"),
    case("train --batch-size=2000", "--batch-size", "1442"),
    case("train --train-size=5000", "5000", "--train-size"),
    case("train --test-size=5000", "5000", "--test-size"),
    case("train --crop=8", "--crop"),
    case("train --cutout=9", "--cutout"),
    case("train --blocks=40", "blocks=40"),
    case("train --at nowhere", "nowhere"),
    case("train --at layer1 nowhere", "nowhere"),
    case("train --at=", "--at"),
    case(["train", "--at", LONG], "xxx"),
    case(["train", "--at", "läyer1", "[b]"], "läyer1"),
    case("train --at layer1,layer2", "layer1,layer2"),
    case("train --resume", "digits-cnn-bll-seed0"),
    case("train --resume --out=nowhere", "nowhere"),
    case("train --resume --out=run --lr=3", "--lr", "run"),
    case("train --out=run", "run", "--resume"),
    case("blocks mlp --link=1gbit", "--link", "--plan"),
    case("blocks mlp --speeds 1 1", "--speeds", "--plan"),
    case("blocks mlp --message-dtype=bf16", "--message-dtype", "--plan"),
    case("blocks mlp --plan=5", "--plan", "--blocks"),
    case("blocks mlp --plan=2 --speeds 1", "--speeds"),
    case("blocks mlp --plan=2 --speeds 1 2 3", "--speeds"),
    case("blocks mlp --plan=2 --speeds 1 0", "--speeds"),
    case("blocks mlp --plan=2 --speeds 1 fast", "--speeds"),
    *[
        case(f"blocks mlp --plan=2 --link={link}", "--link")
        for link in (
            "fast",
            "0mbit",
            "-1mbit",
            "1tbit",
            "1gbit,",
            "1gbit,fast",
            "nan",
            "inf",
            "1e9",
            "١gbit",
            "1gbit;1ms",
        )
    ],
    case(["blocks", "mlp", "--plan=2", f"--link={'9' * 400}gbit"], "--link"),
    case("blocks mlp --at layer1 --blocks=7", "--blocks", "--at"),
    case("blocks mlp --at nowhere", "nowhere"),
    case("blocks mlp --blocks=99", "blocks=99"),
    case("bench --scale --plot=a.png", "--plot", "--scale"),
    case("bench --scale --operations", "--operations", "--scale"),
    case("bench --plot=a.txt", "--plot", ".svg"),
    case("bench --plot=a", "--plot", ".svg"),
    case("bench --accumulate=3 --batch-size=4", "--accumulate"),
    case("bench --model=mlp --size=8 --rules=bp-accumulate --batch-size=4", "bp-accumulate", "more than 1 value"),
    case("blocks mlp --batch-size=2000000000", "memory", code=1),
    case("bench --model=mlp --batch-size=2000000000", "memory", code=1),
    case("bench --pipeline --processes=1", "--processes"),
    case("bench --pipeline --processes=5", "--processes", "2 to 4"),
    case("bench --pipeline --processes=17 --model=devices", "--processes"),
    case("bench --pipeline --microbatches 0", "--microbatches"),
    case("bench --pipeline --microbatches 3", "--microbatches"),
    case("bench --pipeline --microbatches 2 2", "--microbatches"),
    case("bench --pipeline --minibatches=1", "--minibatches"),
    case("bench --pipeline --rounds=0", "--rounds"),
    case("bench --pipeline --interface=nowhere0", "--interface", "nowhere0"),
    # processes and machines
    *[case(f"launch --rule={rule}", f"--rule {rule}", "bll train") for rule in IN_ONE_PROCESS],
    case("launch --interface=nowhere0", "--interface", "nowhere0"),
    case("launch --interface=", "--interface"),
    case("launch --nnodes=2", "--nnodes", "--rdzv-endpoint"),
    case("launch --nnodes=2 --rdzv-endpoint=localhost:29500", "--interface"),
    case("launch --rdzv-endpoint=localhost:29500", "--rdzv-endpoint", "--nnodes"),
    *[
        case(f"launch --nnodes={n}", "--nnodes")
        for n in ("0", "-1", "3:2", "1:", ":2", "1:2:3", "two", "1.5", "٣", "²", "999999")
    ],
    *[
        case(f"launch --nnodes=2 --interface=lo --rdzv-endpoint={endpoint}", "--rdzv-endpoint")
        for endpoint in (
            "nowhere",
            "localhost:",
            ":29500",
            "localhost:x",
            "localhost:0",
            "localhost:65536",
            "localhost:-1",
        )
    ],
    case("launch --nnodes=2 --interface=lo --rdzv-endpoint=localhost:99999999999", "--rdzv-endpoint"),
    case(f"launch --nnodes=2 --interface=lo --rdzv-endpoint={'a' * 70}.b:29500", "--rdzv-endpoint"),
    case("launch --shard", "--shard"),
    case("launch --replicas=3", "--replicas"),
    case("launch --lr=-1", "--lr"),
    case("launch --resume", "digits-cnn-bll-seed0"),
    case("launch --out=run", "run", "--resume"),
    # devices
    *[
        case(f"{command} --device={device}", "--device", device)
        for command in ("train", "eval run", "bench")
        for device in (
            "meta",
            "cpu:3",
            "mps",
            "xla",
            "hpu",
            "gpu",
            "cuda:-1",
            "cuda:99",
            "privateuseone",
            "mkldnn",
            "CPU",
        )
    ],
    case("train --device=", "--device"),
    case(["train", "--device= "], "--device"),
    case(["train", f"--device={LONG}"], "--device"),
    # paths
    case("train nowhere", "nowhere", "cifar10"),
    case("train ./nowhere", "./nowhere"),
    case("train a_file", "a_file"),
    case("train empty", "empty"),
    case("train broken", "train-0.parquet"),
    case("train images", "fake.png"),
    case("train hf:", "hf:"),
    case("train ''", "argument 1"),
    case("train ' '", "argument 1"),
    case(["train", LONG], "DATA", "too long"),
    case(["train", "\udcff"], "DATA"),
    case(["train", "a\0b"], "DATA"),
    case(["train", "[bold]data[/bold]"], "[bold]data[/bold]"),
    case(["train", "a\x1b[2Jb"], "x1b"),
    case(["train", "a\nb"], "a"),
    case(["train", "\u202edata"], "u202e"),
    case("train --out=", "--out"),
    case("eval nowhere", "nowhere"),
    case("eval a_file", "a_file"),
    case("eval empty", "empty"),
    case("eval damaged", "damaged"),
    case("eval foreign", "foreign"),
    case("eval run", "run", "checkpoint"),
    case("eval ''", "argument 1"),
    case("eval run --data=nowhere", "nowhere"),
    case("eval run --data=", "--data"),
    case("eval run --exit=", "--exit"),
    case(["eval", LONG], "xxx"),
    case(["eval", "[/]"], "[/]"),
    case("report nowhere", "nowhere"),
    case("report a_file", "a_file"),
    case("report empty", "empty"),
    case("report damaged", "damaged"),
    case("report foreign", "foreign"),
    case("report run", "finished an epoch"),
    case("report run nowhere", "nowhere"),
    case("report run ''", "argument 2"),
    case("report run --out=", "--out"),
    case("report run --html=", "--html"),
    case("timeline nowhere", "nowhere"),
    case("timeline run", "run", "--trace"),
    case("timeline a_file", "a_file"),
    case("timeline traced --out=x.pdf", "--out", ".svg"),
    case("timeline traced --out=x", "--out", ".svg"),
    case("timeline traced --out=", "--out"),
    case("table1 --data=", "--data"),
    case("table1 --out=", "--out"),
    case("compare --out=", "--out"),
    case("compare ''", "argument 1"),
    case("demo --out=", "--out"),
]

CASES = {each.args: each for each in (*wrong_numbers(), *no_text(), *BY_HAND)}


@functools.cache
def facts() -> dict[str, object]:
    """Of the digits, which are read once."""
    return Images.load(Settings()).facts


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few things in it, most of them wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("empty", "damaged", "foreign", "run", "broken", "images/train/a", "images/test/a", "traced/trace"):
        (tmp_path / name).mkdir(parents=True)
    Path("a_file").write_text("text")
    Path("grid.py").write_text('[{"rule": "bp"}]')
    Path("damaged/config.json").write_text("{")
    Path("foreign/config.json").write_text('{"name": "another program"}')
    write_run(Path("run"), accuracies=[], epochs=3, model="mlp", data="digits")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {"data": facts(), "steps": 22}))
    Path("broken/train-0.parquet").write_text("no table")
    for part in ("train", "test"):
        Path(f"images/{part}/a/fake.png").write_text("no picture")
    record = {"doing": "forward", "block": 0, "rank": 0, "minibatch": 0, "start": 0.0, "end": 1.0, "size": 0}
    Path("traced/trace/rank0.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, 0 if path.is_dir() else path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "wrong", [pytest.param(each, id=each.name, marks=[pytest.mark.long] * each.long) for each in CASES.values()]
)
def test_one_line_says_it_and_nothing_is_left(world: Path, capfd: pytest.CaptureFixture[str], wrong: Case) -> None:
    before = files(world)
    code = main(wrong.args)
    out, err = capfd.readouterr()
    assert (code, out) == (wrong.code, ""), err
    assert re.fullmatch(r"bll: [^\n]+\n", err), err
    assert all(word in err for word in wrong.words), err
    assert err.isprintable() or err[:-1].isprintable()
    assert len(err) < 2000
    assert files(world) == before


def test_there_are_many_for_every_command() -> None:
    counts = {name: sum(name in args[:1] for args in CASES) for name in COMMANDS}
    assert len(CASES) > 250
    assert min(counts.values()) >= 10, counts


@pytest.mark.parametrize("command", OPTIONS)
def test_every_number_has_a_range(command: str) -> None:
    for name, (hint, beside) in ranges.declared(OPTIONS[command]).items():
        if re.search(r"\b(int|float)\b", str(hint)):
            assert any(isinstance(bound, ranges.Range) for bound in beside), name


ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("command", ["train", "bench --pipeline"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", None),
        ("MASTER_ADDR", None),
        ("MASTER_PORT", None),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "two"),
        ("RANK", ""),
        ("RANK", "-1"),
        ("RANK", "1"),
        ("RANK", "first"),
        ("RANK", "0.5"),
        ("LOCAL_RANK", "x"),
        ("LOCAL_WORLD_SIZE", "0"),
        ("MASTER_PORT", "70000"),
        ("MASTER_PORT", "http"),
        ("MASTER_PORT", "²"),
        ("TORCHELASTIC_RESTART_COUNT", "often"),
    ],
)
def test_an_environment_that_is_no_group(
    world: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    value: str | None,
) -> None:
    for key in (*ENVIRONMENT, "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(key, raising=False)
    for key, given in {**ENVIRONMENT, name: value}.items():
        if given is not None:
            monkeypatch.setenv(key, given)
    before = files(world)
    assert main(command.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(rf"bll: .*\b{name}\b.*\n", err), err
    assert files(world) == before


@pytest.mark.parametrize("rule", IN_ONE_PROCESS)
def test_one_of_several_processes_refuses_feedback_alignment(
    world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    for key, given in ENVIRONMENT.items():
        monkeypatch.setenv(key, given)
    before = files(world)
    assert main(["train", f"--rule={rule}"]) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"bll: --rule {rule} trains the model whole, in one process: use bll train\n")
    assert files(world) == before
