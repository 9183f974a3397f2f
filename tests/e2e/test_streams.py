"""Streams to the letter: silence is filled with comments, and what broke off cannot be taken for complete."""

import json
import threading

import openai
import pytest

import harness

CHAT = "/v1/chat/completions"
LONG = {"prompt": "Once", "max_tokens": 12_000, "ignore_eos": True}


@pytest.fixture(scope="module")
def single(logs, long_model):
    """One answer at a time, a comment each 100 ms."""
    directory = logs / "single"
    directory.mkdir()
    process = harness.Process(directory, "single", [
        "serve", "--model", long_model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory", "64MiB", "--aggregated",
        "--requests-max", 1, "--keepalive", 0.1]).wait_started()
    harness.wait_ready(process.address)
    yield process
    assert process.stop() == 0, process.output()[-4000:]


def test_comments_while_it_waits(single):
    """From the moment a request is accepted, the queue included; a client of OpenAI's does not see them."""
    with harness.open_request(single.address, {**LONG, "stream": True}) as first:
        assert first.recv(100)
        body = {"messages": [{"role": "user", "content": "What is a violin?"}], "stream": True, "temperature": 0}
        with harness.open_request(single.address, body, CHAT) as second:
            second.settimeout(30)
            seen = b""
            while seen.count(b": keepalive\n\n") < 3:
                seen += second.recv(4096)
            header, _, rest = seen.partition(b"\r\n\r\n")
            assert header.startswith(b"HTTP/1.1 200 ") and b"content-type: text/event-stream" in header.lower()
            assert b"cache-control: no-cache" in header.lower() and b"x-accel-buffering: no" in header.lower()
            client = openai.OpenAI(base_url=f"http://{single.address}/v1", api_key="none", max_retries=0, timeout=60)
            answer = {}
            asking = threading.Thread(target=lambda: answer.update(text="".join(
                c.choices[0].delta.content or "" for c in client.chat.completions.create(model=single_model(single), **body))))
            asking.start()
            harness.wait_until(lambda: json.loads(harness.request(single.address, "GET", "/load")[2])["waiting"] == 2, 30, "it waits")
            first.close()
            while b"data: [DONE]" not in seen:
                data = second.recv(65536)
                assert data, "the stream ended without [DONE]"
                seen += data
            asking.join(60)
            assert answer["text"].startswith("A violin is")


def single_model(process):
    return json.loads(harness.request(process.address, "GET", "/v1/models")[2])["data"][0]["id"]


def test_what_fails_midway_breaks_off(logs, long_model):
    """An error frame, no [DONE], no last chunk: the official client raises."""
    directory = logs / "breaks"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=0, decode=1)
    try:
        with harness.open_request(cluster.address, {**LONG, "stream": True}) as connection:
            connection.settimeout(30)
            seen = connection.recv(1000)
            client = openai.OpenAI(base_url=f"http://{cluster.address}/v1", api_key="none", max_retries=0, timeout=60)
            stream = client.completions.create(model=single_model(cluster), stream=True, prompt="Once", max_tokens=12_000,
                                               extra_body={"ignore_eos": True})
            next(iter(stream))
            cluster.workers["decode"][0].kill()
            with pytest.raises(openai.APIError) as caught:
                for _ in stream:
                    pass
            assert caught.value.code == "service_unavailable"
            while data := connection.recv(65536):
                seen += data
        assert not seen.endswith(b"0\r\n\r\n") and b"[DONE]" not in seen and b'"finish_reason":"' not in seen
        error = json.loads(seen[seen.rindex(b"data: ") + 6:].split(b"\n")[0])["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["code"] == "service_unavailable"
    finally:
        cluster.stop()
