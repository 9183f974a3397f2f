"""One trace over gateway, prefill, transfer and decode, as a collector with OpenTelemetry's own messages sees it."""

import json
import re
import subprocess
import threading
import time
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import harness

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7"
STATE = "vendor=abc,other=1"
GENERATE, PREFILL = "millrace.worker.v1.Worker/Generate", "millrace.worker.v1.Worker/Prefill"
SECRET = "zebra-crossing"


class Seen:
    """One span and the process that it came from."""

    def __init__(self, resource, span):
        self.span, self.name = span, span.name
        self.service = resource["service.name"]
        self.process = resource["process.pid"]
        self.id, self.parent = span.span_id.hex(), span.parent_span_id.hex()
        self.trace = span.trace_id.hex()
        self.begin, self.end = span.start_time_unix_nano, span.end_time_unix_nano
        self.attributes = values(span.attributes)

    def __repr__(self):
        return f"{self.service}:{self.name} {self.id} in {self.parent or 'nothing'}"


def value(any_value):
    kind = any_value.WhichOneof("value")
    return [value(v) for v in any_value.array_value.values] if kind == "array_value" else getattr(any_value, kind)


def values(pairs):
    return {pair.key: value(pair.value) for pair in pairs}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, port=0):
        self.spans, self.lock, self.refusals = [], threading.Lock(), 0
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.server.start()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def Export(self, request, context):
        with self.lock:
            if self.refusals:
                self.refusals -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
            for each in request.resource_spans:
                resource = values(each.resource.attributes)
                assert resource["service.version"] and resource["host.name"]
                self.spans += [Seen(resource, span) for scope in each.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace):
        with self.lock:
            return [span for span in self.spans if span.trace == trace]

    def complete(self, trace, count):
        """The spans of a trace when there are `count` of them, and no more a moment later."""
        harness.wait_until(lambda: len(self.of(trace)) >= count, 20, f"{count} spans of {trace}", interval=0.1)
        time.sleep(1.5)
        spans = self.of(trace)
        assert len(spans) == count, spans
        return spans


@pytest.fixture(scope="module")
def traced(logs, long_model):
    """P, D and a gateway that trace, and their collector."""
    directory = logs / "traces"
    directory.mkdir()
    collector = Collector()
    cluster = harness.Cluster(directory, long_model, worker_args=["--otlp-endpoint", collector.endpoint],
                              gateway_args=["--otlp-endpoint", collector.endpoint, "--trace-sample", 0, "--grpc-listen", "127.0.0.1:0"])
    yield cluster, collector
    cluster.stop()
    collector.server.stop(0)


def ask(address, body, sampled=True, trace=TRACE, **headers):
    parent = f"00-{trace}-{PARENT}-{'01' if sampled else '00'}"
    status, _, text = harness.request(address, "POST", "/v1/completions", {"temperature": 0, "max_tokens": 4, "ignore_eos": True, **body},
                                      {"traceparent": parent, **headers})
    assert status == 200, text
    return json.loads(text)


def only(spans, name, kind=None):
    found = [span for span in spans if span.name == name and kind in (None, span.span.kind)]
    assert len(found) == 1, (name, spans)
    return found[0]


def test_one_trace_through_all_roles(traced, long_model, make_prompt):
    cluster, collector = traced
    answer = ask(cluster.address, {"prompt": make_prompt(400)}, tracestate=STATE)
    spans = collector.complete(TRACE, 11)

    root = only(spans, f"text_completion {long_model.name}")
    called = only(spans, GENERATE, Span.SPAN_KIND_CLIENT)
    served = only(spans, GENERATE, Span.SPAN_KIND_SERVER)
    handed = only(spans, PREFILL, Span.SPAN_KIND_CLIENT)
    taken = only(spans, PREFILL, Span.SPAN_KIND_SERVER)
    tree = {root: (PARENT, "millrace-gateway"), only(spans, "queue"): (root.id, "millrace-gateway"), called: (root.id, "millrace-gateway"),
            served: (called.id, "millrace-decode"), handed: (served.id, "millrace-decode"),
            only(spans, "grant_wait"): (handed.id, "millrace-decode"), only(spans, "commit"): (handed.id, "millrace-decode"),
            only(spans, "decode"): (served.id, "millrace-decode"), taken: (handed.id, "millrace-prefill"),
            only(spans, "prefill"): (taken.id, "millrace-prefill"), only(spans, "kv_transfer"): (taken.id, "millrace-prefill")}
    assert set(tree) == set(spans)
    for span, (parent, service) in tree.items():
        assert (span.parent, span.service) == (parent, service), span
        assert span.span.trace_state == STATE and span.span.status.code == Status.STATUS_CODE_UNSET, span
    assert root.span.kind == Span.SPAN_KIND_SERVER
    assert len({span.process for span in spans}) == 3

    # All on one machine: what was asked for lies within what asked. The clocks are read at different moments: a millisecond.
    by_id = {span.id: span for span in spans}
    for span in spans:
        assert span.begin <= span.end, span
        if span is not root:
            outer = by_id[span.parent]
            assert outer.begin - 1e6 <= span.begin and span.end <= outer.end + 1e6, (span, outer)
    order = [only(spans, name) for name in ("grant_wait", "prefill", "commit", "decode")]
    for before, after in zip(order, order[1:]):
        assert before.end <= after.begin + 1e6 or before.name == "grant_wait", (before, after)
    transfer = only(spans, "kv_transfer")
    assert transfer.end <= only(spans, "commit").begin + 1e6
    config = json.loads((long_model / "config.json").read_text())
    pages = -(-400 // 64)
    assert transfer.attributes["millrace.pieces"] == pages * (config["num_hidden_layers"] + config["num_nextn_predict_layers"]) and transfer.attributes["millrace.bytes"] > 0

    expected = {"gen_ai.operation.name": "text_completion", "gen_ai.provider.name": "millrace", "gen_ai.request.model": long_model.name,
                "gen_ai.response.model": long_model.name, "gen_ai.response.id": answer["id"], "gen_ai.response.finish_reasons": ["length"],
                "gen_ai.usage.input_tokens": 400, "gen_ai.usage.output_tokens": 4}
    assert {k: root.attributes.get(k) for k in expected} == expected
    assert called.attributes["server.address"] == cluster.workers["decode"][0].address
    assert handed.attributes["server.address"] == cluster.workers["prefill"][0].address
    assert only(spans, "prefill").attributes["millrace.prompt_tokens"] == 400


def test_the_flag_decides_and_nothing_else(traced, make_prompt):
    cluster, collector = traced
    before = len(collector.spans)
    silent = "1" * 32
    ask(cluster.address, {"prompt": make_prompt(100)}, sampled=False, trace=silent)
    harness.complete(cluster.address, make_prompt(100), max_tokens=2)  # --trace-sample 0: no trace of its own
    for broken in ("00-xyz", f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE.upper()}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01"):
        assert harness.request(cluster.address, "POST", "/v1/completions", {"prompt": "hi", "max_tokens": 1},
                               {"traceparent": broken})[0] == 200
    last = "2" * 32
    ask(cluster.address, {"prompt": make_prompt(100)}, trace=last)
    collector.complete(last, 11)
    with collector.lock:
        assert {span.trace for span in collector.spans[before:]} == {last}


def test_text_stays_out_and_failures_show(traced, long_model):
    cluster, collector = traced
    trace = "3" * 32
    chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 3, "ignore_eos": True, "user": SECRET}
    assert harness.request(cluster.address, "POST", "/v1/chat/completions", chat, {"traceparent": f"00-{trace}-{PARENT}-01"})[0] == 200
    root = only(collector.complete(trace, 11), f"chat {long_model.name}")
    assert root.attributes["gen_ai.operation.name"] == "chat"
    with collector.lock:
        assert all(SECRET not in str(span.span) for span in collector.spans)

    late = "4" * 32
    status, _, _ = harness.request(cluster.address, "POST", "/v1/completions",
                                   {"prompt": "Once", "max_tokens": 8000, "ignore_eos": True, "timeout": 0.3},
                                   {"traceparent": f"00-{late}-{PARENT}-01"})
    assert status == 504
    name = f"text_completion {long_model.name}"
    harness.wait_until(lambda: [s for s in collector.of(late) if s.name == name], 20, "the failed request")
    root = only(collector.of(late), name)
    assert root.span.status.code == Status.STATUS_CODE_ERROR and root.attributes["error.type"] == "DEADLINE_EXCEEDED"


def test_grpc_metadata_carry_it_too(traced, long_model, tmp_path):
    import importlib
    import sys

    cluster, collector = traced
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{harness.ROOT / 'proto'}", f"--python_out={tmp_path}",
                    f"--grpc_python_out={tmp_path}", "chat.proto"], check=True)
    sys.path.insert(0, str(tmp_path))
    pb, stubs = importlib.import_module("chat_pb2"), importlib.import_module("chat_pb2_grpc")
    address = re.search(r"gRPC: (\S+)", cluster.gateway.output()).group(1)
    trace = "5" * 32
    with grpc.insecure_channel(address) as channel:
        stubs.ChatStub(channel).Complete(pb.CompleteRequest(text="hi", max_tokens=2, ignore_eos=True),
                                         metadata=[("traceparent", f"00-{trace}-{PARENT}-01"), ("tracestate", STATE)])
    spans = collector.complete(trace, 11)
    assert only(spans, f"text_completion {long_model.name}").parent == PARENT
    assert all(span.span.trace_state == STATE for span in spans)


def test_a_worker_that_fails_is_in_the_trace(logs, long_model, make_prompt):
    """The prefill worker is gone: the attempt with it shows as failed, and D's own prefill after it."""
    directory = logs / "traces-failure"
    directory.mkdir()
    collector = Collector()
    endpoint = ["--otlp-endpoint", collector.endpoint]
    cluster = harness.Cluster(directory, long_model, worker_args=endpoint, gateway_args=endpoint)
    try:
        cluster.workers["prefill"][0].popen.send_signal(19)  # frozen: the gateway does not know yet
        ask(cluster.address, {"prompt": make_prompt(300)})
        spans = collector.complete(TRACE, 7)
        handed = only(spans, PREFILL, Span.SPAN_KIND_CLIENT)
        assert handed.span.status.code == Status.STATUS_CODE_ERROR and handed.attributes["error.type"] == "UNAVAILABLE"
        served = only(spans, GENERATE, Span.SPAN_KIND_SERVER)
        local = only(spans, "prefill")
        assert local.parent == served.id and local.service == "millrace-decode"
        assert served.span.status.code == Status.STATUS_CODE_UNSET
    finally:
        cluster.workers["prefill"][0].popen.send_signal(18)
        cluster.stop()
        collector.server.stop(0)


def test_serving_does_not_need_the_collector(logs, model):
    """Nobody listens, then somebody who refuses twice, then it works: no request notices, and no span that fits is lost."""
    directory = logs / "traces-alone"
    directory.mkdir()
    port = harness.free_port()
    process = harness.Process(directory, "serve", ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory",
                                                   "32MiB", "--otlp-endpoint", f"http://127.0.0.1:{port}"]).wait_started()
    collector = None
    try:
        harness.wait_ready(process.address)
        for _ in range(3):
            harness.complete(process.address, "Once", max_tokens=2)
        harness.wait_until(lambda: "traces do not go to" in process.output(), 20, "the complaint")
        collector = Collector(port)
        collector.refusals = 1
        count = lambda outcome: harness.metric(process.address, "millrace_trace_spans_total", outcome=outcome)  # noqa: E731
        harness.wait_until(lambda: count("sent") == 3 * 11, 40, "the spans", interval=0.1)
        assert count("dropped") == count("failed") == 0
        assert process.output().count("traces do not go to") == 1 and "again" in process.output()
        roots = [span for span in collector.spans if not span.parent]
        assert len(roots) == 3 and len({span.trace for span in roots}) == 3, "each request began a trace of its own"
        assert {span.service for span in collector.spans} == {"millrace"}
        # What has ended is still sent when the process ends.
        before = len(collector.spans)
        harness.complete(process.address, "Once", max_tokens=2)
    finally:
        assert process.stop() == 0, process.output()[-4000:]
    assert len(collector.spans) > before
    collector.server.stop(0)


def test_an_endpoint_that_is_none_refuses_to_start(model):
    for endpoint in ("127.0.0.1:4317", "http://", "ftp://x:1", "http://host"):
        done = subprocess.run([harness.binary(), "serve", "--model", str(model), "--listen", "127.0.0.1:0", "--otlp-endpoint", endpoint],
                              capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "OTLP" in done.stderr, (endpoint, done)
