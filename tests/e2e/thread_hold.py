"""Stops single threads of a process from outside, as a debugger does: the process stays in the state that such a thread would end."""

import contextlib
import ctypes
import os
import pathlib

import pytest

SEIZE, INTERRUPT, DETACH = 0x4206, 0x4207, 17
WAIT_ALL = 0x40000000  # __WALL: threads too

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def _ptrace(request, thread):
    if libc.ptrace(request, thread, None, None) != 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x} of thread {thread}")


def _threads(process, name):
    """Ids of the threads of that name."""
    tasks = pathlib.Path(f"/proc/{process.popen.pid}/task")
    return [int(task.name) for task in tasks.iterdir() if (task / "comm").read_text().strip() == name]


@contextlib.contextmanager
def held(processes, name):
    """While inside, the threads `name` of these processes do not run. Enter and leave on one thread. A process that is
    killed meanwhile is not gone before the end: who traces a thread must have seen it die."""
    stopped = []
    try:
        for process in processes:
            threads = _threads(process, name)
            assert len(threads) == 1, f"{process.name} has {len(threads)} threads named {name}"
            try:
                _ptrace(SEIZE, threads[0])
            except PermissionError as error:
                pytest.skip(f"threads may not be traced here: {error}")
            stopped.append(threads[0])
            _ptrace(INTERRUPT, threads[0])
            os.waitpid(threads[0], WAIT_ALL)
        yield
    finally:
        for thread in stopped:
            try:
                _ptrace(DETACH, thread)
            except ProcessLookupError:
                os.waitpid(thread, WAIT_ALL)
