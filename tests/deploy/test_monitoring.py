"""The alerts fire on what they are for and on nothing else (promtool), and every expression of dashboard, alerts and scaling means
something to a real Prometheus that watches real roles."""

import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
import yaml

import harness


def of_kind(documents, kind):
    return [document for document in documents if document["kind"] == kind]


@pytest.fixture(scope="module")
def groups(overlays):
    (rule,) = of_kind(overlays["pd-operated"], "PrometheusRule")
    return {"groups": rule["spec"]["groups"]}


@pytest.fixture(scope="module")
def dashboard(overlays):
    (config_map,) = [c for c in of_kind(overlays["pd-operated"], "ConfigMap") if c["metadata"]["name"] == "millrace-dashboard"]
    return json.loads(config_map["data"]["millrace.json"])


def panel_expressions(dashboard):
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]


def tool(name):
    path = shutil.which(name)
    assert path, f"{name} is missing: deploy/packages --tests"
    return path


def promtool(*args):
    run = subprocess.run([tool("promtool"), *map(str, args)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_rules_are_sound_and_say_what_to_do(groups, tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(groups))
    assert "SUCCESS" in promtool("check", "rules", path)
    for rule in groups["groups"][0]["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and len(rule["annotations"]["runbook"]) > 40


# A quarter of an hour of a healthy deployment, one sample a minute. Counters in steps per minute.
POD = 'namespace="n",component="decode",instance="d:9100"'
HEALTHY = {
    'up{namespace="n",component="gateway",instance="g:8000"}': "1x30",
    'up{namespace="n",component="prefill",instance="p:9100"}': "1x30",
    f"up{{{POD}}}": "1x30",
    f"millrace_engine_running{{{POD}}}": "3x30",
    f"millrace_engine_steps_total{{{POD}}}": "0+600x30",
    'millrace_http_requests_total{namespace="n",path="/v1/chat/completions",status="200"}': "0+600x30",
    'millrace_http_requests_total{namespace="n",path="/v1/chat/completions",status="503"}': "0+2x30",
    'millrace_http_requests_total{namespace="n",path="/v1/chat/completions",status="429"}': "0+10x30",
    'millrace_http_requests_total{namespace="n",path="/ready",status="503"}': "0+60x30",
    f'millrace_worker_phase_seconds_bucket{{{POD},phase="queue",le="1"}}': "0+600x30",
    f'millrace_worker_phase_seconds_bucket{{{POD},phase="queue",le="10"}}': "0+600x30",
    f'millrace_worker_phase_seconds_bucket{{{POD},phase="queue",le="+Inf"}}': "0+600x30",
    f"millrace_engine_pages{{{POD}}}": "1000x30",
    f"millrace_engine_pages_free{{{POD}}}": "200x30",
    f'millrace_worker_prefill_attempts_total{{{POD},outcome="committed"}}': "0+600x30",
    f'millrace_worker_prefill_attempts_total{{{POD},outcome="failed"}}': "0+6x30",
    f'millrace_transfer_path_trips_total{{{POD},kind="tcp",local="a",remote="b"}}': "0+0x30",
    f'millrace_worker_tickets{{{POD},state="aborting"}}': "1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0 1 0",
}
# What each alert is for: series that differ, and the alerts that must then fire (those that follow are in the list).
FAULTS = {
    "MillraceRoleDown": ({'up{namespace="n",component="prefill",instance="p:9100"}': "1x5 0x25"}, ["MillracePodDown"]),
    "MillracePodDown": ({'up{namespace="n",component="prefill",instance="q:9100"}': "1x5 0x25"}, []),
    "MillraceEngineStalled": ({f"millrace_engine_steps_total{{{POD}}}": "0+600x5 3000x25"}, []),
    "MillraceErrors": ({'millrace_http_requests_total{namespace="n",path="/v1/chat/completions",status="503"}': "0+60x30"}, []),
    "MillraceRefusing": ({'millrace_http_requests_total{namespace="n",path="/v1/chat/completions",status="429"}': "0+60x30"}, []),
    "MillraceQueueing": ({f'millrace_worker_phase_seconds_bucket{{{POD},phase="queue",le="1"}}': "0+300x30"}, []),
    "MillraceKvFull": ({f"millrace_engine_pages_free{{{POD}}}": "20x30"}, []),
    "MillracePrefillFailing": ({f'millrace_worker_prefill_attempts_total{{{POD},outcome="failed"}}': "0+90x30"}, []),
    "MillraceRailTrips": ({f'millrace_transfer_path_trips_total{{{POD},kind="tcp",local="a",remote="b"}}': "0+1x30"}, []),
    "MillraceTicketsStuck": ({f'millrace_worker_tickets{{{POD},state="aborting"}}': "2x30"}, []),
}


def test_each_alert_fires_on_its_fault_and_on_no_other(groups, tmp_path):
    alerts = {rule["alert"] for rule in groups["groups"][0]["rules"]}
    assert alerts == FAULTS.keys(), "an alert without a fault"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    tests = []
    for fault, (changes, others) in [("", ({}, [])), *FAULTS.items()]:
        expected = {fault, *others} - {""}
        tests.append({
            "name": fault or "healthy", "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in {**HEALTHY, **changes}.items()],
            "promql_expr_test": [
                {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": "20m",
                 "exp_samples": [{"labels": "{}", "value": 1}] if alert in expected else []} for alert in sorted(alerts)]})
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", tmp_path / "tests.yaml")


class Prometheus:
    """Debian's, scraping every second what the pod monitor would, with its labels."""

    def __init__(self, directory, targets, rules):
        self.address = f"127.0.0.1:{harness.free_port()}"
        (directory / "rules.yaml").write_text(yaml.safe_dump(rules))
        (directory / "prometheus.yaml").write_text(yaml.safe_dump({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "millrace", "static_configs": [
                {"targets": [address], "labels": {"namespace": "millrace", "component": component}}
                for component, address in targets]}]}))
        self.log = open(directory / "prometheus.log", "wb")
        self.process = subprocess.Popen(
            [tool("prometheus"), f"--config.file={directory}/prometheus.yaml", f"--storage.tsdb.path={directory}/data",
             f"--web.listen-address={self.address}", "--log.level=warn"], stdout=self.log, stderr=self.log)
        harness.wait_until(self._answers, 60, "Prometheus does not answer", interval=0.1)

    def _answers(self):
        try:
            return self.ask("alerts") is not None
        except OSError:
            return False

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.log.close()

    def ask(self, path, **parameters):
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as response:
            return json.load(response)["data"]

    def values(self, expression):
        return self.ask("query", query=expression)["result"]

    def firing(self):
        return {alert["labels"]["alertname"] for alert in self.ask("alerts")["alerts"] if alert["state"] == "firing"}


def quicker(rules):
    """The same rules on a clock that runs 30 times as fast: minutes become two seconds."""
    text = re.sub(r"\[(\d+)m\]", lambda m: f"[{max(4, 2 * int(m[1]))}s]", json.dumps(rules))
    return json.loads(re.sub(r'"for": "(\d+)m"', lambda m: f'"for": "{2 * int(m[1])}s"', text))


def bench(address, seconds, check=True):
    run = subprocess.run([harness.binary(), "bench", "--url", f"http://{address}", "--rate", "4", "--duration", str(seconds),
                          "--input-tokens", "64:200", "--output-tokens", "8:32", "--grace", "60"], capture_output=True, text=True, timeout=200)
    assert not check or run.returncode == 0, run.stdout


def test_expressions_and_alerts_on_a_real_prometheus(overlays, groups, dashboard, tmp_path):
    model = harness.ROOT / "deploy/models/ling-tiny"
    cluster = harness.Cluster(tmp_path, model, rails=["127.0.0.1"])
    workers = [(role, worker) for role in ("prefill", "decode") for worker in cluster.workers[role]]
    targets = [("gateway", cluster.address), *((role, worker.metrics_address) for role, worker in workers)]
    prometheus = Prometheus(tmp_path, targets, quicker(groups))
    try:
        bench(cluster.address, 8)
        harness.wait_until(lambda: len(prometheus.values("up == 1")) == len(targets), 30, "every role is scraped")
        expressions = panel_expressions(dashboard)
        for scaled in of_kind(overlays["pd-operated"], "ScaledObject"):
            expressions += [(scaled["metadata"]["name"], trigger["metadata"]["query"]) for trigger in scaled["spec"]["triggers"]]
        assert len(expressions) > 20
        # The load has ended; a window that still holds it.
        for title, expression in expressions:
            asked = expression.replace("$__rate_interval", "60s").replace("$namespace", "millrace")
            assert prometheus.values(asked), f"{title}: {asked}: no data"
        names = set(re.findall(r"\bmillrace_\w+", json.dumps(groups)))
        known = set(prometheus.ask("label/__name__/values"))
        assert names <= known, f"alerts about metrics that no role has: {names - known}"
        assert prometheus.firing() == set()

        cluster.workers["prefill"][0].kill()
        bench(cluster.address, 3)  # decode prefills by itself
        harness.wait_until(lambda: {"MillraceRoleDown", "MillracePodDown"} <= prometheus.firing(), 60, "alerts of a dead prefill role")
        cluster.workers["decode"][0].kill()
        deadline = time.monotonic() + 60
        while "MillraceErrors" not in prometheus.firing():
            assert time.monotonic() < deadline, f"no alert of server errors; firing: {prometheus.firing()}"
            bench(cluster.address, 2, check=False)
        print("fired:", sorted(prometheus.firing()))
    finally:
        prometheus.stop()
        cluster.stop(check=False)
