"""What goes wrong with caches and blocks that are trained alone: one line each, and nothing is lost."""

import errno
import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_folders import options, settings_of, train_chain
from safetensors.torch import load_file, save_file

from blocklocal.lab.cli import main
from blocklocal.lab.one_block import planning, writing
from blocklocal.lab.one_block.activations import Activations
from blocklocal.lab.one_block.folder import BlockRun, trained_on


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """Three blocks b0, b1, b2 on images with the caches b0-cache, b1-cache."""
    folder = tmp_path_factory.mktemp("chain")
    train_chain(folder, replace(settings_of("images", folder), epochs=1))
    return folder


@pytest.fixture
def own(chain, tmp_path) -> Path:
    """A copy of it, to be spoiled."""
    shutil.copytree(chain, tmp_path / "own")
    return tmp_path / "own"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, command: list[str], *words: str, code: int = 2) -> None:
    """The command ends with this code and one line with these words."""
    capsys.readouterr()
    assert main(command) == code
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bll:")]
    assert len(told) == 1, told
    for word in words:
        assert word in told[0], (word, told[0])


TRAIN = {
    "no cache": (["--only=1"], "name their cache with --from"),
    "a cache that is not there": (["--only=1", "--from={}/none"], "holds no cache of activations"),
    "the cache of another border": (["--only=2", "--from={}/b0-cache"], "behind block 0, which block 1 reads"),
    "a block that is not there": (["--only=7", "--from={}/b1-cache"], "which block 2 reads, and not block 7"),
    "a cache for block 0": (["--only=0", "--from={}/b0-cache"], "--only 0 reads the data"),
    "another model": (["--only=1", "--from={}/b0-cache", "--model=mlp"], "--model differs"),
    "another data set": (["wine", "--only=1", "--from={}/b0-cache"], "DATA differs"),
    "another learning rate": (["--only=1", "--from={}/b0-cache", "--lr=0.3"], "--lr differs"),
    "a rule without blocks": (["--only=0", "--rule=bp"], "choose --rule bll instead of bp"),
    "a head that reads the next block": (["--only=0", "--lookahead=frozen"], "--lookahead is not for a block"),
    "a head that reads the last block": (["--only=0", "--head=unembedding"], "--head unembedding is not for a block"),
    "blocks kept elsewhere": (["--only=0", "--offload=disk"], "--offload is not for a block"),
    "beliefs": (["--only=0", "--add-beliefs"], "--add-beliefs is not for a block"),
    "compilation": (["--only=0", "--compile"], "--compile is not for a block"),
    "processes": (["--only=0", "--replicas=2"], "--replicas"),
    "a block with another number": (["--only=0", "--resume", "--out={}/b1"], "holds block 1: resume it with --only 1"),
    "a folder that is taken": (["--only=1", "--from={}/b0-cache", "--out={}/b1"], "already holds a run"),
    "nothing to resume": (["--only=1", "--resume", "--out={}/none"], "holds no block"),
}


@pytest.mark.parametrize("case", TRAIN)
def test_training_is_refused(chain, tmp_path, capsys, case):
    given, words = TRAIN[case]
    out = [] if any("--out" in arg for arg in given) else [f"--out={tmp_path / 'out'}"]
    before = snapshot(chain)
    refused(capsys, ["train", *(arg.format(chain) for arg in given), *out], words)
    assert snapshot(chain) == before
    assert not (tmp_path / "out").exists()


OTHERS = {
    "eval of a block": (["eval", "{}/b0"], "a block that was trained alone: bll merge"),
    "a cache behind the last block": (["cache", "{}/b2", "--yes"], "block 2, the last"),
    "a cache of no block": (["cache", "{}/b0-cache", "--yes"], "holds no block"),
    "more views than there are": (["cache", "{}/b1", "--yes", "--views=2", "--out={}/new"], "--views 2"),
    "more views than epochs": (["cache", "{}/b0", "--yes", "--views=3", "--out={}/new"], "1 to the 1 epochs"),
    "nobody to ask": (["cache", "{}/b0", "--out={}/new"], "MiB in 2 files", "add --yes"),
    "a cache of something else there": (["cache", "{}/b0", "--yes", "--dtype=bf16"], "another cache (dtype differs"),
    "a folder with something else": (["cache", "{}/b0", "--yes", "--out={}"], "is not empty and holds no cache"),
    "the wrong upstream": (["cache", "{}/b1", "--yes", "--from={}/b1-cache", "--out={}/new"], "is not the cache on"),
    "an upstream for block 0": (["cache", "{}/b0", "--yes", "--from={}/b1-cache", "--out={}/new"], "leave --from out"),
    "a missing block": (["merge", "{}/b0", "{}/b1", "--out={}/new"], "block 2 is missing"),
    "a block twice": (["merge", "{}/b0", "{}/b1", "{}/b1", "--out={}/new"], "both hold block 1"),
    "an --out that is taken": (["merge", "{}/b0", "{}/b1", "{}/b2", "--out={}/b0-cache"], "is not empty"),
    "nothing to merge": (["merge", "--out={}/new"], "name the folders"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_commands_refuse(chain, capsys, case):
    given, *words = OTHERS[case]
    before = snapshot(chain)
    refused(capsys, [arg.format(chain) for arg in given], *words)
    assert snapshot(chain) == before
    assert not (chain / "new").exists()


def test_damaged_caches(own, capsys):
    command = ["train", "--only=1", f"--from={own / 'b0-cache'}", f"--out={own / 'new'}"]
    shard = own / "b0-cache" / "view-1-00000.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(capsys, command, "view-1-00000.safetensors' is damaged", f"{len(content) - 100:,} bytes instead of")
    shard.unlink()
    refused(capsys, command, "view-1-00000.safetensors' is damaged", "No such file")
    assert not (own / "new").exists()
    shard.write_bytes(content[:-100] + bytes(100))
    refused(capsys, command, "sha256", "no checkpoint has been written yet")
    shard.write_bytes(content)
    index = own / "b0-cache" / "index.json"
    written = index.read_text()
    index.write_text(written.replace('"border": 0', '"border": 1'))
    refused(capsys, command, "index.json' is damaged", "checksum")
    index.write_text(written[:-20])
    refused(capsys, command, "index.json' is damaged")
    index.write_text(written)
    assert main(["train", "--only=1", "--resume", f"--out={own / 'new'}"]) == 0
    assert BlockRun(own / "new").weights().keys() == BlockRun(own / "b1").weights().keys()


def test_another_cache_is_not_taken_for_the_one_before(own, capsys):
    shutil.rmtree(own / "b0-cache")
    resume = ["train", "--only=1", "--resume", f"--out={own / 'b1'}", f"--from={own / 'b0-cache'}"]
    refused(capsys, resume, "holds no cache of activations")
    assert main(["cache", str(own / "b0"), "--yes", "--dtype=bf16"]) == 0
    refused(capsys, resume, "is not the cache on which")


def test_a_block_that_is_not_trained_to_its_end(own, capsys):
    BlockRun(own / "b0").model.unlink()
    for command in (
        ["cache", str(own / "b0"), "--yes"],
        ["merge", *(f"{own}/b{k}" for k in range(3)), f"--out={own}/x"],
    ):
        refused(capsys, command, "is not trained to its end", "--resume")


def test_blocks_that_do_not_belong_together(own, capsys):
    merge = ["merge", *(f"{own}/b{k}" for k in range(3)), f"--out={own}/new"]
    run = BlockRun(own / "b0")
    weights, written = run.model.read_bytes(), run.config.read_text()
    save_file({name: tensor + (tensor.is_floating_point() * 1e-6) for name, tensor in run.weights().items()}, run.model)
    refused(capsys, merge, "block 1", "was trained on activations of another block 0")
    run.model.write_bytes(weights)
    changed = json.loads(written)
    changed["settings"]["lr"] = 0.3
    run.config.write_text(json.dumps(changed))
    refused(capsys, merge, "was changed after the training")
    changed["trained_on"] = trained_on(run.settings(), changed["data"], None)
    run.config.write_text(json.dumps(changed))
    refused(capsys, merge, "was trained with other --lr than block 0")
    assert not (own / "new").exists()
    run.config.write_text(
        json.dumps({name: json.loads(written)[name] for name in json.loads(written) if name != "block"})
    )
    refused(capsys, merge, "block.json' is not the record of a block")


def test_a_checkpoint_of_other_weights_is_not_merged(own, capsys):
    merge = ["merge", *(f"{own}/b{k}" for k in range(3)), f"--out={own}/new"]
    shutil.rmtree(own / "b2")
    for seed in ("b2", "other"):
        assert main(["train", "--only=2", f"--from={own / 'b1-cache'}", f"--out={own / seed}"]) == 0
    weights = {name: tensor * 2 for name, tensor in load_file(own / "b2" / "block.safetensors").items()}
    save_file(weights, own / "b2" / "block.safetensors")
    refused(capsys, merge, "is not the checkpoint of")
    assert not (own / "new").exists()


def test_the_size_is_asked_for(chain, tmp_path, monkeypatch, capsys):
    class Answer:
        def __init__(self, text: str) -> None:
            self.text = text

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.text

    command = ["cache", str(chain / "b0"), f"--out={tmp_path / 'new'}"]
    monkeypatch.setattr("sys.stdin", Answer("\n"))
    assert main(command) == 2
    assert capsys.readouterr().err.endswith("Write them? [y/N] bll: nothing was written\n")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("sys.stdin", Answer("y\n"))
    assert main(command) == 0
    told = capsys.readouterr()
    files = sum(path.stat().st_size for path in (tmp_path / "new").glob("*.safetensors"))
    assert "MiB in 2 files" in told.err
    assert 0 <= files - json.loads(told.out.splitlines()[-1])["bytes"] < 1000  # headers


def test_too_little_room_is_said_before_anything_is_written(chain, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refused(capsys, ["cache", str(chain / "b0"), "--yes", f"--out={tmp_path / 'new'}"], "are needed and", "are free")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_nothing_half_written(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "FILE_BYTES", 2**14)
    out = tmp_path / "new"
    command = ["cache", str(chain / "b0"), "--yes", f"--out={out}"]
    written: list[Path] = []
    save = writing.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == 3:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", full)
        refused(capsys, command, "was not written (No space left on device)", code=1)
    kept = snapshot(out)
    assert sorted(path.suffix for path in kept) == [".json", *[".safetensors"] * 3]
    refused(capsys, ["train", "--only=1", f"--from={out}", f"--out={tmp_path / 'b1'}"], "is not whole")
    refused(capsys, [*command, "--dtype=bf16"], "another cache (dtype differs")
    times = {path: path.stat().st_mtime_ns for path in kept if path.suffix == ".safetensors"}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not (out / "plan.json").exists()
    resumed = Activations(out)
    assert len(resumed.files) > 4
    assert main([*command[:-1], f"--out={tmp_path / 'whole'}"]) == 0
    assert Activations(tmp_path / "whole").digest == resumed.digest
    again = snapshot(out)
    assert main(command) == 0
    assert snapshot(out) == again
    before = Activations(chain / "b0-cache")
    for (h, y), (g, z) in zip(resumed.training(1), before.training(1), strict=True):
        assert torch.equal(h, g)
        assert torch.equal(y, z)
    (h, y), (g, z) = next(resumed.training(1, begin=3)), list(before.training(1))[3]
    assert torch.equal(h, g)
    assert torch.equal(y, z)


def test_a_block_is_not_trained_over_processes(tmp_path, monkeypatch, capsys):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    command = ["train", "--only=0", *options(settings_of("images", tmp_path)), f"--out={tmp_path / 'new'}"]
    refused(capsys, command, "in one process")
