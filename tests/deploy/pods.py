"""What test_pods.py runs inside namespaces of its own: the image, the single-node and the P/D overlay in real containers.

    pods.py BINARY MODEL KUBECTL DIRECTORY

Prints what it saw; exit status 0 when everything held.
"""

import json
import pathlib
import subprocess
import sys
import time

import kustomize  # first: it says where the others are
import harness
from cluster import DNS_ADDRESS, SERVICE_ADDRESS, Cluster, Names, Podman, Service

HERE = pathlib.Path(__file__).resolve().parent
IMAGE = "localhost/millrace:0.1.0"


def build_image(podman, binary, directory):
    """The last stage of deploy/Containerfile, with the root file system that its first stage would lay out."""
    context = pathlib.Path(directory) / "context"
    stripped = pathlib.Path(directory) / "millrace"
    subprocess.run(["strip", "-o", stripped, binary], check=True)
    subprocess.run([kustomize.ROOT / "deploy/image-root", stripped, context / "image"], check=True)
    stage = (kustomize.ROOT / "deploy/Containerfile").read_text().split("FROM scratch", 1)[1]
    (context / "Containerfile").write_text("FROM scratch" + stage.replace("COPY --from=build /image /", "COPY image /"))
    podman("build", "--file", context / "Containerfile", "--tag", IMAGE, context)
    return podman("image", "inspect", IMAGE, "--format", "{{.Size}}")


class Load:
    """`millrace bench` against the Service while something happens."""

    def __init__(self, binary, address, directory, seconds, rate):
        self.report = pathlib.Path(directory) / f"bench-{time.monotonic_ns()}.json"
        self.process = subprocess.Popen(
            [binary, "bench", "--url", f"http://{address}", "--rate", str(rate), "--duration", str(seconds), "--grace", "60",
             "--input-tokens", "64:256", "--output-tokens", "32:128", "--json", self.report],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def running(self):
        return self.process.poll() is None

    def finish(self):
        output, _ = self.process.communicate(timeout=600)
        assert self.process.returncode == 0, output
        return json.loads(self.report.read_text()), output


def answer(address):
    body = {"model": "ling-tiny", "temperature": 0, "messages": [{"role": "user", "content": "What is a violin?"}]}
    text = harness.post(address, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert "instrument" in text, text
    return text


def documents(kubectl, overlay):
    rendered = kustomize.render(kubectl, HERE / "overlays" / overlay)
    return json.loads(json.dumps(rendered).replace('"image": "millrace:', '"image": "localhost/millrace:'))


def main():
    binary, model, kubectl, directory = sys.argv[1:]
    for address in (DNS_ADDRESS, SERVICE_ADDRESS):
        subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    podman = Podman(directory)
    cluster = None
    try:
        print(f"image: {int(build_image(podman, binary, directory)) / 1e6:.0f} MB", flush=True)

        names, service = Names(), Service()
        cluster = Cluster(podman, directory, documents(kubectl, "single-node"), model, names, service)
        print(f"single-node: ready, answers: {answer(service.address)!r}")
        print("single-node: init check:", cluster.pods["serve"][0].check_log.splitlines()[-1])
        print("single-node: ended with", cluster.stop(), flush=True)

        cluster = Cluster(podman, directory, documents(kubectl, "pd"), model, names, service)
        text = answer(service.address)
        print(f"P/D: ready with {({c: len(p) for c, p in cluster.pods.items()})}, answers: {text!r}", flush=True)

        def committed():
            return sum(harness.metric(f"{pod.host}:{pod.ports['metrics']}", "millrace_worker_prefill_attempts_total",
                                      outcome="committed") for pod in cluster.pods["decode"])

        assert committed() > 0
        for component in ("prefill", "decode"):
            load = Load(binary, service.address, directory, 20, 2)
            time.sleep(4)
            victim = cluster.pods[component].pop(0)
            victim.kill()
            began = time.monotonic()
            cluster.new_pod(component).wait_ready()
            took = time.monotonic() - began
            report, output = load.finish()
            print(f"P/D: killed {victim.name}, the next one ready after {took:.1f} s; load: {outcome(report)}", flush=True)
        for component in ("prefill", "decode", "gateway"):
            load = Load(binary, service.address, directory, 90, 2)
            time.sleep(2)
            codes = cluster.replace(component)
            assert codes and not any(codes), codes
            within = load.running()
            report, output = load.finish()
            print(f"P/D: every {component} replaced{'' if within else ' (beyond the load)'}, exit codes {codes}; "
                  f"load: {outcome(report)}", flush=True)
        assert answer(service.address) == text
        restarts = {p.name: p.restarts_by_liveness for pods in cluster.pods.values() for p in pods}
        assert not any(restarts.values()), restarts
        codes = cluster.stop()
        print("P/D: ended with", codes)
        assert not any(codes.values())
    finally:
        if cluster is not None:
            for pods in cluster.pods.values():
                for pod in pods:
                    pod.kill()
        podman("system", "reset", "--force", check=False)


def outcome(report):
    """What the load tester counted; it has seen to it that nothing failed."""
    (level,) = report["levels"]
    (run,) = level["runs"]
    return run["requests"]


if __name__ == "__main__":
    main()
