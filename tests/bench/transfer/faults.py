"""Rails broken and healed during a long checked transfer: what the caller saw and how fast goodput came back."""

import pathlib
import statistics
import threading
import time

import timeline
from rails import Rails, Target, run_initiator

PERIOD = 4.0  # seconds from one trial's fault to the next one's
OUTAGE = 1.5  # until the heal
CALM = 0.9  # before the fault
TRIALS_PER_RUN = 4
RATE_MBIT = 100  # shaping four of these takes half a core, four of 200 takes a whole one
# 32 KiB blocks, 64 in flight: a moment without completions is a moment without goodput.
LOAD = ["--block", "32KiB", "--threads", 2, "--depth", 32, "--memory", "8MiB", "--check", "--timeline", 5]

FAULTS = ["link_down", "black_hole", "reset", "collapse", "flap"]


class Outcome:
    """All trials of one fault."""

    def __init__(self):
        self.recovery_ms = []  # None: not before the heal
        self.calm_ms = []      # the same measure over the moment before the fault, of all rails: what the machine does by itself
        self.stall_ms = []     # the longest stretch of the outage with less than a quarter of the survivors' rate
        self.lost_ms = []      # of the survivors' rate, within the outage
        self.back_s = []       # on the healed rail
        self.during = []       # goodput over the survivors' limit, over the whole outage
        self.errors = {}
        self.wrong_bytes = 0
        self.checked_bytes = 0
        self.resent_slices = 0

    def note(self, row):
        for message, count in row["errors"].items():
            self.errors[message] = self.errors.get(message, 0) + count
        self.wrong_bytes += row["wrong_bytes"]
        self.checked_bytes += row["checked_bytes"]
        self.resent_slices += sum(rail["slices_resent"] for rail in row["rails"])
        failed = [fault for fault in row["faults"] if fault["exit_code"] != 0]
        if failed:
            raise RuntimeError(f"a fault could not be made: {failed}")


def run_trials(rails, limits, kind, trials, log_dir, outcome, rows):
    """One run with `trials` faults of one kind, on each rail in turn."""
    plan = []
    arguments = []
    for trial in range(trials):
        rail = 1 + trial % len(rails.rates)
        at = 1.0 + trial * PERIOD
        if kind == "flap":
            steps = []
            down, up = rails.link_down(rail)
            for second in range(2):  # half a second down, half a second up
                steps += [(at + second, down), (at + second + 0.5, up)]
        else:
            broken, healed = getattr(rails, kind)(rail)
            steps = [(at, broken), (at + OUTAGE, healed)]
        for moment, command in steps:
            arguments += ["--fault", f"{moment}:{command}"]
        plan.append((rail, len(steps)))
    with Target(rails, log_dir, f"target-{time.monotonic_ns()}") as target:
        row = run_initiator(rails, target.address, *LOAD, "--seconds", 1.0 + trials * PERIOD, *arguments)
    rows.append({"fault": kind, "row": row})
    outcome.note(row)
    runs = iter(row["faults"])
    for trial, (rail, steps) in enumerate(plan):
        done = [next(runs) for _ in range(steps)]
        start, heal = done[0]["started_seconds"], done[-1]["started_seconds"]
        next_fault = 1.0 + (trial + 1) * PERIOD
        survivors = sum(limits.values()) - limits[rail]
        until = heal if kind != "reset" else start + OUTAGE
        seconds = timeline.recovery(row, start, until, 0.9 * survivors)
        outcome.recovery_ms.append(None if seconds is None else seconds * 1e3)
        seconds = timeline.recovery(row, start - CALM, start, 0.9 * sum(limits.values()))
        outcome.calm_ms.append(CALM * 1e3 if seconds is None else seconds * 1e3)
        outcome.stall_ms.append(timeline.stall(row, start, until, survivors / 4) * 1e3)
        outcome.lost_ms.append(timeline.lost_seconds(row, start, until, survivors) * 1e3)
        outcome.during.append(timeline.goodput(row, start, until) / survivors)
        healed_at = done[-1]["ended_seconds"] if kind != "reset" else done[0]["ended_seconds"]
        outcome.back_s.append(timeline.back_on_rail(row, rails.index(row, rail), healed_at, next_fault, 0.8 * limits[rail]))


def run_restarts(rails, limits, trials, log_dir, outcome, rows, period=6.0):
    """The target is killed, every `period` seconds, and another process takes its place. A peer is lost 3 s after its process died;
    recovery is from there until the new one is found, `back_s` until goodput is back."""
    began = pathlib.Path(log_dir) / f"began-{time.monotonic_ns()}"
    target = Target(rails, log_dir, "target-0")
    port = target.address.rsplit(":", 1)[1]
    result = {}
    seconds = 1.5 + trials * period

    def load():
        result["row"] = run_initiator(rails, target.address, *LOAD, "--reconnect", "--seconds", seconds, "--fault", f"0:touch {began}")

    thread = threading.Thread(target=load)
    thread.start()
    current = target
    try:
        while not began.exists() and thread.is_alive():
            time.sleep(0.02)
        started = time.monotonic()
        for trial in range(trials):
            time.sleep(max(0, started + 1.0 + trial * period - time.monotonic()))
            current.process.kill()
            current.process.popen.wait()
            time.sleep(0.3)
            current = Target(rails, log_dir, f"target-{trial + 1}", port=port)
        thread.join()
    finally:
        current.process.kill()
        thread.join()
    row = result["row"]
    rows.append({"fault": "peer_restart", "row": row})
    outcome.note(row)
    # Both threads of the initiator lose and find the peer; the later one counts.
    backs = sorted(loss["back_seconds"] for loss in row["losses"])
    losses = sorted(loss["lost_seconds"] for loss in row["losses"])
    if len(backs) != 2 * trials or min(backs) == 0:
        raise RuntimeError(f"{trials} restarts, but the initiator's losses were {row['losses']}")
    for trial in range(trials):
        back = backs[2 * trial + 1]
        outcome.recovery_ms.append((back - losses[2 * trial]) * 1e3)
        reached = timeline.recovery(row, back, back + 1.0, 0.9 * sum(limits.values()))
        outcome.back_s.append(reached)


def summary(values, form):
    if any(value is None for value in values):
        return f"{sum(value is None for value in values)} of {len(values)} never"
    return f"{form.format(statistics.median(values))} / {form.format(max(values))}" if values else "-"


def report(kind, outcome):
    print(f"{kind:14} {len(outcome.back_s):>6}  {summary(outcome.recovery_ms, '{:.0f}'):>16} "
          f"{summary(outcome.calm_ms, '{:.0f}'):>22} {summary(outcome.stall_ms, '{:.0f}'):>16} {summary(outcome.lost_ms, '{:.0f}'):>14} {summary(outcome.back_s, '{:.2f}'):>14}   "
          f"{sum(outcome.errors.values())} errors, {outcome.wrong_bytes} of {outcome.checked_bytes / 1e9:.1f} GB wrong, "
          f"{outcome.resent_slices} slices sent again", flush=True)


def measure(args, log_dir):
    rows = []
    print("fault          trials  recovery ms med/max  without a fault med/max  stall ms med/max  lost ms med/max  back s med/max")
    with Rails([RATE_MBIT] * 4) as rails:
        limits = rails.iperf(rails.rails)
        for kind in args.only or [*FAULTS, "peer_restart"]:
            outcome = Outcome()
            while len(outcome.back_s) < args.trials:
                trials = min(TRIALS_PER_RUN, args.trials - len(outcome.back_s))
                if kind == "peer_restart":
                    run_restarts(rails, limits, trials, log_dir, outcome, rows)
                else:
                    run_trials(rails, limits, kind, trials, log_dir, outcome, rows)
            report(kind, outcome)
    return rows
