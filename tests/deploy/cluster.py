"""A cluster of one machine: podman runs the pods, and this plays what Kubernetes would do around them - the kubelet's probes and
termination, a Deployment's and a LeaderWorkerSet's replacement of pods, and with network.py DNS, the Service and network policies.

Everything lives in a network namespace that the caller made (see test_pods.py). Needs podman, root and a kernel that lets
containers run.
"""

import itertools
import json
import os
import pathlib
import resource
import subprocess
import threading
import time

import grpc
import lws
import yaml
from network import DNS_ADDRESS, Policies

NODE = "10.88.0.1"  # this side of podman's bridge


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
    def __init__(self, podman, directory, name, template, config_maps, model):
        self.podman, self.name = podman, name
        self.labels = template["metadata"]["labels"]
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
        self.host = self.pid = None
        self.restarts_by_liveness = 0
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
        infra = json.loads(self.podman("inspect", self.podman("pod", "inspect", self.name, "--format", "{{.InfraContainerID}}")))[0]
        self.pid = infra["State"]["Pid"]
        self.host = infra["NetworkSettings"]["Networks"]["podman"]["IPAddress"]
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def _watch(self):
        startup, readiness, liveness = (self.probes[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness"))
        while not probe(startup, self.host):
            if self.terminating:
                return
            time.sleep(min(startup["periodSeconds"], 1))
        hits = misses = dead = 0
        next_ready = next_live = time.monotonic()
        while not self.terminating:
            if time.monotonic() >= next_ready:
                next_ready += readiness["periodSeconds"]
                hits, misses = (hits + 1, 0) if probe(readiness, self.host) else (0, misses + 1)
                if hits >= readiness.get("successThreshold", 1):
                    self.ready = not self.terminating
                if misses >= readiness["failureThreshold"]:
                    self.ready = False
            if time.monotonic() >= next_live:
                next_live += liveness["periodSeconds"]
                dead = 0 if probe(liveness, self.host) else dead + 1
                if dead >= liveness["failureThreshold"]:
                    self.restarts_by_liveness += 1
                    dead = 0
            time.sleep(0.5)

    def wait_ready(self, seconds=180):
        deadline = time.monotonic() + seconds
        while not self.ready:
            assert time.monotonic() < deadline, f"{self.name} is not ready:\n{self.log()}"
            time.sleep(0.1)
        return self

    def log(self):
        return self.podman("logs", self.id, check=False)[-4000:]

    def memory(self):
        """MiB that the process has had resident at most."""
        pid = self.podman("inspect", self.id, "--format", "{{.State.Pid}}")
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024

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
    """The Deployments and LeaderWorkerSets of rendered documents, running."""

    def __init__(self, podman, directory, documents, model, names, service):
        self.podman, self.directory, self.model, self.names = podman, directory, model, names
        self.config_maps = {d["metadata"]["name"]: d for d in documents if d["kind"] == "ConfigMap"}
        self.deployments = {d["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: d
                            for d in documents if d["kind"] == "Deployment"}
        self.groups = {d["metadata"]["labels"]["app.kubernetes.io/component"]: d for d in documents if d["kind"] == "LeaderWorkerSet"}
        self.pods = {component: [] for component in (*self.deployments, *self.groups)}
        self.policies = Policies(documents, NODE)
        self.numbers = itertools.count(1)
        for document in (d for d in documents if d["kind"] == "Service"):
            component = document["spec"]["selector"]["app.kubernetes.io/component"]
            if document["spec"].get("clusterIP") == "None":
                names.addresses[document["metadata"]["name"]] = lambda c=component: [p.host for p in self.pods[c] if p.host]
            else:
                service.backends = lambda c=component: [(p.host, p.ports["http"]) for p in self.pods[c] if p.ready]
        for component, document in self.groups.items():
            for group in lws.pods(document):
                for name in group:
                    names.addresses[f"{name}.{document['metadata']['name']}"] = lambda c=component, n=name: [
                        p.host for p in self.pods[c] if p.name == n and p.host]
                    self.new_pod(component, name)
        for component, document in self.deployments.items():
            for _ in range(document["spec"].get("replicas", 1)):
                self.new_pod(component)
        for pod in self.all_pods():
            pod.wait_ready()

    def all_pods(self):
        return [pod for pods in self.pods.values() for pod in pods]

    def new_pod(self, component, name=None):
        """Starts one more of a Deployment, or the one of that name of a LeaderWorkerSet."""
        if component in self.groups:
            template = next(group[name] for group in lws.pods(self.groups[component]) if name in group)
        else:
            deployment = self.deployments[component]
            name, template = f"{deployment['metadata']['name']}-{next(self.numbers)}", deployment["spec"]["template"]
        pod = Pod(self.podman, self.directory, name, template, self.config_maps, self.model)
        self.pods[component].append(pod)
        pod.start()
        self.policies.apply([p for p in self.all_pods() if p.host])
        return pod

    def _drop(self, component, pod):
        self.pods[component].remove(pod)
        self.policies.apply([p for p in self.all_pods() if p.host])

    def kill(self, component):
        """The first pod is gone at once and another takes its place, which is returned."""
        old = self.pods[component][0]
        old.kill()
        self._drop(component, old)
        return self.new_pod(component, old.name)

    def replace(self, component):
        """A rolling restart, as the workload's strategy says; the exit codes of the old pods."""
        if component in self.groups:
            return [code for group in lws.pods(self.groups[component]) for code in self._replace_group(component, group)]
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
            self._drop(component, old)
            if not surge:
                add()
        return codes

    def replace_all(self):
        """A rolling restart of every component at once, as an apply of another image does; exit codes by component."""
        codes = {}

        def roll(component):
            codes[component] = self.replace(component)

        rolls = [threading.Thread(target=roll, args=(component,)) for component in self.pods]
        for thread in rolls:
            thread.start()
        for thread in rolls:
            thread.join()
        return codes

    def _replace_group(self, component, group):
        old = [pod for pod in self.pods[component] if pod.name in group]
        codes = []
        ends = [threading.Thread(target=lambda p=pod: codes.append(p.terminate())) for pod in old]
        for end in ends:
            end.start()
        for end in ends:
            end.join()
        for pod in old:
            self._drop(component, pod)
        for pod in [self.new_pod(component, name) for name in group]:
            pod.wait_ready()
        return codes

    def stop(self):
        return {pod.name: pod.terminate() for pod in self.all_pods()}
