"""Bodies made from openapi.json, and bodies next to them: every answer is what the description says, none is a 5xx, nothing hangs.

MILLRACE_API_EXAMPLES says how many bodies each request gets (default: 150, in all some ten seconds); MILLRACE_API_SEED which ones."""

import copy
import json
import os

import hypothesis
import jsonschema
import pytest
from hypothesis import strategies

import harness

EXAMPLES = int(os.environ.get("MILLRACE_API_EXAMPLES", "150"))
SEED = int(os.environ.get("MILLRACE_API_SEED", "1"))
DESCRIPTION = json.loads((harness.ROOT / "server/gateway/assets/openapi.json").read_text())
POSTS = [path for path, methods in DESCRIPTION["paths"].items() if "post" in methods]
ANYTHING = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers(-2**70, 2**70) | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(max_size=20), lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(
        strategies.text(max_size=8), inner, max_size=3), max_leaves=6)


def inlined(schema):
    """Without references."""
    if isinstance(schema, list):
        return [inlined(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inlined(DESCRIPTION["components"]["schemas"][schema["$ref"].split("/")[-1]])
    return {key: inlined(value) for key, value in schema.items()}


TEXT = strategies.sampled_from(["", "a", "Paris", "get_weather", "{}", "什么是小提琴？", "👩‍🔬", "\u0000", "<tool_call>", "<think>"]) | strategies.text(
    max_size=30)


def made_from(schema):
    """What a schema of this description asks for; its keywords are those that the description uses."""
    if "const" in schema:
        return strategies.just(schema["const"])
    if "enum" in schema:
        return strategies.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return strategies.one_of([made_from(s) for s in schema["anyOf"]])
    kind = schema.get("type")
    if kind is None:
        return ANYTHING
    if kind == "object":
        properties = {key: made_from(s) for key, s in schema.get("properties", {}).items()}
        required = {key: properties.pop(key) for key in schema.get("required", [])}
        if properties or required:
            # Few at a time, or every body is refused for one of them.
            some = strategies.lists(strategies.sampled_from(sorted(properties)), max_size=5, unique=True) if properties else \
                strategies.just([])
            return some.flatmap(lambda keys: strategies.fixed_dictionaries({**required, **{k: properties[k] for k in keys}}))
        more = schema.get("additionalProperties")
        return strategies.dictionaries(TEXT, made_from(more) if isinstance(more, dict) else ANYTHING,
                                       max_size=min(3, schema.get("maxProperties", 3)))
    if kind == "array":
        return strategies.lists(made_from(schema.get("items", {})), min_size=schema.get("minItems", 0),
                                max_size=min(4, schema.get("maxItems", 4)))
    if kind == "string":
        return strategies.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else TEXT
    if kind == "integer":
        return strategies.integers(schema.get("minimum", -2**40), schema.get("maximum", 2**40)) | strategies.integers(
            schema.get("minimum", 0), schema.get("maximum", schema.get("minimum", 0) + 9))
    if kind == "number":
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        return strategies.floats(low, schema.get("maximum"), allow_nan=False, allow_infinity=False,
                                 exclude_min="exclusiveMinimum" in schema)
    return {"boolean": strategies.booleans(), "null": strategies.none()}[kind]


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def damaged(data, body):
    """The body with something else at one of its places."""
    body = copy.deepcopy(body)
    path = data.draw(strategies.sampled_from(list(places(body))), label="place")
    something = data.draw(ANYTHING, label="something")
    if not path:
        return something
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = something
    return body


def short(path, body):
    """Keeps what is asked for small, of the one model and not in a hurry: this is not about speed."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        del body["model"]
    if isinstance(body, dict) and isinstance(body.get("timeout"), float) and 0 < body["timeout"] < 60:
        body["timeout"] = 60
    if path.startswith("/v1/") and isinstance(body, dict):
        key = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        for name in (key, "max_completion_tokens", "min_tokens", "n"):
            if isinstance(body.get(name), int) and body[name] > 2:
                body[name] = 2
        body.setdefault(key, 2)
    return body


def check_stream(text):
    assert text.endswith("\n\n"), text[-200:]
    frames = [f for f in text[:-2].split("\n\n") if not f.startswith(":")]
    datas = [line[6:] for frame in frames for line in frame.split("\n") if line.startswith("data: ")]
    assert len(datas) == len(frames)
    if datas[-1] == "[DONE]":
        datas.pop()
    return [json.loads(data) for data in datas]


@pytest.fixture(scope="module")
def validators():
    schemas = {}
    for path in POSTS:
        for name, answer in DESCRIPTION["paths"][path]["post"]["responses"].items():
            schemas[path, name] = jsonschema.Draft202012Validator(inlined(answer["content"]["application/json"]["schema"]))
    return schemas


@pytest.mark.parametrize("kind", ["as described", "damaged"])
@pytest.mark.parametrize("path", POSTS)
def test_bodies(server, validators, path, kind):
    schema = inlined(DESCRIPTION["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"])
    bodies = made_from(schema)
    seen = {}

    @hypothesis.seed(SEED)
    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=False,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategies.data())
    def run(data):
        body = data.draw(bodies, label="body")
        if kind == "damaged":
            body = damaged(data, body)
        body = short(path, body)
        status, headers, text = harness.request(server.address, "POST", path, json.dumps(body), timeout=60)
        seen[status] = seen.get(status, 0) + 1
        assert status in (200, 400, 404), (status, text, body)
        assert headers["x-request-id"]
        if headers["content-type"] == "text/event-stream":
            check_stream(text)
        else:
            validators[path, "200" if status == 200 else "default"].validate(json.loads(text))

    run()
    print(path, kind, seen)
    assert server.running()
    if kind == "as described" and path.startswith("/v1/"):
        assert seen.get(200), "not one body was accepted: the description asks for something else"
