"""How many streams one thread of `millrace bench` holds at once, and how late its timers are then.

    build/venv/bin/python tests/bench/load_streams.py [--streams 5000] [--rounds 3]

The server is tests/e2e/mock_server.py: two seconds to the first token, one second between tokens, so that all streams are open together.
Bounded: a round takes about 15 s. It needs two file descriptors a stream."""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))
import harness  # noqa: E402
from mock_server import MockServer  # noqa: E402

TOKENS = 12


def measure(streams):
    plan = lambda number, body: {"first": 2.0, "gap": 1.0} if body["max_tokens"] > 1 else {}
    with MockServer(plan) as server, tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "report.json"
        done = subprocess.run([harness.binary(), "bench", "--url", server.url, "--users", str(streams), "--requests", str(streams),
                               "--input-tokens", "16", "--output-tokens", str(TOKENS), "--json", out], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return json.loads(out.read_text())["levels"][0]["runs"][0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    wanted = 2 * args.streams + 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), max(hard, wanted)))
    runs = [measure(args.streams) for _ in range(args.rounds)]
    print(f"{'at once':>8} {'served':>7} {'tokens/s':>9} {'core':>6} {'CPU/token':>10} {'timers late P50':>16} {'P99':>9} {'max':>9}")
    for run in runs:
        client = run["client"]
        lag = client["timer_lag"]
        print(f"{client['in_flight_max']:>8} {run['requests']['served']:>7} {run['throughput']['output_tokens_per_second']:>9.0f} "
              f"{100 * client['cpu_share']:>5.1f}% {1e6 * client['cpu_seconds'] / (run['requests']['served'] * TOKENS):>7.1f} us "
              f"{1e3 * lag['p50']:>13.2f} ms {1e3 * lag['p99']:>6.2f} ms {1e3 * lag['max']:>6.2f} ms")
    print(f"median P99 lateness {1e3 * statistics.median(r['client']['timer_lag']['p99'] for r in runs):.2f} ms")


if __name__ == "__main__":
    main()
