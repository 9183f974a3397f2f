"""Mutual TLS between gateways and workers: who belongs to us gets in, nobody else does, and the log says why."""

import os
import subprocess

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import harness
from certificates import make_certificate


def flags(directory, name, ca="ca"):
    return ["--peer-ca", directory / f"{ca}.pem", "--peer-cert", directory / f"{name}.pem", "--peer-key", directory / f"{name}.key"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """ca has signed worker, gateway and expired; foreign has signed stranger."""
    directory = tmp_path_factory.mktemp("peers")
    for authority, signed in (("ca", ["worker", "gateway"]), ("foreign", ["stranger"])):
        make_certificate(directory, authority)
        for name in signed:
            make_certificate(directory, name, issuer=authority)
    make_certificate(directory, "expired", days=-1, issuer="ca")
    return directory


@pytest.fixture(scope="module")
def guarded(logs, long_model, files):
    directory = logs / "peer-tls"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, worker_args=flags(files, "worker"), gateway_args=flags(files, "gateway"))
    yield cluster
    cluster.stop()


def knock(worker, credentials):
    """Asks a worker for its health as somebody with these credentials; None when it answers, else what the caller is told."""
    # The certificates name 127.0.0.1, as grpc's own client wants them to.
    channel = grpc.insecure_channel(worker.address) if credentials is None else grpc.secure_channel(worker.address, credentials)
    with channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            return None
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAVAILABLE, error
            return error.details()


def shown(files, name=None, ca="ca"):
    """Credentials of one who trusts `ca` and shows the certificate called `name`, or none."""
    read = lambda file: (files / file).read_bytes()  # noqa: E731
    pair = (read(f"{name}.key"), read(f"{name}.pem")) if name else (None, None)
    return grpc.ssl_channel_credentials(read(f"{ca}.pem"), *pair)


def test_answers_are_those_without_tls(guarded, cluster, make_prompt):
    prompt = make_prompt(300)
    assert harness.complete(guarded.address, prompt, max_tokens=8) == harness.complete(cluster.address, prompt, max_tokens=8)
    assert guarded.metric("decode", "millrace_worker_prefill_attempts_total", outcome="committed") >= 1, "D asked P over TLS"


def test_only_those_that_our_authority_signed_get_in(guarded, files):
    for role in ("prefill", "decode"):
        worker = guarded.workers[role][0]
        assert knock(worker, shown(files, "gateway")) is None
        assert knock(worker, shown(files, "worker")) is None
        refused = {"plain text": None, "no certificate": shown(files), "a foreign one": shown(files, "stranger"),
                   "an expired one": shown(files, "expired")}
        for what, credentials in refused.items():
            assert knock(worker, credentials), f"{role} let somebody with {what} in"
        for words in ("it does not speak TLS", "it shows no certificate", "not signed by the authorities that this process trusts, or not "
                      "valid at this time"):
            harness.wait_until(lambda: words in worker.output(), 5, words)
    # And nobody trusts a worker whose certificate is not from there.
    assert knock(guarded.workers["decode"][0], shown(files, "stranger", ca="foreign"))


def test_a_gateway_of_strangers_gets_no_worker(guarded, files, long_model):
    args = ["gateway", "--model", long_model, "--listen", "127.0.0.1:0"]
    for role in ("prefill", "decode"):
        args += [f"--{role}", guarded.workers[role][0].address]
    for name, extra, words in (("stranger", flags(files, "stranger", ca="foreign"), "certificate verify failed"), ("plain", [], "")):
        process = harness.Process(guarded.log_dir, f"gateway-{name}", args + extra).wait_started()
        try:
            harness.wait_until(lambda: process.output().count(" is not reachable: ") == 2 and words in process.output(), 20,
                               f"{name}: {process.output()}")
            assert harness.request(process.address, "GET", "/ready")[0] == 503
        finally:
            assert process.stop() == 0


def test_role_needs_them_too(guarded, files):
    worker = guarded.workers["prefill"][0]
    role = lambda *args: subprocess.run([harness.binary(), "role", worker.address, "prefill", *map(str, args)],  # noqa: E731
                                        capture_output=True, text=True, timeout=30)
    assert role().returncode == 1
    assert role(*flags(files, "stranger", ca="foreign")).returncode == 1
    done = role(*flags(files, "gateway"))
    assert done.returncode == 0, done


def test_new_files_are_read_while_running(logs, long_model, tmp_path):
    """Authority and certificate are replaced; whoever had the old ones is out, whoever has the new ones is in."""
    for generation in ("old", "new"):
        make_certificate(tmp_path, f"{generation}-ca")
        make_certificate(tmp_path, f"{generation}-one", issuer=f"{generation}-ca")

    def install(generation):
        for suffix in ("ca.pem", "one.pem", "one.key"):
            (tmp_path / "next").write_bytes((tmp_path / f"{generation}-{suffix}").read_bytes())
            os.replace(tmp_path / "next", tmp_path / suffix)
    install("old")
    directory = logs / "peer-tls-reload"
    directory.mkdir()
    worker = harness.Process(directory, "worker", ["worker", "--model", long_model, "--listen", "127.0.0.1:0", "--threads", 1,
                                                   "--kv-memory", "32MiB", *flags(tmp_path, "one")]).wait_started()
    try:
        old, new = (shown(tmp_path, f"{generation}-one", ca=f"{generation}-ca") for generation in ("old", "new"))
        assert knock(worker, old) is None and knock(worker, new)
        install("new")
        harness.wait_until(lambda: knock(worker, new) is None, 20, "the new certificate")
        assert knock(worker, old)
        (tmp_path / "one.pem").write_text("nonsense")
        assert knock(worker, new) is None, "what cannot be used changes nothing"
    finally:
        assert worker.stop() == 0, worker.output()[-4000:]


def test_what_cannot_be_used_refuses_to_start(long_model, files):
    def refuses(*args):
        done = subprocess.run([harness.binary(), "worker", "--model", str(long_model), "--listen", "127.0.0.1:0", *map(str, args)],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done
        return done.stderr.splitlines()[-1]

    ca, cert, key = "--peer-ca", "--peer-cert", "--peer-key"
    assert "certificate has expired" in refuses(*flags(files, "expired"))
    assert "unable to get local issuer certificate" in refuses(*flags(files, "stranger"))
    assert "needs authorities, a certificate and its key" in refuses(ca, files / "ca.pem")
    assert "worker.pem" in refuses(ca, files / "ca.pem", cert, files / "worker.pem", key, files / "gateway.key")
    assert "no-such" in refuses(ca, files / "no-such", cert, files / "worker.pem", key, files / "worker.key")
    assert "no-such" in refuses(ca, files / "ca.pem", cert, files / "no-such", key, files / "worker.key")
