"""What the LeaderWorkerSet controller makes of an object: its groups' pods."""

import copy
import re


def pods(document):
    """[{name: pod template}] by group; in each what the controller and the kubelet put into a pod's environment and arguments."""
    lws, spec = document["metadata"]["name"], document["spec"]["leaderWorkerTemplate"]
    namespace = document["metadata"]["namespace"]
    return [{f"{lws}-{group}" + (f"-{index}" if index else ""): _pod(spec, lws, namespace, group, index) for index in range(spec["size"])}
            for group in range(document["spec"]["replicas"])]


def _pod(spec, lws, namespace, group, index):
    template = copy.deepcopy(spec["workerTemplate"])
    labels = template["metadata"]["labels"]
    labels |= {"leaderworkerset.sigs.k8s.io/name": lws, "leaderworkerset.sigs.k8s.io/group-index": str(group),
               "leaderworkerset.sigs.k8s.io/worker-index": str(index)}
    environment = {"LWS_LEADER_ADDRESS": f"{lws}-{group}.{lws}.{namespace}", "LWS_GROUP_SIZE": str(spec["size"]),
                   "LWS_WORKER_INDEX": str(index)}
    for container in template["spec"].get("initContainers", []) + template["spec"]["containers"]:
        assert "env" not in container
        container["env"] = [{"name": name, "value": value} for name, value in environment.items()]
        container["args"] = [re.sub(r"\$\((\w+)\)", lambda m: environment[m[1]], argument) for argument in container["args"]]
    return template
