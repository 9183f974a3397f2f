"""What operators see: every role scraped by a real Prometheus, names that its linter accepts, phases that add up, and vLLM's
names for the same."""

import json
import re
import shutil
import subprocess
import urllib.parse

import pytest

import harness

REQUESTS = 6
TOKENS = 5
PROMPTS = [300 + 70 * i for i in range(REQUESTS - 1)] + [200]  # tokens


@pytest.fixture(scope="module")
def watched(logs, long_model, make_prompt):
    """P, D and a gateway after REQUESTS answers of TOKENS tokens each, one of them a stream, and one that was refused."""
    directory = logs / "metrics"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model)
    for i in range(REQUESTS - 1):
        harness.complete(cluster.address, make_prompt(PROMPTS[i], i), max_tokens=TOKENS, ignore_eos=True)
    list(harness.stream(cluster.address, {"prompt": make_prompt(PROMPTS[-1], 9), "max_tokens": TOKENS, "ignore_eos": True}))
    assert harness.request(cluster.address, "POST", "/v1/completions", {})[0] == 400
    # A request's end is counted after its last byte.
    harness.wait_until(lambda: harness.metric(cluster.address, "millrace_requests_total", outcome="ok") == REQUESTS, 30, "counted")
    yield cluster
    cluster.stop()


def pages(cluster):
    """{role: (address, page)}"""
    addresses = {"gateway": cluster.address, "prefill": cluster.workers["prefill"][0].metrics_address,
                 "decode": cluster.workers["decode"][0].metrics_address}
    return {role: (address, harness.request(address, "GET", "/metrics")[2]) for role, address in addresses.items()}


def test_what_the_gateway_counted(watched):
    def value(name, **labels):
        return harness.metric(watched.address, name, **labels)

    for name in ("time_to_first_token_seconds", "request_seconds", "time_per_output_token_seconds", "request_prompt_tokens"):
        assert value(f"millrace_{name}_count") == REQUESTS, name
    assert value("millrace_inter_token_seconds_count") == REQUESTS * (TOKENS - 1)
    assert value("millrace_request_output_tokens_sum") == REQUESTS * TOKENS
    assert value("millrace_answers_total", finished_reason="length") == REQUESTS
    assert value("millrace_http_requests_total", path="/v1/completions", status="400") == 1
    assert value("millrace_gateway_running") == value("millrace_gateway_waiting") == 0

    phases = ["queue", "grant_wait", "compute", "post", "wire", "commit", "first_decode", "decode"]
    for phase in phases:
        assert value("millrace_request_phase_seconds_count", phase=phase) == REQUESTS, phase
    seconds = {phase: value("millrace_request_phase_seconds_sum", phase=phase) for phase in phases}
    # What the phases leave out of the time to the first token is the wires between the roles; nothing is counted twice.
    to_first = seconds["queue"] + seconds["grant_wait"] + seconds["compute"]
    assert 0 < to_first <= value("millrace_time_to_first_token_seconds_sum")
    assert seconds["post"] + seconds["wire"] + seconds["commit"] + seconds["first_decode"] <= seconds["decode"] + 0.05 * REQUESTS
    assert seconds["compute"] > 0 and seconds["commit"] > 0


def test_what_came_from_which_peer(watched, long_model):
    """On the decode worker, by prefill worker; and the queues of both, empty now."""
    decode, prefill = (watched.workers[role][0] for role in ("decode", "prefill"))
    config = json.loads((long_model / "config.json").read_text())
    layers = config["num_hidden_layers"] + config["num_nextn_predict_layers"]
    value = lambda name: harness.metric(decode.metrics_address, name, peer=prefill.address)  # noqa: E731
    for name in ("wire_seconds", "post_seconds", "bytes", "pieces"):
        assert value(f"millrace_kv_{name}_count") == REQUESTS, name
    assert value("millrace_kv_pieces_sum") == layers * sum(-(-tokens // 64) for tokens in PROMPTS)
    assert value("millrace_kv_bytes_sum") == harness.metric(prefill.metrics_address, "millrace_worker_transfer_bytes_total") > 0
    assert value("millrace_kv_wire_seconds_sum") > 0 == value("millrace_kv_failures_total")
    for worker, queues in ((prefill, ("prefill_prealloc", "prefill_inflight")), (decode, ("decode_prealloc", "decode_transfer"))):
        for queue in queues:
            # A ticket goes a moment after the answer's last byte.
            harness.wait_until(lambda: re.search(rf'^millrace_worker_queue\{{queue="{queue}"\}} 0$', harness.request(
                worker.metrics_address, "GET", "/metrics")[2], re.M), 10, f"{queue} is not empty")


def test_pairs_can_be_compared(watched, long_model):
    told = {}
    for role, (_, page) in pages(watched).items():
        (labels,) = re.findall(r"^millrace_build_info\{(.*)\} 1$", page, re.M)
        told[role] = dict(re.findall(r'(\w+)="(.*?)"', labels))
    assert all(info["version"] for info in told.values()) and [told[role]["role"] for role in told] == list(told)
    for label in ("model", "model_digest", "kv_layout", "protocol"):
        assert told["prefill"][label] == told["decode"][label] != "", label
    assert re.fullmatch("[0-9a-f]{16}", told["decode"]["kv_layout"]) and told["decode"]["model"] == long_model.name


def test_names_are_as_prometheus_wants_them(watched):
    """promtool on our own names; vLLM's have colons, which it takes for recording rules."""
    promtool = shutil.which("promtool")
    assert promtool, "promtool is missing: deploy/packages --tests installs it"
    for role, (_, page) in pages(watched).items():
        # The exposer of prometheus-cpp tells of itself in microseconds.
        ours = "".join(line + "\n" for line in page.splitlines() if not re.search(r"\b(vllm:|sglang:|exposer_)", line))
        done = subprocess.run([promtool, "check", "metrics"], input=ours, capture_output=True, text=True)
        assert done.returncode == 0, f"{role}: {done.stdout}{done.stderr}"
        assert re.search(rf'^millrace_build_info\{{.*role="{role}".*\}} 1$', page, re.M), role


VLLM_ON_WORKERS = ["num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "prefix_cache_queries_total",
                   "prefix_cache_hits_total", "prompt_tokens_total", "generation_tokens_total", "num_preemptions_total",
                   "iteration_tokens_total_count", "cache_config_info", "spec_decode_num_drafts_total",
                   "spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total",
                   "spec_decode_num_accepted_tokens_per_pos_total"]
VLLM_ON_DECODE = [*VLLM_ON_WORKERS, "nixl_xfer_time_seconds_count", "nixl_post_time_seconds_count", "nixl_bytes_transferred_sum",
                  "nixl_num_descriptors_sum"]
VLLM_ON_GATEWAY = ["time_to_first_token_seconds_count", "inter_token_latency_seconds_count", "e2e_request_latency_seconds_count",
                   "request_time_per_output_token_seconds_count", "request_queue_time_seconds_count", "request_prefill_time_seconds_count",
                   "request_decode_time_seconds_count", "request_inference_time_seconds_count", "request_prompt_tokens_sum",
                   "request_generation_tokens_sum", "request_max_num_generation_tokens_sum", "request_success_total"]


def test_prometheus_scrapes_all_roles(watched, long_model, tmp_path):
    prometheus = shutil.which("prometheus")
    assert prometheus, "prometheus is missing: deploy/packages --tests installs it"
    targets = {role: address for role, (address, _) in pages(watched).items()}
    config = {"global": {"scrape_interval": "1s"},
              "scrape_configs": [{"job_name": role, "static_configs": [{"targets": [address]}]} for role, address in targets.items()]}
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    address = f"127.0.0.1:{harness.free_port()}"
    log = open(tmp_path / "prometheus.log", "wb")
    process = subprocess.Popen([prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data",
                                f"--web.listen-address={address}"], stdout=log, stderr=log)

    def query(expression):
        """[(labels, value)]"""
        try:
            status, _, text = harness.request(address, "GET", "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))
        except OSError:
            return []
        if status != 200:
            return []
        return [(r["metric"], float(r["value"][1])) for r in json.loads(text)["data"]["result"]]

    try:
        up = lambda: {labels["job"] for labels, value in query("up") if value == 1} == set(targets)  # noqa: E731
        harness.wait_until(up, 60, "every role is scraped", interval=0.2)
        model = long_model.name
        for job, names in (("decode", VLLM_ON_DECODE), ("prefill", VLLM_ON_WORKERS), ("gateway", VLLM_ON_GATEWAY)):
            for name in names:
                found = query(f'{{__name__="vllm:{name}",job="{job}",model_name="{model}",engine="0"}}')
                assert found, f"{job}: vllm:{name}"
        for job, queues in (("prefill", ("prefill_prealloc", "prefill_inflight")), ("decode", ("decode_prealloc", "decode_transfer"))):
            for queue in queues:
                assert query(f'{{__name__="sglang:num_{queue}_queue_reqs",job="{job}"}}'), queue
        assert query('http_requests_total{handler="/v1/completions",method="POST",status="400"}')[0][1] == 1
        for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "request_duration_seconds"):
            assert query(f'gen_ai_server_{name}_count{{gen_ai_request_model="{model}"}}')[0][1] == REQUESTS, name
        for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_duration_seconds", "input_sequence_tokens",
                     "output_sequence_tokens"):
            assert query(f'dynamo_frontend_{name}_count{{model="{model}"}}')[0][1] > 0, name
        # Two names of one thing.
        for ours, theirs in (('millrace_engine_output_tokens_total{job="decode"}', 'vllm:generation_tokens_total{job="decode"}'),
                             ("millrace_request_output_tokens_sum", "vllm:request_generation_tokens_sum"),
                             ('millrace_request_phase_seconds_sum{phase="compute"}', "vllm:request_prefill_time_seconds_sum")):
            (_, a), (_, b) = query(ours)[0], query(theirs)[0]
            assert a == b > 0, (ours, theirs)
        assert [labels["finished_reason"] for labels, _ in query("vllm:request_success_total")] == ["length"]
        # What a dashboard asks of histograms.
        p99 = query("histogram_quantile(0.99, sum by (le) (millrace_time_to_first_token_seconds_bucket))")
        assert p99 and 0 < p99[0][1] < 640
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def test_vllm_names_can_be_left_out(logs, model):
    directory = logs / "own-names"
    directory.mkdir()
    process = harness.Process(directory, "serve", ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory",
                                                   "32MiB", "--vllm-metrics", "off"]).wait_started()
    page = harness.request(process.address, "GET", "/metrics")[2]
    assert process.stop() == 0
    assert not re.search("vllm:|sglang:|dynamo_", page) and "millrace_build_info" in page
    # Both engines of the one process, told apart by their role.
    for role in ("prefill", "decode"):
        assert re.search(rf'^millrace_engine_kv_used_ratio\{{role="{role}"\}} ', page, re.M), role
        assert re.search(rf'^millrace_worker_queue\{{queue="{role}_prealloc",role="{role}"\}} 0$', page, re.M), role
