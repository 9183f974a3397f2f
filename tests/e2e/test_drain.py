"""The role of a worker changed from outside; a process that cannot end in time; one whose step does not end."""

import subprocess
import threading
import time

import harness
import thread_hold


def change_role(address, role):
    return subprocess.run([harness.binary(), "role", address, role], capture_output=True, text=True, timeout=30)


def test_an_idle_worker_takes_another_role(logs, long_model, make_prompt):
    directory = logs / "role"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=1, decode=2, worker_args=["--prefix-cache", "off"])
    try:
        prompt = make_prompt(900, 4)
        expected = harness.complete(cluster.address, prompt, max_tokens=8)
        decode, worker = cluster.workers["decode"]
        streams = [harness.open_request(cluster.address, {"prompt": make_prompt(20, i), "max_tokens": 12_000, "ignore_eos": True,
                                                          "stream": True}) for i in range(2)]
        harness.wait_until(lambda: all(harness.metric(w.metrics_address, "millrace_engine_running") for w in (decode, worker)), 20,
                           "both decode")
        refused = change_role(worker.address, "prefill")
        assert refused.returncode == 1 and "its role changes when it is idle" in refused.stderr, refused
        for connection in streams:
            connection.close()
        harness.wait_until(lambda: change_role(worker.address, "prefill").returncode == 0, 20, "the idle worker refuses")

        before = harness.metric(worker.metrics_address, "millrace_worker_requests_total", kind="prefill", outcome="OK")
        def served():
            assert harness.complete(cluster.address, prompt, max_tokens=8) == expected
            return harness.metric(worker.metrics_address, "millrace_worker_requests_total", kind="prefill", outcome="OK") > before
        harness.wait_until(served, 30, "the new prefill worker gets no prompt")
        assert change_role(worker.address, "decode").returncode == 0
        unknown = change_role(worker.address, "cook")
        assert unknown.returncode != 0 and "cook" in unknown.stderr
        nobody = change_role(f"127.0.0.1:{harness.free_port()}", "both")
        assert nobody.returncode == 1 and nobody.stderr.startswith("millrace role: "), nobody
    finally:
        cluster.stop()


def test_a_process_that_cannot_drain_ends_all_the_same(logs, model):
    """Its control thread is held, so no call ever ends: the process goes 30 s after its drain, and says so."""
    directory = logs / "alarm"
    directory.mkdir()
    process = harness.Process(directory, "worker", ["worker", "--role", "both", "--model", model, "--listen", "127.0.0.1:0",
                                                    "--threads", 1, "--kv-memory", "16MiB", "--drain", 1]).wait_started()
    with thread_hold.held([process], "worker"):
        begun = time.monotonic()
        process.ask_to_end()
        harness.wait_until(lambda: "did not end in time" in process.output(), 60, "it does not say so", interval=0.2)
        assert time.monotonic() - begun > 30
    assert process.popen.wait(20) == 3


def test_liveness_follows_the_steps_of_the_own_engines(logs, model):
    """`serve` has its workers inside: an engine thread that stands still makes it not alive, in the middle of its steps or
    called and not waking; an idle engine does not."""
    directory = logs / "stalled"
    directory.mkdir()
    process = harness.Process(directory, "serve", ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1,
                                                   "--kv-memory", "16MiB", "--aggregated", "--stall-max", 1]).wait_started()
    status = lambda path: harness.request(process.address, "GET", path)[0]
    harness.wait_ready(process.address)
    time.sleep(1.5)
    assert (status("/live"), status("/health")) == (200, 200)
    ended = threading.Event()

    def ask():
        while not ended.is_set():
            harness.request(process.address, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 200, "ignore_eos": True})
            time.sleep(0.01)

    for called_first in (True, False):
        ended.clear()
        asking = threading.Thread(target=ask)
        if called_first:
            asking.start()
            harness.wait_until(lambda: harness.metric(process.address, "millrace_engine_running") > 0, 20, "it runs")
        try:
            with thread_hold.held([process], "engine"):
                if not called_first:
                    asking.start()
                harness.wait_until(lambda: status("/live") == 503, 30, "it is alive though its engine stands still", interval=0.1)
                assert status("/health") == 503
        finally:
            ended.set()
        harness.wait_until(lambda: status("/live") == 200, 30, "it does not come back", interval=0.1)
        asking.join()
    assert process.stop() == 0
