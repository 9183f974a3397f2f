"""Starts Millrace's processes on free loopback ports, and speaks plain HTTP to them."""

import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
START_SECONDS = 60


def binary():
    path = pathlib.Path(os.environ.get("MILLRACE_BIN", ROOT / "build/release/millrace")).resolve()
    assert path.exists(), f"{path} does not exist: build it, or set MILLRACE_BIN"
    return str(path)


class Process:
    """One millrace process. Its output goes to a file; `address` is what it printed when it was ready."""

    def __init__(self, log_dir, name, args, prefix=(), program=None, env=None):
        self.name = name
        self.log_path = pathlib.Path(log_dir) / f"{name}.log"
        self.log = open(self.log_path, "wb")
        self.popen = subprocess.Popen([*prefix, program or binary(), *map(str, args)], stdout=subprocess.PIPE, stderr=self.log,
                                      stdin=subprocess.DEVNULL, text=True, env=None if env is None else {**os.environ, **env})
        self.address = None
        self.metrics_address = None
        self.asked_to_end = False
        self.ready_line = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.popen.stdout:
            self.log.write(line.encode())
            self.log.flush()
            found = re.search(r"Millrace .* (?:at https?://|on )(\S+:\d+)$", line.strip())
            if found and self.address is None:
                self.address = found.group(1)
                self.ready_line.set()
        self.ready_line.set()

    def wait_started(self):
        assert self.ready_line.wait(START_SECONDS) and self.address, f"{self.name} did not start:\n{self.output()}"
        return self

    def output(self):
        return self.log_path.read_text(errors="replace")

    def running(self):
        return self.popen.poll() is None

    def kill(self):
        self.popen.kill()
        self.popen.wait()

    def ask_to_end(self):
        """SIGTERM, once: a second one would end the process at once."""
        if self.running() and not self.asked_to_end:
            self.asked_to_end = True
            self.popen.send_signal(signal.SIGTERM)

    def stop(self, seconds=20):
        """Asks, waits; the exit status."""
        self.ask_to_end()
        if self.running():
            try:
                self.popen.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self.name} did not end within {seconds} s of SIGTERM:\n{self.output()[-4000:]}")
        self.reader.join(5)
        self.log.close()
        return self.popen.returncode


def free_port(host="127.0.0.1"):
    """A port that nobody listens on, from below the range that the system gives to connections: those take one at any time."""
    while True:
        with socket.socket() as probe:
            try:
                port = random.randrange(20000, 32000)
                probe.bind((host, port))
                return port
            except OSError:
                continue


def start_all(starts):
    """Starts processes side by side; weights load at the same time."""
    processes = [start() for start in starts]
    return [process.wait_started() for process in processes]


class Cluster:
    """Roles apart: prefill workers, decode workers, one gateway."""

    def __init__(self, log_dir, model, prefill=1, decode=1, rails=(), kv_memory="64MiB", worker_args=(), gateway_args=()):
        self.log_dir = log_dir
        rail_args = [flag for rail in rails for flag in ("--rail", rail)]
        self.workers = {"prefill": [], "decode": []}

        def worker(role, i):
            metrics = f"127.0.0.1:{free_port()}"
            process = Process(log_dir, f"{role}-{i}", [
                "worker", "--role", role, "--model", model, "--listen", "127.0.0.1:0", "--metrics-listen", metrics,
                "--threads", 1, "--kv-memory", kv_memory, *rail_args, *worker_args])
            process.metrics_address = metrics
            self.workers[role].append(process)
            return process

        starts = [lambda i=i: worker("prefill", i) for i in range(prefill)]
        starts += [lambda i=i: worker("decode", i) for i in range(decode)]
        self.gateway = None
        try:
            start_all(starts)
            args = ["gateway", "--model", model, "--listen", "127.0.0.1:0"]
            for role in ("prefill", "decode"):
                for process in self.workers[role]:
                    args += [f"--{role}", process.address]
            args += gateway_args
            self.gateway = Process(log_dir, "gateway", args).wait_started()
            self.address = self.gateway.address
            wait_ready(self.address)
        except BaseException:
            self.stop(check=False)
            raise

    def stop(self, check=True):
        """Ends all; whoever still ran must end cleanly."""
        processes = [p for p in [self.gateway, *self.workers["decode"], *self.workers["prefill"]] if p is not None]
        alive = [p for p in processes if p.running()]
        for process in alive:
            process.ask_to_end() if check else process.kill()
        codes = {p.name: p.stop() for p in alive}
        if check:
            assert not any(codes.values()), f"exit codes {codes}; logs in {self.log_dir}"

    def metric(self, role, name, **labels):
        return sum(metric(w.metrics_address, name, **labels) for w in self.workers[role] if w.running())


def request(address, method, path, body=None, headers=None, timeout=60):
    """(status, headers, text). `body`: bytes, or anything that becomes JSON."""
    import http.client

    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
        all_headers = {"content-type": "application/json"} if body is not None else {}
        all_headers.update(headers or {})
        connection.request(method, path, body=body, headers=all_headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode()
    finally:
        connection.close()


def post(address, path, body, timeout=60):
    """The JSON answer, which must be a 200."""
    status, _, text = request(address, "POST", path, body, timeout=timeout)
    assert status == 200, (status, text)
    return json.loads(text)


def complete(address, prompt, **fields):
    """One completion as (text, tokens' texts, tokens' log-probabilities, finish reason)."""
    choice = post(address, "/v1/completions", {"prompt": prompt, "temperature": 0, "logprobs": 1, **fields})["choices"][0]
    logprobs = choice["logprobs"]
    return choice["text"], logprobs["tokens"], logprobs["token_logprobs"], choice["finish_reason"]


def stream(address, body, path="/v1/completions", timeout=60):
    """Yields the JSON of every event; ends after [DONE] and raises when the stream breaks off before it."""
    import http.client

    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, (response.status, response.read())
        while True:
            line = response.readline()
            assert line, "the stream ended without [DONE]"
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                assert response.read() == b"\n"
                return
            event = json.loads(line[6:])
            assert "error" not in event, event
            yield event
    finally:
        connection.close()


def open_request(address, body, path="/v1/completions", timeout=None):
    """A request whose answer nobody has read yet: the socket."""
    host, port = address.rsplit(":", 1)
    connection = socket.create_connection((host, int(port)), timeout)
    payload = json.dumps(body).encode()
    connection.sendall(f"POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n"
                       f"content-length: {len(payload)}\r\n\r\n".encode() + payload)
    return connection


def metric(address, name, **labels):
    """Sum of the series `name` whose labels include `labels`; 0 when there is none."""
    _, _, text = request(address, "GET", "/metrics", timeout=10)
    total = 0.0
    for line in text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if found and all(f'{k}="{v}"' in (found.group(1) or "") for k, v in labels.items()):
            total += float(found.group(2))
    return total


def wait_until(condition, seconds, what, interval=0.01):
    """Polls until `condition` holds; fails with its last value."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s (last: {value!r})"
        time.sleep(interval)


def wait_ready(address, seconds=30):
    wait_until(lambda: request(address, "GET", "/ready")[0] == 200, seconds, f"{address} is not ready")


def in_threads(calls):
    """Runs the calls side by side; their results in order; the first failure is raised."""
    results, errors = [None] * len(calls), []

    def run(i):
        try:
            results[i] = calls[i]()
        except BaseException as error:  # carried to the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
