"""What test_pods.py runs inside namespaces of its own: an overlay in real containers.

    pods.py OVERLAY BINARY MODEL KUBECTL DIRECTORY

The image is in podman's storage below DIRECTORY. Prints what it saw; exit status 0 when everything held.
"""

import contextlib
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import threading
import time

import kustomize  # first: it says where the others are
import harness
from cluster import Cluster, Podman
from network import DNS_ADDRESS, SERVICE_ADDRESS, Names, Service, listening, reaches

HERE = pathlib.Path(__file__).resolve().parent


class Load:
    """`millrace bench` against the Service while something happens."""

    def __init__(self, binary, address, directory, seconds):
        self.report = pathlib.Path(directory) / f"bench-{time.monotonic_ns()}.json"
        self.process = subprocess.Popen(
            [binary, "bench", "--url", f"http://{address}", "--rate", "2", "--duration", str(seconds), "--grace", "60",
             "--input-tokens", "64:256", "--output-tokens", "32:128", "--json", self.report],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, what):
        """Waits for the end; the load tester has seen to it that nothing failed."""
        within = self.process.poll() is None
        output, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, output
        (level,) = json.loads(self.report.read_text())["levels"]
        (run,) = level["runs"]
        print(f"{what}{'' if within else ' (beyond the load)'}; load: {run['requests']}", flush=True)


def answer(address):
    body = {"model": "ling-tiny", "temperature": 0, "messages": [{"role": "user", "content": "What is a violin?"}]}
    return harness.post(address, "/v1/chat/completions", body)["choices"][0]["message"]["content"]


class Answers:
    """The same question again and again: every text that came back, with how often."""

    def __init__(self, address):
        self.texts, self.address, self.end = {}, address, threading.Event()
        self.failure = None
        self.thread = threading.Thread(target=self._ask)
        self.thread.start()

    def _ask(self):
        try:
            while not self.end.wait(1):
                text = answer(self.address)
                self.texts[text] = self.texts.get(text, 0) + 1
        except Exception as error:  # of the thread: raised where it is waited for
            self.failure = error

    def finish(self):
        self.end.set()
        self.thread.join()
        if self.failure:
            raise self.failure
        return self.texts


def documents(kubectl, overlay):
    rendered = kustomize.render(kubectl, HERE / "overlays" / overlay)
    return json.loads(json.dumps(rendered).replace('"image": "millrace:', '"image": "localhost/millrace:'))


def other_weights(model, directory):
    """The same model with other embeddings, so that it answers otherwise."""
    other = pathlib.Path(directory) / "other-model"
    shutil.copytree(model, other)
    path = other / "model.safetensors"
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    begin, end = json.loads(data[8:8 + size])["model.word_embeddings.weight"]["data_offsets"]
    for at in range(8 + size + begin, 8 + size + end, 2):  # each bfloat16 by a half of its power of two
        data[at] ^= 64
    path.write_bytes(data)
    return other


def committed(cluster):
    """Prompts that decode workers have taken over from prefill workers."""
    return sum(harness.metric(f"{pod.host}:{pod.ports['metrics']}", "millrace_worker_prefill_attempts_total", outcome="committed")
               for pod in cluster.pods["decode"])


def wait_known(cluster):
    """Until every gateway is connected to every worker that runs; how long that took."""
    began = time.monotonic()

    def known():
        hosts = {pod.host for component in ("prefill", "decode") for pod in cluster.pods[component]}
        for gateway in cluster.pods["gateway"]:
            workers = json.loads(harness.request(f"{gateway.host}:{gateway.ports['admin']}", "GET", "/state")[2])["workers"]
            if not hosts <= {re.sub(r":\d+$", "", w["address"]) for w in workers if w["connected"] and w["ready"]}:
                return False
        return True

    harness.wait_until(known, 90, "not every worker is known to every gateway")
    return time.monotonic() - began


def check_ports(cluster):
    """What is open is what the manifests name and the policies speak of; and the policies hold."""
    for pod in cluster.all_pods():
        opened, named = listening(pod), set(pod.ports.values())
        # The ranks of a group have ports for each other besides, which nobody else may reach.
        assert opened == named or "group" in pod.ports and opened > named, (pod.name, opened, named)
    gateway, prefill, decode = (cluster.pods[c][0] for c in ("gateway", "prefill", "decode"))
    for source, target, port, passes in (
            (gateway, decode, "grpc", True), (decode, prefill, "grpc", True), (decode, prefill, "transfer", True),
            (prefill, decode, "transfer", True), (gateway, decode, "transfer", False), (gateway, decode, "metrics", False),
            (decode, gateway, "admin", False), (decode, gateway, "http", False), (prefill, decode, "metrics", False),
            *[(prefill, decode, "group", False)] * ("group" in decode.ports)):
        seen = reaches(source, target.host, target.ports[port])
        assert seen == passes, f"{source.name} to {port} of {target.name}: {'reached' if seen else 'not reached'}"
    print("ports open are those named; network policies in force: ways that must pass do, and those that must not do not", flush=True)


def single_node(cluster, service, *_):
    with ended(cluster):
        (pod,) = cluster.pods["serve"]
        text = answer(service.address)
        assert "instrument" in text, text
        assert listening(pod) == set(pod.ports.values())
        print(f"ready, answers: {text!r}")
        print("init check:", pod.check_log.splitlines()[-1])
        print("ended with", cluster.stop(), flush=True)


def prefill_and_decode(cluster, service, directory, model, binary):
    with ended(cluster):
        text = first_answer(cluster, service)
        check_ports(cluster)
        for component in ("prefill", "decode"):
            killed(cluster, component, Load(binary, service.address, directory, 75))
        replaced(cluster, Load(binary, service.address, directory, 170))
        assert answer(service.address) == text
        upgrade(cluster, directory, model, service, binary, text)
        last_look(cluster)


def expert_groups(cluster, service, directory, model, binary):
    with ended(cluster):
        text = first_answer(cluster, service)
        check_ports(cluster)
        killed(cluster, "decode", Load(binary, service.address, directory, 90))
        replaced(cluster, Load(binary, service.address, directory, 200))
        assert answer(service.address) == text
        last_look(cluster)


def first_answer(cluster, service):
    wait_known(cluster)
    text = answer(service.address)
    assert "instrument" in text, text
    print(f"ready with {({c: len(p) for c, p in cluster.pods.items()})}, answers: {text!r}", flush=True)
    assert committed(cluster) > 0
    return text


def killed(cluster, component, load):
    time.sleep(4)
    began = time.monotonic()
    name = cluster.pods[component][0].name
    cluster.kill(component).wait_ready()
    took = time.monotonic() - began
    used = took + wait_known(cluster)
    load.finish(f"killed {name}, the next one ready after {took:.1f} s, known to every gateway after {used:.0f} s")


def replaced(cluster, load):
    time.sleep(2)
    began = time.monotonic()
    codes = cluster.replace_all()
    load.finish(f"every pod of every role replaced within {time.monotonic() - began:.0f} s, exit codes {codes}")
    assert codes.keys() == cluster.pods.keys() and not any(code for some in codes.values() for code in some), codes
    wait_known(cluster)


def last_look(cluster):
    print("most resident memory of a pod, MiB:", {c: max(p.memory() for p in pods) for c, pods in cluster.pods.items()})
    print("packets that policies dropped (to a pod, from it):", {p.name: cluster.policies.dropped(p) for p in cluster.all_pods()})
    restarts = {p.name: p.restarts_by_liveness for p in cluster.all_pods()}
    assert not any(restarts.values()), restarts
    codes = cluster.stop()
    print("ended with", codes, flush=True)
    assert not any(codes.values())


def upgrade(cluster, directory, model, service, binary, text):
    """Other weights, prefill first: while only these have them nothing is handed over, and every answer is of one model or the other."""
    cluster.model = other_weights(model, directory)
    load, answers = Load(binary, service.address, directory, 250), Answers(service.address)
    codes = cluster.replace("prefill")
    wait_known(cluster)
    before = committed(cluster)
    time.sleep(10)
    handed_over = committed(cluster) - before
    codes += cluster.replace("decode")
    wait_known(cluster)
    before = committed(cluster)
    new = answer(service.address)
    texts = answers.finish()
    load.finish(f"prefill, then decode replaced by other weights, exit codes {codes}")
    assert new != text and set(texts) == {text, new}, texts
    assert handed_over == 0 and committed(cluster) > before
    print(f"hand-overs in 10 s while the two differ: {handed_over:.0f}; the same question: {texts[text]} times the old answer, "
          f"{texts[new]} times the new, nothing else", flush=True)


@contextlib.contextmanager
def ended(cluster):
    """Kills what still runs when something did not hold."""
    try:
        yield
    finally:
        for pod in cluster.all_pods():
            pod.kill()


PARTS = {"single-node": single_node, "pd": prefill_and_decode, "pd-expert-groups": expert_groups}


def main():
    overlay, binary, model, kubectl, directory = sys.argv[1:]
    print(f"== {overlay}", flush=True)
    for address in (DNS_ADDRESS, SERVICE_ADDRESS):
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    names, service = Names(), Service()
    cluster = Cluster(Podman(directory), directory, documents(kubectl, overlay), model, names, service)
    PARTS[overlay](cluster, service, directory, model, binary)


if __name__ == "__main__":
    main()
