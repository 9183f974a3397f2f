"""Load on a fleet whose processes die, freeze and are cut off; every answer is compared with the undisturbed one.

By hand, the long form, which prints a table: MILLRACE_CHAOS_FAULTS=200 build/venv/bin/python -m pytest -s tests/e2e/test_chaos.py
"""

import json
import random
import select
import statistics
import threading
import time

import harness

ANSWER_SECONDS = 90  # without a byte for so long, and nobody disturbs the gateway: the answer is lost
GAP_MIN = 0.2        # shorter silences are not looked at


class Broken(Exception):
    """The gateway went away, or says nothing."""


class Case:
    """A request and what the undisturbed fleet answers: tokens with log-probabilities, text, finish reason of each choice."""

    def __init__(self, name, path="/v1/completions", **body):
        self.name, self.path = name, path
        self.body = {"model": "ling-tiny", "stream": True, "logprobs": 0, "ignore_eos": True, **body}
        self.expected = None


def make_cases(make_prompt):
    """Every kind of state that an answer carries along, at several lengths."""
    kinds = {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 0.9, "seed": 11},
        "penalties": {"temperature": 0.8, "seed": 5, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        "narrow": {"temperature": 1.1, "seed": 6, "top_p": 0.9, "logit_bias": {"50": -3, "51": 2}},
        "stop string": {"temperature": 0.7, "seed": 3, "stop": [" the", "ing"], "ignore_eos": False},
    }
    cases = [Case(f"{name} {length}", prompt=make_prompt(length, 77), max_tokens=tokens, **fields)
             for name, fields in kinds.items() for length, tokens in ((30, 400), (400, 150), (1500, 60))]
    cases += [Case(f"three choices {length}", prompt=make_prompt(length, 78), max_tokens=120, n=3, temperature=0.9, seed=8)
              for length in (30, 700)]
    chat = {"path": "/v1/chat/completions", "logprobs": True, "ignore_eos": False}
    tool = {"type": "function", "function": {"name": "get_weather", "description": "Get the weather in a city", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
    schema = {"type": "object", "required": ["name", "age", "tags"], "additionalProperties": False, "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 4, "maxItems": 8}}}
    cases += [Case("tool", messages=[{"role": "user", "content": "What is the weather in Paris and Rome?"}], tools=[tool],
                   temperature=0, max_tokens=120, **chat),
              *(Case(f"schema {seed}", messages=[{"role": "user", "content": "Tell me about a violin."}], temperature=1.6,
                     seed=seed, max_tokens=400, response_format={"type": "json_schema", "json_schema": {
                         "name": "answer", "strict": True, "schema": schema}}, **chat) for seed in (1, 2))]
    return cases


def piece(choice):
    """What an event adds to a choice: text, and for chat also reasoning and tool calls, as one string."""
    if "text" in choice:
        return choice["text"]
    delta = choice.get("delta", {})
    calls = (call["function"] for call in delta.get("tool_calls") or ())
    return (delta.get("content") or "") + (delta.get("reasoning_content") or "") + "".join(
        call.get("name", "") + (call.get("arguments") or "") for call in calls)


class Answers:
    """One stream as it is read: what each choice has said, and when the client heard nothing."""

    def __init__(self, on_gap):
        self.tokens, self.text, self.finish = {}, {}, {}
        self.on_gap = on_gap
        self.heard = time.monotonic()
        self.begun = False

    def add(self, event):
        now = time.monotonic()
        if now - self.heard >= GAP_MIN:
            self.on_gap("pause" if self.begun else "wait", self.heard, now)
        self.heard = now
        self.begun = True
        for choice in event["choices"]:
            index = choice["index"]
            self.text[index] = self.text.get(index, "") + piece(choice)
            if logprobs := choice.get("logprobs"):
                self.tokens.setdefault(index, []).extend(
                    zip(logprobs["tokens"], logprobs["token_logprobs"]) if "tokens" in logprobs
                    else [(entry["token"], entry["logprob"]) for entry in logprobs["content"]])
            if choice.get("finish_reason"):
                self.finish[index] = choice["finish_reason"]

    def result(self):
        return self.tokens, self.text, self.finish


class Load:
    """Clients in a loop over the cases; at most `clients` answers at once, arrivals `interval` seconds apart."""

    def __init__(self, fleet, cases, clients, interval=0.0, seed=1):
        self.fleet, self.cases, self.interval = fleet, cases, interval
        self.lock = threading.Lock()
        self.rng = random.Random(seed)
        self.stopping = False
        self.next_at = time.monotonic()
        self.violations, self.gaps = [], []
        self.answered = self.broken = 0
        self.disturbed = set()  # gateways that a fault has now, or has just had
        self.threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def start(self):
        for thread in self.threads:
            thread.start()

    def stop(self):
        self.stopping = True
        for thread in self.threads:
            thread.join()

    def _client(self):
        while not self.stopping:
            with self.lock:
                case = self.rng.choice(self.cases)
                wait = self.next_at - time.monotonic()
                self.next_at = max(self.next_at, time.monotonic()) + self.interval
            if wait > 0:
                time.sleep(wait)
            try:
                answer = self.ask(case)
            except Exception as error:  # every one counts against the fleet
                self.violations.append(f"{case.name}: {type(error).__name__}: {error}")
                continue
            if answer != case.expected:
                self.violations.append(f"{case.name}: {difference(case.expected, answer)}")
            with self.lock:
                self.answered += 1

    def ask(self, case):
        """The whole answer. Only what happens to a gateway may break a stream; then the client asks another one."""
        deadline = time.monotonic() + 2 * ANSWER_SECONDS
        while True:
            with self.lock:
                fit = [g for g in self.fleet.gateways() if g not in self.disturbed] or self.fleet.gateways()
                gateway = self.rng.choice(fit)
            try:
                return self._follow(gateway, case)
            except (Broken, OSError) as error:
                if gateway not in self.disturbed or time.monotonic() > deadline:
                    raise
                with self.lock:
                    self.broken += 1
                time.sleep(0.05)

    def _follow(self, gateway, case):
        answers = Answers(lambda *gap: self._on_gap(f"{case.name} at {gateway.name}", *gap))
        connection = harness.open_request(gateway.address, case.body, case.path, timeout=5)
        try:
            pending = b""
            while True:
                pending += self._receive(connection, gateway)
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    if line.startswith(b"HTTP/1.1 ") and b" 200 " not in line:
                        self._refused(gateway, line)
                    if line.startswith(b"data: [DONE]"):
                        return answers.result()
                    if line.startswith(b"data: "):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self._refused(gateway, line)
                        answers.add(event)
        finally:
            connection.close()

    def _receive(self, connection, gateway):
        limit = time.monotonic() + ANSWER_SECONDS
        while not select.select([connection], [], [], 0.25)[0]:
            if gateway in self.disturbed and time.monotonic() > limit - ANSWER_SECONDS + 2:
                raise Broken("silence")
            assert time.monotonic() < limit, f"no byte for {ANSWER_SECONDS} s"
        data = connection.recv(65536)
        if not data:
            raise Broken("the stream ended without [DONE]")
        return data

    def _refused(self, gateway, line):
        """A gateway that ends says so properly; from any other an error is a lost answer."""
        if gateway in self.disturbed:
            raise Broken(line.decode())
        raise AssertionError(f"{gateway.name} answers {line.decode()}")

    def _on_gap(self, whose, kind, since, until):
        with self.lock:
            self.gaps.append((kind, since, until, whose))


def difference(expected, answer):
    for what, a, b in zip(("tokens", "text", "finish"), expected, answer):
        for index in sorted(set(a) | set(b)):
            x, y = a.get(index), b.get(index)
            if x != y:
                if what == "finish" or x is None or y is None:
                    return f"choice {index}: {what} {y!r} instead of {x!r}"
                at = next((i for i, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
                return f"choice {index}: {what} differ at {at} ({len(y)} instead of {len(x)}): {y[at:at + 8]!r} for {x[at:at + 8]!r}"
    return "equal"


# What happens, how long it lasts, and to which roles. A frozen process and a cut one must last longer than the bound
# after which others give it up.
FAULTS = {
    "kill -9": ("killed", 0.5, ("prefill", "decode", "gateway")),
    "kill -STOP": ("stopped", 5, ("prefill", "decode", "gateway")),
    "links cut": ("cut", 5, ("prefill", "decode", "gateway")),
    "black hole": ("in_a_black_hole", 5, ("prefill", "decode", "gateway")),
    "SIGTERM": ("restarted", 0.5, ("prefill", "decode", "gateway")),
    "slow rail": ("behind_a_slow_rail", 2, ("prefill", "decode")),
    "one rail cut": ("without_its_second_rail", 2, ("prefill", "decode")),
}


class Happened:
    def __init__(self, fault, node, since, until):
        self.fault, self.node, self.since, self.until = fault, node, since, until


def strike(fleet, load, fault, node, settle):
    """One fault from its beginning until its process is known to all again."""
    how, seconds, _ = FAULTS[fault]
    since = time.monotonic()
    if node.role == "gateway":
        load.disturbed.add(node)
    with getattr(node, how)():
        time.sleep(seconds)
    fleet.wait_known()
    until = time.monotonic()
    time.sleep(settle)  # what the fault did to streams shows
    load.disturbed.discard(node)
    return Happened(fault, node, since, until)


def table(happened, load):
    """Of each fault and role: the longest silence that began while it lasted and that any client saw."""
    rows = {}
    for one in happened:
        for kind in ("pause", "wait"):
            longest = max((until - max(since, one.since) for what, since, until, _ in load.gaps
                           if what == kind and since < one.until and until > one.since), default=0.0)
            rows.setdefault((one.fault, one.node.role), {}).setdefault(kind, []).append(longest)
    lines = ["| fault | role | times | pause in a stream, median / worst | wait for a first token, median / worst |",
             "| --- | --- | --- | --- | --- |"]
    for (fault, role), longest in sorted(rows.items()):
        cells = [f"{statistics.median(longest[k]):.2f} / {max(longest[k]):.2f} s" for k in ("pause", "wait")]
        lines.append(f"| {fault} | {role} | {len(longest['pause'])} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def longest_gaps(happened, load, count=12):
    """The longest silences, each with whose it was and what had struck before; times in seconds since the first fault."""
    first = happened[0].since
    lines = []
    for kind, since, until, whose in sorted(load.gaps, key=lambda gap: gap[1] - gap[2])[:count]:
        faults = [f"{one.fault} of {one.node.name} ({one.since - first:.1f} to {one.until - first:.1f})" for one in happened
                  if one.since < until and one.until > since - 5]
        lines.append(f"{kind} of {until - since:.1f} s from {since - first:.1f}, {whose}: {', '.join(faults)}")
    return "\n".join(lines)
