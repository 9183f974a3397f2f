"""Tool calls, several choices, several prompts and token ids, through the official client. The demo model was trained to
call tools."""

import json

import openai
import pytest

import harness


def tool(name, description, **parameters):
    return {"type": "function", "function": {"name": name, "description": description, "parameters": {
        "type": "object", "properties": {k: {"type": t, "description": d} for k, (t, d) in parameters.items()},
        "required": list(parameters)}}}


WEATHER = tool("get_weather", "Get the weather in a city", city=("string", "Name of the city"))
MULTIPLY = tool("multiply", "Multiply two numbers", a=("integer", "First number"), b=("integer", "Second number"))
PARIS = [{"role": "user", "content": "What is the weather in Paris?"}]
TWO_CITIES = [{"role": "user", "content": "What is the weather in Paris and Rome?"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client, model, **fields):
    return client.chat.completions.create(model=model.name, temperature=0, max_tokens=120, **fields)


def gather(chunks):
    """(content, calls, finish) of a streamed answer, checked for order and form on the way."""
    content, calls, finish = "", [], None
    for chunk in chunks:
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            if piece.function.name is not None:
                assert piece.index == len(calls) and piece.id and piece.type == "function"
                calls.append({"id": piece.id, "name": piece.function.name, "arguments": ""})
            else:
                assert piece.id is None
            calls[piece.index]["arguments"] += piece.function.arguments
        if choice.finish_reason:
            assert finish is None and not choice.delta.content and not choice.delta.tool_calls
            finish = choice.finish_reason
    return content, calls, finish


def test_one_call(client, model):
    choice = ask(client, model, messages=PARIS, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    content, calls, finish = gather(ask(client, model, messages=PARIS, tools=[WEATHER], stream=True))
    assert (content, finish) == ("", "tool_calls")
    assert [(c["name"], c["arguments"]) for c in calls] == [("get_weather", call.function.arguments)]


def test_a_conversation_with_a_tool(client, model):
    call = ask(client, model, messages=PARIS, tools=[WEATHER]).choices[0].message
    conversation = PARIS + [call.model_dump(exclude_none=True),
                            {"role": "tool", "tool_call_id": call.tool_calls[0].id,
                             "content": '{"temperature": 21, "sky": "sunny"}'}]
    answer = ask(client, model, messages=conversation, tools=[WEATHER]).choices[0]
    assert answer.finish_reason == "stop" and answer.message.tool_calls is None
    assert "Paris" in answer.message.content and "21" in answer.message.content


def test_parallel_calls(client, model):
    both = ask(client, model, messages=TWO_CITIES, tools=[WEATHER]).choices[0]
    assert [json.loads(c.function.arguments)["city"] for c in both.message.tool_calls] == ["Paris", "Rome"]
    assert len({c.id for c in both.message.tool_calls}) == 2
    content, calls, finish = gather(ask(client, model, messages=TWO_CITIES, tools=[WEATHER], stream=True))
    assert (content, finish, len(calls)) == ("", "tool_calls", 2)
    one = ask(client, model, messages=TWO_CITIES, tools=[WEATHER], parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1 and one.choices[0].finish_reason == "tool_calls"
    assert one.usage.completion_tokens < ask(client, model, messages=TWO_CITIES, tools=[WEATHER]).usage.completion_tokens


def test_tool_choice_none_and_length(client, model):
    none = ask(client, model, messages=PARIS, tools=[WEATHER], tool_choice="none").choices[0]
    assert none.message.tool_calls is None and none.finish_reason != "tool_calls"
    full = ask(client, model, messages=PARIS, tools=[WEATHER]).usage.completion_tokens
    for limit in range(1, full):  # cut anywhere: never markup, never tool_calls
        choice = client.chat.completions.create(model=model.name, temperature=0, max_tokens=limit, messages=PARIS,
                                                tools=[WEATHER]).choices[0]
        assert "tool_call>" not in (choice.message.content or "")
        if choice.finish_reason == "length":
            assert limit < full
        else:
            assert choice.finish_reason == "tool_calls"


def test_several_choices(client, model):
    fields = dict(model=model.name, prompt="Once", max_tokens=12, temperature=1.5, seed=3, extra_body={"ignore_eos": True})
    one = client.completions.create(**fields)
    three = client.completions.create(**fields, n=3)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert three.choices[0].text == one.choices[0].text and len({c.text for c in three.choices}) == 3
    assert three.usage.completion_tokens == 36 and three.usage.prompt_tokens == one.usage.prompt_tokens
    texts, finishes = ["", "", ""], [0, 0, 0]
    for chunk in client.completions.create(**fields, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
        finishes[chunk.choices[0].index] += chunk.choices[0].finish_reason is not None
    assert texts == [c.text for c in three.choices] and finishes == [1, 1, 1]
    chat = client.chat.completions.create(model=model.name, messages=PARIS, n=2, max_tokens=4, temperature=1.5, stream=True)
    assert [c.choices[0].index for c in chat if c.choices[0].delta.role] == [0, 1]


def test_several_prompts(client, model):
    prompts = ["What is", "Once upon", "Two"]
    fields = dict(model=model.name, max_tokens=6, temperature=0, extra_body={"ignore_eos": True})
    together = client.completions.create(prompt=prompts, **fields)
    alone = [client.completions.create(prompt=p, **fields).choices[0].text for p in prompts]
    assert [c.text for c in together.choices] == alone
    assert client.completions.create(prompt=prompts, n=2, **fields).choices[5].index == 5


def test_token_ids_and_tokenizing(server, model):
    body = {"prompt": "What is", "max_tokens": 5, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    choice = harness.post(server.address, "/v1/completions", body)["choices"][0]
    assert len(choice["token_ids"]) == 5
    tokens = harness.post(server.address, "/tokenize", {"prompt": "What is"})
    assert tokens["tokens"] == choice["prompt_token_ids"] and tokens["count"] == len(tokens["tokens"])
    back = harness.post(server.address, "/detokenize", {"tokens": choice["token_ids"]})
    assert back["prompt"] == choice["text"]
    events = list(harness.stream(server.address, body))
    assert [i for e in events for i in e["choices"][0].get("token_ids", [])] == choice["token_ids"]
    assert events[0]["choices"][0]["prompt_token_ids"] == tokens["tokens"]
    chat = {"messages": PARIS}
    rendered = harness.post(server.address, "/apply-template", chat)["prompt"]
    assert rendered.endswith("<role>HUMAN</role>What is the weather in Paris?<|role_end|><role>ASSISTANT</role>")
    assert harness.post(server.address, "/tokenize", chat)["tokens"] == \
        harness.post(server.address, "/tokenize", {"prompt": rendered})["tokens"]


def test_stop_strings_kept_when_asked(client, model):
    fields = dict(model=model.name, messages=[{"role": "user", "content": "What is a violin?"}], temperature=0, stop=["bowed"])
    assert client.chat.completions.create(**fields).choices[0].message.content == "A violin is a "
    kept = client.chat.completions.create(**fields, extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == "A violin is a bowed"


def test_a_message_is_continued(client, model):
    messages = [{"role": "user", "content": "What is a violin?"}, {"role": "assistant", "content": "A violin is a bowed"}]
    answer = client.chat.completions.create(model=model.name, messages=messages, temperature=0,
                                            extra_body={"continue_final_message": True, "add_generation_prompt": False})
    assert answer.choices[0].message.content.startswith(" stringed instrument")


def test_unknown_fields_are_logged_once(server):
    for _ in range(3):
        harness.post(server.address, "/v1/completions", {"prompt": "hi", "max_tokens": 1, "no_such_field_7": {"a": 1}})
    assert server.output().count("'no_such_field_7'") == 1


def test_prompts_stay_out_of_the_log(server):
    secret = "xylophone-secret-4711"
    harness.post(server.address, "/v1/completions", {"prompt": secret, "max_tokens": 1})
    harness.request(server.address, "POST", "/v1/completions", {"prompt": secret, "max_tokens": -1})
    harness.request(server.address, "POST", "/v1/chat/completions", {"messages": [{"role": secret, "content": secret}]})
    assert secret not in server.output()
