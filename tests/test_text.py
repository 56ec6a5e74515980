"""Language modelling from the command: windows of a text, perplexity per exit, samples."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interruption import interrupted
from safetensors.torch import load_file
from torch.nn import functional as F

from blocklocal.lab.cli import main
from blocklocal.lab.commands.sample import tokens
from blocklocal.lab.data.text import read_text, windows
from blocklocal.lab.data.vocabulary import BytePairs, Characters
from blocklocal.lab.errors import UserError
from blocklocal.lab.runs.folder import Run
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.find import load_task
from blocklocal.lab.tasks.text import LanguageModelling
from blocklocal.lab.training.experiment import prepare
from blocklocal.lab.training.recipes import recipe
from blocklocal.lab.training.run import train
from blocklocal.lab.training.trained import load_trained
from blocklocal.lab.training.trainer import SingleTrainer

POEM = "The quick brown fox jumps over the lazy dog; naïve cats – all of them – nap.\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "poem.txt"
    file.write_text(POEM * 40, encoding="utf-8")
    return file


def tiny(text: Path, **changes: object) -> Settings:
    small = {"model": "gpt-tiny", "context": 16, "windows": 48, "epochs": 2, "test_size": 10, "blocks": 2}
    return replace(recipe(f"text:{text}"), **{**small, **changes})


def task_of(settings: Settings) -> LanguageModelling:
    task = load_task(settings, device=torch.device("cpu"))
    assert isinstance(task, LanguageModelling)
    return task


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_vocabularies_give_the_text_back(text):
    content = text.read_text(encoding="utf-8")
    for words in (Characters(content), BytePairs(content, size=300), BytePairs("other words", size=258)):
        ids = words.encode(content)
        assert words.decode(ids) == content
        assert max(ids) < len(words.tokens)
    assert len(Characters(content).tokens) == len(set(content))
    assert len(BytePairs(content, size=300).encode(content)) < len(content) / 2
    assert BytePairs(content, size=300).encode(content) == BytePairs(content, size=300).encode(content)


def test_the_last_tenth_is_for_testing_and_no_window_reaches_into_it(text):
    content = text.read_text(encoding="utf-8")
    parts = read_text(text)
    begin = len(content) - len(content) // 10
    assert parts.vocabulary.decode(parts.train.tolist()) == content[:begin]
    assert parts.vocabulary.decode(parts.test.tolist()) == content[begin:]
    held = windows(parts.test, context=16)
    assert torch.equal(held.inputs.flatten()[1:], held.labels.flatten()[:-1])
    assert torch.equal(held.labels.flatten(), parts.test[1 : held.labels.numel() + 1])


def test_batches_are_windows_from_anywhere_with_the_tokens_that_follow(text):
    task = task_of(tiny(text, validation=5))
    string = "".join(task.vocabulary.tokens[i] for i in task.tokens)
    batches = list(task.training_batches(1))
    assert [x.shape for x, _ in batches] == [(12, 16)] * 4
    for x, y in batches:
        assert torch.equal(x[:, 1:], y[:, :-1])
        for row in torch.cat([x, y[:, -1:]], 1).tolist():
            assert task.vocabulary.decode(row) in string
    assert all(torch.equal(y, labels) for (_, y), labels in zip(batches, task.training_labels(1), strict=True))
    later = list(task.training_batches(1, begin=3))
    assert torch.equal(later[0][0], batches[3][0])
    assert not torch.equal(next(task.training_batches(2))[0], batches[0][0])
    held = task.dataset.validation
    assert held is not None
    assert len(held) == 5
    whole = task_of(tiny(text)).tokens
    assert torch.equal(torch.cat([task.tokens, held.inputs.flatten()]), whole[: len(task.tokens) + 80])


def test_a_run_records_the_loss_of_each_exit(tmp_path, text, capsys):
    settings = tiny(text, validation=4, out=str(tmp_path / "run"))
    summary = train(settings)
    trained = load_trained(Run(tmp_path / "run"), data=None, device="cpu", trust=False)
    trained.experiment.validate()
    learner, test = trained.learner.eval(), trained.experiment.dataset.test
    last = lines(tmp_path / "run")[-1]

    def nats(logits: torch.Tensor) -> float:
        return F.cross_entropy(logits.flatten(0, 1), test.labels.flatten()).item()

    for k in range(2):
        assert last["test_loss"][k] == pytest.approx(nats(learner.predict(test.inputs, exit=k)), rel=1e-6)
    assert last["test_loss_all"] == pytest.approx(nats(learner.predict(test.inputs, exit="all")), rel=1e-6)
    assert summary["loss"] == last["test_loss"][-1] < math.log(len(trained.experiment.dataset.classes))
    assert main(["eval", "--exit=0", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["loss"] == last["test_loss"][0]
    assert told["perplexity"] == math.exp(told["loss"])


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "schedulefree", "schedule": "constant"}, {"rule": "bp", "vocabulary": 260}]
)
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path, text, changes):
    settings = tiny(text, save_every=3, **changes)
    train(replace(settings, out=str(tmp_path / "whole")))
    stopped = replace(settings, out=str(tmp_path / "stopped"))
    with interrupted(SingleTrainer, epoch=2, step=3), pytest.raises(KeyboardInterrupt, match="epoch 2, step 3"):
        train(stopped)
    train(replace(stopped, resume=True))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "stopped"), strict=True):
        assert (one["train_loss"], one["test_loss"]) == (other["train_loss"], other["test_loss"])


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("schedulefree", marks=pytest.mark.long)])
def test_a_pipeline_gives_the_same_weights(tmp_path, text, optimizer):
    options = ["--model=gpt-tiny", "--context=16", "--windows=48", "--epochs=1", "--test-size=10", "--blocks=2"]
    options += [f"--optimizer={optimizer}", "--schedule=constant"]
    assert main(["train", f"text:{text}", *options, "--validation=4", f"--out={tmp_path / 'one'}"]) == 0
    launch = ["launch", "--processes=2", f"text:{text}", *options, "--validation=4", f"--out={tmp_path / 'two'}"]
    assert main(launch) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (first,), (second,) = lines(tmp_path / "one"), lines(tmp_path / "two")
    for name in ("train_loss", "test_loss", "test_accuracy", "exit_weights", "borders"):
        assert first[name] == second[name]
    assert first["test_loss_all"] == pytest.approx(second["test_loss_all"], rel=1e-6)


def test_samples_are_drawn_from_the_model(tmp_path, text, capsys):
    train(tiny(text, out=str(tmp_path / "run")))
    trained = load_trained(Run(tmp_path / "run"), data=None, device="cpu", trust=False)
    learner, task = trained.learner.eval(), trained.experiment.task
    assert isinstance(task, LanguageModelling)
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--prompt=The", "--tokens=30", "--temperature=0", "--exit=0"]) == 0
    said = capsys.readouterr().out
    ids = task.vocabulary.encode("The")
    for _ in range(30):
        ids.append(int(learner.predict(torch.tensor([ids[-16:]]), exit=0)[0, -1].argmax()))
    assert said == task.vocabulary.decode(ids) + "\n"
    command = ["sample", str(tmp_path / "run"), "--tokens=40"]
    texts = []
    for seed in (1, 1, 2):
        assert main([*command, f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_sample_has_the_frequencies_of_its_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])

    def drawn(*, temperature: float, top: int) -> torch.Tensor:
        begin = torch.zeros(1, 1, dtype=torch.int64)
        found = tokens(lambda _: logits.clone(), begin, context=4, temperature=temperature, top=top, seed=0)
        return torch.tensor([next(found) for _ in range(4000)]).bincount(minlength=4) / 4000

    torch.testing.assert_close(drawn(temperature=1.0, top=0), logits.softmax(0), atol=0.03, rtol=0)
    torch.testing.assert_close(drawn(temperature=0.5, top=0), (2 * logits).softmax(0), atol=0.03, rtol=0)
    assert drawn(temperature=1.0, top=2)[[0, 3]].sum() == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "cnn"}, "unknown model 'cnn' for text: choose gpt-tiny"),
        ({"flip": True}, "--flip is for images"),
        ({"vocabulary": 200}, "--vocabulary 200 holds no pair"),
        ({"context": 2000}, "windows of 2000 tokens to test on: lower --test-size or --context"),
        ({"test_size": 999}, "windows of 16 tokens to test on: lower --test-size"),
        ({"validation": 999}, "--validation 999 leaves no window"),
        ({"batch_size": 49}, "--batch-size 49 is more than the 48 training windows"),
        ({"optimizer": "schedulefree"}, "add --schedule constant"),
    ],
)
def test_what_does_not_fit_a_text_is_refused(tmp_path, text, changes, words):
    with pytest.raises(UserError, match=words):
        train(tiny(text, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_text_is_refused(tmp_path, capsys):
    for name, content, words in [
        ("empty", b"", "fewer than two different characters"),
        ("binary", b"\xff\xfe\x00text", "is not UTF-8 text"),
        ("one", b"aaaaaaaaaaaaaaaa", "fewer than two different characters"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert main(["train", f"text:{tmp_path / name}"]) == 2
        assert words in capsys.readouterr().err
    assert main(["train", f"text:{tmp_path}"]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert main(["train", f"text:{tmp_path / 'none'}"]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["train", "digits", "--context=8"]) == 2
    assert capsys.readouterr().err == "bll: --context is for text, and DATA 'digits' is images\n"


def test_another_text_is_refused(tmp_path, text):
    train(tiny(text, epochs=1, out=str(tmp_path / "run")))
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    with pytest.raises(UserError, match="is not what the run was trained on: digest"):
        load_trained(Run(tmp_path / "run"), data=f"text:{other}", device="cpu", trust=False)


def test_only_a_text_can_be_sampled(tmp_path, capsys):
    train(Settings(model="mlp", epochs=1, train_size=64, test_size=20, threads=1, out=str(tmp_path / "run")))
    assert main(["sample", str(tmp_path / "run")]) == 2
    assert "only a text can be sampled" in capsys.readouterr().err


def test_a_gpt_is_cut_between_blocks_of_equal_depth(text):
    experiment = prepare(tiny(text, blocks=4))
    assert [len(list(block.parameters())) > 0 for block in experiment.learner.blocks] == [True] * 4
    assert task_of(tiny(text, blocks=4)).cuts() == ["blocks.0", "blocks.1", "blocks.2"]
    assert task_of(tiny(text, blocks=2)).cuts() == ["blocks.1"]
