"""The CUDA backend over HTTP: in one process, and across the hand-off with a CPU worker on the other side."""

import harness
import pytest

# A likeliest token that leads by more than this (natural log) is the same on both backends: they differ by the rounding
# of activations to bf16 on the device.
CLEAR = 0.25
QUESTIONS = ["What is a violin?", "What is a glacier?", "Explain the word harbor.", "What is a parliament?",
             "What does to whisper mean?", "What is a poem?"]
ARGS = ["--threads", 1, "--kv-memory", "64MiB", "--batch-tokens-max", 128]


@pytest.fixture(scope="module")
def cuda_server(logs, model):
    directory = logs / "cuda"
    directory.mkdir()
    process = harness.Process(directory, "serve", ["serve", "--backend", "cuda", "--model", model, "--listen", "127.0.0.1:0",
                                                   *ARGS])
    process.ready_line.wait(120)
    if process.address is None:
        process.stop()
        output = process.output()
        if "no CUDA" in output:
            pytest.skip(output.strip().splitlines()[-1])
        pytest.fail(output)
    harness.wait_ready(process.address)
    yield process
    assert process.stop() == 0, process.output()[-4000:]


def chat(address, question, **fields):
    return harness.post(address, "/v1/chat/completions",
                        {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 80, **fields})


def tokens_with_lead(answer):
    """(token, lead over the second likeliest) of an answer with top_logprobs=2."""
    steps = answer["choices"][0]["logprobs"]["content"]
    return [(step["token"], step["top_logprobs"][0]["logprob"] - step["top_logprobs"][1]["logprob"]) for step in steps]


def assert_same_where_clear(cpu_address, other_address):
    compared = 0
    for question in QUESTIONS:
        cpu = tokens_with_lead(chat(cpu_address, question, logprobs=True, top_logprobs=2))
        other = tokens_with_lead(chat(other_address, question, logprobs=True, top_logprobs=2))
        for (token, lead), (got, _) in zip(cpu, other):
            if token != got:
                assert lead <= CLEAR, f"{question}: {got!r} instead of {token!r}, which leads by {lead:.3f}"
                break  # the answers go on from different tokens
            compared += 1
        else:
            assert len(cpu) == len(other)
    print(f"{compared} tokens compared")
    assert compared >= 50


def test_same_tokens_as_the_cpu(server, cuda_server):
    assert_same_where_clear(server.address, cuda_server.address)


def test_tokens_drawn_on_the_device(cuda_server):
    """With log-probabilities the host draws, without them the device does: the same tokens, greedy or not."""
    for i, question in enumerate(QUESTIONS):
        for temperature, top_p in ((0, 1), (0.8, 1), (0.8, 0.9)):
            fields = {"temperature": temperature, "top_p": top_p, "seed": i}
            by_host = chat(cuda_server.address, question, logprobs=True, **fields)["choices"][0]["message"]["content"]
            by_device = chat(cuda_server.address, question, **fields)["choices"][0]["message"]["content"]
            assert by_host == by_device


def test_many_at_once(cuda_server):
    """Batched answers are those of one at a time."""
    alone = [chat(cuda_server.address, question)["choices"][0]["message"]["content"] for question in QUESTIONS]
    for _ in range(3):
        together = harness.in_threads([lambda q=q: chat(cuda_server.address, q) for q in QUESTIONS])
        assert [answer["choices"][0]["message"]["content"] for answer in together] == alone


@pytest.mark.parametrize("prefill, decode", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_hand_off_between_backends(logs, model, server, cuda_server, prefill, decode):
    directory = logs / f"{prefill}-to-{decode}"
    directory.mkdir()
    processes = []
    try:
        for role, backend in (("prefill", prefill), ("decode", decode)):
            processes.append(harness.Process(directory, role, ["worker", "--role", role, "--backend", backend, "--model", model,
                                                               "--listen", "127.0.0.1:0", *ARGS]).wait_started())
        gateway = harness.Process(directory, "gateway", ["gateway", "--model", model, "--listen", "127.0.0.1:0", "--prefill",
                                                         processes[0].address, "--decode", processes[1].address])
        processes.append(gateway.wait_started())
        harness.wait_ready(gateway.address)
        assert_same_where_clear(server.address, gateway.address)
    finally:
        codes = [process.stop() for process in reversed(processes)]
    assert codes == [0] * 3, f"exit codes {codes}; logs in {directory}"
