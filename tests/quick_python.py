"""A Python that has imported everything already: most of what a short job costs is its imports.

:func:`quick_python` gives a command that takes what ``python`` takes, a script or ``-m module`` with arguments. A server forks a
fresh process for each call; the command lends it arguments, environment, folder and output, hands signals on, and ends as it
ends. Launchers that start ``sys.executable`` start it in turn. Where the network or the interpreter itself is tried, a test takes
the plain Python.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@functools.cache
def quick_python() -> str:
    """The command; its server starts with the first call and ends with this process."""
    import tempfile
    import time

    from tiny_recipe import FORKS

    folder = Path(tempfile.mkdtemp(prefix="quick-"))  # short: the name of a socket has at most 107 characters
    address, command = folder / "socket", folder / "python"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{address}" "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    server = FORKS.Process(target=serve, args=(str(address), str(command)))
    server.start()
    atexit.register(server.terminate)
    until = time.monotonic() + 120
    while not address.exists():
        assert server.is_alive() and time.monotonic() < until, "the server of quick_python does not start"
        time.sleep(0.01)
    return str(command)


def serve(address: str, command: str) -> NoReturn:
    """Fork a process for each call, for ever."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen()
    os.rename(f"{address}.new", address)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _keep(connection, command)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(connection: socket.socket, command: str) -> NoReturn:
    """Start what one call asks for; end it where the caller ends, and tell the caller how it ended."""
    message, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 16)
    process = os.fork()
    if process == 0:
        connection.close()
        _play(files, command, **json.loads(message))
    for file in files:
        os.close(file)
    connection.sendall(f"{process}\n".encode())
    ended = os.pidfd_open(process)
    ready, _, _ = select.select([connection, ended], [], [])
    if ended not in ready:  # the caller was killed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(f"{code}\n".encode())
    os._exit(0)


def _play(
    files: Sequence[int], command: str, arguments: list[str], environment: dict[str, str], folder: str
) -> NoReturn:
    """Become the process that was asked for."""
    import random
    import runpy
    import threading

    import numpy as np

    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.executable = command
    np.random.seed(random.SystemRandom().getrandbits(32))  # as a fresh one has it; Python's own does so by itself
    while arguments and arguments[0] == "-u":
        arguments.pop(0)
    code: Any = 1
    try:
        if arguments[0] == "-m":
            sys.path[0] = folder
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(arguments[0]).parent)
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code or 0)


def call(address: str, arguments: list[str]) -> NoReturn:
    """The command itself."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(asked).encode() + b"\n"
    sent = socket.send_fds(connection, [message], [0, 1, 2])
    connection.sendall(message[sent:])
    answers = connection.makefile()
    process = int(answers.readline())
    for number in HANDED_ON:
        signal.signal(number, lambda number, _: os.kill(process, number))
    code = int(answers.readline() or 1)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    raise SystemExit(code)


if __name__ == "__main__":
    call(sys.argv[1], sys.argv[2:])
