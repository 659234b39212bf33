"""The applications with their real client: needs OpenCV, opencv-data's cascade and howdah-app.

HOWDAH_APP names the binary, HOWDAH_CASCADE the cascade where Debian's package is not installed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
SERVE = os.path.join(HERE, "../root/usr/lib/howdah/vision/serve.py")
APP = os.environ.get("HOWDAH_APP", "howdah-app")
REQUESTS = 24


class Vision(unittest.TestCase):
    """Each application answers its client, and mostly rightly."""

    def talk(self, name: str, *arguments: str) -> dict:
        """Serves an application, lets its client ask, and returns the client's summary."""
        with tempfile.TemporaryDirectory() as directory:
            known = os.path.join(directory, "known")
            subprocess.run([APP, "inputs", "--application", name, "--out", known], check=True)
            gallery = ["--gallery", known] if os.listdir(known) else []
            port = str(17790 + os.getpid() % 1000)
            server = subprocess.Popen(
                [sys.executable, SERVE, name, os.path.join(directory, "progress")]
                + ["--listen", f"127.0.0.1:{port}", *gallery, *arguments]
            )
            try:
                client = [APP, "client", "--application", name, "--address", f"127.0.0.1:{port}"]
                client += ["--requests", str(REQUESTS), "--connect-s", "60", "--seed", "5"]
                began = time.monotonic()
                said = subprocess.run(client, check=True, capture_output=True).stdout
                took = time.monotonic() - began
            finally:
                server.kill()
                server.wait()
            summary = json.loads(said)
            with open(os.path.join(directory, "progress"), encoding="ascii") as file:
                self.assertEqual(int(file.read()), REQUESTS)
        print(f"{name}: {took:.1f} s, {summary}", file=sys.stderr)
        self.assertEqual(summary["answered"], REQUESTS)
        self.assertEqual((summary["failed"], summary["lost"]), (0, 0))
        return summary

    def test_faces_are_found_and_known(self) -> None:
        cascade = os.environ.get("HOWDAH_CASCADE")
        summary = self.talk("faces", *(["--cascade", cascade] if cascade else []))
        self.assertLessEqual(summary["wrong"], REQUESTS // 10)

    def test_markers_are_found_where_they_are(self) -> None:
        self.assertLessEqual(self.talk("ar")["wrong"], REQUESTS // 10)

    def test_people_are_found(self) -> None:
        self.assertLessEqual(self.talk("detect")["wrong"], REQUESTS // 5)

    def test_what_is_no_picture_is_refused(self) -> None:
        # Imported here, so that the file can be loaded where OpenCV is not.
        from detect import People
        from framed import Refusal

        people = People()
        for request in [b"", b"no picture", b"\xff\xd8\xff\xe0" * 20]:
            with self.assertRaises(Refusal):
                people.answer(request)


if __name__ == "__main__":
    unittest.main()
