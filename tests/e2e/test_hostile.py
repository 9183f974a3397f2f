"""What hostile or broken clients do, the stated result of each, and that nothing is left of any: no open file, no request."""

import http.client
import json
import os
import socket
import ssl

import pytest

import harness
from certificates import make_certificate
from test_bad_input import check_error, connect, read_all, split_answer

TEXT = "/v1/completions"
KEY = "sk-honest-0123456789"


def start(logs, name, model, *args):
    directory = logs / name
    directory.mkdir()
    return harness.Process(directory, name, ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory",
                                             "32MiB", "--aggregated", *args]).wait_started()


@pytest.fixture(scope="module")
def open_server(logs, model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"honest {KEY}\n")
    process = start(logs, "hostile", model, "--api-keys", keys)
    harness.wait_ready(process.address)
    yield process
    assert process.stop() == 0, process.output()[-4000:]


@pytest.fixture
def served(open_server):
    """The server's address; afterwards it has no file open that it had not before, and makes no answer."""
    def files():
        return len(os.listdir(f"/proc/{open_server.popen.pid}/fd"))

    def idle():
        status, _, text = harness.request(open_server.address, "GET", "/load", headers={"x-api-key": KEY})
        return status == 200 and not any(json.loads(text).values())

    harness.wait_until(idle, 30, "idle before")
    before = files()
    yield open_server.address
    harness.wait_until(idle, 60, "every answer has ended")
    # The connection that asked is closed by then, or about to be.
    harness.wait_until(lambda: files() <= before, 60, f"no more than {before} files are open")


def header(body, **fields):
    extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return (f"POST {TEXT} HTTP/1.1\r\nhost: x\r\nx-api-key: {KEY}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{extra}\r\n").encode()


def test_wrong_keys(served):
    """401 each, however many, and the honest one is served meanwhile."""
    for i in range(100):
        status, _, text = harness.request(served, "POST", TEXT, {"prompt": "hi"}, {"authorization": f"Bearer sk-guess-{i:06}"})
        assert status == 401 and check_error(text)["code"] == "invalid_api_key"
    assert harness.request(served, "POST", TEXT, {"prompt": "hi", "max_tokens": 1}, {"x-api-key": KEY})[0] == 200


def test_floods_of_headers(served):
    """431 as soon as the limit is met, whether many short fields or one that never ends."""
    for flood in (b"".join(b"x-%d: y\r\n" % i for i in range(20_000)), b"x-long: " + b"y" * 1_000_000):
        with connect(served) as connection:
            try:
                connection.sendall(b"GET /live HTTP/1.1\r\nhost: x\r\n" + flood)
            except (BrokenPipeError, ConnectionResetError):
                pass
            answer = read_all(connection)
        if answer:  # lost when the reset overtakes it
            status, body = split_answer(answer)
            assert (status, check_error(body)["code"]) == (431, "headers_too_large")


def test_ten_megabytes(served):
    """A body within the limit is read and judged: a prompt that is too long, nesting that is too deep, neither is a crash."""
    prompt = json.dumps({"prompt": "a b " * 2_500_000}).encode()
    deep = b'{"prompt": ' + b"[" * 10_000_000
    for body, code in ((prompt, "context_length_exceeded"), (deep, "invalid_value")):
        status, _, text = harness.request(served, "POST", TEXT, body, {"x-api-key": KEY}, timeout=300)
        assert (status, check_error(text)["code"]) == (400, code)


def test_pipelines_that_are_abandoned(served):
    """Two hundred requests in one write, and gone after the first answer: the rest is not answered, nor made."""
    body = json.dumps({"prompt": "Once", "max_tokens": 20, "ignore_eos": True}).encode()
    for _ in range(5):
        with connect(served) as connection:
            connection.sendall((header(body) + body) * 200)
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_half_of_a_body(served):
    """Gone in the middle of a body, or half closed there: no answer, no request."""
    body = json.dumps({"prompt": "Once", "max_tokens": 20}).encode()
    for close in (lambda c: c.close(), lambda c: c.shutdown(socket.SHUT_WR)):
        for cut in (1, len(body) // 2, len(body) - 1):
            with connect(served) as connection:
                connection.sendall(header(body) + body[:cut])
                close(connection)


def test_smuggled_lengths(served):
    """A body whose end two fields tell differently is refused: proxies may read it otherwise."""
    body = b'{"prompt": "hi", "max_tokens": 1}'
    for fields in ({"content_length": 3}, {"transfer_encoding": "chunked"}):
        with connect(served) as connection:
            connection.sendall(header(body, **fields) + body)
            connection.shutdown(socket.SHUT_WR)
            status, text = split_answer(read_all(connection))
        assert status == 400, (fields, text)
        check_error(text)


def test_expired_certificates(logs, model, tmp_path):
    """A client whose certificate has expired does not get past the handshake; one whose certificate is valid does."""
    key, cert = make_certificate(tmp_path, "server")
    make_certificate(tmp_path, "ca")
    good = make_certificate(tmp_path, "client", issuer="ca")
    old = make_certificate(tmp_path, "old", days=-1, issuer="ca")
    process = start(logs, "expired", model, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", tmp_path / "ca.pem")

    def ask(client):
        context = ssl.create_default_context(cafile=str(cert))
        context.load_cert_chain(client[1], client[0])
        connection = http.client.HTTPSConnection(process.address, context=context, timeout=20)
        try:
            connection.request("GET", "/live")
            return connection.getresponse().status
        finally:
            connection.close()

    try:
        assert ask(good) == 200
        files = len(os.listdir(f"/proc/{process.popen.pid}/fd"))
        for _ in range(20):
            with pytest.raises((OSError, http.client.HTTPException)):
                ask(old)
        # Handshakes that nobody goes on with.
        halves = [connect(process.address) for _ in range(20)]
        for half in halves:
            half.sendall(b"\x16\x03\x01\x00\xc8\x01\x00\x00")
            half.close()
        assert ask(good) == 200
        harness.wait_until(lambda: len(os.listdir(f"/proc/{process.popen.pid}/fd")) <= files, 30, "every connection is closed")
    finally:
        assert process.stop() == 0, process.output()[-4000:]
