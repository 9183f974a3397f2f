"""What the log says, and what it never does: at the most talkative level, as JSON lines."""

import json
import socket

import harness

SECRET = "zebra-umbrella-4711"
KEY = "sk-observant-00000"


def test_no_text_of_clients_and_every_line_is_json(logs, model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"someone {KEY}\n")
    directory = logs / "logs"
    directory.mkdir()
    process = harness.Process(directory, "talkative", [
        "serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory", "32MiB", "--api-keys", keys,
        "--log-level", "trace", "--log-format", "json"]).wait_started()
    try:
        harness.wait_ready(process.address)

        def ask(path, body, headers=None):
            return harness.request(process.address, "POST", path, body, {"x-api-key": KEY, **(headers or {})})[0]

        message = [{"role": "user", "content": SECRET}]
        tool = {"type": "function", "function": {"name": "f", "description": SECRET, "parameters": {"type": "object"}}}
        for path, body in [
                ("/v1/chat/completions", {"messages": message, "max_tokens": 4}),
                ("/v1/chat/completions", {"messages": message, "max_tokens": 4, "stream": True, "tools": [tool]}),
                ("/v1/completions", {"prompt": SECRET, "max_tokens": 4, "stop": [SECRET], "echo": True}),
                ("/v1/responses", {"input": SECRET, "max_output_tokens": 4}),
                ("/tokenize", {"prompt": SECRET})]:
            assert ask(path, body) == 200, path
        # What is refused, too.
        for body in ({"messages": [{"role": SECRET, "content": SECRET}]}, {"messages": message, "temperature": SECRET},
                     {"messages": message, "model": SECRET}, {"messages": message, "stop": [SECRET] * 99},
                     f'{{"messages": "{SECRET}"'):
            assert 400 <= ask("/v1/chat/completions", body) < 500, body
        assert ask("/v1/chat/completions", {"messages": message}, {"x-api-key": KEY + "x"}) == 401
        assert ask("/v1/completions", {"prompt": SECRET, "max_tokens": 500, "timeout": 0.001}) == 504
        # And what is abandoned.
        host, port = process.address.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as connection:
            payload = json.dumps({"prompt": SECRET, "max_tokens": 500, "stream": True}).encode()
            connection.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-type: application/json\r\n"
                               f"content-length: {len(payload)}\r\n\r\n".encode() + payload)
            connection.recv(100)
    finally:
        assert process.stop() == 0
    lines = [line for line in process.output().splitlines() if line and not line.startswith(("Millrace ", "  "))]
    assert len(lines) > 5
    for line in lines:
        entry = json.loads(line)
        assert set(entry) == {"time", "level", "thread", "message"}, line
    for text in (SECRET, KEY, SECRET.split("-")[0]):
        assert text not in process.output()
