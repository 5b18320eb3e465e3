"""Processes that watch each other, without JAX: one is lost, fails or ends well, and what the others do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from experiment import connections
from experiment.connections import LOOPBACK, Link, carry, dial, free_port, listen, port_of
from experiment.errors import UserError
from experiment.files.checkpoints import MANIFEST, Checkpoints
from experiment.processes import meet
from experiment.run.outcome import after_loss, where_saved
from tests.helpers.checkpoint_trees import RUN, make_tree

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 60  # a hang becomes a failure

# Meets the others, then goes on as the test says; `mine.index` is the number of this process.
PROCESS = """
import os, sys, time
from experiment import peers, processes
peers.BEAT_SECONDS, peers.SILENCE_SECONDS, peers.COLLECT_SECONDS, peers.EXCUSE_SECONDS = 0.2, 1.5, 0.3, 1.0
mine = processes.meet()
mine.joined()
others = mine.count - 1 if mine.index == 0 else 1
while os.environ["WAITS"] == "1" and sum(peer.joined for peer in mine._others()) < others:
    time.sleep(0.01)
print("met", flush=True)
sys.stdin.readline()
"""
SLEEP = "time.sleep(120)"


def launch(
    then: str = SLEEP,
    count: int = 3,
    started: tuple[int, ...] = (0, 1, 2),
    waits: bool = True,
    **variables: str,
) -> dict[int, subprocess.Popen[str]]:
    """Start processes; return them once they have met."""
    shared = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    shared |= {"WAITS": str(int(waits))} | variables
    processes = {
        index: subprocess.Popen(
            [sys.executable, "-c", PROCESS + then],
            cwd=ROOT,
            env=os.environ | shared | {"JAX_PROCESS_ID": str(index)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in started
    }
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n"
    for process in processes.values():
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # one that has ended by now
            process.stdin.write("\n")
            process.stdin.flush()
    return processes


def ends(processes: dict[int, subprocess.Popen[str]]) -> dict[int, tuple[int, str]]:
    """The exit status of each and what it printed on stderr."""
    results = {}
    try:
        for index, process in processes.items():
            _, error = process.communicate(timeout=LIMIT_SECONDS)
            results[index] = (process.returncode, error)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return results


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named_by_all_others(lost, number):
    """Killed, its connection closes; stopped, like a host that vanishes, it is silent."""
    processes = launch()
    processes[lost].send_signal(number)
    survivors = {index: process for index, process in processes.items() if index != lost}
    try:
        results = ends(survivors)
    finally:
        processes[lost].kill()
        processes[lost].communicate()
    silence = "" if number == signal.SIGKILL else " after 1.5 s of silence"
    name = f"process {lost} of 3 (pid {processes[lost].pid} on {socket.gethostname()})"
    line = f"train.py: error: {name} was lost{silence}; start the run again\n"
    assert results == dict.fromkeys(survivors, (1, line))


def test_processes_lost_together_are_named_together():
    processes = launch()
    processes[1].kill()
    processes[2].kill()
    (status, error) = ends(processes)[0]
    host = socket.gethostname()
    names = " and ".join(f"process {index} of 3 (pid {processes[index].pid} on {host})" for index in (1, 2))
    assert (status, error) == (1, f"train.py: error: {names} were lost; start the run again\n")


def test_an_error_that_follows_from_a_loss_is_not_reported_itself():
    """Of two processes that wait, as after a collective operation that failed, none prints a second line."""
    processes = launch("processes.fail(30); print('an error', file=sys.stderr); processes.leave(1)")
    processes[1].kill()
    results = ends(processes)
    for index in (0, 2):
        assert results[index][0] == 1
        assert results[index][1].count("\n") == 1
        assert "process 1 of 3" in results[index][1]


@pytest.mark.parametrize("failed", [0, 1])
def test_a_process_that_fails_reports_it_and_the_others_name_it(failed):
    then = f"""
if mine.index == {failed}:
    processes.fail()
    print("no space left", file=sys.stderr)
    processes.leave(2)
{SLEEP}
"""
    results = ends(launch(then))
    assert results.pop(failed) == (2, "no space left\n")
    for status, error in results.values():
        assert status == 1
        assert f"process {failed} of 3" in error
        assert "failed with an error of its own" in error
        assert error.count("\n") == 1


def test_a_process_that_aborts_because_of_a_loss_names_it():
    """As gloo does, in C++ that does not hold Python's lock."""
    then = f"""
import ctypes
processes.delay_abort()
if mine.index == 1:
    time.sleep(0.2)
    ctypes.CDLL(None).abort()
{SLEEP}
"""
    processes = launch(then)
    processes[2].kill()
    results = ends(processes)
    for index in (0, 1):
        assert results[index][0] == 1
        assert "process 2 of 3" in results[index][1]


def test_processes_that_all_fail_report_it_each():
    then = "processes.fail(); print('a mistake', file=sys.stderr); processes.leave(2)"
    assert ends(launch(then)) == dict.fromkeys(range(3), (2, "a mistake\n"))


@pytest.mark.parametrize("then", ["processes.done()", ""])
def test_processes_that_end_one_after_another_raise_no_alarm(then):
    results = ends(launch(f"time.sleep(0.4 * mine.index)\n{then}"))
    assert results == dict.fromkeys(range(3), (0, ""))


def test_a_process_that_dies_after_the_end_of_the_run_is_lost_too():
    """The others still wait for it: JAX leaves together."""
    processes = launch(f"processes.done()\nprint('done', flush=True)\n{SLEEP}")
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"
    processes[2].kill()
    results = ends(processes)
    assert results[0][0] == results[1][0] == 1
    assert "process 2 of 3" in results[1][1]


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ((0, 1), "process 2 of 3 did not start within 1 s"),
        ((1, 2), "process 0 of 3 did not answer at localhost:"),
    ],
)
def test_a_process_that_never_starts_is_named(started, words):
    results = ends(launch(started=started, waits=False, THREEWAY_JOIN_SECONDS="1"))
    for status, error in results.values():
        assert status == 1
        assert words in error
        assert error.count("\n") == 1


def test_another_number_of_processes_is_refused():
    address = f"localhost:{free_port()}"
    first = launch(started=(0,), count=2, waits=False, JAX_COORDINATOR_ADDRESS=address)
    try:
        results = ends(launch(started=(1,), count=3, waits=False, JAX_COORDINATOR_ADDRESS=address))
    finally:
        first[0].kill()
        first[0].communicate()
    line = "train.py: error: process 0 was started as one of 2, this one as one of 3\n"
    assert results == {1: (1, line)}


def test_the_port_of_another_program_is_refused(monkeypatch):
    with listen("", 0) as taken:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{port_of(taken)}")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(UserError, match="--distributed: cannot listen at port"):
            meet()


def test_the_line_of_a_loss_names_the_newest_whole_checkpoint(tmp_path):
    assert after_loss(None, {}) == after_loss(tmp_path, {}) == "nothing is saved yet; start the run again"
    checkpoints = Checkpoints(tmp_path / "checkpoints", 5)
    assert where_saved(tmp_path, checkpoints) == {}
    (tmp_path / "config.json").write_text("{}")
    how = f"continue with python train.py --resume --run-dir {tmp_path}, with --distributed if several"
    assert after_loss(tmp_path, {}).startswith(f"no checkpoint yet; {how}")
    for step in (1, 2, 3):
        checkpoints.save(step, make_tree(step), RUN)
    assert "newest whole checkpoint: 3; " in after_loss(tmp_path, {}, checkpoints)  # once it is saved
    checkpoints.close()
    (tmp_path / "checkpoints" / "3" / MANIFEST).unlink()
    news = where_saved(tmp_path, checkpoints)
    assert news == {"folder": str(tmp_path), "newest": 3}
    for line in (after_loss(tmp_path, {}), after_loss(None, news)):
        assert line.startswith(f"newest whole checkpoint: 2; {how}")
    elsewhere = after_loss(None, {"folder": "/not/on/this/host", "newest": 7})
    assert elsewhere.startswith("newest whole checkpoint: 7; continue with python train.py --resume")


def test_a_connection_is_passed_on_and_held():
    """The client behind it sees nothing when the other side has gone, unless it is not held."""
    for hold in (True, False):
        with listen(LOOPBACK, 0) as server:
            far = dial((LOOPBACK, port_of(server)), 1)
            service, _ = server.accept()
        near, client = socket.socketpair()
        carry(near, far, hold=hold)
        client.sendall(b"question")
        assert service.recv(100) == b"question"
        service.sendall(b"answer")
        assert client.recv(100) == b"answer"
        service.close()
        client.settimeout(0.3)
        if hold:
            with pytest.raises(TimeoutError):
                client.recv(100)
        else:
            assert client.recv(100) == b""
        client.close()


def test_a_failed_accept_does_not_end_a_door():
    """As where no descriptor is free for a moment."""
    accepted, faults = threading.Event(), [OSError(24, "Too many open files")]

    class Listener:
        def accept(self):
            if faults:
                raise faults.pop()
            if accepted.is_set():
                threading.Event().wait()
            accepted.set()
            return mock.Mock(), None

    handled = threading.Event()
    listener: Any = Listener()
    connections.serve(listener, lambda connection: handled.set())
    assert handled.wait(10)


def test_dialing_waits_for_a_listener():
    with listen(LOOPBACK, 0) as taken:
        address = (LOOPBACK, port_of(taken))
    servers = []
    timer = threading.Timer(0.5, lambda: servers.append(listen(*address)))
    timer.start()
    dial(address, 20).close()
    timer.join()
    servers[0].close()
    with pytest.raises(ConnectionRefusedError):
        dial(address, 0.1)


@pytest.mark.parametrize("content", [b"GET / HTTP/1.1\n", b"[1]\n", b"x" * 70_000])
def test_what_is_no_message_is_an_error(content):
    ours, theirs = socket.socketpair()
    link = Link(ours)
    threading.Thread(target=theirs.sendall, args=(content,), daemon=True).start()
    with pytest.raises(ValueError):  # noqa: PT011 - json's, or ours
        link.receive()
    ours.close()


def test_messages_arrive_one_by_one_and_leave_what_follows():
    ours, theirs = (Link(end) for end in socket.socketpair())
    theirs.send({"a": 1})
    theirs.send({"b": [2]})
    connection, _ = theirs.detach()
    connection.sendall(b"PRI * HTTP/2.0")
    assert ours.receive() == {"a": 1}
    assert ours.receive() == {"b": [2]}
    assert ours.receive() is None
    assert ours.detach()[1] == b"PRI * HTTP/2.0"
    connection.close()
    ours.close()
