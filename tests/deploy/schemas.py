"""What is wrong with the types of a Kubernetes object: unknown fields, wrong types, missing fields. Needs no network.

Core kinds: the JSON schemas of kubernetes-validate, made from Kubernetes' own OpenAPI, with every unlisted field refused.
Prometheus operator and KEDA: models generated from their CRDs; they drop what they do not know, so that an object must come
out of its model as it went in. Gateway API and LeaderWorkerSet have no such package: TABLES below is written by hand from their
references and holds only the fields that matter to us, so an unknown field there means "not in the table".
"""

import functools
import json

import kubernetes_validate
import pydantic
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

# preStop.sleep needs 1.30; the newest that the package knows.
VERSIONS = ("1.30", "1.37")
MODELS = {model.__name__: model for model in (ScaledObject, PodMonitor, PrometheusRule)}

POD_TEMPLATE = object()  # in TABLES: what a core PodTemplate has

_METADATA = {"name": str, "namespace": str, "labels": {str: str}, "annotations": {str: str}}
TABLES = {
    ("inference.networking.k8s.io/v1", "InferencePool"): {
        "apiVersion!": str, "kind!": str, "metadata!": _METADATA,
        "spec!": {
            "selector!": {"matchLabels!": {str: str}},
            "targetPorts!": [{"number!": int}],
            "appProtocol": str,
            "endpointPickerRef!": {"group": str, "kind": str, "name!": str, "port": {"number!": int},
                                   "failureMode": ("FailOpen", "FailClose")}}},
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): {
        "apiVersion!": str, "kind!": str, "metadata!": _METADATA,
        "spec!": {
            "parentRefs": [{"group": str, "kind": str, "namespace": str, "name!": str, "sectionName": str, "port": int}],
            "hostnames": [str],
            "rules": [{
                "name": str,
                "matches": [{"path": {"type": ("Exact", "PathPrefix", "RegularExpression"), "value": str}, "method": str}],
                "backendRefs": [{"group": str, "kind": str, "namespace": str, "name!": str, "port": int, "weight": int}],
                "timeouts": {"request": str, "backendRequest": str}}]}},
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): {
        "apiVersion!": str, "kind!": str, "metadata!": _METADATA,
        "spec!": {
            "replicas": int,
            "startupPolicy": ("LeaderCreated", "LeaderReady"),
            "networkConfig": {"subdomainPolicy!": ("Shared", "UniquePerReplica")},
            "rolloutStrategy": {
                "type!": ("RollingUpdate",),
                "rollingUpdateConfiguration": {"partition": int, "maxUnavailable": int, "maxSurge": int}},
            "leaderWorkerTemplate!": {
                "size": int,
                "restartPolicy": ("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
                "leaderTemplate": POD_TEMPLATE, "workerTemplate!": POD_TEMPLATE}}},
}


def problems(document):
    """One line for each; none for an object that a cluster would take."""
    kind = document.get("kind")
    if kind in MODELS:
        return list(_model_problems(MODELS[kind], document))
    table = TABLES.get((document.get("apiVersion"), kind))
    if table is not None:
        return list(_table_problems(table, document, kind))
    return _core_problems(json.dumps(document))


@functools.cache  # a validation takes a tenth of a second, and most objects are in several overlays
def _core_problems(text):
    document, found = json.loads(text), []
    kind = document.get("kind")
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{kind} ({version}): {'.'.join(map(str, error.path))}: {error.message}")
        except kubernetes_validate.SchemaNotFoundError as error:
            found.append(f"{document.get('apiVersion')} {kind}: no schema: {error}")
    return found


def _model_problems(model, document):
    try:
        back = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
    except pydantic.ValidationError as error:
        for problem in error.errors():
            yield f"{model.__name__}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}"
        return
    yield from _lost(document, back, model.__name__)


def _lost(before, after, path):
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key not in after:
                yield f"{path}.{key}: no such field"
            else:
                yield from _lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (a, b) in enumerate(zip(before, after)):
            yield from _lost(a, b, f"{path}[{i}]")
    elif before != after:
        yield f"{path}: {before!r} is taken for {after!r}"


def _table_problems(expected, value, path):
    if expected is POD_TEMPLATE:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": value}
        yield from (f"{path}: {line}" for line in _core_problems(json.dumps(template)))
    elif isinstance(expected, dict):
        if not isinstance(value, dict):
            yield f"{path}: an object is expected"
        elif str in expected:
            for key, item in value.items():
                yield from _table_problems(expected[str], item, f"{path}.{key}")
        else:
            fields = {name.rstrip("!"): inner for name, inner in expected.items()}
            for name in expected:
                if name.endswith("!") and name[:-1] not in value:
                    yield f"{path}.{name[:-1]}: missing"
            for key, item in value.items():
                if key not in fields:
                    yield f"{path}.{key}: no such field"
                else:
                    yield from _table_problems(fields[key], item, f"{path}.{key}")
    elif isinstance(expected, list):
        if not isinstance(value, list):
            yield f"{path}: a list is expected"
            return
        for i, item in enumerate(value):
            yield from _table_problems(expected[0], item, f"{path}[{i}]")
    elif isinstance(expected, tuple):
        if value not in expected:
            yield f"{path}: {value!r} is none of {', '.join(expected)}"
    elif not isinstance(value, expected) or isinstance(value, bool):
        yield f"{path}: {value!r} is no {expected.__name__}"
