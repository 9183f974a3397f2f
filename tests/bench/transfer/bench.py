#!/usr/bin/env python3
"""The transfer engine over shaped rails, through faults, and over loopback, beside iperf3 in the same run.

    tests/bench/transfer/bench.py rails|faults|loopback [--json FILE] ...

Needs root, iproute2, nftables, iptables, iperf3; MILLRACE_BIN names the binary. Prints a table; --json keeps every figure.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import faults as fault_bench  # noqa: E402
import loopback as loopback_bench  # noqa: E402
from rails import Rails, Target, run_initiator  # noqa: E402


def spread(values, form="{:.3f}"):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} .. {form.format(max(values))})"


def carried(rails, log_dir, *args, seconds=4):
    """One run of 1 MiB writes over all rails: the row."""
    with Target(rails, log_dir, f"target-{time.monotonic_ns()}") as target:
        return run_initiator(rails, target.address, "--block", "1MiB", "--depth", 16, "--seconds", seconds, *args)


def goodput_ratio(name, rates, log_dir, runs, results):
    """Goodput over the sum of the rails' iperf3 figures, interleaved `runs` times; shares against iperf3's."""
    ratios, share_errors = [], []
    with Rails(rates) as rails:
        for _ in range(runs):
            limits = rails.iperf(rails.rails)
            row = carried(rails, log_dir)
            ratios.append(row["bytes_per_second"] / sum(limits.values()))
            for rail in rails.rails:
                share = limits[rail] / sum(limits.values())
                share_errors.append(row["rails"][rails.index(row, rail)]["share"] / share - 1)
            results.append({"case": name, "rates_mbit": rates, "iperf_bytes_per_second": limits, "row": row})
    print(f"{name:44} {spread(ratios)} of iperf3's sum; a rail's share is off by at most "
          f"{max(map(abs, share_errors)) * 100:.1f} %", flush=True)
    return ratios


def tail_ratio(log_dir, runs, results):
    """P99 of 1 MiB writes with one of four rails cut to a quarter during the run, over the undisturbed P99."""
    ratios = []
    with Rails([200] * 4) as rails:
        cut, heal = rails.shape_command(1, 50, 0), rails.shape_command(1, 200, 0)
        for _ in range(runs):
            calm = carried(rails, log_dir, seconds=6)
            disturbed = carried(rails, log_dir, "--fault", f"1:{cut}", "--fault", f"5:{heal}", seconds=6)
            ratios.append(disturbed["latency_us"]["p99"] / calm["latency_us"]["p99"])
            results.append({"case": "tail", "calm": calm, "disturbed": disturbed})
    print(f"{'P99 of 1 MiB, one rail cut to 1/4 and healed':44} {spread(ratios)} x undisturbed", flush=True)


def slow_rail(log_dir, runs, results):
    """Goodput of three rails and a slow fourth over that of the three alone."""
    ratios = []
    with Rails([200] * 3) as three, Rails([200] * 3 + [10]) as four:
        for _ in range(runs):
            pair = [carried(rails, log_dir) for rails in (three, four)]
            ratios.append(pair[1]["bytes_per_second"] / pair[0]["bytes_per_second"])
            results.append({"case": "slow rail", "three": pair[0], "four": pair[1]})
    print(f"{'3 x 200 and one of 10 Mbit/s':44} {spread(ratios)} x the three alone (all four: {610 / 600:.3f})", flush=True)


def shaped(args, log_dir):
    results = []
    goodput_ratio("4 x 200 Mbit/s", [200] * 4, log_dir, args.runs, results)
    goodput_ratio("1 x 200 Mbit/s", [200], log_dir, args.runs, results)
    goodput_ratio("2 x 200 Mbit/s", [200] * 2, log_dir, args.runs, results)
    goodput_ratio("8 x 100 Mbit/s", [100] * 8, log_dir, args.runs, results)
    goodput_ratio("4 x 1000 Mbit/s", [1000] * 4, log_dir, args.runs, results)
    goodput_ratio("3 x 200, one of 50 Mbit/s", [200] * 3 + [50], log_dir, args.runs, results)
    goodput_ratio("40, 80, 160, 320 Mbit/s", [40, 80, 160, 320], log_dir, args.runs, results)
    tail_ratio(log_dir, args.runs, results)
    slow_rail(log_dir, args.runs, results)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["rails", "faults", "loopback"])
    parser.add_argument("--runs", type=int, default=3, help="of each case of rails and loopback")
    parser.add_argument("--trials", type=int, default=20, help="of each fault")
    parser.add_argument("--only", nargs="*", help="these faults, or cases of loopback, only")
    parser.add_argument("--json", help="file for every figure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as log_dir:
        what = {"rails": shaped, "faults": fault_bench.measure, "loopback": loopback_bench.measure}[args.what]
        results = what(args, log_dir)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
