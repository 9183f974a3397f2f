"""The same tokens wherever a prompt is prefilled and however its KV cache travels."""

import json
import random
import threading

import pytest

import checkpoints
import harness

LENGTHS = (1, 63, 64, 65, 300, 700)
KINDS = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.8, "top_p": 0.95, "seed": 1234},
    "penalised": {"temperature": 1.0, "top_k": 40, "seed": 99, "repetition_penalty": 1.2, "presence_penalty": 0.5},
}
CASES = [(length, kind) for length in LENGTHS for kind in KINDS]
TOKENS = 24
CHUNK = ["--batch-tokens-max", 128]


def answer_all(address, make_prompt):
    """The answers to all cases, four at a time, beside streams that keep the batches mixed."""
    stop = threading.Event()

    def disturb(seed):
        while not stop.is_set():
            harness.complete(address, make_prompt(90 + 40 * seed, seed), max_tokens=40, temperature=1, seed=seed,
                             ignore_eos=True)

    disturbers = [threading.Thread(target=disturb, args=(seed,), daemon=True) for seed in range(3)]
    for thread in disturbers:
        thread.start()
    answers = {}

    def ask(length, kind):
        answers[length, kind] = harness.complete(address, make_prompt(length), max_tokens=TOKENS, ignore_eos=True,
                                                 **KINDS[kind])

    try:
        for i in range(0, len(CASES), 4):
            harness.in_threads([lambda case=case: ask(*case) for case in CASES[i:i + 4]])
    finally:
        stop.set()
        for thread in disturbers:
            thread.join()
    return answers


def serve(logs, name, model, *args):
    directory = logs / name
    directory.mkdir()
    process = harness.Process(directory, name, ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1,
                                                "--kv-memory", "64MiB", *CHUNK, *args]).wait_started()
    harness.wait_ready(process.address)
    return process


@pytest.fixture(scope="module")
def aggregated(logs, long_model, make_prompt):
    """What one worker answers that does everything itself, asked alone."""
    process = serve(logs, "aggregated", long_model, "--aggregated")
    answers = {(length, kind): harness.complete(process.address, make_prompt(length), max_tokens=TOKENS, ignore_eos=True,
                                                **KINDS[kind]) for length, kind in CASES}
    yield process, answers
    assert process.stop() == 0


def check(answers, expected):
    for case in CASES:
        assert answers[case] == expected[case], f"prompt of {case[0]} tokens, {case[1]}"
        assert len(answers[case][1]) == TOKENS


def test_answers_differ(aggregated):
    """Equality would say little if every answer were the same."""
    _, expected = aggregated
    assert len({expected[case][0] for case in CASES}) > len(CASES) // 2


def test_aggregated_under_load(aggregated, make_prompt):
    process, expected = aggregated
    check(answer_all(process.address, make_prompt), expected)


def test_disaggregated_in_one_process(aggregated, logs, long_model, make_prompt):
    process = serve(logs, "one-process", long_model)
    check(answer_all(process.address, make_prompt), aggregated[1])
    assert harness.metric(process.address, "millrace_engine_prompt_tokens_total", role="decode") == 0, "the decode side prefilled"
    assert harness.metric(process.address, "millrace_engine_prompt_tokens_total", role="prefill") > 0
    assert harness.metric(process.address, "millrace_worker_prefill_attempts_total", outcome="committed") > len(CASES)
    assert process.stop() == 0


def kv_bytes_per_token(model):
    config = json.loads((model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim  # K and V, bf16


@pytest.mark.parametrize("rails", [1, 2, 3])
def test_disaggregated_over_tcp(aggregated, logs, long_model, make_prompt, rails):
    directory = logs / f"rails-{rails}"
    directory.mkdir()
    # Without the prefix cache, so that every token of every prompt has to cross. tests/e2e/test_cache.py has it on.
    cluster = harness.Cluster(directory, long_model, rails=[f"127.0.0.{i + 1}" for i in range(rails)],
                              worker_args=[*CHUNK, "--prefix-cache", "off"])
    try:
        check(answer_all(cluster.address, make_prompt), aggregated[1])
        # The prompts were computed on one side only, and their KV crossed.
        assert cluster.metric("decode", "millrace_engine_prompt_tokens_total") == 0
        assert cluster.metric("decode", "millrace_worker_prefill_attempts_total", outcome="committed") >= len(CASES)
        assert cluster.metric("decode", "millrace_worker_prefill_attempts_total", outcome="failed") == 0
        computed = cluster.metric("prefill", "millrace_engine_prompt_tokens_total")
        assert computed >= sum(length for length, _ in CASES)
        carried = cluster.metric("prefill", "millrace_worker_transfer_bytes_total")
        assert carried >= computed * kv_bytes_per_token(long_model)
        for role in ("prefill", "decode"):
            harness.wait_until(lambda: cluster.metric(role, "millrace_worker_tickets") == 0, 3, f"{role}: tickets stay")
    finally:
        cluster.stop()


@pytest.mark.parametrize("variant", ["v1", "v2-fp8", "v2-yarn"])
def test_other_checkpoints(logs, tmp_path, variant):
    """Ling v1, block FP8 and YaRN, random weights: the hand-over changes no token and no probability of theirs either."""
    directory = tmp_path / variant
    checkpoints.make(variant, str(directory))
    prompts = [random.Random(length).choices(range(256), k=length) for length in (1, 64, 65, 300)]
    answers = {}
    for mode in (["--aggregated"], []):
        process = serve(logs, f"{variant}-{len(mode)}", directory, *mode)
        answers[len(mode)] = [harness.complete(process.address, prompt, max_tokens=TOKENS, ignore_eos=True, **kind)
                              for prompt in prompts for kind in KINDS.values()]
        chat = harness.post(process.address, "/v1/chat/completions", {
            "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "u"}], "max_tokens": 4})
        rendered = "<role>SYSTEM</role>S<role>HUMAN</role>u<role>ASSISTANT</role>" if variant == "v1" else (
            "<role>SYSTEM</role>S\ndetailed thinking off<|role_end|><role>HUMAN</role>u<|role_end|><role>ASSISTANT</role>")
        special = ("<role>", "</role>", "<|role_end|>")
        expected = len(rendered) - sum(rendered.count(text) * (len(text) - 1) for text in special)
        assert chat["usage"]["prompt_tokens"] == expected, "one token per byte and per special token"
        assert process.stop() == 0
    assert answers[0] == answers[1]
    assert len({text for text, *_ in answers[0]}) > len(prompts)
