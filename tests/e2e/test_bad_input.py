"""Whatever a client, an operator or the network gets wrong: a clear error, and the process lives or says why it does not."""

import json
import pathlib
import shutil
import socket
import subprocess
import threading
import time

import pytest

import harness

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module", autouse=True)
def slow_header(server):
    """A client that never finishes its header: opened first, looked at last, because it may take 20 s."""
    connection = connect(server.address)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
    began = time.monotonic()
    answer = {}

    def read():
        connection.settimeout(40)
        answer["bytes"] = read_all(connection)
        answer["seconds"] = time.monotonic() - began

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    yield lambda: (thread.join(40), answer)[1]
    connection.close()


def connect(address):
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(connection):
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def check_error(text, status=None):
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def raw(address, data):
    """Sends bytes; (status, body) of the first answer."""
    with connect(address) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return split_answer(read_all(connection))


def split_answer(data):
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), data[:200]
    return int(head.split()[1]), body.decode()


def chat(**fields):
    return {"messages": USER, **fields}


def text(**fields):
    return {"prompt": "hi", **fields}


BODIES = [
    # path, body, status, code, param
    (CHAT, b"", 400, "invalid_value", None),
    (CHAT, b"{", 400, "invalid_value", None),
    (CHAT, b"{'messages': []}", 400, "invalid_value", None),
    (CHAT, b'{"messages": [], }', 400, "invalid_value", None),
    (CHAT, b"nonsense", 400, "invalid_value", None),
    (CHAT, b"[]", 400, "invalid_value", None),
    (CHAT, b"null", 400, "invalid_value", None),
    (CHAT, b'"text"', 400, "invalid_value", None),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', 400, "invalid_value", None),
    (CHAT, b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', 400, "invalid_value", None),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_value", None),
    (CHAT, b"[" * 100_000, 400, "invalid_value", None),
    (CHAT, b'{"a":' * 1000 + b"1" + b"}" * 1000, 400, "invalid_value", None),
    (CHAT, b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', 400, "invalid_value", ...),
    (CHAT, {}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": None}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": "hi"}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": []}, 400, "invalid_value", "messages"),
    (CHAT, {"messages": [123]}, 400, "invalid_value", "messages[0]"),
    (CHAT, {"messages": [{}]}, 400, "invalid_value", "messages[0].role"),
    (CHAT, {"messages": [{"role": 1, "content": "a"}]}, 400, "invalid_value", "messages[0].role"),
    (CHAT, {"messages": [{"role": "bard", "content": "a"}]}, 400, "invalid_value", "messages[0].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, 400, "invalid_value", "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "invalid_value",
     "messages[0].content[0].type"),
    (CHAT, {"messages": USER + [{"role": "assistant", "content": "a"}] * 2}, 400, "invalid_value", "messages"),
    (CHAT, chat(model=7), 400, "invalid_value", "model"),
    (CHAT, chat(model="other"), 404, "model_not_found", "model"),
    (CHAT, chat(temperature="hot"), 400, "invalid_value", "temperature"),
    (CHAT, chat(temperature=True), 400, "invalid_value", "temperature"),
    (CHAT, chat(temperature=3), 400, "invalid_value", "temperature"),
    (CHAT, chat(top_p=0), 400, "invalid_value", "top_p"),
    (CHAT, chat(top_k=[1]), 400, "invalid_value", "top_k"),
    (CHAT, chat(n=17), 400, "invalid_value", "n"),
    (CHAT, chat(seed="x"), 400, "invalid_value", "seed"),
    (CHAT, chat(max_tokens=0), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=-1), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=1.5), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(max_tokens=10**9), 400, "context_length_exceeded", "max_tokens"),
    (CHAT, chat(max_tokens=10**30), 400, "invalid_value", "max_tokens"),
    (CHAT, chat(stop=5), 400, "invalid_value", "stop"),
    (CHAT, chat(stop=[""]), 400, "invalid_value", "stop"),
    (CHAT, chat(stop=["a"] * 17), 400, "invalid_value", "stop"),
    (CHAT, chat(stream="yes"), 400, "invalid_value", "stream"),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "invalid_value", "stream_options"),
    (CHAT, chat(top_logprobs=1), 400, "invalid_value", "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=99), 400, "invalid_value", "top_logprobs"),
    (CHAT, chat(logit_bias={"a": 1}), 400, "invalid_value", "logit_bias"),
    (CHAT, chat(logit_bias={"1": "x"}), 400, "invalid_value", "logit_bias"),
    (CHAT, chat(tools=[]), 400, "invalid_value", "tools"),
    (CHAT, chat(tools=[{"type": "function", "function": {}}]), 400, "invalid_value", "tools[0]"),
    (CHAT, chat(tool_choice="required"), 400, "invalid_value", "tool_choice"),
    (CHAT, chat(tool_choice={"type": "function", "function": {"name": "f"}}), 400, "invalid_value", "tool_choice"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "invalid_value", "response_format.json_schema"),
    (CHAT, chat(chat_template_kwargs={"x": 1}), 400, "invalid_value", "chat_template_kwargs.x"),
    (CHAT, chat(timeout=-1), 400, "invalid_value", "timeout"),
    (TEXT, {}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ""}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": []}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": {}}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["a", 7]}, 400, "invalid_value", "prompt[1]"),
    (TEXT, {"prompt": [-1]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": [10**9]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": [2**64 - 1]}, 400, "invalid_value", "prompt"),
    (TEXT, {"prompt": [1, "a"]}, 400, "invalid_value", "prompt"),
    (TEXT, text(best_of=2), 400, "invalid_value", "best_of"),
    (TEXT, text(suffix="a"), 400, "invalid_value", "suffix"),
    (TEXT, text(logprobs=99), 400, "invalid_value", "logprobs"),
    (TEXT, text(echo=1), 400, "invalid_value", "echo"),
    (TEXT, text(model="other"), 404, "model_not_found", "model"),
]


@pytest.mark.parametrize("path,body,status,code,param", BODIES, ids=range(len(BODIES)))
def test_bodies(server, path, body, status, code, param):
    got, headers, answer = harness.request(server.address, "POST", path, body)
    assert got == status, answer
    assert headers["content-type"] == "application/json" and headers["x-request-id"]
    error = check_error(answer)
    assert error["code"] == code and error["type"] == "invalid_request_error", error
    assert param is ... or error["param"] == param, error


def test_too_long_prompt_says_both_numbers(server, model, make_prompt):
    context = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    prompt = make_prompt(context + 7)
    for body in ({"prompt": prompt}, {"prompt": prompt[:10], "max_tokens": context + 7}):
        status, _, answer = harness.request(server.address, "POST", TEXT, body)
        error = check_error(answer)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert str(context + 7) in error["message"] and str(context) in error["message"]


def test_routes(server):
    for method, path, status, code in [
            ("GET", "/nothing", 404, "not_found"), ("POST", "/v1/embeddings", 404, "not_found"), ("GET", "/index.html", 404, "not_found"),
            ("GET", "/v1/models/other", 404, "model_not_found"), ("GET", CHAT, 405, "method_not_allowed"),
            ("PUT", TEXT, 405, "method_not_allowed"), ("DELETE", "/v1/models", 405, "method_not_allowed"),
            ("POST", "/health", 405, "method_not_allowed")]:
        got, _, answer = harness.request(server.address, method, path)
        error = check_error(answer)
        assert (got, error["code"]) == (status, code), (method, path, answer)


def test_content_types(server):
    body = json.dumps(text(max_tokens=1))
    for content_type, status in [("text/plain", 415), ("application/x-www-form-urlencoded", 415), ("", 415),
                                 ("application/json; charset=utf-8", 200), ("Application/JSON", 200)]:
        got, _, answer = harness.request(server.address, "POST", TEXT, body, {"content-type": content_type})
        assert got == status, (content_type, answer)
        if status != 200:
            assert check_error(answer)["code"] == "unsupported_media_type"


def test_head(server):
    for path, status in [("/health", 200), ("/v1/models", 200), ("/nothing", 404)]:
        got, headers, answer = harness.request(server.address, "HEAD", path)
        assert (got, answer) == (status, "") and int(headers["content-length"]) > 0


def test_too_large(server):
    with connect(server.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"content-length: 40000000\r\n\r\n" + b"x" * 1_000_000)
        status, body = split_answer(read_all(connection))
    assert (status, check_error(body)["code"]) == (413, "request_too_large")
    with connect(server.address) as connection:  # without a length: the limit is met on the way
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(40):
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass
        status, body = split_answer(read_all(connection))
    assert (status, check_error(body)["code"]) == (413, "request_too_large")
    status, body = raw(server.address, b"GET /health HTTP/1.1\r\nhost: x\r\nx-filler: " + b"y" * 40_000 + b"\r\n\r\n")
    assert (status, check_error(body)["code"]) == (431, "headers_too_large")


def test_garbage(server):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x00" * 64, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n",
                 b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n"):
        with connect(server.address) as connection:
            connection.sendall(data)
            answer = read_all(connection)
        status, body = split_answer(answer)
        assert status == 400, (data, answer)
        check_error(body)
    with connect(server.address) as connection:  # gone in the middle of a body
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
    harness.wait_ready(server.address)


def test_pipelined_requests(server):
    body = json.dumps(text(max_tokens=2, temperature=0)).encode()
    ask = (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
           % len(body)) + body
    with connect(server.address) as connection:
        connection.sendall(ask * 3 + b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        data = read_all(connection)
    assert data.count(b"HTTP/1.1 200 OK") == 4 and data.count(b'"text_completion"') == 3
    assert data.rstrip().endswith(b'{"status":"ok"}')


def test_expect_continue(server):
    body = json.dumps(text(max_tokens=1)).encode()
    with connect(server.address) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"expect: 100-continue\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert b"HTTP/1.1 200 " in read_all(connection)


def test_request_timeout(server, make_prompt):
    status, _, answer = harness.request(server.address, "POST", TEXT, {"prompt": make_prompt(100), "max_tokens": 400,
                                                                      "ignore_eos": True, "timeout": 0.001})
    assert (status, check_error(answer)["code"]) == (504, "deadline_exceeded")


def test_unreachable_workers(logs, model):
    directory = logs / "alone"
    directory.mkdir()
    dead = f"127.0.0.1:{harness.free_port()}"
    gateway = harness.Process(directory, "gateway", ["gateway", "--model", model, "--listen", "127.0.0.1:0", "--decode", dead,
                                                     "--prefill", dead]).wait_started()
    for path in ("/ready", "/health"):
        status, headers, answer = harness.request(gateway.address, "GET", path)
        assert (status, check_error(answer)["code"]) == (503, "service_unavailable") and headers["retry-after"]
    assert harness.request(gateway.address, "GET", "/live")[0] == 200
    for stream in (False, True):
        status, headers, answer = harness.request(gateway.address, "POST", CHAT, chat(stream=stream))
        assert status == 503 and "decode worker" in check_error(answer)["message"] and headers["retry-after"]
    assert gateway.running() and gateway.stop() == 0


def refuses(*args):
    """The command must end by itself with status 1 (2 and more: bad usage); its message."""
    done = subprocess.run([harness.binary(), *map(str, args)], capture_output=True, text=True, timeout=30)
    assert 0 < done.returncode < 128, (args, done.returncode, done.stderr)
    assert done.stderr.strip(), args
    return done


def test_port_in_use(server, model):
    for command in (["serve"], ["gateway", "--decode", "127.0.0.1:1"], ["worker", "--role", "decode"]):
        done = refuses(*command, "--model", model, "--listen", server.address)
        assert done.returncode == 1 and server.address in done.stderr, done.stderr
        assert "in use" in done.stderr.lower(), done.stderr


def test_bad_checkpoints(model, tmp_path):
    assert "no-such-directory" in refuses("serve", "--model", tmp_path / "no-such-directory").stderr
    for name, damage, expected in [
            ("config.json", lambda p: p.unlink(), "config.json"),
            ("config.json", lambda p: p.write_text("{"), "config.json"),
            ("config.json", lambda p: p.write_text('{"architectures": ["LlamaForCausalLM"]}'), "LlamaForCausalLM"),
            ("tokenizer.json", lambda p: p.write_text("[]"), "tokenizer.json"),
            ("tokenizer.json", lambda p: p.unlink(), "tokenizer.json"),
            ("*.safetensors", lambda p: p.write_bytes(p.read_bytes()[:1000]), "safetensors"),
            ("*.safetensors", lambda p: p.write_bytes(b"\xff" * 100), "safetensors")]:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns("*.py", "*.md"))
        damage(next(pathlib.Path(copy).glob(name)))
        for command in ("serve", "inspect"):
            done = refuses(command, "--model", copy)
            assert done.returncode == 1 and expected in done.stderr, (name, command, done.stderr)


def test_bad_options(model):
    for args, expected in [
            (["--kv-memory", "1KiB"], "kv-memory"), (["--kv-memory", "lots"], "lots"), (["--isa", "sse9"], "sse9"),
            (["--precision", "int1"], "int1"), (["--listen", "nonsense"], "nonsense"), (["--log-level", "loud"], "loud"),
            (["--batch-tokens-max", "1"], "batch-tokens-max"), (["--no-such-flag"], "no-such-flag")]:
        assert expected in refuses("serve", "--model", model, *args).stderr
    assert "tidy" in refuses("worker", "--model", model, "--role", "tidy").stderr
    assert "nowhere.invalid" in refuses("worker", "--model", model, "--rail", "nowhere.invalid").stderr


def test_the_server_still_answers(server):
    assert server.running()
    assert harness.post(server.address, TEXT, text(max_tokens=2))["usage"]["completion_tokens"] >= 1


def test_slow_header(slow_header):
    answer = slow_header()
    status, body = split_answer(answer.get("bytes", b""))
    assert (status, check_error(body)["code"]) == (408, "request_timeout")
    assert answer["seconds"] < 30
