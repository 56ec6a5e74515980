"""Folders of runs that are damaged or that no run has written: every command that reads them says so in one line."""

import json
import math
import os
import shutil
import zlib
from pathlib import Path

import pytest

from blocklocal.lab import cli

OPTIONS = ["--model=mlp", "--blocks=2", "--epochs=3", "--train-size=128", "--test-size=50"]
TRACE = [
    {"rank": 0, "replica": 0, "block": 0, "minibatch": m, "phase": phase, "start": 10 * m + t, "end": 10 * m + t + 1.0}
    for m in range(3)
    for t, phase in enumerate(("wait", "forward", "send", "backward"))
]
MISSING = object()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run, as `bll compare` keeps it, with a trace."""
    home = tmp_path_factory.mktemp("whole")
    run = home / "bll-seed0"
    assert cli.main(["train", *OPTIONS, f"--out={run}"]) == 0
    (run / "trace").mkdir()
    for rank in (0, 1):
        lines = [json.dumps({**record, "rank": rank, "block": rank}) for record in TRACE]
        (run / "trace" / f"rank{rank}.jsonl").write_text("\n".join(lines) + "\n")
    return home


@pytest.fixture
def run(home, tmp_path):
    return shutil.copytree(home, tmp_path / "runs") / "bll-seed0"


def commands(run: Path, file: str) -> list[list[str]]:
    """Those that read the file of a run."""
    if file == "trace":
        return [["timeline", str(run)]]
    found = [
        ["report", str(run)],
        ["report", str(run.parent)],
        ["compare", *OPTIONS, "--rules=bll", "--seeds=1", f"--out={run.parent}"],
        ["train", "--resume", f"--out={run}"],
        ["launch", "--resume", f"--out={run}"],
    ]
    return [*found, ["eval", str(run)]] if file == "config.json" else found


def files(folder: Path) -> dict[Path, object]:
    """All that is there."""
    return {path: path.read_bytes() if path.is_file() else path.stat().st_mode for path in folder.rglob("*")}


def refused(run: Path, file: str, *words: str, capsys: pytest.CaptureFixture[str], every: bool = True) -> None:
    """The command ends with 2 and one line that has these words, and leaves all files as they are: every command that
    reads the file, or one of them by the test's name, since one function reads it for all."""
    before = files(run.parent)
    capsys.readouterr()
    found = commands(run, file)
    one = zlib.crc32(os.environ["PYTEST_CURRENT_TEST"].encode()) % len(found)
    for command in found if every else [found[one]]:
        assert cli.main(command) == 2, command
        out, err = capsys.readouterr()
        assert err.startswith("bll: "), command
        assert err.count("\n") == 1, err
        assert all(word in err for word in words), (command, err)
        assert out == ""
    assert files(run.parent) == before


def replace(found: dict, place: str, value: object) -> None:
    """Set or take away what stands at a.b.c."""
    *way, name = place.split(".")
    for step in way:
        found = found[int(step)] if isinstance(found, list) else found[step]
    if value is MISSING:
        del found[name]
    else:
        found[name] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((name, MISSING) for name in ("settings", "data", "blocks", "steps", "versions", "device", "git")),
        *(("settings", value) for value in (None, [], "bll", 3)),
        *((f"settings.{name}", MISSING) for name in ("data", "model", "rule", "seed", "epochs", "at", "lr")),
        ("settings.colour", "red"),
        ("settings.out", "/elsewhere"),
        ("settings.resume", True),
        *(("settings.epochs", value) for value in ("3", 3.0, True, None, [3], 0, -1)),
        *(("settings.lr", value) for value in ("0.1", None, math.nan, math.inf, -1)),
        *(("settings.at", value) for value in ("layer1", [1], {"layer1": 1}, None)),
        ("settings.seed", -1),
        ("settings.seed", 2**63),
        ("settings.dtype", "fp8"),
        ("settings.schedule", 0),
        ("settings.flip", 1),
        ("settings.model", None),
        ("settings.rule", ["bll"]),
        ("settings.data", {"name": "digits"}),
        *(("blocks", value) for value in (0, -1, 2.0, "2", None)),
        ("steps", 0),
        ("versions", {"torch": None}),
        ("versions", []),
        ("device", "cpu"),
        ("git", 7),
        ("git", "\ud800"),
    ],
)
def test_parts_of_the_configuration(run, capsys, place, value):
    config = json.loads((run / "config.json").read_text())
    replace(config, place, value)
    (run / "config.json").write_text(json.dumps(config))
    field = place.split(".")[-1].replace("_", "-") if value != "\ud800" else "surrogates"
    refused(run, "config.json", str(run / "config.json"), field, capsys=capsys, every=False)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"17", b'"run"', b"\xff\xfe{}", b"\0" * 100, b"[" * 100_000, b"1" * 5000, b"{}{}"],
    ids=lambda content: str(content[:8]),
)
def test_configurations_that_are_none(run, capsys, content):
    (run / "config.json").write_bytes(content)
    refused(run, "config.json", str(run / "config.json"), "is not a configuration", capsys=capsys, every=False)


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file(run, capsys, file, make):
    (run / file).unlink()
    make(run / file)
    refused(run, file, str(run / file), "is not a regular file", capsys=capsys)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((name, MISSING) for name in ("epoch", "train_loss", "test_accuracy", "test_accuracy_all", "seconds")),
        *((name, MISSING) for name in ("peak_memory_mib", "borders")),
        *(("epoch", value) for value in (1, 3, 0, -2, 2.0, "2", True, None, 10**30)),
        *(
            ("train_loss", value)
            for value in (1.0, [], [1.0], [1.0, 2.0, 3.0], [1.0, "2"], [1.0, None], [[1.0], [2.0]])
        ),
        *(("train_loss", [1.0, value]) for value in (math.nan, math.inf, -math.inf)),
        *(("test_accuracy", value) for value in ([0.5], [0.5, 0.5, 0.5], [0.5, math.nan], [0.5, 1.5], [-0.5, 0.5], {})),
        *(("test_accuracy_all", value) for value in (math.nan, 2, "0.5", None)),
        *(("seconds", value) for value in (-1, math.nan, math.inf, "1", None)),
        *(("peak_memory_mib", value) for value in (-1, math.nan, True)),
        *(("borders", value) for value in ([], [{}], [{"agreement": 0.1}], {}, None, [[0.1, 0.2]])),
        ("borders.0.variance_ratio", "large"),
        *(("angles", value) for value in ([1.0], {"layer": "right"}, {"layer": None}, 3)),
    ],
)
def test_parts_of_a_record(run, capsys, place, value):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = json.loads(lines[1])
    replace(record, place, value)
    lines[1] = json.dumps(record)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    refused(
        run, "metrics.jsonl", f"line 2 of '{run / 'metrics.jsonl'}'", place.split(".")[0], capsys=capsys, every=False
    )


@pytest.mark.parametrize(
    ("order", "line"),
    [([1, 2, 2, 3], 3), ([2, 3], 1), ([1, 3, 2], 2), ([1, 2, 3, 1, 2, 3], 4), ([3, 2, 1], 1), ([1, 2, 3, 3], 4)],
)
def test_records_out_of_order(run, capsys, order, line):
    """As two processes leave them that write at once."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(lines[epoch - 1] + "\n" for epoch in order))
    refused(
        run, "metrics.jsonl", f"line {line} of '{run / 'metrics.jsonl'}'", "epoch: expected", capsys=capsys, every=False
    )


@pytest.mark.parametrize(
    "garbage",
    [b"", b"no json", b'{"epoch": 2, "train', b"null", b"[]", b"2", b"{}", b"\xff\xff", b"\0" * 64, b"[" * 100_000],
    ids=lambda content: str(content[:8]),
)
def test_lines_that_are_no_records(run, capsys, garbage):
    first, second, third = (run / "metrics.jsonl").read_bytes().splitlines()
    for lines, number in [([first, garbage, third], 2), ([first, garbage, second, third], 2), ([garbage], 1)]:
        (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        refused(run, "metrics.jsonl", f"line {number} of '{run / 'metrics.jsonl'}'", capsys=capsys, every=not garbage)


def test_records_that_are_gone(run, capsys):
    (run / "metrics.jsonl").unlink()
    refused(run, "metrics.jsonl", str(run / "metrics.jsonl"), "No such file", capsys=capsys)


def test_records_of_which_the_checkpoint_knows_more(run, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    before = files(run.parent)
    assert cli.main(["train", "--resume", f"--out={run}"]) == 2
    assert "has no record of epoch 3, which the checkpoint includes" in capsys.readouterr().err
    assert files(run.parent) == before


def test_half_a_line_at_the_end_is_what_a_kill_leaves(run, capsys):
    metrics, model = run / "metrics.jsonl", run / "model.safetensors"
    whole = {path: path.read_bytes() for path in (metrics, model)}
    model.unlink()
    with metrics.open("a") as file:
        file.write('{"epoch": 4, "train_loss": [0.')
    assert cli.main(["report", str(run), f"--out={run.parent / 'report'}"]) == 0
    assert cli.main(["train", "--resume", f"--out={run}"]) == 0
    assert {path: path.read_bytes() for path in whole} == whole


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((name, MISSING) for name in ("rank", "replica", "block", "minibatch", "phase", "start", "end")),
        *((name, value) for name in ("rank", "block", "minibatch") for value in (-1, 1.0, "1", None, True, [])),
        *(("phase", value) for value in ("sleep", None, 3, ["wait"], {})),
        *((name, value) for name in ("start", "end") for value in (math.nan, math.inf, "1", None, True, 10**400)),
        ("end", -5.0),
        ("colour", "red"),
    ],
)
def test_parts_of_a_trace(run, capsys, place, value):
    file = run / "trace" / "rank1.jsonl"
    lines = file.read_text().splitlines()
    record = json.loads(lines[4])
    replace(record, place, value)
    lines[4] = json.dumps(record)
    file.write_text("\n".join(lines) + "\n")
    refused(run, "trace", f"line 5 of '{file}'", place, capsys=capsys)


@pytest.mark.parametrize(
    "garbage", [b"", b"no json", b'{"rank": 1, "repl', b"null", b"[]", b"\xff\xff", b"[" * 100_000]
)
def test_lines_that_are_no_trace(run, capsys, garbage):
    file = run / "trace" / "rank1.jsonl"
    first, *rest = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, garbage, *rest]) + b"\n")
    refused(run, "trace", f"line 2 of '{file}'", capsys=capsys)


def test_traces_that_are_not_whole(run, capsys):
    file = run / "trace" / "rank1.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    refused(run, "trace", str(file), "ends inside line 12", capsys=capsys)
    file.write_bytes(b"")
    (run / "trace" / "rank0.jsonl").write_bytes(b"")
    refused(run, "trace", "a timeline needs records", capsys=capsys)
    for kept, words in [
        (["wait"], "rank 1 has learnt from none"),
        (["backward", "wait"], "rank 1 has learnt from none"),
        (["forward", "send"], "rank 1 has learnt from none"),
    ]:
        file.write_bytes(b"".join(line for line in content.splitlines(True) if json.loads(line)["phase"] in kept))
        refused(run, "trace", words, capsys=capsys)
    file.write_bytes(b"".join(content.splitlines(True)[:4]))
    refused(run, "trace", "throughput needs at least two minibatches", capsys=capsys)
    shutil.copy(file, run / "trace" / "rank1 (copy).jsonl")
    refused(run, "trace", "both hold records of rank 1", capsys=capsys)
    still = [json.dumps({**json.loads(line), "start": 5.0, "end": 5.0}) + "\n" for line in content.splitlines()]
    (run / "trace" / "rank1 (copy).jsonl").unlink()
    file.write_text("".join(still))
    refused(run, "trace", "cannot be drawn", capsys=capsys)


def test_folders_without_a_run(run, capsys):
    (run / "config.json").unlink()
    for command in (["report", str(run)], ["eval", str(run)], ["train", "--resume", f"--out={run}"]):
        assert cli.main(command) == 2
        assert "holds no run" in capsys.readouterr().err
    before = files(run)
    for command in ("train", "launch"):
        assert cli.main([command, *OPTIONS, f"--out={run}"]) == 2
        assert "belongs to a run without config.json" in capsys.readouterr().err
    assert files(run) == before
    shutil.rmtree(run / "trace")
    assert cli.main(["timeline", str(run)]) == 2
    assert "holds no trace" in capsys.readouterr().err
