"""What the machinery against failures costs while nothing fails: two binaries in turn under the same load.

    build/venv/bin/python tests/bench/failover_cost.py OLD_BINARY build/release/millrace --rounds 5

Prints tokens per second and the time to the first token of each round, and the ratio of each pair of rounds.
"""

import argparse
import os
import pathlib
import random
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))

import harness  # noqa: E402

CLIENTS = 4


def measure(binary, model, seconds):
    """(tokens per second, median time to the first token) of 2 prefill and 2 decode workers."""
    os.environ["MILLRACE_BIN"] = binary
    with tempfile.TemporaryDirectory() as logs:
        cluster = harness.Cluster(logs, model, prefill=2, decode=2)
        try:
            counts, firsts = [0] * CLIENTS, []
            until = None

            def client(i):
                rng = random.Random(i)
                while time.monotonic() < until:
                    begun = time.monotonic()
                    prompt = [rng.randrange(300, 4000) for _ in range(300)]
                    body = {"prompt": prompt, "max_tokens": 64, "temperature": 0, "ignore_eos": True}
                    first = True
                    for _ in harness.stream(cluster.address, body):
                        if first:
                            firsts.append(time.monotonic() - begun)
                        first = False
                        counts[i] += time.monotonic() < until

            for length in (2, seconds):  # the first is for warming up
                counts, firsts = [0] * CLIENTS, []
                until = time.monotonic() + length
                threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            return sum(counts) / seconds, statistics.median(firsts)
        finally:
            cluster.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--model", default=str(harness.ROOT / "deploy/models/ling-tiny"))
    options = parser.parse_args()
    rates, firsts = [], []
    for round_number in range(options.rounds):
        order = (options.old, options.new) if round_number % 2 == 0 else (options.new, options.old)
        result = {binary: measure(binary, options.model, options.seconds) for binary in order}
        old, new = result[options.old], result[options.new]
        rates.append(new[0] / old[0])
        firsts.append(new[1] / old[1])
        print(f"round {round_number + 1}: {old[0]:.0f} -> {new[0]:.0f} tokens/s, first token {old[1] * 1e3:.1f} -> "
              f"{new[1] * 1e3:.1f} ms", flush=True)
    for what, ratios in (("throughput", rates), ("time to first token", firsts)):
        print(f"{what}: new / old {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
