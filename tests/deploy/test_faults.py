"""Alerts that fire on a real Prometheus while their fault is really there, each in roles of its own; what else fires is printed.
By hand, with --faults: some minutes. promtool has each alert's logic in every run (test_monitoring.py); roles that are gone and
errors have their fault there too."""

import contextlib
import subprocess
import threading
import time

import pytest
from test_monitoring import Prometheus, groups, quicker  # noqa: F401: groups is a fixture

import harness
import thread_hold

MODEL = harness.ROOT / "deploy/models/ling-tiny"
SECONDS = 120


@pytest.fixture
def watched(request, groups, tmp_path):  # noqa: F811
    """Makes roles, with a Prometheus that scrapes them each second and knows the alerts on a quicker clock."""
    if not request.config.getoption("--faults"):
        pytest.skip("runs for minutes: by hand, with --faults")
    with contextlib.ExitStack() as after:
        def make(**fields):
            cluster = harness.Cluster(tmp_path, MODEL, **fields)
            after.callback(cluster.stop, check=False)
            workers = [(role, worker.metrics_address) for role in ("prefill", "decode") for worker in cluster.workers[role]]
            prometheus = Prometheus(tmp_path, [("gateway", cluster.address), *workers], quicker(groups))
            after.callback(prometheus.stop)
            harness.wait_until(lambda: len(prometheus.values("up == 1")) == 1 + len(workers), 30, "every role is scraped")
            return cluster, prometheus
        yield make


def fires(prometheus, alert):
    harness.wait_until(lambda: alert in prometheus.firing(), SECONDS, f"{alert} does not fire", interval=0.5)
    print(f"{alert}: fired; firing: {sorted(prometheus.firing())}")


@contextlib.contextmanager
def clients(address, count, tokens, pause=0.1):
    """So many clients that ask again and again, whatever the answer."""
    end = threading.Event()

    def ask(number):
        turn = 0
        while not end.wait(pause):
            turn += 1
            with contextlib.suppress(OSError):
                harness.request(address, "POST", "/v1/completions", {"prompt": f"{number} {turn} " + "word " * 200, "max_tokens": tokens,
                                                                     "ignore_eos": True}, timeout=SECONDS)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_an_engine_that_stands_still(watched):
    cluster, prometheus = watched()
    with clients(cluster.address, 2, 500):
        harness.wait_until(lambda: cluster.metric("decode", "millrace_engine_running") > 0, 30, "decode has requests")
        with thread_hold.held(cluster.workers["decode"], "engine"):
            fires(prometheus, "MillraceEngineStalled")


def test_more_clients_than_places(watched):
    """The queue of the gateway is short, that of decode long: some are refused, some wait, and scaling would see it."""
    cluster, prometheus = watched(worker_args=["--running-max", 1], gateway_args=["--requests-max", 60, "--queue-max", 4])
    with clients(cluster.address, 100, 600):
        fires(prometheus, "MillraceRefusing")
        fires(prometheus, "MillraceQueueing")
        (waiting,) = prometheus.values('sum(millrace_engine_waiting{namespace="millrace",component="decode"})')
        assert float(waiting["value"][1]) > 4, "above the threshold of components/autoscaling"


def test_pages_run_out(watched):
    cluster, prometheus = watched(kv_memory="16MiB", worker_args=["--prefix-cache", "off"])
    with clients(cluster.address, 60, 600):
        fires(prometheus, "MillraceKvFull")


def test_a_prefill_worker_that_does_not_answer(watched):
    cluster, prometheus = watched()
    with clients(cluster.address, 4, 4):
        time.sleep(2)
        with thread_hold.held(cluster.workers["prefill"], "worker"):
            fires(prometheus, "MillracePrefillFailing")


def test_memory_that_no_peer_lets_go(watched):
    cluster, prometheus = watched()
    (prefill,), (decode,) = cluster.workers["prefill"], cluster.workers["decode"]
    with clients(cluster.address, 4, 4):
        with thread_hold.held([decode], "transfer"):
            harness.wait_until(lambda: harness.metric(decode.metrics_address, "millrace_worker_tickets", state="streaming"), 20,
                               "no ticket streams")
            prefill.kill()
            fires(prometheus, "MillraceTicketsStuck")


def test_a_path_that_fails_again_and_again(watched):
    cluster, prometheus = watched(rails=["127.0.0.1"])
    (prefill,) = cluster.workers["prefill"]
    known = {address.rpartition(":")[2] for role in ("prefill", "decode") for worker in cluster.workers[role]
             for address in (worker.address, worker.metrics_address)}

    def cut():
        """Every connection of the prefill worker but those to gRPC and metrics."""
        for line in subprocess.run(["ss", "-Htnp", "state", "established"], capture_output=True, text=True, check=True).stdout.splitlines():
            local, peer = line.split()[2:4]
            if f"pid={prefill.popen.pid}," in line and not {local.rpartition(":")[2], peer.rpartition(":")[2]} & known:
                subprocess.run(["ss", "-K", "src", local, "dst", peer], stdout=subprocess.DEVNULL, check=True)

    with clients(cluster.address, 4, 4):
        deadline = time.monotonic() + SECONDS
        while "MillraceRailTrips" not in prometheus.firing():
            assert time.monotonic() < deadline, "MillraceRailTrips does not fire"
            cut()
            time.sleep(1)
        print("MillraceRailTrips: fired; firing:", sorted(prometheus.firing()))
