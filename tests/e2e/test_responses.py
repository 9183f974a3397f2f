"""/v1/responses through the official client, and the description of the API against what is served."""

import json
import re

import jsonschema
import openai
import pytest

import harness

WEATHER = {"type": "function", "name": "get_weather", "description": "Get the weather in a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "Name of the city"}}, "required": ["city"]}}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def description(server):
    return json.loads(harness.request(server.address, "GET", "/openapi.json")[2])


def test_create(client, model):
    answer = client.responses.create(model=model.name, input="What is a violin?", temperature=0, max_output_tokens=60)
    assert answer.status == "completed" and answer.id.startswith("resp_") and answer.error is None
    assert answer.output_text == "A violin is a bowed stringed instrument that is the highest member of the violin family."
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    cut = client.responses.create(model=model.name, input="What is a violin?", temperature=0, max_output_tokens=3)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    chat = client.chat.completions.create(model=model.name, temperature=0, messages=[
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is an island?"}])
    same = client.responses.create(model=model.name, instructions="Be brief.", temperature=0, input=[
        {"role": "user", "content": [{"type": "input_text", "text": "What is an island?"}]}])
    assert same.output_text == chat.choices[0].message.content


def test_stream(client, model):
    events = list(client.responses.create(model=model.name, input="What is a violin?", temperature=0, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.completed"]
    text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert text == events[-1].response.output_text and text.startswith("A violin")


def test_tools(client, model):
    fields = dict(model=model.name, input="What is the weather in Paris?", tools=[WEATHER], temperature=0)
    answer = client.responses.create(**fields)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "get_weather" and json.loads(call.arguments) == {"city": "Paris"}
    events = list(client.responses.create(**fields, stream=True))
    streamed = "".join(e.delta for e in events if e.type == "response.function_call_arguments.delta")
    assert streamed == call.arguments == events[-1].response.output[0].arguments
    turn = [{"role": "user", "content": "What is the weather in Paris?"}, call.model_dump(exclude_none=True),
            {"type": "function_call_output", "call_id": call.call_id, "output": '{"temperature": 21, "sky": "sunny"}'}]
    done = client.responses.create(model=model.name, input=turn, tools=[WEATHER], temperature=0)
    assert "21" in done.output_text and "Paris" in done.output_text


@pytest.mark.parametrize("body,param", [
    ({}, "input"), ({"input": []}, "input"), ({"input": 7}, "input"), ({"input": [{}]}, "input[0].role"),
    ({"input": [{"type": "image"}]}, "input[0].type"), ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "a", "background": True}, "background"), ({"input": "a", "store": True}, "store"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0]"), ({"input": "a", "text": 1}, "text"),
    ({"input": "a", "temperature": 9}, "temperature"), ({"input": [{"type": "function_call"}]}, "input[0].call_id"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"), ({"input": "a", "messages": []}, "messages"),
    ({"input": "a", "n": 2}, "n"), ({"input": "a", "top_logprobs": 3}, "top_logprobs"), ({"input": "a", "suffix": "b"}, "suffix"),
    ({"input": "a", "reasoning": {"effort": 7}}, "reasoning.effort"), ({"input": "a", "tool_choice": "required"}, "tool_choice"),
    ({"input": "a", "text": {"format": {"type": "yaml"}}}, "text.format.type")])
def test_refusals(server, body, param):
    status, _, text = harness.request(server.address, "POST", "/v1/responses", body)
    assert (status, json.loads(text)["error"]["param"]) == (400, param), text


def test_what_chat_has_is_passed_on(server):
    body = {"input": "What is a violin?", "temperature": 0, "max_output_tokens": 40}
    text = lambda **more: harness.post(server.address, "/v1/responses", {**body, **more})["output"][0]["content"][0]["text"]  # noqa: E731
    whole = text()
    stop = whole[len(whole) // 2:][:3]
    assert text(stop=stop) == whole[:whole.index(stop)]
    assert text(made_up_field=1, top_logprobs=0, n=1) == whole


def test_description_names_what_is_served(server, model, description):
    for path, methods in description["paths"].items():
        real = path.replace("{id}", model.name)
        for method in ("get", "post"):
            body = {} if method == "post" else None
            status, _, text = harness.request(server.address, method.upper(), real, body)
            if method in methods:
                assert status in (200, 400, 404) and "method_not_allowed" not in text and '"not_found"' not in text or path == "/abort"
            else:
                assert status == 405, (method, path, status)
    source = (harness.ROOT / "server/gateway/http_session.cc").read_text()
    routes = set(re.findall(r'\.path = "([^"]+)"', source)) | {"/v1/models/{id}"}
    assert routes == set(description["paths"])


def test_answers_fit_the_description(server, description):
    def check(path, body):
        status, _, text = harness.request(server.address, "POST", path, body)
        operation = description["paths"][path]["post"]
        name = "200" if status == 200 else "default"
        schema = operation["responses"][name]["content"]["application/json"]["schema"]
        jsonschema.validate(json.loads(text), {**schema, "components": description["components"]})
        return status

    def check_get(path):
        schema = description["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(json.loads(harness.request(server.address, "GET", path)[2]),
                            {**schema, "components": description["components"]})

    user = [{"role": "user", "content": "hi"}]
    assert check("/v1/chat/completions", {"messages": user, "max_tokens": 3, "n": 2, "logprobs": True}) == 200
    assert check("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2}) == 200
    assert check("/v1/completions", {"prompt": "a", "max_tokens": 2, "echo": True, "logprobs": 1, "return_token_ids": True}) == 200
    assert check("/v1/responses", {"input": "hi", "max_output_tokens": 3}) == 200
    for path in ("/state", "/load", "/info", "/version", "/v1/models", "/live", "/ready", "/health", "/openapi.json"):
        check_get(path)
    assert check("/tokenize", {"prompt": "hi"}) == 200 and check("/detokenize", {"tokens": [1]}) == 200
    assert check("/apply-template", {"messages": user}) == 200
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize", "/abort"):
        assert check(path, {}) == 400


def test_every_described_field_is_known(server, description):
    """A field that the description lists is honoured or refused, never waved through as unknown."""
    for schema, path, base in [("ChatRequest", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
                               ("CompletionRequest", "/v1/completions", {"prompt": "hi"})]:
        for field in description["components"]["schemas"][schema]["properties"]:
            if field in base or field == "model":
                continue
            status, _, text = harness.request(server.address, "POST", path, {**base, "max_tokens": 1, field: {"no": ["sense"]}})
            assert status == 400 and json.loads(text)["error"]["param"].startswith(field), (field, status, text)
