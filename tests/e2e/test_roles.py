"""Several workers of each role: all are used, and the loss of one costs time, never an answer."""

import json
import threading
import time

import pytest

import harness
import namespaces


def used(worker, kind):
    return harness.metric(worker.metrics_address, "millrace_worker_requests_total", kind=kind, outcome="OK")


def test_all_workers_are_used(cluster, make_prompt):
    """40 requests: nobody is starved, whatever one of the first prompts measured."""
    before = {worker.name: used(worker, kind) for role, kind in (("prefill", "prefill"), ("decode", "generate"))
              for worker in cluster.workers[role]}
    harness.in_threads([lambda i=i: [harness.complete(cluster.address, make_prompt(400, 10 * i + j), max_tokens=30)
                                     for j in range(5)] for i in range(8)])
    for role, kind in (("prefill", "prefill"), ("decode", "generate")):
        counts = [used(worker, kind) - before[worker.name] for worker in cluster.workers[role]]
        assert min(counts) >= 3, f"{role} workers served {counts}"


def test_roles_are_watched(cluster):
    """Health and readiness of a gateway with workers, and its own metrics."""
    for path in ("/live", "/ready", "/health"):
        assert harness.request(cluster.address, "GET", path)[0] == 200
    health = lambda: json.loads(harness.request(cluster.address, "GET", "/health")[2])  # noqa: E731
    assert health()["live"] and health()["ready"]
    harness.wait_until(lambda: health()["workers_ready"] == {"prefill": 2, "decode": 2, "both": 0}, 30, "all are counted")
    assert harness.metric(cluster.address, "millrace_http_requests_total", path="/ready", status="200") >= 1


@pytest.fixture(scope="module")
def mortal(logs, long_model):
    """A cluster for the tests that kill."""
    directory = logs / "mortal"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=2, decode=2, worker_args=["--batch-tokens-max", 128])
    yield cluster
    cluster.stop()


def test_a_prefill_worker_is_killed(mortal, make_prompt):
    """kill -9 in the middle of the load: every request is answered, and as before."""
    prompts = [make_prompt(1500, seed) for seed in range(6)]
    ask = lambda prompt: harness.complete(mortal.address, prompt, max_tokens=40, ignore_eos=True)
    expected = [ask(prompt) for prompt in prompts]
    victim = mortal.workers["prefill"][0]

    done = []
    def load(i):
        for _ in range(6):
            assert ask(prompts[i]) == expected[i]
            done.append(i)

    def kill():
        harness.wait_until(lambda: len(done) >= 6 and harness.metric(victim.metrics_address, "millrace_engine_running") > 0,
                           20, "load on the victim", interval=0.001)
        victim.kill()

    harness.in_threads([kill, *(lambda i=i: load(i) for i in range(len(prompts)))])
    assert len(done) == 36
    for worker in mortal.workers["decode"]:
        harness.wait_until(lambda: harness.metric(worker.metrics_address, "millrace_worker_tickets") == 0, 5, "tickets stay")


def test_a_decode_worker_is_killed(mortal, make_prompt):
    """Streams go on elsewhere from where they were: the same tokens, each exactly once."""
    prompts = [make_prompt(100 + 30 * seed, seed) for seed in range(6)]
    fields = {"max_tokens": 1200, "ignore_eos": True, "temperature": 0.9, "seed": 5, "logprobs": 0}
    expected = [harness.complete(mortal.address, prompt, **fields) for prompt in prompts]
    running = lambda worker: harness.metric(worker.metrics_address, "millrace_engine_running")
    tokens = [[] for _ in prompts]
    texts = ["" for _ in prompts]
    reasons = [None for _ in prompts]

    def follow(i):
        for event in harness.stream(mortal.address, {"prompt": prompts[i], **fields}):
            choice = event["choices"][0]
            texts[i] += choice["text"]
            tokens[i].extend(choice["logprobs"]["tokens"] if choice["logprobs"] else [])
            reasons[i] = choice["finish_reason"]

    at_kill = {}
    def kill():
        # One of the two has three of the six; which one is the router's matter.
        victim = harness.wait_until(
            lambda: next((worker for worker in mortal.workers["decode"] if running(worker) >= 3), None), 20,
            "streams on a victim", interval=0.001)
        harness.wait_until(lambda: min(map(len, tokens)) >= 20, 20, "all stream", interval=0.001)
        at_kill["running"] = running(victim)
        at_kill["tokens"] = list(map(len, tokens))
        victim.kill()

    harness.in_threads([kill, *(lambda i=i: follow(i) for i in range(len(prompts)))])
    assert at_kill["running"] >= 1 and min(at_kill["tokens"]) < 1200, at_kill
    assert "trying another" in mortal.gateway.output()
    for i, (text, words, _, reason) in enumerate(expected):
        assert tokens[i] == words, f"stream {i} differs at token {first_difference(tokens[i], words)} ({at_kill})"
        assert (texts[i], reasons[i]) == (text, reason)


def first_difference(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def test_a_killed_worker_comes_back(mortal, long_model, make_prompt):
    """A new process at the old address is found again and gets work."""
    old = mortal.workers["prefill"][0]
    assert not old.running()
    process = harness.Process(mortal.log_dir, "prefill-0-again", [
        "worker", "--role", "prefill", "--model", long_model, "--listen", old.address, "--metrics-listen",
        old.metrics_address, "--threads", 1, "--kv-memory", "64MiB", "--batch-tokens-max", 128]).wait_started()
    process.metrics_address = old.metrics_address
    mortal.workers["prefill"][0] = process
    deadline = time.monotonic() + 15
    while used(process, "prefill") == 0:
        assert time.monotonic() < deadline, "the new worker gets no work"
        harness.in_threads([lambda i=i: harness.complete(mortal.address, make_prompt(800, i), max_tokens=2) for i in range(4)])


def test_the_last_worker_goes(logs, long_model, make_prompt):
    """Without a decode worker: an error that says so in a started stream, 503 for new requests; then all is well again."""
    directory = logs / "last"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=0, decode=1)
    try:
        events = []

        def follow():
            body = {"prompt": make_prompt(20), "max_tokens": 12_000, "ignore_eos": True}
            with pytest.raises(AssertionError, match="error"):
                for event in harness.stream(cluster.address, body):
                    events.append(event)

        reader = threading.Thread(target=follow)
        reader.start()
        harness.wait_until(lambda: len(events) > 5, 10, "the stream runs")
        worker = cluster.workers["decode"][0]
        worker.kill()
        reader.join(20)
        assert not reader.is_alive() and events[-1]["choices"][0]["finish_reason"] is None
        harness.wait_until(lambda: harness.request(cluster.address, "GET", "/ready")[0] == 503, 10, "not ready")
        again = harness.Process(directory, "decode-again", ["worker", "--role", "decode", "--model", long_model, "--listen",
                                                           worker.address, "--kv-memory", "64MiB"]).wait_started()
        harness.wait_ready(cluster.address)
        assert harness.complete(cluster.address, make_prompt(20), max_tokens=2)[1]
        assert again.stop() == 0
    finally:
        cluster.stop()


def test_network_namespaces(logs, long_model, make_prompt, cluster):
    """Gateway and decode worker in one network namespace, prefill in another, two links between them: two rails."""
    prompts = [make_prompt(length, 7) for length in (65, 1000, 3000)]
    expected = [harness.complete(cluster.address, prompt, max_tokens=16, ignore_eos=True) for prompt in prompts]
    directory = logs / "namespaces"
    directory.mkdir()
    with namespaces.Pair(links=2) as pair:
        common = ["--model", long_model, "--threads", 1, "--kv-memory", "64MiB"]

        def worker(role, side):
            rails = [flag for link in range(2) for flag in ("--rail", pair.address(side, link))]
            return harness.Process(directory, role, ["worker", "--role", role, "--listen", f"{pair.address(side, 0)}:0",
                                                     *common, *rails], prefix=pair.prefix(side)).wait_started()

        processes = [worker("decode", 0), worker("prefill", 1)]
        try:
            decode, prefill = processes
            gateway = harness.Process(directory, "gateway", ["gateway", "--model", long_model, "--listen", "127.0.0.1:0",
                                                             "--decode", decode.address, "--prefill", prefill.address],
                                      prefix=pair.prefix(0)).wait_started()
            processes.insert(0, gateway)
            pair.run(0, lambda: harness.wait_ready(gateway.address))
            # Ready means that somebody decodes; until the prefill worker is known too, nothing has to cross.
            for worker_process in (decode, prefill):
                harness.wait_until(lambda: f"worker {worker_process.address} is ready" in gateway.output(), 10,
                                   f"{worker_process.name} is not known", interval=0.05)
            before = [pair.bytes_sent(1, link) for link in range(2)]
            answers = pair.run(0, lambda: [
                harness.complete(gateway.address, prompt, max_tokens=16, ignore_eos=True) for prompt in prompts])
            assert answers == expected
            # How much of one prompt's KV a rail gets is the scheduler's matter; both are used before long.
            for seed in range(20):
                sent = [pair.bytes_sent(1, link) - before[link] for link in range(2)]
                if min(sent) > 100_000:
                    break
                pair.run(0, lambda: harness.complete(gateway.address, make_prompt(3000, 100 + seed), max_tokens=4))
            assert min(sent) > 100_000, f"bytes per link: {sent}"
        finally:
            codes = [process.stop() for process in processes]
        assert codes == [0, 0, 0]


def test_workers_by_name(cluster, logs, long_model, make_prompt):
    """A DNS name in place of an address: all that it resolves to is tried (here also ::1, where nobody listens)."""
    directory = logs / "by-name"
    directory.mkdir()
    names = [flag for role in ("prefill", "decode") for worker in cluster.workers[role]
             for flag in (f"--{role}", worker.address.replace("127.0.0.1", "localhost"))]
    gateway = harness.Process(directory, "gateway", ["gateway", "--model", long_model, "--listen", "127.0.0.1:0",
                                                     *names]).wait_started()
    harness.wait_ready(gateway.address)
    prompt = make_prompt(300)
    assert harness.complete(gateway.address, prompt, max_tokens=8) == harness.complete(cluster.address, prompt, max_tokens=8)
    assert gateway.stop() == 0
