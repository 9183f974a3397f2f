"""Clients that leave, in every phase of a request: all that the request held comes back on both roles."""

import os
import pathlib
import random
import re
import time

import pytest

import harness

PROMPT = 12_000       # tokens; long enough to be caught in the middle of its prefill
ANSWER = 3_000
KV_MIB = 256
TEXT = "/v1/completions"
# What a role holds for requests. Pages are counted from their value at the start, the others from 0.
HELD = ("millrace_worker_tickets", "millrace_engine_tickets", "millrace_engine_running", "millrace_engine_waiting",
        "millrace_engine_importing", "millrace_engine_pages_ticket_only", "millrace_transfer_open_tickets",
        "millrace_transfer_pending_writes")


class Watched(harness.Cluster):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.connections = []
        self.pages = self.free_pages()
        assert all(pages > PROMPT / 64 for pages in self.pages.values()), self.pages

    def free_pages(self):
        return {role: self.metric(role, "millrace_engine_pages_free") for role in ("prefill", "decode")}

    def held(self):
        """What is not as it was at the start."""
        held = {(role, name): value for role in ("prefill", "decode") for name in HELD
                if (value := self.metric(role, name)) != 0}
        if self.free_pages() != self.pages:
            held["pages"] = self.free_pages()
        return held

    def assert_back(self, seconds=3):
        deadline = time.monotonic() + seconds
        while held := self.held():
            assert time.monotonic() < deadline, f"still held after {seconds} s: {held}"
            time.sleep(0.02)

    def cancelled(self):
        return self.metric("decode", "millrace_worker_requests_total", kind="generate", outcome="CANCELLED")

    def waiting(self):
        return sum(self.metric(role, "millrace_engine_waiting") for role in ("prefill", "decode"))

    def open(self, prompt, stream, max_tokens=ANSWER):
        connection = harness.open_request(self.address, {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True,
                                                         "temperature": 0, "stream": stream})
        self.connections.append(connection)
        return connection


@pytest.fixture(scope="module")
def roles(logs, long_model):
    directory = logs / "cancel"
    directory.mkdir()
    cluster = Watched(directory, long_model, rails=["127.0.0.1", "127.0.0.2"], kv_memory=f"{KV_MIB}MiB",
                      worker_args=["--batch-tokens-max", 96, "--running-max", 2])
    yield cluster
    cluster.stop()


@pytest.fixture(autouse=True)
def from_rest(roles):
    """Each test begins and ends with nothing under way, also after one that failed."""
    roles.assert_back(seconds=30)
    yield
    for connection in roles.connections:
        connection.close()
    roles.connections.clear()


def leave(roles, connection):
    """The client goes; its request must be counted as cancelled and leave nothing behind."""
    before = roles.cancelled()
    connection.close()
    roles.assert_back()
    assert roles.cancelled() == before + 1, "the request ended by itself: it was not in the phase that it should be in"


streaming = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


@streaming
def test_queued(roles, make_prompt, stream):
    occupants = [roles.open(make_prompt(PROMPT, seed), True) for seed in range(2)]
    harness.wait_until(lambda: roles.metric("decode", "millrace_engine_importing") == 2, 10, "two prompts at once")
    queued = roles.open(make_prompt(PROMPT, 3), stream)
    waiting = harness.wait_until(roles.waiting, 10, "a third one waits")
    before = roles.cancelled()
    queued.close()
    harness.wait_until(lambda: roles.waiting() < waiting and roles.cancelled() == before + 1, 3, "the queued one is gone")
    for connection in occupants:
        connection.close()
    roles.assert_back()


@streaming
def test_prefill(roles, make_prompt, stream):
    connection = roles.open(make_prompt(PROMPT), stream)
    harness.wait_until(lambda: roles.metric("prefill", "millrace_engine_running") == 1, 10, "the prompt is computed")
    assert roles.metric("decode", "millrace_engine_importing") == 1
    leave(roles, connection)


@streaming
def test_transferring(roles, make_prompt, stream):
    carried = roles.metric("prefill", "millrace_worker_transfer_bytes_total")
    connection = roles.open(make_prompt(PROMPT), stream)
    harness.wait_until(lambda: roles.metric("prefill", "millrace_worker_transfer_bytes_total") > carried, 10,
                       "pages are on their way")
    assert roles.metric("decode", "millrace_worker_tickets", state="streaming") == 1
    leave(roles, connection)


@streaming
def test_decoding(roles, make_prompt, stream):
    tokens = roles.metric("decode", "millrace_engine_output_tokens_total")
    connection = roles.open(make_prompt(200), stream, max_tokens=15_000)
    harness.wait_until(lambda: roles.metric("decode", "millrace_engine_output_tokens_total") > tokens + 20, 10, "tokens come")
    leave(roles, connection)
    assert roles.metric("decode", "millrace_engine_output_tokens_total") < tokens + 15_000


def test_a_client_that_does_not_read(roles, make_prompt):
    """A stream whose client stops reading fills the socket; closing it still ends the request."""
    connection = roles.open(make_prompt(100), True, max_tokens=15_000)
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    time.sleep(0.5)
    connection.close()
    roles.assert_back()


def test_request_timeout(roles, make_prompt):
    status, _, body = harness.request(roles.address, "POST", TEXT, {"prompt": make_prompt(PROMPT), "max_tokens": ANSWER,
                                                                   "timeout": 0.2})
    assert status == 504, body
    roles.assert_back()


def resident_kib(process):
    """(all but the KV memory, KV memory): the pool is of one size, and is touched bit by bit as the prefix cache fills it."""
    smaps = pathlib.Path(f"/proc/{process.popen.pid}/smaps").read_text()
    found = re.findall(r"^[0-9a-f]+-[0-9a-f]+ (\S+) .*\nSize: +(\d+) kB\n(?:.*\n)*?Rss: +(\d+) kB", smaps, re.M)
    pool = [int(rss) for mode, size, rss in found if mode == "rw-p" and int(size) > 0.95 * KV_MIB * 1024]
    assert len(pool) == (process.name != "gateway"), f"{process.name}: mappings as large as the KV memory: {pool}"
    return sum(int(rss) for _, _, rss in found) - sum(pool), sum(pool)


def test_many_leave_at_random(roles, make_prompt):
    """MILLRACE_ABORTS: how many. In a long run no process may grow after its first quarter, but for the KV memory."""
    rng = random.Random(20)
    count = int(os.environ.get("MILLRACE_ABORTS", 40))
    processes = [roles.gateway, *roles.workers["prefill"], *roles.workers["decode"]]
    prompts = [make_prompt(length, i) for length in (1, 64, 300, 3000) for i in range(16)]
    open_connections, resident, begun = [], [], time.monotonic()
    for i in range(count):
        body = {"prompt": rng.choice(prompts), "max_tokens": 400, "ignore_eos": True, "stream": rng.random() < 0.5}
        open_connections.append(harness.open_request(roles.address, body))
        if count < 1000 or i % 16 == 0:
            time.sleep(rng.random() * 0.02)
        while len(open_connections) > rng.randrange(1, 12):
            open_connections.pop(rng.randrange(len(open_connections))).close()
        if count >= 1000 and (i + 1) % (count // 8) == 0:
            resident.append([resident_kib(process) for process in processes])
            print(f"{i + 1} left after {time.monotonic() - begun:.0f} s; resident MiB {[r // 1024 for r, _ in resident[-1]]}, KV memory "
                  f"{[r // 1024 for _, r in resident[-1]]}", flush=True)
    for connection in open_connections:
        connection.close()
    roles.assert_back(seconds=60)
    assert harness.complete(roles.address, make_prompt(300), max_tokens=3)[1]
    for (before, _), (after, _) in zip(resident[1], resident[-1]) if resident else ():
        assert after < 1.1 * before + 16 * 1024, f"KiB resident: {resident}"


def test_the_gateway_dies(roles, logs, long_model, make_prompt):
    directory = logs / "second-gateway"
    directory.mkdir()
    gateway = harness.Process(directory, "gateway", [
        "gateway", "--model", long_model, "--listen", "127.0.0.1:0", "--decode", roles.workers["decode"][0].address,
        "--prefill", roles.workers["prefill"][0].address]).wait_started()
    harness.wait_ready(gateway.address)
    tokens = roles.metric("decode", "millrace_engine_output_tokens_total")
    connections = []
    for length in (50, PROMPT):
        connections.append(harness.open_request(gateway.address, {"prompt": make_prompt(length), "max_tokens": 4_000,
                                                                  "ignore_eos": True, "stream": True}))
        harness.wait_until(lambda: roles.metric("decode", "millrace_engine_output_tokens_total") > tokens + 5, 10, "it decodes")
    harness.wait_until(lambda: roles.metric("prefill", "millrace_engine_running") == 1, 10, "one is in each phase")
    gateway.kill()
    roles.assert_back()
    for connection in connections:
        connection.close()
