"""More than there is room for: bounded queues, 429 with a time to come back, fair shares for keys, deadlines that hold in the
queue."""

import json
import threading
import time

import pytest

import harness

KEYS = {"greedy": "sk-greedy-000000", "modest": "sk-modest-000000"}
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def narrow(logs, model, tmp_path_factory):
    """Two answers at a time, six waiting."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()))
    directory = logs / "narrow"
    directory.mkdir()
    process = harness.Process(directory, "narrow", [
        "serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory", "32MiB", "--aggregated",
        "--requests-max", 2, "--queue-max", 6, "--api-keys", keys]).wait_started()
    harness.wait_ready(process.address)
    yield process
    assert process.stop() == 0, process.output()[-4000:]


def ask(address, key, tokens=60, **fields):
    return harness.request(address, "POST", PATH, {"prompt": "Once", "max_tokens": tokens, "ignore_eos": True, **fields},
                           {"x-api-key": KEYS[key]})


def load(address):
    return json.loads(harness.request(address, "GET", "/load", headers={"x-api-key": KEYS["modest"]})[2])


def test_the_queue_is_bounded_and_says_when_to_come_back(narrow):
    answers = harness.in_threads([lambda: ask(narrow.address, "greedy") for _ in range(24)])
    by_status = {s: [a for a in answers if a[0] == s] for s in (200, 429)}
    assert len(by_status[200]) + len(by_status[429]) == 24 and len(by_status[200]) >= 8 and by_status[429]
    for _, headers, text in by_status[429]:
        error = json.loads(text)["error"]
        assert error["code"] == "server_overloaded" and error["type"] == "rate_limit_error"
        assert 1 <= int(headers["retry-after"]) <= 60
    harness.wait_until(lambda: not any(load(narrow.address).values()), 30, "everything is over")


def test_a_key_that_floods_leaves_the_others_their_share(narrow):
    stop = threading.Event()
    served = {"greedy": 0, "modest": 0}
    refused = {"greedy": 0, "modest": 0}

    def client(key):
        while not stop.is_set():
            status = ask(narrow.address, key, tokens=30)[0]
            if status == 200:
                served[key] += 1
            else:
                assert status == 429
                refused[key] += 1
                time.sleep(0.02)

    threads = [threading.Thread(target=client, args=("greedy",)) for _ in range(12)]
    threads += [threading.Thread(target=client, args=("modest",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(6)
    stop.set()
    for thread in threads:
        thread.join()
    assert refused["modest"] == 0 < refused["greedy"], (served, refused)
    assert served["modest"] > 0.6 * served["greedy"], (served, refused)


def test_deadlines_hold_in_the_queue(narrow):
    slow = [threading.Thread(target=ask, args=(narrow.address, "greedy", 1200)) for _ in range(2)]
    for thread in slow:
        thread.start()
    harness.wait_until(lambda: load(narrow.address)["running"] == 2, 10, "two run")
    began = time.monotonic()
    status, _, text = ask(narrow.address, "modest", 10, timeout=0.2)
    if status != 200:  # the two were still running
        assert status == 504 and json.loads(text)["error"]["code"] == "deadline_exceeded"
        assert time.monotonic() - began < 3
    for thread in slow:
        thread.join()
    harness.wait_until(lambda: load(narrow.address)["server_load"] == 0, 10, "idle")
