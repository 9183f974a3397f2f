"""The commands themselves: help, chat, inspect, configuration files, signals."""

import json
import signal
import subprocess
import threading

import pytest

import harness

FLAGS = {
    "serve": ["--model", "--listen", "--aggregated", "--kv-memory", "--batch-tokens-max", "--threads", "--drain", "--config"],
    "gateway": ["--model", "--listen", "--decode", "--prefill", "--request-timeout", "--keepalive", "--config"],
    "worker": ["--role", "--listen", "--rail", "--metrics-listen", "--grant-pages", "--kv-memory", "--config"],
    "chat": ["--url", "--system", "--prompt", "--temperature", "--max-tokens"],
    "inspect": ["--model"],
    "role": ["worker", "prefill, decode or both"],
    "doctor": ["--require", "--memory", "--listen", "--peer", "--json"],
    "transfer-bench": ["--target", "--connect", "--rail", "--block", "--batch", "--threads", "--check", "--fault", "--json"],
}


def run(*args, **options):
    return subprocess.run([harness.binary(), *map(str, args)], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("command", FLAGS)
def test_help(command):
    done = run(command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for flag in FLAGS[command]:
        assert flag in done.stdout, done.stdout
    assert len(done.stdout.splitlines()) > len(FLAGS[command])


def test_top_level():
    done = run("--help")
    assert done.returncode == 0 and all(command in done.stdout for command in FLAGS)
    assert run("--version").stdout.strip()
    for args in ((), ("nonsense",)):
        done = run(*args)
        assert done.returncode != 0 and done.stderr


def test_chat_asks_once(server):
    url = f"http://{server.address}"
    done = run("chat", "--url", url, "-p", "What is a violin?", "--max-tokens", 16)
    assert done.returncode == 0, done.stderr
    answer = harness.post(server.address, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "What is a violin?"}], "temperature": 0, "max_tokens": 16})
    assert done.stdout.rstrip("\n") == answer["choices"][0]["message"]["content"].rstrip("\n")


def test_chat_converses(server):
    done = run("chat", "--url", f"http://{server.address}", "--max-tokens", 4, input="Hello\nWhat is a drum?\n\n")
    assert done.returncode == 0 and done.stdout.count("> ") >= 3, done.stdout


def test_chat_says_what_went_wrong(server):
    done = run("chat", "--url", f"http://127.0.0.1:{harness.free_port()}", "-p", "hi")
    assert done.returncode == 1 and "cannot reach" in done.stderr
    assert run("chat", "--url", "gopher://x", "-p", "hi").returncode == 1
    done = run("chat", "--url", f"http://{server.address}", "-p", "hi", "--max-tokens", 10**9)
    assert done.returncode == 1 and "context" in done.stderr


def test_inspect(model):
    config = json.loads((model / "config.json").read_text())
    for args in ((model,), ("--model", model)):
        done = run("inspect", *args)
        assert done.returncode == 0, done.stderr
        assert "Ling v2" in done.stdout and str(config["num_experts"]) in done.stdout
        assert str(config["max_position_embeddings"]) in done.stdout


def test_config_file(model, tmp_path, logs):
    config = tmp_path / "serve.json"
    config.write_text(json.dumps({"model": str(model), "listen": "127.0.0.1:0", "threads": 1, "kv-memory": "32MiB",
                                  "aggregated": True, "model-name": "from-the-file"}))
    directory = logs / "config"
    directory.mkdir()
    process = harness.Process(directory, "serve", ["serve", "--config", config, "--kv-memory", "16MiB"]).wait_started()
    models = json.loads(harness.request(process.address, "GET", "/v1/models")[2])
    assert [entry["id"] for entry in models["data"]] == ["from-the-file"]
    effective = next(line for line in process.output().splitlines() if "serve:" in line)
    assert "kv-memory=16MiB" in effective and "aggregated=true" in effective, "the command line wins; the rest is the file's"
    assert process.stop() == 0

    lists = tmp_path / "gateway.json"
    lists.write_text(json.dumps({"model": str(model), "listen": "127.0.0.1:0", "decode": ["127.0.0.1:1", "127.0.0.1:2"]}))
    process = harness.Process(directory, "gateway", ["gateway", "--config", lists]).wait_started()
    assert "decode=127.0.0.1:1,127.0.0.1:2" in process.output()
    assert process.stop() == 0


@pytest.mark.parametrize("content,expected", [
    ('{"modell": "x"}', "modell"),
    ('{"model": "x", "kv-memory": {"a": 1}}', "kv-memory"),
    ('{"model": "x", "no-such-key": 1}', "no-such-key"),
    ('{"model": ', "onfig"),
    ("[]", "object"),
])
def test_bad_config_files(tmp_path, model, content, expected):
    file = tmp_path / "bad.json"
    file.write_text(content)
    done = run("serve", "--model", model, "--config", file)
    assert done.returncode != 0 and expected in done.stderr, done.stderr
    assert run("serve", "--model", model, "--config", tmp_path / "absent.json").returncode != 0


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_running_answers_finish(long_model, logs, make_prompt, signal_number):
    directory = logs / f"drain-{signal_number.name}"
    directory.mkdir()
    process = harness.Process(directory, "serve", ["serve", "--model", long_model, "--listen", "127.0.0.1:0",
                                                   "--threads", 1, "--kv-memory", "64MiB"]).wait_started()
    harness.wait_ready(process.address)
    first, tokens, reasons = threading.Event(), [], []

    def follow():
        body = {"prompt": make_prompt(20), "max_tokens": 1500, "temperature": 0, "ignore_eos": True, "logprobs": 0}
        for event in harness.stream(process.address, body):
            choice = event["choices"][0]
            tokens.extend(choice["logprobs"]["tokens"] if choice["logprobs"] else [])
            reasons.append(choice["finish_reason"])
            first.set()

    reader = threading.Thread(target=follow)
    reader.start()
    assert first.wait(20)
    process.popen.send_signal(signal_number)
    reader.join(60)
    assert reasons[-1] == "length" and len(tokens) == 1500
    assert process.popen.wait(20) == 0


@pytest.mark.parametrize("command", ["serve", "gateway"])
def test_signal_cuts_what_outlasts_the_drain(long_model, logs, make_prompt, cluster, command):
    """A stream that is cut must not look complete; the process ends cleanly and in time."""
    directory = logs / f"cut-{command}"
    directory.mkdir()
    args = ["serve", "--threads", 1, "--kv-memory", "64MiB"] if command == "serve" else [
        "gateway", *(flag for role in ("prefill", "decode") for worker in cluster.workers[role]
                     for flag in (f"--{role}", worker.address))]
    process = harness.Process(directory, command, [*args, "--model", long_model, "--listen", "127.0.0.1:0", "--drain",
                                                   0.1]).wait_started()
    harness.wait_ready(process.address)
    body = {"prompt": make_prompt(20), "max_tokens": 16_000, "ignore_eos": True}
    streams = [harness.open_request(process.address, {**body, "stream": stream}) for stream in (True, True, False)]
    idle = harness.open_request(process.address, {"prompt": "a", "max_tokens": 1})
    assert idle.recv(1000).startswith(b"HTTP/1.1 200")
    assert streams[0].recv(1000).startswith(b"HTTP/1.1 200")
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(10) == 0, process.output()[-3000:]
    for connection in streams:
        data = b""
        try:
            while chunk := connection.recv(1 << 20):
                data += chunk
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in data and b"finish_reason\":\"length" not in data
        connection.close()
    idle.close()
