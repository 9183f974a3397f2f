"""A cluster of one machine: podman runs the pods, and this plays what Kubernetes would do around them - the kubelet's probes and
termination, a Deployment's replacement of pods, cluster DNS for headless services, and the gateways' Service.

Everything lives in a network namespace that the caller made (see test_pods.py). Needs podman, root and a kernel that lets
containers run.
"""

import json
import os
import pathlib
import random
import resource
import select
import socket
import struct
import subprocess
import threading
import time

import grpc
import yaml

DNS_ADDRESS = "10.99.0.53"
SERVICE_ADDRESS = "10.99.0.80"


class Podman:
    """podman with storage and configuration of its own, below a directory."""

    def __init__(self, directory):
        files, processes = (resource.getrlimit(r)[1] for r in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        processes = 4096 if processes == resource.RLIM_INFINITY else min(processes, 4096)
        config = pathlib.Path(directory) / "containers.conf"
        config.write_text("[containers]\n"
                          f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
                          f'dns_servers = ["{DNS_ADDRESS}"]\n'
                          'log_driver = "k8s-file"\n'
                          "[engine]\n"
                          'cgroup_manager = "cgroupfs"\nevents_logger = "file"\n')
        self.environment = {**os.environ, "CONTAINERS_CONF": str(config)}
        self.command = ["podman", "--root", f"{directory}/storage", "--runroot", f"{directory}/run", "--tmpdir", f"{directory}/tmp"]

    def __call__(self, *args, check=True):
        run = subprocess.run([*self.command, *map(str, args)], capture_output=True, text=True, env=self.environment)
        assert not check or run.returncode == 0, f"podman {' '.join(map(str, args))}: {run.stderr}"
        return run.stdout.strip()


class Names:
    """Cluster DNS: each name's addresses now, by UDP."""

    def __init__(self):
        self.addresses = {}  # name -> callable that gives addresses
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((DNS_ADDRESS, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            question, client = self.socket.recvfrom(512)
            end = question.index(b"\0", 12) + 5
            labels, at = [], 12
            while question[at]:
                labels.append(question[at + 1:at + 1 + question[at]].decode())
                at += 1 + question[at]
            is_a = question[end - 4:end - 2] == b"\0\1"
            known = self.addresses.get(labels[0])
            found = known() if known and is_a else []
            answer = question[:2] + struct.pack(">HHHHH", 0x8580 if known else 0x8583, 1, len(found), 0, 0) + question[12:end]
            for address in found:
                answer += b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 1, 4) + socket.inet_aton(address)
            self.socket.sendto(answer, client)


class Service:
    """One address in front of the ready pods, for new connections; those that run stay where they are."""

    def __init__(self):
        self.backends = list  # callable: [(host, port)]
        self.listener = socket.create_server((SERVICE_ADDRESS, 80), backlog=256)
        self.address = f"{SERVICE_ADDRESS}:80"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client):
        backends = self.backends()
        if not backends:
            client.close()
            return
        try:
            server = socket.create_connection(random.choice(backends), timeout=10)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        other = {client: server, server: client}
        try:
            while other:
                for side in select.select(list(other), [], [])[0]:
                    data = side.recv(65536)
                    if data:
                        other[side].sendall(data)
                    else:
                        other[side].shutdown(socket.SHUT_WR)
                        raise EOFError
        except (EOFError, OSError):
            # Half-closed by one side: let the other finish what it is sending.
            try:
                for source, sink in ((server, client), (client, server)):
                    source.settimeout(5)
                    while data := source.recv(65536):
                        sink.sendall(data)
            except OSError:
                pass
        finally:
            client.close()
            server.close()


def probe(spec, host):
    """One probe as the kubelet makes it."""
    seconds = spec.get("timeoutSeconds", 1)
    if "httpGet" in spec:
        import http.client
        connection = http.client.HTTPConnection(host, spec["httpGet"]["number"], timeout=seconds)
        try:
            connection.request("GET", spec["httpGet"]["path"])
            return 200 <= connection.getresponse().status < 400
        except OSError:
            return False
        finally:
            connection.close()
    with grpc.insecure_channel(f"{host}:{spec['grpc']['port']}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", request_serializer=bytes, response_deserializer=bytes)
        try:
            return check(b"", timeout=seconds) == b"\x08\x01"  # status: SERVING
        except grpc.RpcError:
            return False


class Pod:
    def __init__(self, podman, directory, deployment, config_maps, model, number):
        template = deployment["spec"]["template"]
        self.podman = podman
        self.component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        self.name = f"{deployment['metadata']['name']}-{number}"
        self.spec = json.loads(json.dumps(template["spec"]))
        (self.container,) = self.spec["containers"]
        # podman would take them for ports of the host, of which there is one
        self.ports = {port["name"]: port["containerPort"] for port in self.container.pop("ports")}
        self.probes = {}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            self.probes[kind] = self.container.pop(kind)
            if "httpGet" in self.probes[kind]:
                self.probes[kind]["httpGet"]["number"] = self.ports[self.probes[kind]["httpGet"]["port"]]
        self.pre_stop = self.container.pop("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        # What podman cannot place or claim: one machine, and a directory for the claim.
        for field in ("topologySpreadConstraints", "affinity"):
            self.spec.pop(field, None)
        self.checks = self.spec.pop("initContainers", [])
        for container in [self.container, *self.checks]:
            container["imagePullPolicy"] = "Never"
        for volume in self.spec["volumes"]:
            if volume.pop("persistentVolumeClaim", None):
                volume["hostPath"] = {"path": str(model), "type": "Directory"}
        self.ready = self.terminating = False
        self.host = None
        self.restarts_by_liveness = 0
        self.labels = template["metadata"]["labels"]
        self.config_maps = [config_maps[v["configMap"]["name"]] for v in self.spec["volumes"] if "configMap" in v]
        self.directory = pathlib.Path(directory)

    def _play(self, name, containers, restart):
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": self.labels},
                    "spec": {**self.spec, "containers": containers, "restartPolicy": restart}}
        file = self.directory / f"{name}.yaml"
        file.write_text(yaml.safe_dump_all([document, *self.config_maps]))
        self.podman("kube", "play", "--network", "podman", file)

    def start(self):
        # podman 4.3 starts init containers again and again, or removes them while they run: as a pod before the pod.
        for check in self.checks:
            name = f"{self.name}-init"
            self._play(name, [check], "Never")
            code = self.podman("wait", f"{name}-{check['name']}")
            self.check_log = self.podman("logs", f"{name}-{check['name']}")
            self.podman("pod", "rm", "--force", name)
            assert code == "0", f"{name}: exit code {code}\n{self.check_log}"
        self._play(self.name, [self.container], "Always")
        self.id = f"{self.name}-{self.container['name']}"
        infra = self.podman("pod", "inspect", self.name, "--format", "{{.InfraContainerID}}")
        self.host = json.loads(self.podman("inspect", infra))[0]["NetworkSettings"]["Networks"]["podman"]["IPAddress"]
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self):
        startup, readiness, liveness = (self.probes[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
        while not probe(startup, self.host):
            if self.terminating:
                return
            time.sleep(min(startup["periodSeconds"], 1))
        misses = {"ready": 0, "live": 0}
        next_live = time.monotonic()
        while not self.terminating:
            if probe(readiness, self.host):
                misses["ready"], self.ready = 0, True
            else:
                misses["ready"] += 1
                if misses["ready"] >= readiness["failureThreshold"]:
                    self.ready = False
            if time.monotonic() >= next_live:
                next_live += liveness["periodSeconds"]
                misses["live"] = 0 if probe(liveness, self.host) else misses["live"] + 1
                if misses["live"] >= liveness["failureThreshold"]:
                    self.restarts_by_liveness += 1
                    misses["live"] = 0
            time.sleep(1)

    def wait_ready(self, seconds=120):
        deadline = time.monotonic() + seconds
        while not self.ready:
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log()}"
            time.sleep(0.1)
        return self

    def log(self):
        return self.podman("logs", self.id, check=False)[-4000:]

    def terminate(self):
        """As the kubelet ends a pod: out of the endpoints, preStop, SIGTERM, the grace period. The exit code."""
        self.terminating, self.ready = True, False
        time.sleep(self.pre_stop)
        self.podman("stop", "--time", self.spec["terminationGracePeriodSeconds"] - self.pre_stop, self.id)
        code = int(self.podman("inspect", self.id, "--format", "{{.State.ExitCode}}"))
        self.remove()
        return code

    def kill(self):
        """The node is gone, as far as this pod is concerned."""
        self.terminating, self.ready = True, False
        self.remove()

    def remove(self):
        self.podman("pod", "rm", "--force", "--time", 0, self.name, check=False)


class Cluster:
    """The Deployments of rendered documents, running."""

    def __init__(self, podman, directory, documents, model, names, service):
        self.podman, self.directory, self.model = podman, directory, model
        self.config_maps = {d["metadata"]["name"]: d for d in documents if d["kind"] == "ConfigMap"}
        self.deployments = {d["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: d
                            for d in documents if d["kind"] == "Deployment"}
        self.pods = {component: [] for component in self.deployments}
        self.number = 0
        for document in (d for d in documents if d["kind"] == "Service"):
            component = document["spec"]["selector"]["app.kubernetes.io/component"]
            if document["spec"].get("clusterIP") == "None":
                names.addresses[document["metadata"]["name"]] = lambda c=component: [p.host for p in self.pods[c] if p.host]
            else:
                service.backends = lambda c=component: [(p.host, p.ports["http"]) for p in self.pods[c] if p.ready]
        starts = [self.new_pod(c) for c, d in self.deployments.items() for _ in range(d["spec"].get("replicas", 1))]
        for pod in starts:
            pod.wait_ready()

    def new_pod(self, component):
        self.number += 1
        pod = Pod(self.podman, self.directory, self.deployments[component], self.config_maps, self.model, self.number)
        self.pods[component].append(pod)
        return pod.start()

    def replace(self, component):
        """A rolling restart, as the Deployment's strategy says; the exit codes of the old pods."""
        spec = self.deployments[component]["spec"]
        surge = spec["strategy"]["rollingUpdate"]["maxSurge"]
        codes = []

        def add():
            self.new_pod(component).wait_ready()
            time.sleep(spec.get("minReadySeconds", 0))

        for old in list(self.pods[component]):
            if surge:
                add()
            codes.append(old.terminate())
            self.pods[component].remove(old)
            if not surge:
                add()
        return codes

    def stop(self):
        codes = {}
        for pods in self.pods.values():
            for pod in pods:
                codes[pod.name] = pod.terminate()
        return codes
