"""A real S3 server (moto's) on loopback, which can be killed while it serves and started again.

As a program: serve a folder as a bucket, and end by SIGKILL after some requests.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "bucket"
ACCESS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


class Server:
    """Serves `folder`; `kills`: how often it is killed, each time after some more requests."""

    def __init__(self, folder: Path, kills: int = 0, seed: int = 0, most: int = 8):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        rng = random.Random(seed)
        self.environment = ACCESS | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_MAX_ATTEMPTS": "1",
        }
        self._folder, self._limits = folder, [rng.randint(1, most) for _ in range(kills)]
        self.killed = 0
        self._process = self._start()
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._keep_up)
        self._watch.start()

    def _start(self, number: int = 0) -> subprocess.Popen:
        limit = self._limits[number] if number < len(self._limits) else 0
        process = subprocess.Popen(
            [sys.executable, __file__, str(self._folder), str(self.port), str(limit)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        process.stdout.readline()  # it listens, and holds all files
        return process

    def _keep_up(self) -> None:
        while not self._stop.is_set():
            if self._process.poll() == -signal.SIGKILL:
                self._process = self._start(self.killed + 1)
                self.killed += 1
            time.sleep(0.02)

    def restart(self) -> None:
        """End it and start it with the folder's files as they are now."""
        self._process.kill()
        killed = self.killed
        while self.killed == killed:
            time.sleep(0.02)

    def close(self) -> None:
        self._stop.set()
        self._watch.join()
        self._process.kill()
        self._process.wait()


@contextmanager
def serving(folder: Path, kills: int = 0, seed: int = 0, most: int = 8) -> Iterator[Server]:
    server = Server(folder, kills, seed, most)
    try:
        yield server
    finally:
        server.close()


def main(folder: str, port: str, limit: str) -> None:
    os.environ.update(ACCESS)
    import boto3
    from moto.server import DomainDispatcherApplication, ThreadedMotoServer, create_backend_app
    from werkzeug.serving import make_server

    hidden = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    hidden.start()
    host, hidden_port = hidden.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{hidden_port}")
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            client.upload_file(str(path), BUCKET, str(path.relative_to(folder)))
    application = DomainDispatcherApplication(create_backend_app)
    left = [int(limit)]

    def serve(environ, start_response):
        if environ["REQUEST_METHOD"] == "GET" and left[0]:
            left[0] -= 1
            if not left[0]:  # in the middle of a body
                body = b"".join(application(environ, lambda status, headers: start_response(status, headers)))
                return cut(body)
        return application(environ, start_response)

    def cut(body: bytes) -> Iterator[bytes]:
        yield body[: len(body) // 2]
        os.kill(os.getpid(), signal.SIGKILL)

    server = make_server("127.0.0.1", int(port), serve, threaded=True)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
