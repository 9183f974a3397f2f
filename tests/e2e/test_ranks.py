"""Expert groups: workers of several processes that hold the model together answer like one that holds it alone, and lose no
answer when one of the processes dies."""

import json
import os
import pathlib
import signal
import time

import pytest

import harness
import namespaces


def children(process):
    pid = process.popen.pid
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def leftovers():
    return set(pathlib.Path("/dev/shm").glob("millrace-*"))


class Groups:
    """One prefill worker and a decode group of three ranks, or as said; the gateway knows one address of each."""

    def __init__(self, directory, model, prefill_ranks, decode_ranks):
        self.processes = []
        self.before = leftovers()
        args = ["gateway", "--model", model, "--listen", "127.0.0.1:0"]
        self.metrics = {}
        for role, ranks in (("prefill", prefill_ranks), ("decode", decode_ranks)):
            port, metrics = harness.free_port(), harness.free_port()
            self.metrics[role] = metrics
            process = harness.Process(directory, role, [
                "worker", "--role", role, "--model", model, "--listen", f"127.0.0.1:{port}", "--metrics-listen",
                f"127.0.0.1:{metrics}", "--threads", 1, "--kv-memory", "32MiB", "--batch-tokens-max", 256,
                "--ranks", ranks, "--redundant-experts", 2 if ranks > 1 else 0, "--rebalance-every", 1])
            self.processes.append(process)
            args += [f"--{role}", f"127.0.0.1:{port}"]
        for process in self.processes:
            process.wait_started()
        self.gateway = harness.Process(directory, "gateway", args).wait_started()
        self.address = self.gateway.address
        harness.wait_until(lambda: self.ready() == prefill_ranks + decode_ranks, 60, "all ranks at the gateway")

    def workers(self):
        return json.loads(harness.request(self.address, "GET", "/state")[2])["workers"]

    def ready(self):
        return sum(worker["connected"] and worker["ready"] for worker in self.workers())

    def stop(self):
        assert self.gateway.stop() == 0
        for process in self.processes:
            assert process.stop(60) == 0, process.output()[-3000:]
        assert leftovers() <= self.before


@pytest.fixture(scope="module")
def groups(logs, model):
    directory = logs / "groups"
    directory.mkdir()
    made = Groups(directory, model, prefill_ranks=2, decode_ranks=3)
    yield made
    made.stop()


def test_answers_are_those_of_one_process(groups, server, make_prompt):
    """Prefill and decode groups of different sizes, mixed lengths, greedy and seeded."""
    asks = [dict(prompt=make_prompt(length, length), max_tokens=40, ignore_eos=True, temperature=temperature, seed=length)
            for length in (5, 70, 200, 400) for temperature in (0, 0.9)]
    expected = [harness.complete(server.address, **ask) for ask in asks]
    answers = harness.in_threads([lambda ask=ask: harness.complete(groups.address, **ask) for ask in asks])
    assert answers == expected


def test_all_ranks_serve(groups, make_prompt):
    harness.in_threads([lambda i=i: [harness.complete(groups.address, make_prompt(120, 10 * i + j), max_tokens=20)
                                     for j in range(4)] for i in range(6)])
    for i in range(3):
        assert harness.metric(f"127.0.0.1:{groups.metrics['decode'] + i}", "millrace_worker_requests_total", kind="generate",
                              outcome="OK") >= 2
    decode = [worker["group"] for worker in groups.workers() if worker["role"] == "decode"]
    assert sorted(group["rank"] for group in decode) == [0, 1, 2]
    for group in decode:
        assert group["ranks_alive"] == 3
        # 4 MoE layers with the MTP layer; 11 experts and 2 more, or a little else once the load is known.
        assert 4 * 11 <= group["experts_held"] <= 4 * 14
    def load_is_told():
        loads = [worker["group"]["expert_load"] for worker in groups.workers() if worker["role"] == "decode"]
        return all(len(load) == 32 and abs(sum(load) - 1) < 1e-3 for load in loads)
    harness.wait_until(load_is_told, 20, "the experts' load")
    assert harness.metric(f"127.0.0.1:{groups.metrics['decode']}", "millrace_expert_group_ranks_alive") == 3


def test_a_rank_is_killed(groups, make_prompt):
    """Its requests go on elsewhere, those of the other ranks too, and it comes back."""
    prompts = [make_prompt(60 + 20 * i, i) for i in range(6)]
    ask = lambda prompt: harness.complete(groups.address, prompt, max_tokens=60, ignore_eos=True)
    expected = [ask(prompt) for prompt in prompts]
    decode = groups.processes[1]
    stop = []

    def load(i):
        while not stop:
            assert ask(prompts[i]) == expected[i]

    def kill():
        try:
            for victim in range(3):
                time.sleep(0.5)
                before = children(decode)
                os.kill(before[victim], signal.SIGKILL)
                harness.wait_until(lambda: len(children(decode)) == 3 and before[victim] not in children(decode), 30,
                                   "the rank's next process")
                harness.wait_until(lambda: groups.ready() == 5, 60, "all ranks again")
        finally:
            stop.append(True)

    harness.in_threads([lambda i=i: load(i) for i in range(6)] + [kill])
    assert "is out: its process is gone" in decode.output()


def test_ranks_on_two_hosts(server, logs, model, make_prompt):
    """A rank in each of two network namespaces with two links between them: the answers of one process, over both links; the
    loss of the link over which the ranks dialled each other casts nobody out; and no answer is lost when the other host's
    rank is killed; its next process is taken in."""
    directory = logs / "hosts"
    directory.mkdir()
    prompts = [make_prompt(40 + 60 * i, i) for i in range(6)]
    fields = {"max_tokens": 50, "ignore_eos": True}
    expected = [harness.complete(server.address, prompt, **fields) for prompt in prompts]
    with namespaces.Pair(links=2) as pair:
        peers = ",".join(f"{pair.address(side, 1)}:7200" for side in range(2))

        def rank(side, name):
            rails = [flag for link in range(2) for flag in ("--rail", pair.address(side, link))]
            return harness.Process(directory, name, [
                "worker", "--role", "both", "--model", model, "--listen", "0.0.0.0:7000", "--metrics-listen",
                f"{pair.address(side, 0)}:9090", "--threads", 1, "--kv-memory", "32MiB", "--batch-tokens-max", 256, "--ranks", 2,
                "--rank", side, "--group-peers", peers, *rails], prefix=pair.prefix(side))

        ranks = [rank(side, f"rank-{side}") for side in range(2)]
        processes = list(ranks)
        try:
            for process in ranks:
                process.wait_started()
            gateway = harness.Process(directory, "gateway", [
                "gateway", "--model", model, "--listen", "127.0.0.1:0",
                *[flag for side in range(2) for flag in ("--decode", f"{pair.address(side, 0)}:7000")]],
                prefix=pair.prefix(0)).wait_started()
            processes.append(gateway)

            def ready():
                workers = json.loads(harness.request(gateway.address, "GET", "/state")[2])["workers"]
                return sum(worker["connected"] and worker["ready"] for worker in workers)

            both_ready = lambda what: pair.run(0, lambda: harness.wait_until(lambda: ready() == 2, 60, what))
            both_ready("both ranks")
            before = [pair.bytes_sent(side, link) for side in range(2) for link in range(2)]
            ask = lambda i: harness.complete(gateway.address, prompts[i], **fields)
            assert pair.run(0, lambda: harness.in_threads([lambda i=i: ask(i) for i in range(6)])) == expected
            # How much of a pass a rail gets is the scheduler's matter; all are used before long.
            for _ in range(20):
                sent = [pair.bytes_sent(side, link) for side in range(2) for link in range(2)]
                if min(after - earlier for after, earlier in zip(sent, before)) > 100_000:
                    break
                pair.run(0, lambda: ask(5))
            assert min(after - earlier for after, earlier in zip(sent, before)) > 100_000, (before, sent)

            stop = []

            def load(i):
                while not stop:
                    assert ask(i) == expected[i]

            def kill():
                try:
                    time.sleep(0.5)
                    with pair.cut(1):
                        for side, process in enumerate(ranks):
                            harness.wait_until(lambda: f"the link with rank {1 - side} goes on" in process.output(), 10,
                                               "it does not go on over the other link")
                        time.sleep(2.5)  # longer than a rank may be silent
                    time.sleep(0.5)
                    assert not any("is out" in process.output() for process in ranks)
                    ranks[1].kill()
                    harness.wait_until(lambda: "rank 1 is out" in ranks[0].output(), 30, "its end is seen")
                    time.sleep(0.5)
                    processes.append(rank(1, "rank-1-again").wait_started())
                    harness.wait_until(lambda: ready() == 2, 60, "both ranks again")
                    assert harness.metric(f"{pair.address(0, 0)}:9090", "millrace_expert_group_ranks_alive") == 2
                finally:
                    stop.append(True)

            pair.run(0, lambda: harness.in_threads([lambda i=i: load(i) for i in range(6)] + [kill]))
        finally:
            codes = [process.stop(60) for process in processes if process is not ranks[1] or process.running()]
        assert set(codes) == {0}


@pytest.mark.parametrize("args, said", [
    (["--ranks", 2, "--rank", 2, "--group-directory", "/dev/shm/millrace-x"], "--rank 2: with --ranks 2 it is 0 to 1"),
    (["--ranks", 2, "--rank", 0], "--rank needs --group-directory"),
    (["--ranks", 2, "--rank", 0, "--group-peers", "a:1,b:2,c:3"], "--group-peers: 3 addresses for --ranks 2"),
    (["--ranks", 2, "--group-peers", "a:1,b:2"], "--group-peers needs --rank"),
    (["--ranks", 2, "--rank", 0, "--group-peers", "a,b"], "--group-peers a: not HOST:PORT"),
    (["--ranks", 32, "--model", "/nowhere"], "rank"),
])
def test_bad_groups_are_refused(logs, model, args, said):
    model_args = [] if "--model" in args else ["--model", model]
    process = harness.Process(logs, f"bad-group-{len(args)}-{args[1]}", ["worker", *model_args, "--listen", "127.0.0.1:0", *args])
    assert process.popen.wait(60) == 1
    process.reader.join(5)
    assert said in process.output()
