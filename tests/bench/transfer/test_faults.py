"""The short form of bench.py faults, and of what it measures with: a few faults of each kind. Nothing here depends on speed:
milliseconds belong to bench.py, on a machine that does nothing else."""

import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import faults  # noqa: E402
import timeline  # noqa: E402
from rails import Rails, Target, harness, run_initiator  # noqa: E402

TRIALS = 2
RATE_MBIT = 40  # little enough for the processor not to be the limit


@pytest.fixture(scope="module")
def rails():
    with Rails([RATE_MBIT] * 4) as rails:
        yield rails


@pytest.fixture(scope="module")
def limits(rails):
    return {rail: RATE_MBIT * 1e6 / 8 for rail in rails.rails}


@pytest.mark.parametrize("kind", faults.FAULTS)
def test_a_broken_rail_costs_time_only(rails, limits, kind, tmp_path):
    outcome, rows = faults.Outcome(), []
    faults.run_trials(rails, limits, kind, TRIALS, tmp_path, outcome, rows)
    assert outcome.errors == {} and outcome.wrong_bytes == 0 and outcome.checked_bytes > 0
    assert min(outcome.during) > 0, "nothing went over the rails that lived"
    if kind in ("link_down", "black_hole", "reset"):
        assert outcome.resent_slices > 0, "the fault was not felt"
    row = rows[-1]["row"]
    assert all(row["rails"][rails.index(row, rail)]["bytes"] > 0 for rail in rails.rails)


def test_a_killed_target_is_found_again(rails, limits, tmp_path):
    outcome, rows = faults.Outcome(), []
    faults.run_restarts(rails, limits, 1, tmp_path, outcome, rows, period=10)
    assert outcome.errors == {} and outcome.wrong_bytes == 0 and outcome.checked_bytes > 0


def test_several_initiators_read_and_write(rails, tmp_path):
    with Target(rails, tmp_path) as target:
        row = run_initiator(rails, target.address, "--op", "mixed", "--threads", 3, "--block", "64KiB", "--batch", 4,
                            "--scatter", "--prepare", "--check", "--seconds", 1)
    assert row["errors"] == {} and row["wrong_bytes"] == 0
    assert row["checked_bytes"] >= row["bytes"] > 0
    assert sum(rail["share"] for rail in row["rails"]) == pytest.approx(1)


@pytest.mark.parametrize("flags, named", [
    (["--block", "5MB"], "--block"), (["--block", "12"], "--block"), (["--op", "erase"], "--op"), (["--depth", "0"], "--depth"),
    (["--threads", "1,0"], "--threads"), (["--memory", "much"], "--memory"), (["--fault", "soon:true"], "--fault"),
    (["--fault", "9:true"], "--fault"), (["--background", "1X"], "--background"), (["--connect", "nowhere"], "--connect"),
    (["--target", "--json"], "--json"), (["--kind", "pigeon"], "--kind")])
def test_a_bad_flag_is_named(flags, named):
    done = subprocess.run([harness.binary(), "transfer-bench", *flags], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and named in done.stderr, done.stderr


def row_of(bytes_per_bucket, rail_samples=()):
    return {"timeline": {"bucket_ms": 5, "bytes": bytes_per_bucket},
            "rail_samples": [{"seconds": s, "bytes": [b]} for s, b in rail_samples]}


def test_recovery_is_the_end_of_the_stall():
    steady, stall = [100] * 20, [0] * 8  # 100 ms at 20 kB/s, then 40 ms of nothing
    assert timeline.recovery(row_of(steady + steady), 0.1, 0.2, 18_000) == pytest.approx(0)
    # Goodput goes on for 20 ms after the fault, and only then stops: the stall counts.
    row = row_of(steady + [100] * 4 + stall + [100] * 60)
    assert timeline.recovery(row, 0.1, 0.4, 18_000) == pytest.approx(0.06, abs=0.006)
    assert timeline.recovery(row_of(steady + [0] * 60), 0.1, 0.4, 18_000) is None
    assert timeline.lost_seconds(row, 0.1, 0.4, 20_000) == pytest.approx(0.04, abs=0.006)
    assert timeline.stall(row, 0.1, 0.4, 5_000) == pytest.approx(0.04)
    assert timeline.stall(row, 0.1, 0.14, 5_000) == pytest.approx(0.02) and timeline.stall(row, 0.2, 0.4, 5_000) == 0


def test_back_on_rail_is_when_it_carries_again():
    samples = [(i * 0.02, 0 if i < 25 else (i - 25) * 400) for i in range(100)]  # 20 kB/s from 0.5 s on
    assert timeline.back_on_rail(row_of([], samples), 0, 0.2, 2, 16_000) == pytest.approx(0.27, abs=0.05)
    assert timeline.back_on_rail(row_of([], [(i * 0.02, 0) for i in range(100)]), 0, 0.2, 2, 16_000) is None
