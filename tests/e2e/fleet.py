"""Millrace's processes each in a network namespace of its own, joined by two bridges; and what can happen to them."""

import contextlib
import os
import signal
import subprocess
import time

import pytest

import harness
from namespaces import ip, run_in

LINKS = 2  # per process: both are rails, the first also carries gRPC and HTTP


class Node:
    """One role in its namespace. Its process may die and be started again at the same address."""

    def __init__(self, fleet, role, number, index):
        self.fleet, self.role, self.index = fleet, role, index
        self.name = f"{role}-{number}"
        self.namespace = f"{fleet.prefix}-{self.name}"
        self.hosts = [f"10.78.{link}.{10 + index}" for link in range(LINKS)]
        self.address = f"{self.hosts[0]}:{8000 if role == 'gateway' else 7001}"
        self.metrics_address = self.address if role == "gateway" else f"{self.hosts[0]}:9001"
        self.starts = 0
        self.process = None

    def port(self, link):
        return f"n{self.index}l{link}"

    def make_namespace(self):
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        for link in range(LINKS):
            ip("link", "add", f"net{link}", "netns", self.namespace, "type", "veth", "peer", "name", self.port(link),
               "netns", self.fleet.hub)
            ip("-n", self.namespace, "addr", "add", f"{self.hosts[link]}/24", "dev", f"net{link}")
            ip("-n", self.namespace, "link", "set", f"net{link}", "up")
            ip("-n", self.fleet.hub, "link", "set", self.port(link), "master", f"br{link}", "up")

    def start(self):
        args = [self.role, "--model", self.fleet.model, "--listen", self.address]
        if self.role == "gateway":
            for worker in self.fleet.workers():
                args += [f"--{worker.role}", worker.address]
            args += ["--drain", 2]
        else:
            args = ["worker", "--role", *args, "--metrics-listen", self.metrics_address, "--threads", 1, "--drain", 2,
                    "--kv-memory", "64MiB", "--batch-tokens-max", 128]
            for host in self.hosts:
                args += ["--rail", host]
        self.starts += 1
        self.process = harness.Process(self.fleet.logs, f"{self.name}-{self.starts}", args,
                                       prefix=["ip", "netns", "exec", self.namespace])
        return self.process

    def sockets(self):
        """Established TCP connections of the namespace."""
        text = subprocess.run(["ip", "netns", "exec", self.namespace, "ss", "-Htn", "state", "established"],
                              capture_output=True, text=True, check=True).stdout
        return len(text.splitlines())

    # What can happen, each as a context: it holds while inside.

    @contextlib.contextmanager
    def killed(self):
        self.process.kill()
        yield
        self.start().wait_started()

    @contextlib.contextmanager
    def restarted(self):
        process = self.process
        process.ask_to_end()
        yield
        code = process.stop(seconds=60)
        assert code == 0, f"{process.name} ended with {code} after SIGTERM:\n{process.output()[-4000:]}"
        self.start().wait_started()

    @contextlib.contextmanager
    def stopped(self):
        self.process.popen.send_signal(signal.SIGSTOP)
        yield
        self.process.popen.send_signal(signal.SIGCONT)

    @contextlib.contextmanager
    def cut(self, links=range(LINKS)):
        for link in links:
            ip("-n", self.fleet.hub, "link", "set", self.port(link), "down")
        yield
        for link in links:
            ip("-n", self.fleet.hub, "link", "set", self.port(link), "up")

    @contextlib.contextmanager
    def in_a_black_hole(self):
        """Carrier and sockets stay; whatever goes in or out vanishes."""
        nft = ["ip", "netns", "exec", self.namespace, "nft"]
        subprocess.run([*nft, "add table inet hole; "
                        f"add chain inet hole in {{ type filter hook input priority -300; policy accept; }}; "
                        f"add chain inet hole out {{ type filter hook output priority -300; policy accept; }}; "
                        f"add rule inet hole in iifname != lo drop; add rule inet hole out oifname != lo drop"], check=True)
        yield
        subprocess.run([*nft, "delete", "table", "inet", "hole"], check=True)

    @contextlib.contextmanager
    def behind_a_slow_rail(self):
        """The second link at 2 Mbit/s, both ways."""
        ends = [(self.namespace, "net1"), (self.fleet.hub, self.port(1))]
        for namespace, device in ends:
            subprocess.run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", "2mbit", "burst",
                            "16k", "latency", "50ms"], check=True)
        yield
        for namespace, device in ends:
            subprocess.run(["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], check=True)

    @contextlib.contextmanager
    def without_its_second_rail(self):
        with self.cut(links=[1]):
            yield


class Fleet:
    """Everything up and known to each other while inside. Skips the test where namespaces are not permitted."""

    def __init__(self, logs, model, prefill=2, decode=2, gateway=2):
        self.logs, self.model = logs, model
        self.prefix = f"mr{os.getpid()}"
        self.hub = f"{self.prefix}-hub"
        counts = {"prefill": prefill, "decode": decode, "gateway": gateway}
        roles = [(role, number) for role, count in counts.items() for number in range(count)]
        self.nodes = [Node(self, role, number, index) for index, (role, number) in enumerate(roles)]

    def workers(self):
        return [node for node in self.nodes if node.role != "gateway"]

    def gateways(self):
        return [node for node in self.nodes if node.role == "gateway"]

    def __enter__(self):
        try:
            ip("netns", "add", self.hub)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}")
        try:
            for link in range(LINKS):
                ip("-n", self.hub, "link", "add", f"br{link}", "type", "bridge")
                ip("-n", self.hub, "addr", "add", f"10.78.{link}.1/24", "dev", f"br{link}")
                ip("-n", self.hub, "link", "set", f"br{link}", "up")
            ip("-n", self.hub, "link", "set", "lo", "up")
            for node in self.nodes:
                node.make_namespace()
            harness.start_all([node.start for node in self.nodes])
            self.wait_known()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for node in self.nodes:
            if node.process is not None and node.process.running():
                node.process.kill()
        for namespace in [*(node.namespace for node in self.nodes), self.hub]:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)

    def run(self, call):
        """Runs `call` in a thread whose sockets, and those of the threads that it starts, are in the hub; its result."""
        return run_in(self.hub, call)

    def wait_known(self):
        """Until each gateway knows each worker as ready."""
        for gateway in self.gateways():
            for worker in self.workers():
                harness.wait_until(lambda: last_said(gateway, worker) == "ready", 60,
                                   f"{gateway.name} does not know {worker.name}", interval=0.05)

    def held(self, names):
        """What workers hold for requests. In the hub."""
        held = {}
        for node in self.workers():
            for name in names:
                if value := harness.metric(node.metrics_address, name):
                    held[node.name, name] = value
            pages = harness.metric(node.metrics_address, "millrace_engine_pages")
            if missing := pages - harness.metric(node.metrics_address, "millrace_engine_pages_free"):
                held[node.name, "pages"] = missing
        return held


def last_said(gateway, worker):
    """'ready', 'not ready', 'not reachable' or None: how the gateway's log last spoke of the worker."""
    said = None
    for line in gateway.process.output().splitlines():
        if f"worker {worker.address} is " in line:
            said = line.split(f"worker {worker.address} is ", 1)[1].split(":")[0].strip('"} ')
    return said
