"""Requests and answers over a Unix socket that only its owner can reach (0600).

Both are 8 bytes of length (little-endian) and as many bytes. Every connection is read by a thread
of its own, so that a silent one blocks nobody; tasks are worked on one after another by the thread
that calls `serve`, because torch's settings belong to a thread.
"""

from __future__ import annotations

import os
import queue
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rolora.errors import BadInput

LIMIT = 1 << 36  # bytes of one answer
HELLO = b"H"
_PATIENCE = 30.0  # seconds that a whole request, or the sending of an answer, may take
_AT_ONCE = 32  # connections that are read at the same time


def listening(path: Path) -> socket.socket:
    """A listening socket; raises BadInput where `path` is not free.

    A socket that a dead worker left behind is replaced. Anything that is not a socket stays.
    """
    try:
        found = os.lstat(path)
    except OSError:
        pass  # nothing there, or not reachable, which bind will say
    else:
        if not stat.S_ISSOCK(found.st_mode):
            raise BadInput(
                f"--socket {path}: exists and is not a socket: name a file that does not exist"
            )
        if _is_alive(path):
            raise BadInput(f"--socket {path}: a worker is listening there already")
        path.unlink()
    server, before = socket.socket(socket.AF_UNIX), os.umask(0o177)
    try:
        server.bind(str(path))
    except OSError as error:
        raise BadInput(f"--socket {path} cannot be made: {error.strerror or error}") from None
    finally:
        os.umask(before)
    server.listen(_AT_ONCE)
    return server


def serve(server: socket.socket, hello: bytes, work: Callable[[bytes], bytes], limit: int) -> None:
    """Answers every request, `H` with `hello` and any other with `work(request)`; never returns.

    limit: bytes of a request. Whoever asks and is gone, late, or over the limit gets no answer.
    """
    tasks: queue.Queue[tuple[socket.socket, bytes]] = queue.Queue(maxsize=_AT_ONCE)
    places = threading.Semaphore(_AT_ONCE)

    def read(connection: socket.socket) -> None:
        try:
            request = _receive(connection, limit, time.monotonic() + _PATIENCE)
            if request == HELLO:
                _reply(connection, hello)
            else:
                tasks.put((connection, request))
        except (OSError, ValueError, MemoryError):
            connection.close()
        finally:
            places.release()

    def accept() -> None:
        while True:
            places.acquire()
            try:
                connection, _ = server.accept()
                threading.Thread(target=read, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # out of descriptors or threads for the moment
                places.release()
                time.sleep(0.1)

    threading.Thread(target=accept, daemon=True).start()
    while True:
        connection, request = tasks.get()
        _reply(connection, work(request))


def ask(path: str, request: bytes) -> bytes:
    """A worker's answer to a request; raises ConnectionError or OSError where there is none."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        _send(connection, request)
        return _receive(connection, LIMIT)


def _is_alive(path: Path) -> bool:
    """Whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_PATIENCE)
        try:
            connection.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError as error:
            if isinstance(error, TimeoutError):
                return True
            raise BadInput(
                f"--socket {path}: exists and cannot be reached: {error.strerror or error}"
            ) from None
    return True


def _reply(connection: socket.socket, answer: bytes) -> None:
    with connection:
        try:
            connection.settimeout(_PATIENCE)
            _send(connection, answer)
        except OSError:
            pass  # who asked is gone, or does not read


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(struct.pack("<Q", len(data)) + data)


def _receive(connection: socket.socket, limit: int, end: float | None = None) -> bytes:
    """One message. end: None, or a time of the monotonic clock, after which nobody waits."""
    (length,) = struct.unpack("<Q", _exactly(connection, 8, end))
    if length > limit:
        raise ValueError(f"{length} bytes are over the limit of {limit}")
    return _exactly(connection, length, end)


def _exactly(connection: socket.socket, length: int, end: float | None) -> bytes:
    data = bytearray()
    while len(data) < length:
        if end is not None:
            connection.settimeout(max(end - time.monotonic(), 1e-3))
        part = connection.recv(min(length - len(data), 1 << 20))
        if not part:
            raise ConnectionError("the other side closed the connection")
        data += part
    return bytes(data)
