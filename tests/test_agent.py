"""The launcher's own part, with processes that are quick to start: what it says, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faults
import pytest

from blocklocal.lab.distributed import elastic_agent, process_group, workers
from blocklocal.lab.distributed.elastic_agent import ElasticAgent, describe_failure
from blocklocal.lab.distributed.rank_log import REPORT
from blocklocal.lab.distributed.rendezvous import Alone, Endpoint, within
from blocklocal.lab.distributed.workers import Children
from blocklocal.lab.runs.folder import Run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic_agent, "POLL", 0.01)
    monkeypatch.setattr(workers, "GRACE", 0.3)


class Launch:
    """A program in each of several processes, as `bll launch` would have it. The program has `rank` and `again`."""

    def __init__(self, folder: Path, program: str, *, processes: int = 2, restarts: int = 1) -> None:
        start = "import json, os, signal, sys, time\nrank, again = int(os.environ['RANK']), sys.argv[1]\n"
        start += f"again = os.environ['BLOCKLOCAL_LAUNCHED'] == 'again'\nfolder = {str(folder)!r}\n"
        start += "open(f'{folder}/pid{rank}', 'w').write(str(os.getpid()))\n"
        self.folder, self.processes = folder, processes
        (folder / "reports").mkdir()
        self.agent = ElasticAgent(
            [sys.executable, "-S", "-c", start + program, "-"],
            processes=processes,
            rendezvous=Alone(processes=processes, folder=folder),
            restarts=restarts,
            run=Run(folder / "run"),
            folder=folder / "reports",
        )

    def alive(self) -> list[int]:
        pids = [int((self.folder / f"pid{rank}").read_text() or 0) for rank in range(self.processes)]
        return [rank for rank, pid in enumerate(pids) if faults.alive(pid)]


def report(message: str) -> str:
    return f"open(os.environ[{REPORT!r}], 'w').write(json.dumps({{'message': {message!r}}}))\n"


def test_a_failure_is_told_and_all_start_again(tmp_path, capsys):
    launch = Launch(tmp_path, f"if not again and rank == 1:\n {report('OSError: no luck')} sys.exit(1)\nelse: rank / 1")
    assert launch.agent.run() is None
    assert capsys.readouterr().err == "bll: process 1 failed: OSError: no luck; restart 1 of 1\n"


def test_what_fails_for_good_is_given_back(tmp_path, capsys):
    launch = Launch(tmp_path, "sys.exit(7) if rank == 1 else time.sleep(60)", restarts=2)
    failure = launch.agent.run()
    assert failure is not None
    assert (failure.rank, failure.code, failure.message) == (1, 7, "exit code 7")
    assert capsys.readouterr().err.count("; restart") == 2
    assert launch.alive() == []


def test_unusable_settings_start_nothing_again(tmp_path, capsys):
    failure = Launch(tmp_path, f"{report('no such data')}sys.exit(2)", restarts=5).agent.run()
    assert failure is not None
    assert (failure.code, failure.message) == (2, "no such data")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "stubborn", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "os.kill(os.getpid(), signal.SIGSTOP)"]
)
def test_a_process_that_does_not_end_is_killed(tmp_path, stubborn):
    launch = Launch(tmp_path, f"if rank: time.sleep(0.3); sys.exit(1)\n{stubborn}\ntime.sleep(60)", restarts=0)
    failure = launch.agent.run()
    assert failure is not None
    assert failure.rank == 1
    assert launch.alive() == []


def test_what_a_process_has_started_goes_with_it(tmp_path):
    program = "if rank: time.sleep(0.3); sys.exit(1)\nfork = os.fork()\n"
    program += "if fork: open(f'{folder}/fork', 'w').write(str(fork))\n"
    launch = Launch(tmp_path, program + "time.sleep(60)", restarts=0)
    assert launch.agent.run() is not None
    end = time.monotonic() + 5
    while faults.alive(fork := int((tmp_path / "fork").read_text())) and time.monotonic() < end:
        time.sleep(0.01)
    assert not faults.alive(fork)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, elastic_agent.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_all(tmp_path, number, error):
    launch = Launch(tmp_path, "time.sleep(60)")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where tests run unattended

    def send() -> None:
        while not all((tmp_path / f"pid{rank}").exists() for rank in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    with pytest.raises(error):
        launch.agent.run()
    sender.join()
    signal.signal(signal.SIGINT, before)
    assert launch.alive() == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_was_ignored_still_is(tmp_path):
    """As by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert Launch(tmp_path, "os.kill(os.getppid(), signal.SIGHUP)").agent.run() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_cause_is_told_before_what_follows_from_it(tmp_path, monkeypatch):
    """Rank 2 is killed, rank 1 notices and says so, rank 0 goes on; then the launcher looks."""
    monkeypatch.setattr(elastic_agent, "POLL", 2.0)
    program = f"""
if rank == 0: signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)
if rank == 2: os.kill(os.getpid(), 9)
while not os.path.exists(folder + "/pid2") or not (pid := open(folder + "/pid2").read()): time.sleep(0.01)
while "Z" not in open("/proc/" + pid + "/stat").read().split()[2]: time.sleep(0.01)
{report("connection closed")}sys.exit(1)
"""
    failure = Launch(tmp_path, program, processes=3, restarts=0).agent.run()
    assert failure is not None
    assert describe_failure(failure, Run(tmp_path / "run")) == "process 2 was killed by SIGKILL"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"timestamp": 1}'])
def test_a_report_that_is_none_is_passed_over(tmp_path, content):
    program = f"open(os.environ[{REPORT!r}], 'w').write({content!r}); sys.exit(3)"
    failure = Launch(tmp_path, program, processes=1, restarts=0).agent.run()
    assert failure is not None
    assert failure.message == "exit code 3"


def test_a_program_that_cannot_be_started_leaves_nothing(tmp_path):
    started = Children(
        ["/does/not/exist"], ranks=range(2), size=2, environment={}, launched="first", folder=tmp_path / "x"
    )
    with pytest.raises(OSError, match="/does/not/exist"), started:
        pass


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def test_machines_meet_count_their_processes_and_leave_together():
    endpoint = f"127.0.0.1:{free_port()}"

    def machine(own: int) -> tuple[int, int, str, bool, bool]:
        rendezvous = Endpoint(endpoint, processes=own, machines=(2, 2), address="127.0.0.1", hosts=own == 3)
        place = rendezvous.join()
        changed = rendezvous.changed()
        alone = own == 2 and rendezvous.done()
        end = time.monotonic() + 30
        while not rendezvous.done() and time.monotonic() < end:
            time.sleep(0.01)
        return place.first, place.size, place.environment["MASTER_PORT"], changed, alone

    with ThreadPoolExecutor(2) as both:
        three, two = both.map(machine, (3, 2))
    assert {(three[0], 3), (two[0], 2)} in ({(0, 3), (3, 2)}, {(2, 3), (0, 2)})
    assert three[1] == two[1] == 5
    assert three[2] == two[2]
    assert not any((*three[3:], *two[3:-1]))


def test_a_run_that_another_machine_has_ended(tmp_path):
    endpoint = f"127.0.0.1:{free_port()}"
    first = Endpoint(endpoint, processes=1, machines=(1, 2), address="127.0.0.1", hosts=True)
    second = Endpoint(endpoint, processes=1, machines=(1, 2), address="127.0.0.1", hosts=False)
    first.close()
    with pytest.raises(OSError, match="another machine has ended the run"):
        second.join()


def test_a_call_that_does_not_return_is_given_up():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"has not answered for 0\.1 s"):
        within(0.1, never.wait)
    never.set()
    assert within(100, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(100, lambda: 1 / 0)


JOIN = """
import sys
from datetime import timedelta
from blocklocal.lab.distributed import process_group
process_group.START = timedelta(seconds=float(sys.argv[1]))
with process_group.joined(device="cpu", timeout=0.5) as joined:
    joined.barrier()
"""


def joining(folder: Path, rank: int, *, start: float, **environment: str) -> subprocess.Popen[str]:
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    place = {process_group.STORE: str(folder / "store"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return subprocess.Popen(
        [sys.executable, "-c", JOIN, str(start)],
        env={**os.environ, **own, **place, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_that_never_comes_is_not_waited_for_for_ever(tmp_path):
    alone = joining(tmp_path, 0, start=1)
    _, said = alone.communicate(timeout=faults.PATIENCE)
    assert alone.returncode == 1
    assert said == "bll: rank 0: OSError: the 2 processes did not all start within 1 s\n"


def test_a_process_may_start_later_than_others_have_patience(tmp_path):
    first = joining(tmp_path, 0, start=100)
    while not (tmp_path / "store").exists() and first.poll() is None:
        time.sleep(0.01)
    time.sleep(1)
    second = joining(tmp_path, 1, start=100)
    assert [process.communicate(timeout=faults.PATIENCE)[1] for process in (first, second)] == ["", ""]
    assert first.returncode == second.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot do it")
def test_a_process_whose_launcher_is_gone_ends(tmp_path):
    orphan = joining(tmp_path, 0, start=100, **{process_group.PARENT: "1"})
    orphan.communicate(timeout=faults.PATIENCE)
    assert orphan.returncode == 1
    assert not (tmp_path / "store").exists()
