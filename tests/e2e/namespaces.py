"""Two network namespaces joined by veth pairs."""

import contextlib
import ctypes
import itertools
import os
import subprocess
import threading

import pytest

CLONE_NEWNET = 0x40000000
_pairs = itertools.count()


def ip(*args):
    return subprocess.run(["ip", *map(str, args)], capture_output=True, text=True, check=True).stdout


def enter(namespace):
    """The calling thread, and threads that it starts, live in that namespace from now on."""
    with open(f"/var/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


def run_in(namespace, call):
    """Runs `call` in a thread whose sockets, and those of the threads that it starts, are in the namespace; its result."""
    outcome = {}

    def enter_and_run():
        try:
            enter(namespace)
            outcome["result"] = call()
        except BaseException as error:  # carried to the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=enter_and_run)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


class Pair:
    """Side 0 and side 1; link l joins 10.77.l.1 and 10.77.l.2. Skips the test where namespaces are not permitted."""

    def __init__(self, links):
        self.links = links
        pair = next(_pairs)  # a process may have several
        self.names = [f"millrace-{os.getpid()}-{pair}-{side}" for side in range(2)]

    def __enter__(self):
        try:
            ip("netns", "add", self.names[0])
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}")
        try:
            ip("netns", "add", self.names[1])
            for link in range(self.links):
                ip("link", "add", f"rail{link}", "netns", self.names[0], "type", "veth", "peer", "name", f"rail{link}",
                   "netns", self.names[1])
                for side in range(2):
                    ip("-n", self.names[side], "addr", "add", f"{self.address(side, link)}/24", "dev", f"rail{link}")
                    ip("-n", self.names[side], "link", "set", f"rail{link}", "up")
            for side in range(2):
                ip("-n", self.names[side], "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def address(self, side, link):
        return f"10.77.{link}.{side + 1}"

    def prefix(self, side):
        """What makes a command run on that side."""
        return ["ip", "netns", "exec", self.names[side]]

    def run(self, side, call):
        """Runs `call` in a thread whose sockets are on that side; its result."""
        return run_in(self.names[side], call)

    @contextlib.contextmanager
    def cut(self, link):
        """Nothing comes through; side 0 sees its interface go down, side 1 its carrier."""
        ip("-n", self.names[0], "link", "set", f"rail{link}", "down")
        try:
            yield
        finally:
            ip("-n", self.names[0], "link", "set", f"rail{link}", "up")

    def bytes_sent(self, side, link):
        text = subprocess.run([*self.prefix(side), "cat", f"/sys/class/net/rail{link}/statistics/tx_bytes"],
                              capture_output=True, text=True, check=True).stdout
        return int(text)
