"""A run over processes while something breaks. `python tests/faults.py` tries it all at length, and prints a table."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file

from blocklocal.lab.training.recipes import settings_from
from blocklocal.lab.training.run import train

BLL = [sys.executable, "-m", "blocklocal"]
SETTINGS = ["--model=mlp", "--train-size=1024", "--test-size=100", "--batch-size=16", "--save-every=16", "--threads=1"]
STEPS = 1024 // 16  # minibatches of an epoch
STARTED = re.compile(r"rank \d+ of \d+, process (\d+) on")
PATIENCE = 300.0  # seconds that a test waits for what must come


class Launched:
    """A running `bll launch`. before: what stands before the command, such as `ip netns exec ...`."""

    all: ClassVar[list[Launched]] = []

    def __init__(self, out: Path, *options: str, processes: int, before: tuple[str, ...] = ()) -> None:
        self.out, self.processes = out, processes
        command = [*before, *BLL, "launch", f"--processes={processes}", *with_settings(options), f"--out={out}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.launcher = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self.begun = self.beginnings()
        Launched.all.append(self)

    def beginnings(self) -> int:
        """How often all processes have begun to train, restarts and resumptions included."""
        logs = [self.out / "logs" / f"rank{rank}.log" for rank in range(self.processes)]
        return min(len(STARTED.findall(log.read_text())) if log.exists() else 0 for log in logs)

    def wait_until_training(self) -> None:
        """Until all processes have begun once more than when this was last said."""
        self.until(lambda: self.beginnings() > self.begun)
        self.begun = self.beginnings()

    def until(self, what: Callable[[], object], *, every: float = 0.01) -> None:
        """Asks every so many seconds."""
        end = time.monotonic() + PATIENCE
        while not what():
            if self.launcher.poll() is not None or time.monotonic() > end:
                raise AssertionError(
                    f"this never came; exit code {self.launcher.poll()}\n{self.launcher.communicate()}"
                )
            time.sleep(every)

    def pid(self, rank: int) -> int:
        return int(STARTED.findall((self.out / "logs" / f"rank{rank}.log").read_text())[-1])

    def pids(self) -> list[int]:
        return [self.pid(rank) for rank in range(self.processes)]

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pid(rank), number)

    def cuts(self) -> list[int]:
        """The minibatches of the checkpoints that are there, whole or not."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.out.glob("checkpoint/step-*"))

    def end(self) -> tuple[int, str]:
        """Exit code, and what it said on standard error."""
        _, said = self.launcher.communicate(timeout=PATIENCE)
        return self.launcher.returncode, said


def with_settings(options: Sequence[str]) -> list[str]:
    """The options, and of SETTINGS those that they do not say otherwise."""
    given = {option.partition("=")[0] for option in options}
    return [*(setting for setting in SETTINGS if setting.partition("=")[0] not in given), *options]


def alive(pid: int) -> bool:
    """Whether there is such a process, and not only its entry for a parent who has not asked."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def reference(folder: Path, *options: str, epochs: int) -> Path:
    """The weights that one process arrives at, undisturbed."""
    out = folder / "reference"
    train(settings_from([*with_settings(options), f"--epochs={epochs}", f"--out={out}"]))
    return out


def same(one: Path, other: Path) -> bool:
    """Whether two runs have the same weights, to the bit, and the same course of losses and accuracies."""
    first, second = (load_file(out / "model.safetensors") for out in (one, other))
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return equal and course(one) == course(other)


def course(out: Path) -> list[tuple]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(record["epoch"], record["train_loss"], record["test_accuracy"]) for record in records]


@contextlib.contextmanager
def small_disk(folder: Path, *, size: str) -> Iterator[Path]:
    """A file system of so many bytes. PermissionError: this machine mounts nothing."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        raise PermissionError(mounted.stderr.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Two network namespaces with a cable: what stands before a command on each. PermissionError: not allowed here."""
    script = """
        ip netns add bllA && ip netns add bllB
        ip link add bllA netns bllA type veth peer name bllB netns bllB
        for m in A B; do ip -n bll$m link set lo up; ip -n bll$m link set bll$m up; done
        ip -n bllA address add 10.78.0.1/24 dev bllA && ip -n bllB address add 10.78.0.2/24 dev bllB
    """
    remove = "ip netns del bllA; ip netns del bllB"
    subprocess.run(["sh", "-c", remove], capture_output=True)
    made = subprocess.run(["sh", "-ec", script], capture_output=True, text=True)
    if made.returncode:
        raise PermissionError(made.stderr.strip())
    try:
        yield ("ip", "netns", "exec", "bllA"), ("ip", "netns", "exec", "bllB")
    finally:
        subprocess.run(["sh", "-c", remove], capture_output=True)


def kill_one_after_another(folder: Path, whole: Path, *options: str, epochs: int, kills: int, processes: int) -> str:
    """kill -9 of each rank in turn, at a random moment."""
    draw, seconds, killed = random.Random(0), [], 0.0
    share = epochs * STEPS / (2 * kills)  # of the run, so that it is not over before the last kill
    run = Launched(folder / "kills", *options, f"--epochs={epochs}", f"--restarts={kills}", processes=processes)
    for kill in range(kills):
        run.wait_until_training()
        if kill:
            seconds.append(time.monotonic() - killed)
        goal = max(run.cuts(), default=0) + draw.uniform(0, share)
        run.until(lambda goal=goal: max(run.cuts(), default=0) >= goal)
        time.sleep(draw.uniform(0, 0.1))
        run.signal(kill % processes, signal.SIGKILL)
        killed = time.monotonic()
    code, said = run.end()
    assert code == 0, said
    assert said.count("was killed by SIGKILL") == kills, said
    assert same(run.out, whole)
    recovery = f"; training again after {min(seconds):.1f} to {max(seconds):.1f} s" if seconds else ""
    return f"{kills} times, all recovered{recovery}; weights of the undisturbed run"


def kill_all(folder: Path, whole: Path, *, epochs: int, processes: int) -> str:
    """kill -9 of everything, the launcher too; then --resume."""
    run = Launched(folder / "all", f"--epochs={epochs}", processes=processes)
    run.wait_until_training()
    run.until(lambda: len(run.cuts()) > 1)
    pids = run.pids()
    for pid in (run.launcher.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    run.launcher.communicate()
    again = Launched(run.out, f"--epochs={epochs}", "--resume", processes=processes)
    code, said = again.end()
    assert code == 0, said
    assert same(run.out, whole)
    return "`--resume` goes on; weights of the undisturbed run"


def kill_launcher(folder: Path, whole: Path, *, epochs: int, processes: int) -> str:
    """kill -9 of the launcher alone."""
    run = Launched(folder / "launcher", f"--epochs={epochs}", processes=processes)
    run.wait_until_training()
    pids = run.pids()
    run.launcher.kill()
    run.launcher.communicate()
    end = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(alive, pids))
    again = Launched(run.out, f"--epochs={epochs}", "--resume", processes=processes)
    assert again.end()[0] == 0
    assert same(run.out, whole)
    return "no process outlives it; `--resume` goes on; weights of the undisturbed run"


def kill_during_checkpoint(folder: Path, whole: Path, *, epochs: int, kills: int, processes: int) -> str:
    """kill -9 while a checkpoint is half-written."""
    run = Launched(folder / "half", f"--epochs={epochs}", f"--restarts={kills}", processes=processes)

    def half() -> bool:
        parts = list(run.out.glob("checkpoint/step-*/block-*"))
        return any(not (part / "index.json").exists() for part in parts)

    for kill in range(kills):
        run.wait_until_training()
        time.sleep(0.1)
        run.until(half, every=0.002)
        run.signal(kill % processes, signal.SIGKILL)
    code, said = run.end()
    assert code == 0, said
    assert same(run.out, whole)
    return f"{kills} times; the half one is not read; weights of the undisturbed run"


def fill_disk(folder: Path, whole: Path, *, epochs: int, processes: int) -> str:
    """The disk is full while checkpoints are saved; later there is room again."""
    with small_disk(folder / "disk", size="32m") as disk:
        run = Launched(disk / "run", f"--epochs={epochs}", processes=processes)
        run.wait_until_training()
        run.until(lambda: len(run.cuts()) > 1)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(1.0)
        filler.unlink()
        code, said = run.end()
        assert code == 0, said
        logs = said + "".join(path.read_text() for path in run.out.glob("logs/*.log"))
        assert "No space left on device" in logs, logs
        assert same(run.out, whole)
    return "a warning, and no checkpoint as long as it lasts; weights of the undisturbed run"


def keep_disk_full(folder: Path, whole: Path, *, epochs: int, processes: int) -> str:
    """The disk is full and stays so: a clear error, and the last whole checkpoint is still there."""
    with small_disk(folder / "full", size="32m") as disk:
        run = Launched(disk / "run", f"--epochs={epochs}", "--restarts=0", processes=processes)
        run.wait_until_training()
        run.until(lambda: len(run.cuts()) > 1)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        code, said = run.end()
        assert code == 1, said
        last = said.strip().splitlines()[-1]
        assert "keeps the checkpoint of" in last, said
        filler.unlink()
        again = Launched(run.out, f"--epochs={epochs}", "--resume", processes=processes)
        assert again.end()[0] == 0
        assert same(run.out, whole)
    return "exit code 1, one line that names cause and checkpoint; with room again, `--resume` leads to those weights"


def slow_down(folder: Path, whole: Path, *, epochs: int, processes: int) -> str:
    """A rank is three times as slow: it is stopped for two thirds of the time."""
    run = Launched(folder / "slow", f"--epochs={epochs}", processes=processes)
    run.wait_until_training()
    pid = run.pid(1)
    while run.launcher.poll() is None and alive(pid):
        for number, seconds in ((signal.SIGSTOP, 0.04), (signal.SIGCONT, 0.02)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(seconds)
    code, said = run.end()
    assert code == 0, said
    assert "; restart" not in said
    assert same(run.out, whole)
    return "the others wait for it, no restart; weights of the undisturbed run"


def stop(folder: Path, whole: Path, *, epochs: int, timeout: float, processes: int) -> str:
    """A rank stops for good: it computes nothing, reads nothing, and does not end."""
    run = Launched(folder / "stopped", f"--epochs={epochs}", f"--timeout={timeout}", processes=processes)
    run.wait_until_training()
    run.until(run.cuts)
    begin = time.monotonic()
    run.signal(1, signal.SIGSTOP)
    run.wait_until_training()
    seconds = time.monotonic() - begin
    code, said = run.end()
    assert code == 0, said
    assert "restart 1" in said
    assert same(run.out, whole)
    return (
        f"noticed after `--timeout` {timeout:g} s; training again {seconds:.1f} s after the stop; "
        "weights of the undisturbed run"
    )


def interrupt(folder: Path, whole: Path, *, epochs: int, processes: int) -> str:
    """Ctrl-C."""
    run = Launched(folder / "interrupted", f"--epochs={epochs}", processes=processes)
    run.wait_until_training()
    run.until(lambda: len(run.cuts()) > 1)
    pids, begin = run.pids(), time.monotonic()
    run.launcher.send_signal(signal.SIGINT)
    code, said = run.end()
    seconds = time.monotonic() - begin
    assert code == 130, (code, said)
    assert "keeps the checkpoint of" in said, said
    assert not any(map(alive, pids))
    again = Launched(run.out, f"--epochs={epochs}", "--resume", processes=processes)
    assert again.end()[0] == 0
    assert same(run.out, whole)
    return (
        f"all processes gone after {seconds:.1f} s, exit code 130; `--resume` goes on; weights of the undisturbed run"
    )


def change_processes(folder: Path, whole: Path, *, epochs: int, numbers: tuple[int, ...]) -> str:
    """Interrupted and resumed with other numbers of processes, and at last by `bll train` in one."""
    out = folder / "elastic"
    for number in numbers:
        run = Launched(out, f"--epochs={epochs}", *(["--resume"] if out.exists() else []), processes=number)
        before = max(run.cuts(), default=0)
        run.wait_until_training()
        run.until(lambda run=run, before=before: max(run.cuts(), default=0) > before + 16)
        run.launcher.send_signal(signal.SIGINT)
        assert run.end()[0] == 130
    train(settings_from([*SETTINGS, f"--epochs={epochs}", f"--out={out}", "--resume"]))
    assert same(out, whole)
    return f"{' to '.join(map(str, numbers))} processes to `bll train`; weights of the undisturbed run"


def cut_cable(folder: Path, whole: Path, *, epochs: int, seconds: float) -> str:
    """Two machines, here network namespaces, whose link is down for a while."""
    with two_machines() as (here, there):
        rendezvous = ("--nnodes=2", "--rdzv-endpoint=10.78.0.1:29400", f"--epochs={epochs}")
        out = folder / "cable"
        first = Launched(out, *rendezvous, "--interface=bllA", processes=1, before=here)
        second = Launched(out, *rendezvous, "--interface=bllB", processes=1, before=there)
        first.processes = 2  # ranks 0 and 1 write their logs into the same folder
        first.wait_until_training()
        first.until(first.cuts)
        subprocess.run([*here, "ip", "link", "set", "bllA", "down"], check=True)
        before = first.cuts()
        time.sleep(seconds)
        assert first.launcher.poll() is None, "it is still training"
        assert max(first.cuts(), default=0) <= max(before, default=0) + STEPS, "nothing went through"
        subprocess.run([*here, "ip", "link", "set", "bllA", "up"], check=True)
        for run in (first, second):
            code, said = run.end()
            assert code == 0, said
            assert "; restart" not in said
        assert same(out, whole)
    return f"down for {seconds:g} s: both wait and go on, no restart; weights of the undisturbed run"


def lose_a_machine(folder: Path, whole: Path, *, epochs: int) -> str:
    """Two machines, one of which is lost for good: kill -9 of all that runs there."""
    with two_machines() as (here, there):
        rendezvous = ("--nnodes=1:2", "--rdzv-endpoint=10.78.0.1:29400", f"--epochs={epochs}")
        out = folder / "lost"
        first = Launched(out, *rendezvous, "--interface=bllA", processes=1, before=here)
        second = Launched(out, *rendezvous, "--interface=bllB", processes=1, before=there)
        first.processes = 2
        first.wait_until_training()
        first.until(lambda: len(first.cuts()) > 1)
        begin = time.monotonic()
        second.launcher.kill()
        second.launcher.communicate()
        first.processes = 1
        first.begun = 1
        first.wait_until_training()
        seconds = time.monotonic() - begin
        code, said = first.end()
        assert code == 0, said
        assert same(out, whole)
    return f"the other goes on alone after {seconds:.0f} s with all blocks; weights of the undisturbed run"


def main() -> None:
    """Everything, one after another; a failure does not keep the next from being tried."""
    with tempfile.TemporaryDirectory() as name:
        folder, epochs = Path(name), 12
        whole, long = reference(folder, epochs=epochs), folder / "long"
        long.mkdir()
        endless = reference(long, epochs=60)
        scenarios: list[Callable[[], str]] = [
            lambda: kill_one_after_another(folder, endless, epochs=60, kills=20, processes=4),
            lambda: kill_during_checkpoint(folder, endless, epochs=60, kills=5, processes=4),
            lambda: kill_all(folder, whole, epochs=epochs, processes=4),
            lambda: kill_launcher(folder, whole, epochs=epochs, processes=4),
            lambda: fill_disk(folder, whole, epochs=epochs, processes=4),
            lambda: keep_disk_full(folder, whole, epochs=epochs, processes=4),
            lambda: slow_down(folder, whole, epochs=epochs, processes=4),
            lambda: stop(folder, whole, epochs=epochs, timeout=5, processes=4),
            lambda: interrupt(folder, whole, epochs=epochs, processes=4),
            lambda: change_processes(folder, whole, epochs=epochs, numbers=(4, 2, 3, 1)),
            lambda: cut_cable(folder, whole, epochs=epochs, seconds=5),
            lambda: lose_a_machine(folder, endless, epochs=60),
        ]
        for scenario in scenarios:
            begin = time.monotonic()
            name = scenario.__code__.co_names[0]
            what = (globals()[name].__doc__ or "").strip().rstrip(".")
            try:
                result = scenario()
            except Exception as error:  # whatever it is, the next one is tried
                result = f"FAILED: {error!r}"
                for run in Launched.all:
                    run.launcher.kill()
            print(f"| {what} | {result} | {time.monotonic() - begin:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
