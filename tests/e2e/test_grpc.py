"""millrace.v1.Chat with grpc's own client, generated from the .proto file: what HTTP answers, it answers too."""

import importlib
import json
import os
import subprocess
import sys
import threading

import grpc
import jsonschema
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import harness
from certificates import make_certificate

KEY = "sk-grpc-0123456789"
WEATHER = {"type": "object", "properties": {"city": {"type": "string", "description": "Name of the city"}}, "required": ["city"]}


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """(messages, stubs)."""
    out = tmp_path_factory.mktemp("proto")
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{harness.ROOT / 'proto'}", f"--python_out={out}",
                    f"--grpc_python_out={out}", "chat.proto"], check=True)
    sys.path.insert(0, str(out))
    return importlib.import_module("chat_pb2"), importlib.import_module("chat_pb2_grpc")


class Served:
    def __init__(self, process):
        self.process = process
        self.address = process.address
        self.grpc_address = harness.wait_until(lambda: next(
            (line.split()[-1] for line in process.output().splitlines() if line.strip().startswith("gRPC: ")), None), 10,
            "the address of gRPC")


def serve(logs, name, model, *args):
    directory = logs / name
    directory.mkdir()
    process = harness.Process(directory, name, ["serve", "--model", model, "--listen", "127.0.0.1:0", "--grpc-listen", "127.0.0.1:0",
                                                "--threads", 1, "--kv-memory", "64MiB", *args]).wait_started()
    return Served(process)


@pytest.fixture(scope="module")
def served(logs, long_model):
    served = serve(logs, "grpc", long_model)
    harness.wait_ready(served.address)
    yield served
    assert served.process.stop() == 0, served.process.output()[-4000:]


@pytest.fixture(scope="module")
def stub(api, served):
    with grpc.insecure_channel(served.grpc_address) as channel:
        yield api[1].ChatStub(channel)


def user(pb, text):
    return pb.CompleteRequest.Messages(messages=[pb.Message(role="user", content=text)])


def joined(pieces):
    """The choices of a stream, put together as the .proto file says, as {index: (content, reasoning, calls, finish)}."""
    choices = {}
    for piece in pieces:
        for choice in piece.choices:
            content, reasoning, calls, finish = choices.get(choice.index, ("", "", [], ""))
            assert not finish, "nothing comes after a finish"
            for call in choice.message.tool_calls:
                if call.name:
                    calls = calls + [[call.id, call.name, ""]]
                calls[call.index][2] += call.arguments
            choices[choice.index] = (content + choice.message.content, reasoning + choice.message.reasoning_content, calls,
                                     choice.finish_reason)
    return choices


def test_equals_http(api, served, stub):
    pb = api[0]
    over_http = harness.post(served.address, "/v1/chat/completions", {
        "messages": [{"role": "user", "content": "What is a violin?"}], "temperature": 0.9, "seed": 2**63 + 5, "n": 2, "logprobs": True,
        "top_logprobs": 2, "max_tokens": 40, "return_token_ids": True, "logit_bias": {"5": -3}, "presence_penalty": 0.5})
    request = pb.CompleteRequest(messages=user(pb, "What is a violin?"), temperature=0.9, seed=2**63 + 5, n=2, top_logprobs=2,
                                 max_tokens=40, return_token_ids=True, logit_bias={5: -3}, presence_penalty=0.5)
    whole = stub.Complete(request)
    assert whole.id.startswith("chatcmpl-") and whole.model == over_http["model"] and whole.usage.prompt_tokens > 0
    for ours, theirs in zip(whole.choices, over_http["choices"], strict=True):
        assert ours.message.content == theirs["message"]["content"] and ours.finish_reason == theirs["finish_reason"]
        assert list(ours.token_ids) == theirs["token_ids"] and list(ours.prompt_token_ids) == theirs["prompt_token_ids"]
        for a, b in zip(ours.logprobs, theirs["logprobs"]["content"], strict=True):
            assert a.logprob == pytest.approx(b["logprob"], rel=1e-6) and a.token == bytes(b["bytes"])
            assert [bytes(t["bytes"]) for t in b["top_logprobs"]] == [t.token for t in a.top]
    assert whole.usage.completion_tokens == over_http["usage"]["completion_tokens"]
    pieces = list(stub.StreamComplete(request))
    assert len(pieces) > 4 and len({p.id for p in pieces}) == 1
    together = joined(pieces)
    assert [together[i][0] for i in range(2)] == [c.message.content for c in whole.choices]
    assert [t for p in pieces for c in p.choices if c.index == 1 for t in c.token_ids] == list(whole.choices[1].token_ids)
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_text_and_tokens(api, served, stub):
    pb = api[0]
    text = "The violin is"
    over_http = harness.post(served.address, "/v1/completions", {"prompt": text, "temperature": 0, "max_tokens": 12, "echo": True})
    ids = harness.post(served.address, "/tokenize", {"prompt": text})["tokens"]
    for request in (pb.CompleteRequest(text=text, temperature=0, max_tokens=12, echo=True),
                    pb.CompleteRequest(token_ids=pb.CompleteRequest.TokenIds(ids=ids), temperature=0, max_tokens=12, echo=True)):
        answer = stub.Complete(request)
        assert answer.choices[0].message.content == over_http["choices"][0]["text"]
        assert answer.id.startswith("cmpl-")
    scored = stub.Complete(pb.CompleteRequest(text=text, temperature=0, max_tokens=2, echo=True, top_logprobs=1)).choices[0].logprobs
    theirs = harness.post(served.address, "/v1/completions", {"prompt": text, "temperature": 0, "max_tokens": 2, "echo": True,
                                                              "logprobs": 1})["choices"][0]["logprobs"]
    assert not scored[0].HasField("logprob") and theirs["token_logprobs"][0] is None
    assert [t.logprob for t in scored[1:]] == pytest.approx(theirs["token_logprobs"][1:], rel=1e-6)


def test_tools_and_constraints(api, stub):
    pb = api[0]
    request = pb.CompleteRequest(messages=user(pb, "What is the weather in Paris?"), temperature=0, tools=[
        pb.Tool(name="get_weather", description="Get the weather in a city", parameters=json.dumps(WEATHER))])
    whole = stub.Complete(request).choices[0]
    assert whole.finish_reason == "tool_calls" and json.loads(whole.message.tool_calls[0].arguments) == {"city": "Paris"}
    ((_, _, calls, finish),) = joined(stub.StreamComplete(request)).values()
    assert finish == "tool_calls" and [c[1:] for c in calls] == [["get_weather", whole.message.tool_calls[0].arguments]]
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
              "required": ["a", "b"], "additionalProperties": False}
    for seed in range(3):
        answer = stub.Complete(pb.CompleteRequest(messages=user(pb, "hi"), temperature=1.8, seed=seed, structured_outputs=pb.Constraint(
            json=json.dumps(schema)))).choices[0]
        jsonschema.validate(json.loads(answer.message.content), schema)
    answer = stub.Complete(pb.CompleteRequest(messages=user(pb, "hi"), temperature=1.8, structured_outputs=pb.Constraint(
        choice=pb.Constraint.Choices(choices=["yes", "no"]))))
    assert answer.choices[0].message.content in ("yes", "no")


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value, {k: v for k, v in caught.value.trailing_metadata() or ()}


def test_refusals(api, stub):
    pb = api[0]
    hi = user(pb, "hi")
    for request, code, param in [
            (pb.CompleteRequest(), "INVALID_ARGUMENT", "input"),
            (pb.CompleteRequest(messages=hi, temperature=9), "INVALID_ARGUMENT", "temperature"),
            (pb.CompleteRequest(messages=hi, temperature=float("nan")), "INVALID_ARGUMENT", "temperature"),
            (pb.CompleteRequest(messages=hi, n=0), "INVALID_ARGUMENT", "n"),
            (pb.CompleteRequest(messages=hi, model="other"), "NOT_FOUND", "model"),
            (pb.CompleteRequest(messages=pb.CompleteRequest.Messages(messages=[pb.Message(role="bard", content="a")])),
             "INVALID_ARGUMENT", "messages[0].role"),
            (pb.CompleteRequest(messages=hi, tools=[pb.Tool(name="f", parameters="{")]), "INVALID_ARGUMENT", "tools[0].parameters"),
            (pb.CompleteRequest(messages=hi, structured_outputs=pb.Constraint(regex="(")), "INVALID_ARGUMENT",
             "structured_outputs.regex"),
            (pb.CompleteRequest(text=""), "INVALID_ARGUMENT", "prompt"),
            (pb.CompleteRequest(messages=hi, max_tokens=10**9), "INVALID_ARGUMENT", "max_tokens")]:
        for call in (stub.Complete, lambda r: list(stub.StreamComplete(r))):
            error, trailing = refused(lambda: call(request))
            assert error.code().name == code and trailing["error-param"] == param and trailing["error-code"], (request, error)


def test_request_id(api, stub):
    pb = api[0]
    _, call = stub.Complete.with_call(pb.CompleteRequest(messages=user(pb, "hi"), max_tokens=1), metadata=[("x-request-id", "mine.1")])
    assert dict(call.initial_metadata())["x-request-id"] == "mine.1"
    _, call = stub.Complete.with_call(pb.CompleteRequest(messages=user(pb, "hi"), max_tokens=1), metadata=[("x-request-id", "a b")])
    assert dict(call.initial_metadata())["x-request-id"].startswith("req-")


def quiet(served):
    harness.wait_until(lambda: not any(json.loads(harness.request(served.address, "GET", "/load")[2]).values()), 30,
                       "everything is over")


def test_cancel_and_deadline(api, served, stub, make_prompt):
    pb = api[0]
    long = dict(token_ids=pb.CompleteRequest.TokenIds(ids=make_prompt(64)), max_tokens=12000, ignore_eos=True)
    stream = stub.StreamComplete(pb.CompleteRequest(**long))
    next(stream)
    stream.cancel()
    quiet(served)
    waiting = stub.Complete.future(pb.CompleteRequest(**long))
    harness.wait_until(lambda: json.loads(harness.request(served.address, "GET", "/load")[2])["running"], 30, "it runs")
    waiting.cancel()
    quiet(served)
    for call in (stub.Complete, lambda r, timeout: list(stub.StreamComplete(r, timeout=timeout))):
        error, _ = refused(lambda: call(pb.CompleteRequest(**long), timeout=0.5))
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    quiet(served)


def test_many_at_once(api, stub):
    """Answers do not get mixed: each of 24 streams equals its own whole answer."""
    pb = api[0]
    requests = [pb.CompleteRequest(messages=user(pb, f"What is number {i}?"), temperature=1, seed=i, max_tokens=12) for i in range(24)]
    whole = [stub.Complete(r).choices[0].message.content for r in requests]
    streams = harness.in_threads([lambda r=r: joined(stub.StreamComplete(r))[0][0] for r in requests])
    assert streams == whole


def test_health_and_reflection(served):
    with grpc.insecure_channel(served.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "millrace.v1.Chat"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        assert "millrace.v1.Chat" in [s.name for s in answer.list_services_response.service]


def load(url, *args):
    return subprocess.run([harness.binary(), "bench", "--url", url, "--users", "3", "--requests", "12", "--input-tokens", "20:60",
                           "--output-tokens", "9", *map(str, args)], capture_output=True, text=True, timeout=60)


def test_the_load_tester_speaks_it(served, tmp_path):
    out = tmp_path / "report.json"
    for endpoint in ("chat", "completions"):
        for flags, streams in (((), True), (("--no-stream",), False)):
            done = load(f"grpc://{served.grpc_address}", "--endpoint", endpoint, "--json", out, *flags)
            assert done.returncode == 0, done.stdout + done.stderr
            report = json.loads(out.read_text())
            run = report["levels"][0]["runs"][0]
            assert run["requests"]["served"] == 12 and run["tokens"]["output_mean"] == 9 and report["model"]
            assert 20 <= run["tokens"]["prompt_mean"] <= 90
            if streams:
                assert run["latency"]["itl"]["count"] == 12 * 8 and run["latency"]["ttft"]["mean"] < run["latency"]["e2e"]["mean"]
    for url, flags, expected in ((f"grpc://{served.grpc_address}/v1", (), "no path"), (f"grpc://127.0.0.1:{harness.free_port()}", (), "refused"),
                                 (f"grpc://{served.grpc_address}", ("--model", "absent"), "absent")):
        done = load(url, *flags)
        assert done.returncode == 2 and expected in done.stderr, done.stderr
    done = load(f"grpc://{served.grpc_address}", "--body", '{"nonsense": 1}')
    assert done.returncode == 1 and "nonsense" in done.stdout


def test_keys_and_tls(api, logs, model, tmp_path):
    pb, stubs = api
    key, certificate = make_certificate(tmp_path, "first")
    keys = tmp_path / "keys"
    keys.write_text(f"somebody {KEY}\n")
    served = serve(logs, "grpc-tls", model, "--aggregated", "--api-keys", keys, "--tls-cert", certificate, "--tls-key", key)
    try:
        request = pb.CompleteRequest(messages=user(pb, "hi"), max_tokens=2)
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(served.grpc_address, credentials) as channel:
            stub = stubs.ChatStub(channel)
            for metadata in ((), (("authorization", "Bearer wrong"),), (("x-api-key", KEY + "0"),)):
                error, trailing = refused(lambda: stub.Complete(request, metadata=metadata))
                assert error.code() == grpc.StatusCode.UNAUTHENTICATED and trailing["error-code"] == "invalid_api_key"
            harness.wait_until(lambda: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status ==
                               health_pb2.HealthCheckResponse.SERVING, 30, "ready")
            for metadata in ((("authorization", f"Bearer {KEY}"),), (("x-api-key", KEY),)):
                assert stub.Complete(request, metadata=metadata).usage.completion_tokens >= 1
        done = load(f"grpcs://{served.grpc_address}", "--cacert", certificate, "--api-key", KEY)
        assert done.returncode == 0, done.stderr
        done = load(f"grpcs://{served.grpc_address}", "--api-key", KEY)  # not a certificate of the system's
        assert done.returncode == 2, done.stdout
        with grpc.insecure_channel(served.grpc_address) as channel:
            error, _ = refused(lambda: stubs.ChatStub(channel).Complete(request, timeout=5))
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        for file, made in zip((key, certificate), make_certificate(tmp_path, "second")):
            os.replace(made, file)

        def speaks_the_new_one():
            with grpc.secure_channel(served.grpc_address, grpc.ssl_channel_credentials(certificate.read_bytes())) as channel:
                try:
                    return stubs.ChatStub(channel).Complete(request, metadata=(("x-api-key", KEY),), timeout=5).id
                except grpc.RpcError:
                    return None
        harness.wait_until(speaks_the_new_one, 30, "the new certificate", interval=0.2)
        assert KEY not in served.process.output()
    finally:
        assert served.process.stop() == 0


def test_shutdown_lets_answers_finish(api, logs, model):
    pb, stubs = api
    served = serve(logs, "grpc-drain", model, "--aggregated")
    harness.wait_ready(served.address)
    with grpc.insecure_channel(served.grpc_address) as channel:
        stub = stubs.ChatStub(channel)
        stream = stub.StreamComplete(pb.CompleteRequest(text="a", max_tokens=150, ignore_eos=True))
        next(stream)
        ending = threading.Thread(target=served.process.stop)
        ending.start()
        pieces = list(stream)
        ending.join()
        assert pieces[-1].choices[0].finish_reason == "length" and served.process.popen.returncode == 0
