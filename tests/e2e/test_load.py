"""A thousand streams and two hundred slow readers at once, against a worker that does no maths: everybody gets all of it, in
order, and nothing is left behind. How fast is for tests/bench/streams.py to say."""

import json
import sys

import pytest

import harness
import namespaces

sys.path.insert(0, str(harness.ROOT / "tests/load"))

from null_cluster import NullCluster  # noqa: E402

STREAMS, SLOW = 1000, 200


@pytest.fixture
def cluster(tmp_path):
    # As many shells start it: fewer files than there will be connections, unless the server asks for more.
    cluster = NullCluster(tmp_path, step_ms=60, prefix=["prlimit", "--nofile=1024:16384"])
    yield cluster
    cluster.stop()


def test_a_thousand_streams_leave_nothing_behind(cluster):
    files = cluster.gateway_files()
    rss = []
    for _ in range(2):
        report = cluster.load(streams=STREAMS, slow=SLOW, tokens=100, slow_rate=1000, patience=300)
        assert report["slow_left"] > 0 and report["slow_left"] + report["slow_finished"] == SLOW
        load = lambda: json.loads(harness.request(cluster.gateway.address, "GET", "/load")[2])  # noqa: E731
        harness.wait_until(lambda: not any(load().values()), 60, "everything is over")
        harness.wait_until(lambda: cluster.gateway_files() <= files, 60, "every connection is closed")
        state = json.loads(harness.request(cluster.gateway.address, "GET", "/state")[2])
        assert [w["pages_free"] for w in state["workers"]] == [w["pages_total"] for w in state["workers"]]
        rss.append(report["processes"]["gateway"]["rss_after"])
    # What the allocator keeps from the first round serves the second one.
    assert rss[1] < 1.25 * rss[0] + (16 << 20), rss


def test_a_client_that_vanishes_is_noticed(tmp_path):
    """No FIN, no RST: its network is gone. Both answers would take a quarter of an hour; the limit is the gateway's 30 s for a
    write, and the system's timers."""
    body = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True}
    with namespaces.Pair(links=1) as pair:
        cluster = NullCluster(tmp_path, step_ms=1000, prefix=pair.prefix(0), listen=f"{pair.address(0, 0)}:0",
                              run=lambda call: pair.run(0, call))
        load = lambda: json.loads(harness.request(cluster.gateway.address, "GET", "/load")[2])["server_load"]  # noqa: E731
        try:
            def ask():
                waiting = harness.open_request(cluster.gateway.address, body)
                reading = harness.open_request(cluster.gateway.address, {**body, "stream": True})
                assert reading.recv(100)
                return waiting, reading

            clients = pair.run(1, ask)
            harness.wait_until(lambda: pair.run(0, load) == 2, 30, "both answers are being made")
            files = cluster.gateway_files()
            namespaces.ip("-n", pair.names[1], "link", "set", "rail0", "down")
            harness.wait_until(lambda: pair.run(0, load) == 0, 150, "both clients are given up", interval=0.5)
            harness.wait_until(lambda: cluster.gateway_files() <= files - 2, 30, "their connections are closed")
            for client in clients:
                client.close()
        finally:
            cluster.stop()
