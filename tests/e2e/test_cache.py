"""What was computed once is not computed again, whoever has it: the prefix cache, its tiers and its counts."""

import harness


def ask(address, prompt, **fields):
    body = {"model": "ling-tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
    answer = harness.post(address, "/v1/completions", body)
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def test_the_second_time_only_the_end_is_computed(server, make_prompt):
    prompt = make_prompt(300, 501)
    text, cached = ask(server.address, prompt)
    assert cached == 0
    assert ask(server.address, prompt) == (text, 256)
    # What goes on differently shares what was the same.
    assert ask(server.address, prompt[:200] + make_prompt(90, 502))[1] == 192


def test_salt_keeps_callers_apart(server, make_prompt):
    prompt = make_prompt(300, 503)
    text, _ = ask(server.address, prompt, cache_salt="one")
    assert ask(server.address, prompt, cache_salt="two") == (text, 0)
    assert ask(server.address, prompt) == (text, 0)
    assert ask(server.address, prompt, cache_salt="one") == (text, 256)


def test_chat_counts_too(server):
    body = {"model": "ling-tiny", "max_tokens": 4, "temperature": 0,
            "messages": [{"role": "user", "content": "What is a violin? " * 30}]}
    first, second = (harness.post(server.address, "/v1/chat/completions", body)["usage"] for _ in range(2))
    assert second["prompt_tokens_details"]["cached_tokens"] >= 64
    assert first["prompt_tokens"] == second["prompt_tokens"]


def test_off_computes_every_prompt_and_tiers_keep_more_than_the_pool(logs, model, make_prompt):
    prompts = [make_prompt(600, 510 + i) for i in range(12)]
    found = {}
    for name, args in {"off": ["--prefix-cache", "off", "--speculate", "off"],
                       "pool": [],
                       "tiers": ["--kv-host-memory", "16MiB", "--kv-disk-size", "16MiB", "--kv-disk-directory", str(logs)],
                       }.items():
        directory = logs / f"cache-{name}"
        directory.mkdir()
        process = harness.Process(directory, "serve", ["serve", "--aggregated", "--model", model, "--listen", "127.0.0.1:0",
                                                       "--threads", 1, "--kv-memory", "4MiB", *args]).wait_started()
        harness.wait_ready(process.address)
        answers = [[ask(process.address, prompt) for prompt in prompts] for _ in range(2)]
        found[name] = sum(cached for _, cached in answers[1])
        found[name, "text"] = [text for text, _ in answers[0]]
        assert found[name, "text"] == [text for text, _ in answers[1]]
        assert process.stop() == 0, process.output()[-4000:]
    assert found["off"] == 0
    # All of it, but for pages that a busy machine measures as slower to copy than to compute.
    assert found["tiers"] > max(6 * 576, found["pool"])
    assert found["off", "text"] == found["pool", "text"] == found["tiers", "text"]
