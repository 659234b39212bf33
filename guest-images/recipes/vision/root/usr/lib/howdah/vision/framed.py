"""The applications' framed protocol, from the server's side.

A frame is its length (4 bytes), its kind (1: 1 request, 2 answer, 3 failure), the request's number
(8), when it was sent by the client's clock (8), and the payload; all big endian, the length not
counting itself. apps/src/frame.rs has the client's side.
"""

import os
import socket
import struct
import sys
import threading
from collections.abc import Callable

REQUEST, ANSWER, FAILURE = 1, 2, 3
MAX_PAYLOAD_BYTES = 4 << 20
MAX_CONNECTIONS = 16

_LENGTH = struct.Struct(">I")
_FIXED = struct.Struct(">BQq")

Answer = Callable[[bytes], bytes]


class Refusal(Exception):
    """A request that cannot be answered; the client is told why, and may go on."""


class Broken(Exception):
    """What came is not the protocol: the connection is of no use any more."""


class Server:
    """Answers requests, one at a time, of any number of connections up to a limit."""

    def __init__(self, address: tuple[str, int], answer: Answer, progress: str | None = None):
        self._answer = answer
        self._progress = progress
        self._answered = 0
        # One at a time: an application has one picture's worth of memory, and two vCPUs that
        # OpenCV fills by itself.
        self._turn = threading.Lock()
        self._free = threading.Semaphore(MAX_CONNECTIONS)
        self._listener = socket.create_server(address, backlog=MAX_CONNECTIONS)
        self.address = self._listener.getsockname()

    def run(self) -> None:
        """Serves for as long as the process lives."""
        while True:
            connection, peer = self._listener.accept()
            if self._free.acquire(blocking=False):
                threading.Thread(target=self._converse, args=(connection, peer), daemon=True).start()
            else:
                _say(f"{peer} is turned away: {MAX_CONNECTIONS} are connected")
                connection.close()

    def _converse(self, connection: socket.socket, peer: object) -> None:
        try:
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while (frame := read_frame(connection)) is not None:
                    connection.sendall(self._reply(*frame))
        except (OSError, Broken) as error:
            _say(f"the connection of {peer} is over: {error}")
        finally:
            self._free.release()

    def _reply(self, kind: int, seq: int, sent_ns: int, payload: bytes) -> bytes:
        try:
            if kind != REQUEST:
                raise Refusal("this is the server: it takes requests")
            with self._turn:
                reply = frame(ANSWER, seq, sent_ns, self._answer(payload))
                self._answered += 1
                self._note()
            return reply
        except Refusal as refusal:
            return frame(FAILURE, seq, sent_ns, str(refusal).encode())
        except Exception as error:  # pylint: disable=broad-except
            # One picture that the application cannot bear must not end it for all others.
            _say(f"request {seq}: {error!r}")
            return frame(FAILURE, seq, sent_ns, f"the application failed: {error!r}".encode())

    def _note(self) -> None:
        """How many requests were answered, for the guest's agent, which reads it at any time."""
        if self._progress is None:
            return
        with open(self._progress + ".new", "w", encoding="ascii") as out:
            out.write(f"{self._answered}\n")
        os.replace(self._progress + ".new", self._progress)


def frame(kind: int, seq: int, sent_ns: int, payload: bytes) -> bytes:
    """A frame as it goes over the wire."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a payload of {len(payload)} bytes: {MAX_PAYLOAD_BYTES} at most")
    return _LENGTH.pack(_FIXED.size + len(payload)) + _FIXED.pack(kind, seq, sent_ns) + payload


def read_frame(connection: socket.socket) -> tuple[int, int, int, bytes] | None:
    """Kind, number, time and payload of the next frame; None at the end of the connection."""
    head = _read(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if not _FIXED.size <= length <= _FIXED.size + MAX_PAYLOAD_BYTES:
        raise Broken(f"a frame of {length} bytes")
    body = _read(connection, length)
    if body is None:
        raise Broken("it ended within a frame")
    kind, seq, sent_ns = _FIXED.unpack_from(body)
    return kind, seq, sent_ns, body[_FIXED.size :]


def _read(connection: socket.socket, length: int) -> bytes | None:
    """So many bytes; None if the connection ended before the first."""
    parts, missing = [], length
    while missing:
        part = connection.recv(min(missing, 1 << 18))
        if not part:
            if missing == length:
                return None
            raise Broken("it ended within a frame")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
