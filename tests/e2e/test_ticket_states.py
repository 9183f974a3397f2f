"""A worker dies or freezes while a ticket is in a chosen state. The state lasts because the thread that would end it is held."""

import contextlib
import signal
import threading
import time

import pytest

import harness
import thread_hold

PROMPT = 2_000
# Which thread of which role keeps a ticket of D in which state, and how the metrics of D show it.
HOLDS = {
    "offered": ("prefill", "worker"),     # P does not answer Start
    "streaming": ("prefill", "digest"),   # P has written all and does not seal
    "sealed": ("decode", "digest"),       # D does not commit
    "aborting": ("decode", "transfer"),   # D's fence does not answer: the pages stay in quarantine
}


@pytest.fixture(scope="module")
def roles(logs, long_model):
    directory = logs / "states"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=2, decode=2,
                              worker_args=["--batch-tokens-max", 256, "--prefix-cache", "off"])
    yield cluster
    cluster.stop()


def tickets(worker, state):
    return harness.metric(worker.metrics_address, "millrace_worker_tickets", state=state)


def start_again(roles, role, old, long_model):
    process = harness.Process(roles.log_dir, f"{role}-again-{time.monotonic_ns()}", [
        "worker", "--role", role, "--model", long_model, "--listen", old.address, "--metrics-listen", old.metrics_address,
        "--threads", 1, "--kv-memory", "64MiB", "--batch-tokens-max", 256, "--prefix-cache", "off"]).wait_started()
    process.metrics_address = old.metrics_address
    roles.workers[role][roles.workers[role].index(old)] = process
    harness.wait_until(lambda: roles.gateway.output().rfind(f"worker {old.address} is ready") >
                       roles.gateway.output().rfind(f"worker {old.address} is not reachable"), 20, "it is known again")


def assert_nothing_held(roles):
    def held():
        return {(worker.name, name): value for workers in roles.workers.values() for worker in workers
                for name in ("millrace_worker_tickets", "millrace_engine_tickets", "millrace_engine_running",
                             "millrace_engine_waiting", "millrace_engine_importing", "millrace_engine_pages_ticket_only",
                             "millrace_transfer_open_tickets", "millrace_transfer_pending_requests")
                if (value := harness.metric(worker.metrics_address, name))}
    harness.wait_until(lambda: not held(), 30, f"still held: {held()}", interval=0.05)


@pytest.mark.parametrize("fault", ["kill -9", "kill -STOP"])
@pytest.mark.parametrize("victim", ["prefill", "decode"])
@pytest.mark.parametrize("state", ["offered", "streaming", "sealed"])
def test_a_worker_is_lost(roles, long_model, make_prompt, state, victim, fault):
    prompt = make_prompt(PROMPT, 5)
    fields = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    expected = harness.complete(roles.address, prompt, **fields)
    role, thread = HOLDS[state]
    served = {worker.name: harness.metric(worker.metrics_address, "millrace_engine_prompt_tokens_total")
              for worker in roles.workers["prefill"]}
    answers = []
    with contextlib.ExitStack() as after:
        with thread_hold.held(roles.workers[role], thread):
            asking = threading.Thread(
                target=lambda: answers.append(harness.complete(roles.address, prompt, **fields)))
            asking.start()
            after.callback(asking.join)
            decode = harness.wait_until(
                lambda: next((w for w in roles.workers["decode"] if tickets(w, state)), None), 20, f"no ticket is {state}")
            lost = decode
            if victim == "prefill":
                # Who computed the prompt; of two that do not answer, either may be the one that was asked.
                lost = next((w for w in roles.workers["prefill"] if harness.metric(
                    w.metrics_address, "millrace_engine_prompt_tokens_total") > served[w.name]), roles.workers["prefill"][0])
            assert tickets(decode, state), f"the ticket is not {state} any more"
            lost.popen.send_signal(signal.SIGKILL if fault == "kill -9" else signal.SIGSTOP)
        if fault == "kill -STOP":
            time.sleep(4.5)
            lost.popen.send_signal(signal.SIGCONT)
    assert answers == [expected], "one answer, and the undisturbed one"
    if fault == "kill -9":
        lost.popen.wait()
        start_again(roles, victim, lost, long_model)
    assert_nothing_held(roles)


def test_pages_stay_in_quarantine_until_the_fence_answers(roles, long_model, make_prompt):
    """P dies while D's transfer engine cannot say that nothing writes any more: the pages are nobody's for so long."""
    prompt = make_prompt(PROMPT, 6)
    fields = {"max_tokens": 20, "ignore_eos": True, "temperature": 0}
    expected = harness.complete(roles.address, prompt, **fields)
    role, thread = HOLDS["aborting"]
    answers = []
    asking = threading.Thread(target=lambda: answers.append(harness.complete(roles.address, prompt, **fields)))
    with thread_hold.held(roles.workers[role], thread):
        asking.start()
        decode = harness.wait_until(
            lambda: next((w for w in roles.workers["decode"] if tickets(w, "streaming")), None), 20, "no ticket streams")
        lost = list(roles.workers["prefill"])
        for process in lost:
            process.kill()
        # D goes on with the request; the pages of the attempt wait. Not for long: a worker whose transfer thread is held
        # gives no sign of life.
        harness.wait_until(lambda: tickets(decode, "aborting"), 10, "no ticket is aborting")
        held = harness.wait_until(lambda: harness.metric(decode.metrics_address, "millrace_engine_pages_ticket_only"), 10,
                                  "pages came back unproven")
        assert held > 0 and tickets(decode, "aborting")
    asking.join(60)
    assert answers == [expected]
    for process in lost:
        start_again(roles, "prefill", process, long_model)
    assert_nothing_held(roles)
