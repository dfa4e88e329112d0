"""The supervisor's end of a worker's control socket.

A worker runs hostile code, so what it says is checked before it is believed: a packet must be
one JSON object with the fields of the protocol (vm/worker/protocol.py). Anything else raises
`Nonsense`, upon which the VM is ended. So does an answer to what was not asked: a worker can
send no more packets than it was asked for, so it cannot keep the supervisor busy by talking.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from contextlib import suppress
from socket import SCM_RIGHTS, SOL_SOCKET
from typing import Any, Final

import trio

from ..vm.worker.protocol import MAX_PACKET, Ending
from .backend import Conflict, ServiceError, TimedOut

__all__ = ["Nonsense", "WorkerLink", "harmless", "harmless_screen", "parse_ending"]

ANSWER_SECONDS: Final = 5.0      # a VM with a small share answers when its vCPU has a slice
TELL_SECONDS: Final = 0.1        # for a socket that a silent worker has let fill up
TEXT_LIMIT: Final = 2000
MAX_ROWS: Final = 60             # VGA text modes end at 60 rows of 132
MAX_COLUMNS: Final = 132


class Nonsense(Exception):
    """The worker broke the protocol."""


class WorkerLink:
    """Requests to one worker and its events. `kick` interrupts the guest so that it listens."""

    def __init__(self, link: trio.socket.SocketType, kick: Callable[[], None]) -> None:
        self._link = link
        self._kick = kick
        self._waiting: dict[int, _Answer] = {}
        self._given_up: set[int] = set()       # asked, and nobody waits for the answer any more
        self._next = 0
        self._open = True

    async def events(self, on_event: Callable[[dict[str, Any]], None]) -> None:
        """Read until the worker's end closes. Raises Nonsense."""
        try:
            reset = False
            while True:
                try:
                    data = await self._link.recv(MAX_PACKET)
                except ConnectionResetError:
                    # The worker left a request unread. The kernel says so once, and before what it said last.
                    if reset:
                        return
                    reset = True
                    continue
                except (ConnectionError, trio.ClosedResourceError):
                    return
                if not data:
                    return
                packet = _parse(data)
                if "event" in packet:
                    on_event(packet)
                else:
                    self._answered(packet)
        finally:
            self._open = False
            for waiting in self._waiting.values():
                waiting.done.set()

    def _answered(self, packet: dict[str, Any]) -> None:
        number = packet.get("id")
        if not isinstance(number, int):
            raise Nonsense("an answer without a number")
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting.packet = packet
            waiting.done.set()
        elif number in self._given_up:
            self._given_up.discard(number)
        else:
            raise Nonsense("an answer to what was not asked")

    async def ask(self, op: str, *, seconds: float = ANSWER_SECONDS, descriptor: int | None = None,
                  **arguments: Any) -> dict[str, Any]:
        """The worker's answer; it gets a copy of *descriptor*.

        Raises TimedOut, Conflict (the guest has ended), ServiceError.
        """
        if not self._open:
            raise Conflict("the VM has ended")
        self._next += 1
        number = self._next
        waiting = self._waiting[number] = _Answer()
        try:
            with trio.move_on_after(seconds):
                try:
                    request = json.dumps({"id": number, "op": op, **arguments}).encode()
                    if descriptor is None:
                        await self._link.send(request)
                    else:
                        rights = array("i", [descriptor]).tobytes()
                        await self._link.sendmsg([request], [(SOL_SOCKET, SCM_RIGHTS, rights)])
                except (OSError, trio.ClosedResourceError) as error:
                    raise Conflict("the VM has ended") from error
                if self._open:
                    self._kick()
                await waiting.done.wait()
        finally:
            if self._waiting.pop(number, None) is not None:
                self._given_up.add(number)
        answer = waiting.packet
        if answer is None:
            if not self._open:
                raise Conflict("the VM has ended")
            raise TimedOut(f"the VM's worker did not answer '{op}' within {seconds:g} s")
        if answer.get("ok") is not True:
            raise ServiceError(harmless(answer.get("error")) or "the worker refused without a reason")
        return {key: value for key, value in answer.items() if key not in ("id", "ok")}

    async def tell(self, op: str) -> None:
        """A request whose answer nobody waits for, also from a task that is being cancelled."""
        self._next += 1
        self._given_up.add(self._next)
        with trio.move_on_after(TELL_SECONDS, shield=True), suppress(OSError, trio.ClosedResourceError):
            await self._link.send(json.dumps({"id": self._next, "op": op}).encode())
            if self._open:
                self._kick()

    def close(self) -> None:
        self._open = False
        self._link.close()


class _Answer:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.packet: dict[str, Any] | None = None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        packet = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Nonsense("a packet that is not JSON") from error
    if not isinstance(packet, dict):
        raise Nonsense("a packet that is not an object")
    return packet


def parse_ending(packet: dict[str, Any]) -> Ending:
    """The fields of an `ended` or `failed` event, checked. Raises Nonsense."""
    fate = packet.get("fate")
    if fate not in ("stopped", "crashed", "failed"):
        raise Nonsense(f"an unknown fate {harmless(fate)[:40]!r}")
    exit_code = packet.get("exit_code")
    if exit_code is not None and not (isinstance(exit_code, int) and 0 <= exit_code < 2**32):
        raise Nonsense("an exit code that is no number")
    instruction = packet.get("instruction")
    registers = packet.get("registers")
    if registers is not None and not _are_registers(registers):
        raise Nonsense("registers that are no numbers")
    return Ending(
        fate=fate,
        reason=harmless(packet.get("reason")),
        code=harmless(packet.get("code"))[:40] or "unknown",
        exit_code=exit_code,
        instruction=harmless(instruction) if instruction is not None else None,
        registers=registers,
        report=packet["report"] if isinstance(packet.get("report"), dict) else None,    # checked in machine.py
    )


def _are_registers(registers: object) -> bool:
    return (isinstance(registers, dict) and len(registers) <= 128
            and all(name.isidentifier() and isinstance(value, int) and 0 <= value < 2**64
                    for name, value in registers.items()))


def harmless(text: object) -> str:
    """A worker's text made fit for a terminal and a log: printable, one line, bounded; "" for what is no text."""
    return _printable(text[:TEXT_LIMIT]).strip() if isinstance(text, str) else ""


def harmless_screen(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer of the operation `screen`, fit for a terminal. Raises ServiceError for what is no screen."""
    rows = answer.get("rows")
    if not (isinstance(rows, list) and len(rows) <= MAX_ROWS
            and all(isinstance(row, str) and len(row) <= MAX_COLUMNS for row in rows)):
        raise ServiceError("the worker's answer is no text screen")
    return {**answer, "rows": [_printable(row) for row in rows]}


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
