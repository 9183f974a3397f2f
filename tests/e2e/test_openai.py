"""The official Python client, unmodified, against millrace serve."""

import json

import openai
import pytest

import harness

QUESTION = [{"role": "user", "content": "What is a violin?"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather of a city",
                                         "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                                                        "required": ["city"]}}}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def name(client):
    return client.models.list().data[0].id


def test_models(client, model):
    listed = client.models.list()
    assert [m.id for m in listed.data] == [model.name]
    assert listed.data[0].object == "model" and listed.data[0].created > 1_600_000_000
    assert client.models.retrieve(model.name).id == model.name
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"


def test_chat(client, name):
    answer = client.chat.completions.create(model=name, messages=QUESTION, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == name
    choice = answer.choices[0]
    assert choice.index == 0 and choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream_equals_the_whole_answer(client, name):
    fields = dict(model=name, messages=QUESTION, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not chunks[-1].choices[0].delta.content
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_usage_in_the_stream(client, name):
    fields = dict(model=name, messages=QUESTION, max_tokens=7, temperature=0)
    usage = client.chat.completions.create(**fields).usage
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == usage.model_dump(
        exclude={"prompt_tokens_details"})  # the second time more is cached
    assert all(chunk.usage is None and chunk.choices for chunk in chunks[:-1])
    running = list(client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True},
        extra_body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}}))
    counts = [chunk.usage.completion_tokens for chunk in running]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == usage.completion_tokens


def test_running_usage_counts_what_was_said(server):
    """However late a chunk is read: its usage is that of its own tokens and those before."""
    body = {"messages": QUESTION, "temperature": 1.5, "seed": 4, "max_tokens": 120, "ignore_eos": True, "return_token_ids": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    said = 0
    for event in harness.stream(server.address, body, "/v1/chat/completions"):
        said += len(event["choices"][0].get("token_ids", [])) if event["choices"] else 0
        assert event["usage"]["completion_tokens"] == said
    assert said == 120


def test_completions(client, name):
    fields = dict(model=name, prompt="What is", max_tokens=10, temperature=0, extra_body={"ignore_eos": True})
    whole = client.completions.create(**fields)
    assert whole.object == "text_completion" and whole.id.startswith("cmpl-")
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 10
    chunks = list(client.completions.create(**fields, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    echoed = client.completions.create(**{**fields, "echo": True})
    assert echoed.choices[0].text == "What is" + whole.choices[0].text


def test_unknown_model(client):
    for ask in (lambda: client.chat.completions.create(model="other", messages=QUESTION),
                lambda: client.completions.create(model="other", prompt="a")):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_max_tokens(client, name):
    for limit in (1, 5):
        for key in ("max_tokens", "max_completion_tokens"):
            answer = client.chat.completions.create(model=name, messages=QUESTION, temperature=0, **{key: limit},
                                                    extra_body={"ignore_eos": True})
            assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == limit


def test_chat_logprobs(client, name):
    fields = dict(model=name, messages=QUESTION, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3,
                  extra_body={"ignore_eos": True, "skip_special_tokens": False})
    whole = client.chat.completions.create(**fields)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens == 8
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
        tops = [top.logprob for top in entry.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert tops[0] == entry.logprob, "a greedy token is the likeliest"
    text = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    assert text == whole.choices[0].message.content
    streamed = [entry for chunk in client.chat.completions.create(**fields, stream=True)
                if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [(e.token, e.logprob) for e in streamed] == [(e.token, e.logprob) for e in content]


def test_completion_logprobs(client, name):
    answer = client.completions.create(model=name, prompt="What is", max_tokens=6, temperature=0, logprobs=2,
                                       extra_body={"ignore_eos": True})
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 6
    assert all(value <= 0 for value in logprobs.token_logprobs)
    assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs)


def test_echo_with_logprobs(client, name):
    """What is reported of a prompt's tokens is what was reported when the model wrote them itself."""
    fields = dict(model=name, temperature=0, logprobs=2,
                  extra_body={"ignore_eos": True, "return_token_ids": True, "skip_special_tokens": False})
    written = client.completions.create(prompt="What is", max_tokens=100, **fields).choices[0]
    prompt = written.prompt_token_ids + written.token_ids
    for max_tokens, n in ((1, 1), (3, 2)):
        answer = client.completions.create(prompt=prompt, max_tokens=max_tokens, n=n, echo=True, **fields)
        for choice in answer.choices:
            echoed = choice.logprobs
            assert choice.text.startswith("What is" + written.text)
            assert len(echoed.tokens) == len(prompt) + max_tokens and "".join(echoed.tokens) == choice.text
            assert echoed.token_logprobs[0] is None and echoed.top_logprobs[0] is None and echoed.text_offset[0] == 0
            begin = len(written.prompt_token_ids)
            assert echoed.tokens[begin:-max_tokens] == written.logprobs.tokens
            assert echoed.token_logprobs[begin:-max_tokens] == written.logprobs.token_logprobs
            assert echoed.top_logprobs[begin:-max_tokens] == written.logprobs.top_logprobs
            assert all(value <= 0 for value in echoed.token_logprobs[1:])
    streamed = list(client.completions.create(prompt=prompt, max_tokens=1, echo=True, stream=True, **fields))
    assert [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens][:-1] == echoed.tokens[:-3]


def test_stop_strings_across_tokens(client, name):
    fields = dict(model=name, prompt="What is a", max_tokens=40, temperature=0, extra_body={"ignore_eos": True})
    text = client.completions.create(**fields).choices[0].text
    assert len(text) > 12
    checked = 0
    for start in range(1, len(text) - 3):  # every window of 3 characters, wherever its tokens begin
        stop = text[start:start + 3]
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        expected = text[:text.index(stop)]
        whole = client.completions.create(**fields, stop=stop).choices[0]
        assert (whole.text, whole.finish_reason) == (expected, "stop"), stop
        chunks = list(client.completions.create(**fields, stop=["never this", stop], stream=True))
        assert "".join(c.choices[0].text for c in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
        checked += 1
        if checked == 12:
            break
    assert checked > 0


def test_seeds(client, name):
    def sample(seed):
        return client.completions.create(model=name, prompt="Once", max_tokens=24, temperature=1.5, seed=seed,
                                         extra_body={"ignore_eos": True}).choices[0].text

    first = sample(1)
    assert sample(1) == first
    assert len({sample(seed) for seed in range(2, 6)} | {first}) > 1
    drawn = {client.completions.create(model=name, prompt="Once", max_tokens=24, temperature=1.5,
                                       extra_body={"ignore_eos": True}).choices[0].text for _ in range(4)}
    assert len(drawn) > 1, "without a seed each request draws its own"


def test_tools_reach_the_prompt(client, name):
    fields = dict(model=name, messages=QUESTION, max_tokens=4, temperature=0)
    plain = client.chat.completions.create(**fields).usage.prompt_tokens
    with_tool = client.chat.completions.create(**fields, tools=[TOOL]).usage.prompt_tokens
    none = client.chat.completions.create(**fields, tools=[TOOL], tool_choice="none").usage.prompt_tokens
    assert with_tool > plain == none
    conversation = QUESTION + [
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Ulm"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]
    answer = client.chat.completions.create(model=name, messages=conversation, tools=[TOOL], max_tokens=4, temperature=0)
    assert answer.usage.prompt_tokens > with_tool


def test_message_forms(client, name):
    def prompt_tokens(messages):
        return client.chat.completions.create(model=name, messages=messages, max_tokens=1).usage.prompt_tokens

    parts = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a violin?"}]}]
    assert prompt_tokens(parts) == prompt_tokens(QUESTION)
    assert (prompt_tokens([{"role": "developer", "content": "Be brief."}] + QUESTION) ==
            prompt_tokens([{"role": "system", "content": "Be brief."}] + QUESTION))


def test_sampling_fields_are_taken(client, name):
    answer = client.completions.create(
        model=name, prompt="Once", max_tokens=4, temperature=0.7, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5,
        seed=3, logit_bias={"5": -100}, user="somebody",
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 4, "priority": 1, "made_up": 1})
    assert answer.usage.completion_tokens == 4
    forced = client.completions.create(model=name, prompt="Once", max_tokens=3, temperature=0, logprobs=0,
                                       logit_bias={"40": 100}, extra_body={"ignore_eos": True})
    assert len(set(forced.choices[0].logprobs.tokens)) == 1, "a bias of 100 forces its token"


def test_request_ids(client, name):
    raw = client.chat.completions.with_raw_response.create(model=name, messages=QUESTION, max_tokens=1,
                                                           extra_headers={"x-request-id": "abc-123"})
    assert raw.headers["x-request-id"] == "abc-123"
    generated = client.chat.completions.with_raw_response.create(model=name, messages=QUESTION, max_tokens=1,
                                                                 extra_headers={"x-request-id": "bad id; <"})
    assert generated.headers["x-request-id"].startswith("req-")


def test_trained_questions(client, name, model):
    """The demo model says what it said in its own framework when it was made: the gaps between its first and second
    choice are far beyond any rounding. Streamed, so that the whole path is walked."""
    samples = json.loads((model / "samples.json").read_text())
    assert len(samples) >= 8
    for sample in samples:
        assert sample["smallest_logit_gap"] > 5
        chunks = client.chat.completions.create(model=name, messages=[{"role": "user", "content": sample["question"]}],
                                                temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == sample["answer"]
