"""The backend of a process fails in the middle of its work, as a GPU's does: the process ends with the cause in one line, and what it
was answering goes on elsewhere. The program is the real one over a backend that fails at a given step (failing_backend.cc)."""

import pathlib

import pytest

import harness

CAUSE = "an illegal memory access was encountered"


@pytest.fixture(scope="module")
def healthy(logs, long_model):
    directory = logs / "device-error"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model)
    yield cluster
    cluster.stop()


def start_failing(directory, name, fail_at, args):
    program = pathlib.Path(harness.binary()).parent / "tests/e2e/failing_millrace"
    return harness.Process(directory, name, args, program=program, env={"MILLRACE_FAIL_AT": str(fail_at)})


def assert_ended_with_the_cause(process):
    assert process.popen.wait(20) == 1, process.output()[-4000:]
    lines = [line for line in process.output().splitlines() if CAUSE in line and " E " in line]
    assert len(lines) == 1, lines


@pytest.mark.parametrize(("role", "fail_at"), [("decode", 1), ("decode", 150), ("prefill", 1), ("prefill", 4)])
def test_its_requests_go_on_elsewhere(healthy, long_model, make_prompt, role, fail_at):
    """Two workers of the role, one of which fails: the same tokens, each once, whatever it was in the middle of."""
    failing = start_failing(healthy.log_dir, f"failing-{role}-{fail_at}", fail_at, [
        "worker", "--role", role, "--model", long_model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory", "64MiB",
        "--batch-tokens-max", 128]).wait_started()
    workers = {each: [process.address for process in healthy.workers[each]] for each in ("prefill", "decode")}
    workers[role].append(failing.address)
    gateway = harness.Process(healthy.log_dir, f"gateway-{role}-{fail_at}", [
        "gateway", "--model", long_model, "--listen", "127.0.0.1:0",
        *(flag for each, addresses in workers.items() for address in addresses for flag in (f"--{each}", address))]).wait_started()
    harness.wait_ready(gateway.address)
    prompts = [make_prompt(400 + 50 * seed, seed) for seed in range(6)]
    fields = {"max_tokens": 300, "ignore_eos": True, "temperature": 0.9, "seed": 5, "logprobs": 0}
    expected = [harness.complete(healthy.address, prompt, **fields) for prompt in prompts]
    answers = [[] for _ in prompts]

    def ask(i):
        while True:
            answers[i].append(harness.complete(gateway.address, prompts[i], **fields))
            if not failing.running():
                return

    harness.in_threads([lambda: assert_ended_with_the_cause(failing), *(lambda i=i: ask(i) for i in range(len(prompts)))])
    for i, given in enumerate(answers):
        assert all(answer == expected[i] for answer in given), f"{len(given)} answers to prompt {i}"
    assert gateway.stop() == 0


def test_serve_ends(logs, model):
    """Nobody else is there: the client is told, nothing hangs, and the process ends."""
    directory = logs / "serve-device-error"
    directory.mkdir()
    process = start_failing(directory, "serve", 100, ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1,
                                                      "--kv-memory", "16MiB", "--aggregated"]).wait_started()
    harness.wait_ready(process.address)
    status, _, body = harness.request(process.address, "POST", "/v1/completions", {
        "prompt": "a", "max_tokens": 200, "ignore_eos": True})
    assert status in (500, 502, 503), (status, body)
    assert_ended_with_the_cause(process)
