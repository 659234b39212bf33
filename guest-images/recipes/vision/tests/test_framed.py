"""The framed protocol, without OpenCV."""

import os
import socket
import struct
import tempfile
import threading
import unittest

import framed
from framed import ANSWER, FAILURE, REQUEST, Refusal, Server


def _upper(request: bytes) -> bytes:
    if request == b"refuse":
        raise Refusal("not that")
    if request == b"fail":
        raise ValueError("a bug")
    return request.upper()


class Framed(unittest.TestCase):
    """A server, and raw connections to it."""

    def setUp(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.progress = os.path.join(self.directory.name, "progress")
        server = Server(("127.0.0.1", 0), _upper, self.progress)
        threading.Thread(target=server.run, daemon=True).start()
        self.address = server.address

    def tearDown(self) -> None:
        self.directory.cleanup()

    def connect(self) -> socket.socket:
        """A connection that does not wait for ever."""
        connection = socket.create_connection(self.address, timeout=10)
        self.addCleanup(connection.close)
        return connection

    def test_answers_in_order_and_counts_them(self) -> None:
        connection = self.connect()
        asked = [framed.frame(REQUEST, seq, -seq, f"n{seq}".encode()) for seq in range(5)]
        # In pieces that have nothing to do with frames.
        wire = b"".join(asked)
        for at in range(0, len(wire), 7):
            connection.sendall(wire[at : at + 7])
        for seq in range(5):
            expected = (ANSWER, seq, -seq, f"N{seq}".encode())
            self.assertEqual(framed.read_frame(connection), expected)
        with open(self.progress, encoding="ascii") as file:
            self.assertEqual(file.read(), "5\n")

    def test_a_refusal_and_a_bug_are_told_and_the_next_request_is_answered(self) -> None:
        connection = self.connect()
        for kind, payload, told in [
            (REQUEST, b"refuse", b"not that"),
            (REQUEST, b"fail", b"a bug"),
            (ANSWER, b"x", b"it takes requests"),
        ]:
            connection.sendall(framed.frame(kind, 3, 4, payload))
            reply_kind, seq, sent_ns, said = framed.read_frame(connection)
            self.assertEqual((reply_kind, seq, sent_ns), (FAILURE, 3, 4))
            self.assertIn(told, said)
        connection.sendall(framed.frame(REQUEST, 5, 6, b"x"))
        self.assertEqual(framed.read_frame(connection), (ANSWER, 5, 6, b"X"))

    def test_what_is_no_frame_ends_the_connection_and_no_other(self) -> None:
        good = self.connect()
        for bad in [struct.pack(">I", 16), struct.pack(">I", 1 << 31), b"\0\0\0\x20cut off"]:
            connection = self.connect()
            connection.sendall(bad)
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(connection.recv(1), b"")
        good.sendall(framed.frame(REQUEST, 0, 0, b"x"))
        self.assertEqual(framed.read_frame(good), (ANSWER, 0, 0, b"X"))

    def test_more_connections_than_allowed_are_turned_away(self) -> None:
        held = [self.connect() for _ in range(framed.MAX_CONNECTIONS)]
        for connection in held:
            connection.sendall(framed.frame(REQUEST, 0, 0, b"x"))
            framed.read_frame(connection)
        self.assertEqual(self.connect().recv(1), b"")


if __name__ == "__main__":
    unittest.main()
