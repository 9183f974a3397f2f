"""Every overlay renders to objects that a cluster would take, that fit each other, and whose configuration the binary takes."""

import copy
import json
import pathlib
import re
import subprocess

import lws
import pytest
from kustomize import OVERLAYS, ROOT, render
from schemas import problems

import harness


def of_kind(documents, *kinds):
    return [document for document in documents if document["kind"] in kinds]


def templates(documents):
    return ([deployment["spec"]["template"] for deployment in of_kind(documents, "Deployment")] +
            [group["spec"]["leaderWorkerTemplate"]["workerTemplate"] for group in of_kind(documents, "LeaderWorkerSet")])


def containers(documents):
    for template in templates(documents):
        for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
            yield template, container


def config_of(documents, template):
    """What a pod's own container is started with: (command, its JSON file, flags)."""
    (container,) = template["spec"]["containers"]
    command, flag, path, *flags = container["args"]
    assert flag == "--config"
    mount = next(m for m in container["volumeMounts"] if path.startswith(m["mountPath"] + "/"))
    volume = next(v for v in template["spec"]["volumes"] if v["name"] == mount["name"])
    config_map = next(c for c in of_kind(documents, "ConfigMap") if c["metadata"]["name"] == volume["configMap"]["name"])
    return command, json.loads(config_map["data"][path[len(mount["mountPath"]) + 1:]]), flags


def mounted(template, path):
    """The volume that `path` lies on in a pod's own container."""
    (container,) = template["spec"]["containers"]
    (mount,) = [m for m in container["volumeMounts"] if path.startswith(m["mountPath"] + "/")]
    return next(v for v in template["spec"]["volumes"] if v["name"] == mount["name"])


def selects(labels, template):
    return labels.items() <= template["metadata"]["labels"].items()


def seconds_of_grace(template):
    (container,) = template["spec"]["containers"]
    return container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_field_has_its_type(overlays, overlay):
    documents = overlays[overlay]
    assert documents
    assert [line for document in documents for line in problems(document)] == []
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(set(names)) == len(names)
    assert {d["metadata"].get("namespace") for d in documents} == {"millrace"}


@pytest.mark.parametrize("overlay", ["single-node", "pd", "pd-expert-groups"])
def test_an_overlay_can_be_built_upon(kubectl, overlay):
    """As the guide says: settings replaced, workers sized, from a directory elsewhere."""
    documents = render(kubectl, pathlib.Path(__file__).parent / "overlays" / overlay)
    assert [line for document in documents for line in problems(document)] == []
    for template in templates(documents):
        assert config_of(documents, template)[1]["model-name"] == "ling-tiny"


def planted(document, path, value):
    """A copy with `value` at `path`, or without what is there when value is None."""
    changed = copy.deepcopy(document)
    at = changed
    for step in path[:-1]:
        at = at[step]
    if value is None:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return changed


POD = ("spec", "template", "spec")
GROUP = ("spec", "leaderWorkerTemplate")
PLANTED = [
    ("Deployment", ("spec", "replica"), 2),
    ("Deployment", ("spec", "replicas"), "two"),
    ("Deployment", ("spec", "selector"), None),
    ("Deployment", (*POD, "containers", 0, "readinesProbe"), {}),
    ("Deployment", (*POD, "containers", 0, "securityContext", "readOnlyRootFileSystem"), True),
    ("Deployment", (*POD, "terminationGracePeriod"), 30),
    ("Service", ("spec", "clusterip"), "None"),
    ("ConfigMap", ("date",), {}),
    ("NetworkPolicy", ("spec", "ingress", 0, "form"), []),
    ("PodDisruptionBudget", ("spec", "maxUnavailible"), 1),
    ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "intervall"), "15s"),
    ("PodMonitor", ("spec", "selector"), None),
    ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "exp"), "up"),
    ("PrometheusRule", ("spec", "groups", 0, "rules", 0, "labels"), "critical"),
    ("ScaledObject", ("spec", "minReplicas"), 1),
    ("ScaledObject", ("spec", "triggers", 0, "metadata"), None),
    ("InferencePool", ("spec", "targetPort"), 8000),
    ("InferencePool", ("spec", "endpointPickerRef", "name"), None),
    ("InferencePool", ("spec", "endpointPickerRef", "failureMode"), "FailAlways"),
    ("HTTPRoute", ("spec", "rules", 0, "backendRefs", 0, "port"), "http"),
    ("LeaderWorkerSet", ("spec", "replica"), 2),
    ("LeaderWorkerSet", ("spec", "rolloutStrategy", "type"), None),
    ("LeaderWorkerSet", (*GROUP, "size"), "two"),
    ("LeaderWorkerSet", (*GROUP, "restartPolicy"), "Never"),
    ("LeaderWorkerSet", (*GROUP, "workerTemplate"), None),
    ("LeaderWorkerSet", (*GROUP, "workerTemplate", "spec", "containers", 0, "readinesProbe"), {}),
]


@pytest.mark.parametrize("kind, path, value", PLANTED, ids=[f"{k}-{'.'.join(map(str, p))}" for k, p, _ in PLANTED])
def test_a_planted_mistake_is_found(overlays, kind, path, value):
    document = of_kind(overlays["pd-operated"] + overlays["pd-expert-groups"], kind)[0]
    assert problems(document) == []
    assert problems(planted(document, path, value)) != []


def test_an_object_of_an_unknown_kind_is_a_problem():
    assert problems({"apiVersion": "apps/v1", "kind": "Deploiment", "metadata": {"name": "a"}})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_sized(overlays, overlay):
    for template, container in containers(overlays[overlay]):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 10000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        assert ":" in container["image"] and not container["image"].endswith(":latest")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_probed_and_end_in_time(overlays, overlay):
    for template in templates(overlays[overlay]):
        (container,) = template["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe in container, (template["metadata"]["labels"], probe)
        _, config, _ = config_of(overlays[overlay], template)
        assert template["spec"]["terminationGracePeriodSeconds"] >= seconds_of_grace(template) + config["drain"] + 10
        startup = container["startupProbe"]
        assert startup["periodSeconds"] * startup["failureThreshold"] >= 60
        liveness = container["livenessProbe"]
        assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60, "a busy process must not be restarted"


def test_gateways_know_a_new_worker_before_the_next_one_goes(overlays):
    """Names are resolved every 5 s, and cluster DNS answers from its cache for up to 30 s."""
    workers = [d for d in of_kind(overlays["pd"], "Deployment") if "gateway" not in d["metadata"]["name"]]
    assert len(workers) == 2
    for deployment in workers:
        assert deployment["spec"]["minReadySeconds"] >= 5 + 30
    (group,) = of_kind(overlays["pd-expert-groups"], "LeaderWorkerSet")
    (container,) = group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"]
    assert container["readinessProbe"]["periodSeconds"] * container["readinessProbe"]["successThreshold"] >= 5 + 30


def test_ranks_know_each_other(overlays):
    """By their leader's name, at the port that they open to each other."""
    documents = overlays["pd-expert-groups"]
    (document,) = of_kind(documents, "LeaderWorkerSet")
    for group in lws.pods({**document, "spec": {**document["spec"], "replicas": 2}}):
        leader = f"{next(iter(group))}.{document['metadata']['name']}.millrace:7200"
        for rank, pod in enumerate(group.values()):
            (container,) = pod["spec"]["containers"]
            flags = dict(zip(container["args"][3::2], container["args"][4::2]))
            assert flags == {"--ranks": str(len(group)), "--rank": str(rank), "--group-peers": leader}
            assert 7200 in {port["containerPort"] for port in container["ports"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_names_and_ports_fit_each_other(overlays, overlay):
    documents = overlays[overlay]
    pods = templates(documents)

    def selected(labels):
        found = [pod for pod in pods if selects(labels, pod)]
        assert found, f"nothing has {labels}"
        return found

    def port_names(found):
        return {port["name"] for pod in found for port in pod["spec"]["containers"][0]["ports"]}

    for deployment in of_kind(documents, "Deployment"):
        assert selects(deployment["spec"]["selector"]["matchLabels"], deployment["spec"]["template"])
    for service in of_kind(documents, "Service"):
        found = selected(service["spec"]["selector"])
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= port_names(found)
    for budget in of_kind(documents, "PodDisruptionBudget"):
        assert len(selected(budget["spec"]["selector"]["matchLabels"])) == 1
    for policy in of_kind(documents, "NetworkPolicy"):
        found = selected(policy["spec"]["podSelector"]["matchLabels"])
        for rule in policy["spec"]["ingress"]:
            assert {port["port"] for port in rule.get("ports", [])} <= port_names(found)
            for peer in rule.get("from", []):
                if "podSelector" in peer:
                    selected(peer["podSelector"]["matchLabels"])
    for pod in pods:
        assert any(selects(p["spec"]["podSelector"]["matchLabels"], pod) for p in of_kind(documents, "NetworkPolicy"))
    for monitor in of_kind(documents, "PodMonitor"):
        found = selected(monitor["spec"]["selector"]["matchLabels"])
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= port_names(found)
    for scaled in of_kind(documents, "ScaledObject"):
        (deployment,) = [d for d in of_kind(documents, "Deployment")
                         if d["metadata"]["name"] == scaled["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in deployment["spec"]
        for trigger in scaled["spec"]["triggers"]:  # of its own workers, and not of another deployment beside it
            selectors = re.findall(r"\{(.*?)\}", trigger["metadata"]["query"])
            component = deployment["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
            assert set(selectors) == {f'namespace="{scaled["metadata"]["namespace"]}",component="{component}"'}
    for pool in of_kind(documents, "InferencePool"):
        found = selected(pool["spec"]["selector"]["matchLabels"])
        numbers = {port["containerPort"] for pod in found for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["number"] for port in pool["spec"]["targetPorts"]} <= numbers


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_opens_the_ports_that_pods_name(overlays, overlay):
    documents = overlays[overlay]
    services = {service["metadata"]["name"] for service in of_kind(documents, "Service")}
    for template in templates(documents):
        _, config, _ = config_of(documents, template)
        opened = {int(re.search(r":(\d+)$", text)[1]) for key in ("listen", "metrics-listen", "admin-listen", "rail")
                  for text in ([config[key]] if isinstance(config.get(key), str) else config.get(key, []))}
        assert {port["containerPort"] for port in template["spec"]["containers"][0]["ports"]} - {7200} == opened
        for name in config.get("prefill", []) + config.get("decode", []):
            assert name.split(":")[0] in services


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_binary_takes_the_configuration(overlays, overlay, tmp_path):
    documents = overlays[overlay]

    def outcome(command, config, flags):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(config))
        run = subprocess.run([harness.binary(), command, "--config", path, *flags, "--model", tmp_path / "absent"],
                             capture_output=True, text=True, timeout=60)
        assert run.returncode != 0
        return run.stderr

    pods = [deployment["spec"]["template"] for deployment in of_kind(documents, "Deployment")]
    pods += [pod for document in of_kind(documents, "LeaderWorkerSet") for group in lws.pods(document) for pod in group.values()]
    for pod in pods:
        command, config, flags = config_of(documents, pod)
        assert "absent/config.json" in outcome(command, config, flags)  # it came as far as the model
        assert "absent/config.json" not in outcome(command, {**config, "no-such-key": 1}, flags)


def test_one_version_everywhere(overlays):
    version = subprocess.run([harness.binary(), "--version"], capture_output=True, text=True, check=True).stdout.strip()
    for documents in overlays.values():
        for _, container in containers(documents):
            assert container["image"] in (f"millrace:{version}", f"millrace:{version}-cuda")
    assert f'org.opencontainers.image.version="{version}"' in (ROOT / "deploy/Containerfile").read_text()


def test_secrets_are_there_by_reference(overlays):
    documents = overlays["pd-tls"]
    assert not of_kind(documents, "Secret")
    (gateway,) = [t for t in templates(documents) if t["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway"]
    _, _, flags = config_of(documents, gateway)
    secrets = {flag: mounted(gateway, path)["secret"]["secretName"] for flag, path in zip(flags[::2], flags[1::2])}
    assert secrets == {"--api-keys": "millrace-api-keys", "--tls-cert": "millrace-tls", "--tls-key": "millrace-tls"}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert gateway["spec"]["containers"][0][probe]["httpGet"]["scheme"] == "HTTPS"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_inference_pool_has_gateways_without_tls(overlays, overlay):
    """Its proxy speaks HTTP to the pods."""
    for pool in of_kind(overlays[overlay], "InferencePool"):
        assert pool["spec"].get("appProtocol", "http") == "http"
        for template in templates(overlays[overlay]):
            if selects(pool["spec"]["selector"]["matchLabels"], template):
                assert "--tls-cert" not in config_of(overlays[overlay], template)[2]


@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if "gpu" in name])
def test_devices_are_asked_for_by_the_init_check_too(overlays, overlay):
    for template in templates(overlays[overlay]):
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == "gateway":
            continue
        (init,), (container,) = template["spec"]["initContainers"], template["spec"]["containers"]
        devices = {name for name in container["resources"]["limits"] if "/" in name}
        assert "nvidia.com/gpu" in devices
        assert init["resources"]["limits"] == container["resources"]["limits"]
        required = {init["args"][i + 1] for i, arg in enumerate(init["args"]) if arg == "--require"}
        assert required == ({"gpu", "rdma"} if len(devices) > 1 else {"gpu"})
