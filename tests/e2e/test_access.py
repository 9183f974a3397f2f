"""Keys, the admin listener, TLS and CORS: who gets in, who does not, and what changes while the server runs."""

import http.client
import json
import os
import socket
import ssl
import subprocess
import time

import openai
import pytest

import harness
from certificates import make_certificate

CHAT = "/v1/chat/completions"
BODY = {"prompt": "hi", "max_tokens": 1}
ALICE, BOB, CAROL = "sk-alice-0123456789", "sk-bob-9876543210", "sk-carol-5555555555"


def start(logs, name, model, *args):
    directory = logs / name
    directory.mkdir(exist_ok=True)
    return harness.Process(directory, name, ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory",
                                             "32MiB", "--aggregated", *args]).wait_started()


@pytest.fixture(scope="module")
def guarded(logs, model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# who may ask\nalice {ALICE}\n\n{BOB}\n")
    admin = f"127.0.0.1:{harness.free_port()}"
    process = start(logs, "guarded", model, "--api-keys", keys, "--admin-listen", admin, "--cors-origin", "https://app.example")
    process.keys, process.admin = keys, admin
    harness.wait_ready(process.address)
    yield process
    assert process.stop() == 0, process.output()[-4000:]


def status(address, method, path, body=None, **headers):
    return harness.request(address, method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})[0]


def test_everything_but_health_needs_a_key(guarded):
    for path in ("/live", "/ready", "/health"):
        assert status(guarded.address, "GET", path) == 200
    for method, path in [("GET", "/v1/models"), ("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/tokenize"),
                         ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/info"), ("GET", "/load"), ("POST", "/abort"),
                         ("GET", "/invocations"), ("GET", "/no/such/path"), ("GET", "//v1/models"), ("GET", "/live/"),
                         ("OPTIONS", CHAT), ("GET", "/V1/MODELS"), ("GET", "/live/../v1/models")]:
        body = BODY if method == "POST" else None
        for headers in ({}, {"authorization": "Bearer wrong-key-123"}, {"authorization": f"Basic {ALICE}"},
                        {"authorization": "Bearer"}, {"authorization": f"Bearer {ALICE}x"}, {"x_api_key": ALICE[:-1]}):
            got, fields, text = harness.request(guarded.address, method, path, body,
                                                {k.replace("_", "-"): v for k, v in headers.items()})
            assert got == 401, (method, path, headers, text)
            error = json.loads(text)["error"]
            assert error["code"] == "invalid_api_key" and set(error) == {"message", "type", "param", "code"}
            assert fields["www-authenticate"] == "Bearer"
            assert ALICE not in text and "wrong-key" not in text


def test_keys_open(guarded, model):
    for headers in ({"authorization": f"Bearer {ALICE}"}, {"authorization": f"bearer {BOB}"}, {"x_api_key": BOB}):
        assert status(guarded.address, "POST", "/v1/completions", BODY, **headers) == 200
        assert status(guarded.address, "GET", "/no/such/path", **headers) == 404
    client = openai.OpenAI(base_url=f"http://{guarded.address}/v1", api_key=ALICE, max_retries=0)
    assert client.models.list().data[0].id == model.name
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"http://{guarded.address}/v1", api_key="sk-nobody-00000", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"
    assert ALICE not in guarded.output() and BOB not in guarded.output()


def test_a_body_without_a_key_is_not_read(guarded):
    with socket.create_connection(tuple(guarded.address.rsplit(":", 1)), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                           b"content-length: 30000000\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_keys_change_while_running(guarded):
    old = guarded.keys.read_text()
    assert status(guarded.address, "GET", "/v1/models", x_api_key=CAROL) == 401
    guarded.keys.write_text(f"alice {ALICE}\ncarol {CAROL}\n")
    harness.wait_until(lambda: status(guarded.address, "GET", "/v1/models", x_api_key=CAROL) == 200, 10, "the new key")
    assert status(guarded.address, "GET", "/v1/models", x_api_key=BOB) == 401
    guarded.keys.write_text("short\n")  # cannot be used: the keys that were stay
    harness.wait_until(lambda: "the old keys and certificates stay" in guarded.output(), 10, "the complaint")
    assert "keys:1:" in guarded.output() and status(guarded.address, "GET", "/v1/models", x_api_key=CAROL) == 200
    guarded.keys.write_text(old)
    harness.wait_until(lambda: status(guarded.address, "GET", "/v1/models", x_api_key=BOB) == 200, 10, "the old key")


def test_the_admin_listener(guarded):
    for path in ("/metrics", "/info", "/load", "/version", "/ready"):
        assert status(guarded.admin, "GET", path) == 200
    info = json.loads(harness.request(guarded.admin, "GET", "/info")[2])
    assert info["api_keys"] == 2 and info["defaults"]["temperature"] == 1.0 and ALICE not in json.dumps(info)
    for path in (CHAT, "/v1/completions", "/tokenize"):
        assert status(guarded.admin, "POST", path, BODY) == 404
    assert status(guarded.address, "GET", "/metrics", x_api_key=ALICE) == 404
    assert status(guarded.address, "POST", "/abort", {"id": "x"}, x_api_key=ALICE) == 404
    assert status(guarded.admin, "POST", "/abort", {"id": "x"}) == 404 and status(guarded.admin, "POST", "/abort", {}) == 400


def test_abort(guarded):
    body = {"prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection(guarded.address, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json", "x-api-key": ALICE})
    response = connection.getresponse()
    name = json.loads(response.readline()[6:])["id"]
    assert status(guarded.admin, "POST", "/abort", {"id": name}) == 200
    with pytest.raises(http.client.IncompleteRead) as caught:  # an error frame, then the connection breaks off
        response.read()
    assert b'"error"' in caught.value.partial and b"[DONE]" not in caught.value.partial
    harness.wait_until(lambda: json.loads(harness.request(guarded.admin, "GET", "/load")[2])["server_load"] == 0, 10, "idle")


def test_cors(guarded):
    for origin, allowed in [("https://app.example", True), ("https://evil.example", False), ("null", False)]:
        got, headers, _ = harness.request(guarded.address, "OPTIONS", CHAT, headers={
            "origin": origin, "access-control-request-method": "POST"})
        assert (got == 204) == allowed and (headers.get("access-control-allow-origin") == origin) == allowed
        got, headers, _ = harness.request(guarded.address, "POST", "/v1/completions", BODY,
                                          {"origin": origin, "x-api-key": ALICE})
        assert got == 200 and (headers.get("access-control-allow-origin") == origin) == allowed
        assert "access-control-allow-credentials" not in headers


def test_no_cors_unless_asked_for(server):
    got, headers, _ = harness.request(server.address, "OPTIONS", CHAT, headers={"origin": "https://app.example"})
    assert got == 405 and "access-control-allow-origin" not in headers


def test_tls(logs, model, tmp_path):
    key, cert = make_certificate(tmp_path, "server")
    make_certificate(tmp_path, "ca")
    client_key, client_cert = make_certificate(tmp_path, "client", issuer="ca")
    process = start(logs, "tls", model, "--tls-cert", cert, "--tls-key", key, "--tls-client-ca", tmp_path / "ca.pem")
    try:
        trusting = ssl.create_default_context(cafile=str(cert))
        trusting.load_cert_chain(client_cert, client_key)

        def ask(context, body=BODY):
            connection = http.client.HTTPSConnection(process.address, context=context, timeout=20)
            try:
                connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
                response = connection.getresponse()
                return response.status, response.read()
            finally:
                connection.close()

        harness.wait_until(lambda: ask(trusting)[0] == 200, 20, "an answer over TLS")
        streamed = ask(trusting, {**BODY, "max_tokens": 5, "stream": True})
        assert streamed[0] == 200 and streamed[1].endswith(b"data: [DONE]\n\n")
        with pytest.raises(OSError):  # without a certificate of its own
            ask(ssl.create_default_context(cafile=str(cert)))
        with pytest.raises(ssl.SSLCertVerificationError):  # the client does not know the server
            ask(ssl.create_default_context())
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.load_cert_chain(client_cert, client_key)
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(OSError):
            ask(old)
        with pytest.raises((OSError, http.client.HTTPException)):  # plain HTTP on the TLS port
            harness.request(process.address, "GET", "/live", timeout=10)

        # A client that leaves is noticed under TLS too.
        connection = http.client.HTTPSConnection(process.address, context=trusting, timeout=20)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "Once", "max_tokens": 2000, "ignore_eos": True,
                                                                  "stream": True}), {"content-type": "application/json"})
        connection.getresponse().readline()
        connection.close()

        def load():
            probe = http.client.HTTPSConnection(process.address, context=trusting, timeout=20)
            probe.request("GET", "/load")
            return json.loads(probe.getresponse().read())["server_load"]
        harness.wait_until(lambda: load() == 0, 10, "the abandoned answer ends")

        new_key, new_cert = make_certificate(tmp_path, "renewed")
        os.replace(new_key, key)
        os.replace(new_cert, cert)
        time.sleep(0.1)
        fresh = ssl.create_default_context(cafile=str(cert))
        fresh.load_cert_chain(client_cert, client_key)

        def answers():
            try:
                return ask(fresh)[0] == 200
            except ssl.SSLError:
                return False
        harness.wait_until(answers, 10, "the renewed certificate")
        cert.write_text("nonsense")
        harness.wait_until(lambda: "the old keys and certificates stay" in process.output(), 10, "the complaint")
        assert answers()
    finally:
        assert process.stop() == 0, process.output()[-4000:]


def test_an_expired_certificate_of_the_server(logs, model, tmp_path):
    """It is said in the log, and clients refuse it and are told why, until there is a new one."""
    make_certificate(tmp_path, "ca")
    key, cert = make_certificate(tmp_path, "server", days=-1, issuer="ca")
    process = start(logs, "expired-server", model, "--tls-cert", cert, "--tls-key", key)

    def live():
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        connection = http.client.HTTPSConnection(process.address, context=context, timeout=20)
        try:
            connection.request("GET", "/live")
            return connection.getresponse().status == 200
        finally:
            connection.close()

    try:
        assert f"TLS certificate {cert} expired on " in process.output()
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
            live()
        for file, made in zip((key, cert), make_certificate(tmp_path, "renewed", issuer="ca")):
            os.replace(made, file)

        def answers():
            try:
                return live()
            except ssl.SSLError:
                return False
        harness.wait_until(answers, 10, "the renewed certificate")
    finally:
        assert process.stop() == 0, process.output()[-4000:]


def test_what_cannot_be_used_refuses_to_start(model, tmp_path):
    def refuses(*args):
        done = subprocess.run([harness.binary(), "serve", "--model", str(model), "--listen", "127.0.0.1:0", *map(str, args)],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done
        return done.stderr

    (tmp_path / "empty").write_text("# nobody\n")
    (tmp_path / "twice").write_text(f"{ALICE}\nx {ALICE}\n")
    assert "no-such" in refuses("--api-keys", tmp_path / "no-such")
    assert "holds no key" in refuses("--api-keys", tmp_path / "empty")
    said = refuses("--api-keys", tmp_path / "twice")
    assert "twice:2" in said and ALICE not in said
    key, cert = make_certificate(tmp_path, "one")
    other, _ = make_certificate(tmp_path, "other")
    assert "TLS" in refuses("--tls-cert", cert, "--tls-key", other)
    assert "TLS" in refuses("--tls-cert", tmp_path / "no-such", "--tls-key", key)
    assert "certificate" in refuses("--tls-key", key)
