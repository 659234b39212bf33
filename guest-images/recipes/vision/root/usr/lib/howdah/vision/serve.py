"""Starts an application: serve.py NAME PROGRESS, or --listen IP:PORT for people.

The agent starts it by its name in ../workloads, with the file for its progress.
"""

import argparse
import os

from framed import Server


def main() -> None:
    """Serves until killed."""
    parser = argparse.ArgumentParser(description="a vision application")
    parser.add_argument("name", choices=["faces", "ar", "detect"])
    parser.add_argument("progress", nargs="?", help="file for the number of answered requests")
    parser.add_argument("--listen", default="0.0.0.0:7790", metavar="IP:PORT")
    parser.add_argument("--gallery", help="directory of what is known beforehand")
    parser.add_argument("--cascade", help="OpenCV's description of faces")
    args = parser.parse_args()
    given = {"directory": args.gallery} if args.gallery else {}
    if args.name == "faces":
        from faces import Faces as application

        given |= {"cascade": args.cascade} if args.cascade else {}
    elif args.name == "ar":
        from ar import Markers as application
    else:
        from detect import People as application

        given = {}
    ip, port = args.listen.rsplit(":", 1)
    # Ready before anybody can connect.
    server = Server((ip, int(port)), application(**given).answer, args.progress)
    print(f"{args.name} at {server.address[0]}:{server.address[1]}, process {os.getpid()}", flush=True)
    server.run()


if __name__ == "__main__":
    main()
