"""Watch over the processes of a `--distributed` run: if one dies, the others report it and end.

A process that has lost another one waits in a collective operation, which nothing can interrupt. So threads
of our own watch. Every process connects to process 0 and holds the connection open, with a message every few
seconds. A connection that closes without a farewell, or is silent for too long, means that a process was
lost. Process 0 then sends the others a line, which all print before they end with exit status 1. If process 0
is lost, each of the others sees it.

Process 0 listens at the coordinator's port. JAX's own connections come in there too, and are passed on to its
service (see `connections`).
"""

import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from experiment import connections, program
from experiment.connections import LOOPBACK, Address, Link, Message
from experiment.errors import UserError

BEAT_SECONDS = 5.0  # between messages
SILENCE_SECONDS = 30.0  # after which a process counts as lost, once JAX has joined all
COLLECT_SECONDS = 0.5  # after a loss, for more of them: the processes of a host die together
ADVICE_SECONDS = 15.0  # for reading checkpoints; with the three above, a loss is reported within a minute
JOIN_SECONDS = 40.0  # within which all must have started
EXCUSE_SECONDS = 10.0  # for this process to end by itself after another one has
PART_SECONDS = 10.0  # for the others to close their connections, and for a stranger to say hello
PATIENCE_SECONDS = SILENCE_SECONDS + BEAT_SECONDS  # for the news of a loss that explains an error


@dataclass
class Peer:
    """Another process.

    Attributes:
        index: its number, from 0.
        link: the connection to it.
        name: its process id and host.
        heard: when its last message came.
        joined: True once JAX has joined it.
        farewell: "done" or "failed" once it has announced its end.
        gone: set when its connection has ended.
    """

    index: int
    link: Link
    name: str = ""
    heard: float = field(default_factory=time.monotonic)
    joined: bool = False
    farewell: str | None = None
    gone: threading.Event = field(default_factory=threading.Event)


class Peers:
    """The other processes of a run, watched from the constructor on.

    Args:
        address: host and port of process 0, as every process was given it.
        index: the number of this process.
        count: the number of processes.
        bind: where process 0 listens, if not at the port of `address` on every address of its machine.
        join_seconds: within which all processes must have started.

    Attributes:
        service: the address at which JAX's client of this process finds its service, which process 0 has.
        report: prints the last line of a process that ends because of another one.
        advice: returns the end of that line, what is saved and how to go on, from the news of process 0.
        news: returns what process 0 has to tell the others, with every message.
        step: returns the last step, or None before training.
        ended: "done" or "failed" once this process has announced its end.

    Raises:
        UserError: process 0 cannot listen at its port.
    """

    def __init__(
        self,
        address: Address,
        index: int,
        count: int,
        *,
        bind: Address | None = None,
        join_seconds: float = JOIN_SECONDS,
    ) -> None:
        self.index, self.count, self._address = index, count, address
        self.report: Callable[[str], None] = _print
        self.advice: Callable[[Message], str] = lambda news: "start the run again"
        self.news: Callable[[], Message] = dict
        self.step: Callable[[], int | None] = lambda: None
        self.ended: str | None = None
        self._name = f"pid {os.getpid()} on {socket.gethostname()}"
        self._joined = False
        self._latest: Message = {}  # news
        self._peers: dict[int, Peer] = {}
        self._fates: dict[int, str] = {}  # by index: what became of processes that did not end well
        self._verdict: str | None = None  # the last line, as process 0 decides it
        self._alarm, self._grace = threading.Event(), 0.0
        self._left = threading.Event()  # JAX, as all others have
        self._ending, self._concluding = threading.Lock(), threading.Lock()  # one line, and only one
        self._join_seconds, self._late = join_seconds, time.monotonic() + join_seconds
        port = self._open_door(bind or ("", address[1])) if index == 0 else self._open_relay()
        self.service = f"{LOOPBACK}:{port}"
        _start(self._await_peers if index == 0 else self._visit)
        _start(self._await_alarm)

    def joined(self) -> None:
        """Note that JAX has joined all processes: from now on a silent one counts as lost."""
        self._joined = True
        self._send(self._status())

    def fail(self, patience: float = 0.0) -> None:
        """Announce that this process fails for a reason of its own, which it reports itself.

        An error may follow from the loss of another process. With `patience`, wait that many seconds for news
        of one; if there are any, this does not return: the process ends with the line that names the loss.
        """
        if patience and self._alarm.wait(patience):
            threading.Event().wait()
        with self._ending:
            self._announce("failed")

    def done(self) -> None:
        """Announce that this process has come to the end of the run."""
        step = self.step()
        self.step = lambda: step  # holds no state of the run any more
        self._announce("done")

    def part(self) -> None:
        """Leave at the exit of the interpreter, after JAX; process 0 last, as it passes JAX's messages on."""
        self._left.set()
        self._announce("done")
        deadline = time.monotonic() + PART_SECONDS
        for peer in self._others() if self.index == 0 else []:
            peer.gone.wait(max(deadline - time.monotonic(), 0.0))

    def _status(self) -> Message:
        return {"name": self._name, "joined": self._joined, "news": self.news()}

    def _announce(self, how: str) -> None:
        if self.ended is None:
            self.ended = how
            self._send({"farewell": how})

    def _send(self, message: Message) -> None:
        for peer in self._others():
            with suppress(OSError):
                peer.link.send(message)

    def _others(self) -> list[Peer]:
        """The processes that are connected to this one."""
        return [peer for peer in list(self._peers.values()) if not peer.gone.is_set()]

    # Process 0

    def _open_door(self, bind: Address) -> int:
        """Listen for the other processes; return a free port, for JAX's service."""
        service = connections.free_port()
        try:
            listener = connections.listen(*bind)
        except OSError as error:
            raise UserError(
                f"--distributed: cannot listen at port {bind[1]} ({error.strerror or error}); name another "
                "one in JAX_COORDINATOR_ADDRESS"
            ) from None
        connections.serve(listener, lambda connection: self._welcome(Link(connection), service))
        return service

    def _welcome(self, link: Link, service: int) -> None:
        """Learn who has connected: watch a process, or pass a connection of JAX on to its service."""
        hello, deadline = None, time.monotonic() + PART_SECONDS
        with suppress(OSError, ValueError):
            while hello is None and time.monotonic() < deadline:
                hello = link.receive()
        if hello is None:
            link.close()
        elif hello.get("relay"):
            with suppress(OSError):
                connection, early = link.detach()
                far = connections.dial((LOOPBACK, service), PATIENCE_SECONDS)
                far.sendall(early)
                connections.carry(connection, far)
        else:
            self._admit(link, hello)

    def _admit(self, link: Link, hello: Mapping[str, Any]) -> None:
        """Watch a process that has said hello, unless it cannot take part."""
        index: Any = hello.get("index")
        count = hello.get("count")
        refusal = ""
        if count != self.count:
            refusal = f"process 0 was started as one of {self.count}, this one as one of {count}"
        elif not isinstance(index, int) or not 0 < index < self.count or index in self._peers:
            refusal = f"there is a process with the index {index} already; give each one of its own"
        else:
            self._peers[index] = Peer(index, link, str(hello.get("name")))
        verdict = refusal or self._verdict  # the second: this process is about to end
        with suppress(OSError):
            link.send({"verdict": verdict} if verdict else self._status())
        if not refusal:
            self._watch(self._peers[index])

    def _await_peers(self) -> None:
        """Note which processes have not started in time."""
        time.sleep(self._join_seconds)
        for index in self._missing():
            self._note(index, f"did not start within {self._join_seconds:g} s")

    def _see_off(self) -> None:
        """Wait until the others have ended, also those that start only now and are sent the last line."""
        deadline = time.monotonic() + BEAT_SECONDS
        while time.monotonic() < max(deadline, self._late if self._missing() else 0.0):
            if not self._missing() and not self._others():
                return
            time.sleep(0.05)

    def _missing(self) -> list[int]:
        """The processes that have not started, as far as process 0 knows."""
        return [index for index in range(1, self.count) if index not in self._peers]

    # The other processes

    def _visit(self) -> None:
        """Connect to process 0, and watch it."""
        try:
            link = Link(connections.dial(self._address, self._join_seconds))
            link.send({"index": self.index, "count": self.count, **self._status()})
        except OSError as error:
            where = "{}:{}".format(*self._address)
            reason = error.strerror or str(error)
            self._note(0, f"did not answer at {where} within {self._join_seconds:g} s ({reason})")
        else:
            self._peers[0] = Peer(0, link)
            self._watch(self._peers[0])

    def _open_relay(self) -> int:
        """Open a port of this process whose connections are passed on to process 0; return it."""
        listener = connections.listen(LOOPBACK, 0)

        def pass_on(near: socket.socket) -> None:
            with suppress(OSError):
                far = connections.dial(self._address, self._join_seconds)
                far.sendall(b'{"relay": true}\n')
                connections.carry(near, far, hold=True)

        connections.serve(listener, pass_on)
        return connections.port_of(listener)

    # All processes

    def _watch(self, peer: Peer) -> None:
        """Exchange messages with a process until its connection ends."""
        fate = "was lost"
        while True:
            if time.monotonic() - peer.link.spoke >= BEAT_SECONDS:
                with suppress(OSError):  # what has come must be read before a closed connection counts
                    peer.link.send(self._status())
            try:
                message = peer.link.receive()
            except (OSError, ValueError):
                break
            if message is not None:
                peer.heard = time.monotonic()
                self._hear(peer, message)
            elif peer.joined and time.monotonic() - peer.heard > SILENCE_SECONDS:
                fate = f"was lost after {SILENCE_SECONDS:g} s of silence"
                break
        peer.gone.set()
        if peer.farewell is None or (peer.farewell == "done" and not self._left.wait(EXCUSE_SECONDS)):
            self._note(peer.index, fate)

    def _hear(self, peer: Peer, message: Message) -> None:
        peer.name = str(message.get("name", peer.name))
        peer.joined = bool(message.get("joined", peer.joined))
        self._latest = message.get("news") or self._latest
        if "verdict" in message:
            peer.farewell, self._verdict = "failed", str(message["verdict"])
            self._alarm.set()
        elif "farewell" in message:
            peer.farewell = message["farewell"]
            if peer.farewell == "failed":
                self._note(peer.index, "failed with an error of its own", EXCUSE_SECONDS)

    def _note(self, index: int, fate: str, grace: float = COLLECT_SECONDS) -> None:
        """Raise the alarm about a process; this one ends after `grace` seconds."""
        self._fates[index] = fate
        if not self._alarm.is_set():
            self._grace = grace
            self._alarm.set()

    def _await_alarm(self) -> None:
        """Wait for an alarm; then end this process, unless it reports a failure of its own."""
        self._alarm.wait()
        time.sleep(self._grace)
        with self._ending:
            if self.ended == "failed":
                return
            line = self._verdict or self._what_happened()
            late = _later(ADVICE_SECONDS, lambda: self._conclude(line))
            advice = ""
            if self._verdict is None:
                with suppress(Exception):  # this process must end whatever state its run is in
                    advice = f"; {self.advice(self._latest)}"
            late.cancel()
            self._conclude(line + advice)

    def _conclude(self, line: str) -> None:
        """End this process, and from process 0 all others, with this line; a second call never returns."""
        self._concluding.acquire()
        self._verdict = line
        wait = max(self._late - time.monotonic(), 0.0) + PART_SECONDS
        _later(wait, lambda: os._exit(1))  # if nobody reads what is printed
        if self.index == 0:
            self._send({"verdict": line})
        with suppress(Exception):
            self.report(line)
        if self.index == 0:
            self._see_off()
        end_process(1)

    def _what_happened(self) -> str:
        """Return in words which processes were lost or failed, and when."""
        by_fate: dict[str, list[str]] = {}
        for index, fate in sorted(self._fates.items()):
            name = self._peers[index].name if index in self._peers else ""
            words = f"process {index} of {self.count}" + (f" ({name})" if name else "")
            by_fate.setdefault(fate, []).append(words)
        parts = [
            f"{' and '.join(words)} {fate if len(words) == 1 else fate.replace('was ', 'were ')}"
            for fate, words in by_fate.items()
        ]
        step = self.step()
        return ", ".join(parts) + ("" if step is None else f" at step {step}")


def end_process(status: int) -> None:
    """End this process now, and those that it has started."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def _print(line: str) -> None:
    print(f"{program.label()}error: {line}", file=sys.stderr)


def _start(function: Callable[[], None]) -> None:
    threading.Thread(target=function, daemon=True).start()


def _later(seconds: float, function: Callable[[], None]) -> threading.Timer:
    """Call a function in some seconds, unless the timer that is returned is cancelled."""
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
    return timer
