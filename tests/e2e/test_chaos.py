"""Processes that die, freeze and are cut off under load: no answer is lost, none is other than the undisturbed one."""

import os
import random
import time

import pytest

import chaos
import fleet
import harness

HELD = ("millrace_worker_tickets", "millrace_engine_tickets", "millrace_engine_running", "millrace_engine_waiting",
        "millrace_engine_importing", "millrace_engine_pages_ticket_only", "millrace_transfer_open_tickets",
        "millrace_transfer_pending_requests")
# One of each kind of failure where it matters most; the long form draws from all.
SHORT = [("kill -9", "decode"), ("kill -STOP", "decode"), ("black hole", "prefill"), ("kill -9", "prefill"),
         ("links cut", "decode"), ("SIGTERM", "decode"), ("kill -9", "gateway"), ("one rail cut", "prefill"),
         ("SIGTERM", "gateway"), ("SIGTERM", "prefill")]


def plan(rng, count):
    every = [(fault, role) for fault, (_, _, roles) in chaos.FAULTS.items() for role in roles]
    drawn = []
    while len(drawn) < count:
        rng.shuffle(every)
        drawn += every
    return drawn[:count]


@pytest.fixture
def five(logs, long_model):
    directory = logs / "chaos"
    directory.mkdir()
    with fleet.Fleet(directory, long_model) as running:
        yield running


def test_no_answer_is_lost(five, make_prompt):
    count = int(os.environ.get("MILLRACE_CHAOS_FAULTS", 0))
    seed = int(os.environ.get("MILLRACE_CHAOS_SEED", time.time_ns() % 1_000_000))
    rng = random.Random(seed)
    print(f"chaos: MILLRACE_CHAOS_SEED={seed}")
    faults = plan(rng, count) if count else SHORT

    def run():
        load = chaos.Load(five, chaos.make_cases(make_prompt), clients=8, seed=seed)
        for case in load.cases:
            case.expected = load.ask(case)
            assert load.ask(case) == case.expected, f"{case.name}: two undisturbed answers differ"
        interval, rate = pace(load) if count else (0.05, 0)
        load = chaos.Load(five, load.cases, clients=8 if count else 6, interval=interval, seed=seed)
        sockets = {node.name: node.sockets() for node in five.nodes}
        load.start()
        happened = []
        try:
            for fault, role in faults:
                node = rng.choice([node for node in five.nodes if node.role == role])
                happened.append(chaos.strike(five, load, fault, node, settle=1.0))
                assert not load.violations, f"{fault} of {node.name}: {load.violations[:5]}; logs in {five.logs}"
        finally:
            load.stop()
        assert not load.violations, f"{load.violations[:5]}; logs in {five.logs}"
        print(f"{len(happened)} faults, {load.answered} answers at {rate:.1f} a second, {load.broken} asked again at another "
              f"gateway\n{chaos.table(happened, load)}\nThe longest silences:\n{chaos.longest_gaps(happened, load)}")
        assert load.answered > 0
        harness.wait_until(lambda: not five.held(HELD), 60, f"something stays held: {five.held(HELD)}", interval=0.2)
        harness.wait_until(lambda: all(node.sockets() <= sockets[node.name] + 2 for node in five.nodes), 60,
                           f"connections stay: {sockets}", interval=0.5)

    five.run(run)
    for node in five.nodes:
        node.process.ask_to_end()
    assert [node.process.stop(seconds=60) for node in five.nodes] == [0] * len(five.nodes)


def pace(load, seconds=15):
    """(interval, rate) of arrivals at 80 % of what the undisturbed fleet answers."""
    load.start()
    time.sleep(seconds)
    load.stop()
    assert not load.violations, load.violations[:5]
    rate = 0.8 * load.answered / seconds
    return 1 / rate, rate
