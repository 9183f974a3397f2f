"""Constrained answers and forced tools, at temperatures at which the demo model would never keep a form by itself; in one
process and across prefill and decode workers, of which one dies on the way. MILLRACE_SCHEMA_SEEDS answers are taken to every
schema (default: 4)."""

import json
import os
import re

import jsonschema
import openai
import pydantic
import pytest
import tokenizers

import harness

CHAT = "/v1/chat/completions"
SEEDS = int(os.environ.get("MILLRACE_SCHEMA_SEEDS", "4"))
ASK = [{"role": "user", "content": "Tell me about a violin."}]

SCHEMAS = {
    "person": {"type": "object", "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"}, "tags": {"type": "array", "items": {"type": "string", "maxLength": 8},
                                                                "maxItems": 3}},
        "required": ["name", "age", "tags"], "additionalProperties": False},
    "enums": {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue", None, 7]}, "sure": {"type": "boolean"},
                                               "kind": {"const": "fixed \"text\" é"}}, "required": ["colour", "sure", "kind"]},
    "numbers": {"type": "array", "items": {"type": ["number", "null"]}, "minItems": 2, "maxItems": 4},
    "optional": {"type": "object", "properties": {k: {"type": "integer", "minimum": 0, "maximum": 9} for k in "abcde"}},
    "union": {"anyOf": [{"type": "integer", "minimum": -5, "maximum": 1000}, {"type": "string", "pattern": "^[A-Z]{2}-\\d{3}$"},
                        {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"]}]},
    "tree": {"$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 9}, "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"},
                                                                              "maxItems": 2}}, "required": ["value", "children"]},
        "leaf": {"type": "object", "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["value"]}},
        "$ref": "#/$defs/node"},
    "formats": {"type": "object", "properties": {"day": {"type": "string", "format": "date"}, "at": {"type": "string", "format":
                "date-time"}, "id": {"type": "string", "format": "uuid"}, "ip": {"type": "string", "format": "ipv4"}},
                "required": ["day", "at", "id", "ip"]},
}


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def ask(address, **fields):
    answer = harness.post(address, CHAT, {"messages": ASK, "temperature": 1.8, "max_tokens": 400, **fields})
    return answer["choices"][0]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(server, name):
    schema = SCHEMAS[name]
    for seed in range(SEEDS):
        choice = ask(server.address, response_format=response_format(schema), seed=seed)
        assert choice["finish_reason"] == "stop", choice
        jsonschema.validate(json.loads(choice["message"]["content"]), schema, format_checker=jsonschema.FormatChecker())


def test_json_object_and_streaming(server):
    for seed in range(4):
        fields = dict(response_format={"type": "json_object"}, seed=seed, max_tokens=600, temperature=1.0)
        choice = ask(server.address, **fields)
        if choice["finish_reason"] == "stop":  # at this temperature a string may go on for ever
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        streamed = "".join(e["choices"][0]["delta"].get("content") or "" for e in harness.stream(
            server.address, {"messages": ASK, **fields}, CHAT) if e["choices"])
        assert streamed == choice["message"]["content"]


def test_choice_regex_grammar(server):
    for fields, pattern in [
            ({"structured_outputs": {"choice": ["yes", "no", "perhaps"]}}, "yes|no|perhaps"),
            ({"guided_choice": ["alpha", "beta"]}, "alpha|beta"),
            ({"structured_outputs": {"regex": "[A-Z][a-z]{2,5} \\d{2}(st|nd)"}}, "[A-Z][a-z]{2,5} [0-9]{2}(st|nd)"),
            ({"guided_regex": "(foo|bar){2}"}, "(foo|bar){2}"),
            ({"structured_outputs": {"grammar": 'root ::= n ("+" n){1,3}\nn ::= [1-9] [0-9]?\n'}}, "[1-9][0-9]?([+][1-9][0-9]?){1,3}"),
            ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 12}}, "10|11|12")]:
        for seed in range(3):
            choice = ask(server.address, seed=seed, **fields)
            assert choice["finish_reason"] == "stop" and re.fullmatch(pattern, choice["message"]["content"]), (fields, choice)
    text = harness.post(server.address, "/v1/completions", {"prompt": "Is it?", "structured_outputs": {"choice": ["yes", "no"]},
                                                            "temperature": 2})["choices"][0]
    assert text["text"] in ("yes", "no") and text["finish_reason"] == "stop"


def thinking(model):
    """What makes the demo model, which has not learnt to think, come to the end of its thoughts: the tag's tokens, favoured."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokenizer.encode("</think>\n\n", add_special_tokens=False).ids
    return {"chat_template_kwargs": {"enable_thinking": True}, "logit_bias": {str(i): 14 for i in ids}}


@pytest.mark.parametrize("name", ["person", "enums", "tree"])
def test_thoughts_come_first(server, model, name):
    """The constraint holds from the end of the thoughts on, and there is one."""
    schema = SCHEMAS[name]
    fields = dict(response_format=response_format(schema), max_tokens=1500, **thinking(model))
    for seed in range(SEEDS):
        choice = ask(server.address, seed=seed, **fields)
        assert choice["finish_reason"] == "stop", choice
        assert choice["message"]["reasoning_content"] and "</think>" not in choice["message"]["reasoning_content"]
        jsonschema.validate(json.loads(choice["message"]["content"]), schema, format_checker=jsonschema.FormatChecker())
    streamed = "".join(e["choices"][0]["delta"].get("content") or "" for e in harness.stream(
        server.address, {"messages": ASK, "temperature": 1.8, "seed": seed, **fields}, CHAT) if e["choices"])
    assert streamed == choice["message"]["content"]


def test_thoughts_before_forced_tools(server, model):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {
        k: {"type": "integer", "minimum": 0, "maximum": 99} for k in "ab"}, "required": ["a", "b"]}}}
    for seed in range(3):
        choice = ask(server.address, tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=1500,
                     **thinking(model))
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["reasoning_content"]
        jsonschema.validate(json.loads(call["function"]["arguments"]), tool["function"]["parameters"])


def test_the_official_client_parses(server, model):
    class Step(pydantic.BaseModel):
        explanation: str = pydantic.Field(max_length=12)
        done: bool

    class Plan(pydantic.BaseModel):
        title: str = pydantic.Field(max_length=12)
        steps: list[Step] = pydantic.Field(max_length=2)

    client = openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0, timeout=60)
    answer = client.chat.completions.parse(model=model.name, messages=ASK, response_format=Plan, temperature=1.5, seed=5)
    plan = answer.choices[0].message.parsed
    assert isinstance(plan, Plan) and len(plan.steps) <= 2


def test_forced_tools(server, model):
    def tool(name, **properties):
        return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties,
                                                                              "required": list(properties)}}}
    weather = tool("get_weather", city={"type": "string", "maxLength": 12})
    add = tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "integer", "minimum": 0, "maximum": 99})
    client = openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0, timeout=60)
    for seed in range(3):
        fields = dict(model=model.name, messages=ASK, tools=[weather, add], temperature=1.8, seed=seed, max_tokens=300)
        named = client.chat.completions.create(**fields, tool_choice={"type": "function", "function": {"name": "add"}}).choices[0]
        (call,) = named.message.tool_calls
        assert call.function.name == "add" and named.finish_reason == "tool_calls" and named.message.content is None
        jsonschema.validate(json.loads(call.function.arguments), add["function"]["parameters"])
        required = client.chat.completions.create(**fields, tool_choice="required", parallel_tool_calls=False).choices[0]
        (call,) = required.message.tool_calls
        schema = {"get_weather": weather, "add": add}[call.function.name]["function"]["parameters"]
        jsonschema.validate(json.loads(call.function.arguments), schema)
        several = client.chat.completions.create(**fields, tool_choice="required").choices[0]
        assert several.message.tool_calls and several.finish_reason in ("tool_calls", "length")


@pytest.mark.parametrize("fields,param,words", [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object", "patternProperties": {}}}}},
     "response_format", "patternProperties"),
    ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "(?="),
    ({"structured_outputs": {"regex": 7}}, "structured_outputs.regex", "string"),
    ({"structured_outputs": {"regex": "(?P<"}}, "structured_outputs.regex", "'>'"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "choice"),
    ({"structured_outputs": {"grammar": "root ::= root"}}, "structured_outputs.grammar", "never end"),
    ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs.regex", "exclude"),
    ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "response_format", "ignore_eos"),
    ({"tool_choice": "required"}, "tool_choice", "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tool_choice", "'g'"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {"type": "json_object"}},
     "response_format", "tool_choice"),
])
def test_refusals_name_the_field(server, fields, param, words):
    status, _, text = harness.request(server.address, "POST", CHAT, {"messages": ASK, **fields})
    error = json.loads(text)["error"]
    assert (status, error["param"]) == (400, param) and words in error["message"], error


@pytest.mark.parametrize("thoughts", [False, True])
def test_across_workers_and_a_death(logs, long_model, thoughts):
    """The same constrained answer from one process and from roles apart; then the decode worker that makes it is killed, and
    another one goes on inside the same grammar: in the answer, or in the thoughts before it."""
    directory = logs / f"structured-{thoughts}"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=1, decode=2)
    try:
        schema = {"type": "array", "items": SCHEMAS["person"], "minItems": 25, "maxItems": 25}
        body = {"messages": ASK, "temperature": 1.2, "seed": 11, "max_tokens": 4000, "response_format": response_format(schema)}
        if thoughts:
            body.update(thinking(long_model), seed=4)
        whole = harness.post(cluster.address, CHAT, body)["choices"][0]
        assert whole["finish_reason"] == "stop"
        jsonschema.validate(json.loads(whole["message"]["content"]), schema)
        pieces, reasoning, killed = [], [], False
        for event in harness.stream(cluster.address, body, CHAT):
            if event["choices"]:
                pieces.append(event["choices"][0]["delta"].get("content") or "")
                reasoning.append(event["choices"][0]["delta"].get("reasoning_content") or "")
            if not killed and (sum(map(len, reasoning)) > 10 if thoughts else sum(map(len, pieces)) > 200):
                assert not (thoughts and any(pieces))
                busy = [w for w in cluster.workers["decode"] if harness.metric(w.metrics_address, "millrace_engine_running") > 0]
                assert len(busy) == 1
                busy[0].kill()
                killed = True
        assert killed and "".join(pieces) == whole["message"]["content"]
        assert "".join(reasoning) == (whole["message"].get("reasoning_content") or "")
    finally:
        cluster.stop(check=False)
