#!/usr/bin/env python3
"""Many streams through one gateway, and the same through nginx in front of it.

    tests/bench/streams.py [--streams 1000] [--slow 200] [--step-ms 200] [--workers 1] [--tokens 60] [--repeats 3] [--json FILE]

A null_worker draws one token for every stream at the same instant, which is the hardest case there is: the age of the last
one to arrive is the work of all the others. With --workers N the streams are spread over N workers, whose steps end one after the
other, as those of a fleet do. Age is from the end of the step to the reader, CPU time is user and system per
token. Beside it, age is measured where nothing is added: the same number of streams read over gRPC from the workers themselves
(direct_load), in turn; the difference is what the gateway adds. nginx (Debian's nginx-light; left out, and said, when it is not installed) passes the bytes on unbuffered: what it adds is
what any proxy costs, the gateway's own share makes the bytes as well. MILLRACE_BIN names the binary.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "load"))

from null_cluster import NullCluster, harness  # noqa: E402

NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log; worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{ proxy_pass http://{gateway}; proxy_http_version 1.1; proxy_set_header connection ""; proxy_buffering off; }}
  }}
}}
"""


class Nginx:
    def __init__(self, directory, gateway):
        port = harness.free_port()
        config = pathlib.Path(directory) / "nginx.conf"
        config.write_text(NGINX.format(dir=directory, port=port, gateway=gateway))
        self.address = f"127.0.0.1:{port}"
        self.popen = subprocess.Popen(["nginx", "-p", str(directory), "-c", str(config)], stderr=subprocess.DEVNULL)
        harness.wait_until(self.serves, 20, "nginx does not serve", interval=0.1)

    def serves(self):
        try:
            return harness.request(self.address, "GET", "/ready")[0] == 200
        except OSError:
            return False

    def stop(self):
        self.popen.terminate()
        self.popen.wait(10)


def spread(values, form="{:.1f}"):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} .. {form.format(max(values))})"


def table(name, reports):
    connections = reports[0]["streams"] + reports[0]["slow"]
    print(f"\n{name}: {reports[0]['streams']} streams, {reports[0]['slow']} slow readers, {reports[0]['workers']} workers, a token each per"
          f" {reports[0]['step_ms']:.0f} ms; median (least .. most) of {len(reports)} runs")
    for quantile in ("p50", "p99", "max"):
        print(f"  age on arrival, {quantile:4} ms   {spread([r['age_ms'][quantile] for r in reports])}")
    print(f"  steps that a stream missed {spread([r['steps_missed'] for r in reports], '{:.0f}')}")
    for process in reports[0]["processes"]:
        of = [r["processes"][process] for r in reports]
        print(f"  {process:8} CPU us per token  {spread([p['cpu_us_per_token'] for p in of])}")
        print(f"  {process:8} KiB per stream    {spread([(p['rss_streaming'] - p['rss_before']) / connections / 1024 for p in of])}")
    print(f"  sockets  KiB per stream    {spread([r['socket_bytes'] / connections / 1024 for r in reports])}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--slow-rate", type=int, default=1000)
    parser.add_argument("--step-ms", type=float, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--http-threads", type=int, default=1)
    parser.add_argument("--json", help="file for every figure")
    args = parser.parse_args()
    ways = ["gateway"] + (["nginx"] if shutil.which("nginx") else [])
    if "nginx" not in ways:
        print("nginx is not installed: no comparison")
    reports = {way: [] for way in ways}
    direct = []
    for _ in range(args.repeats):
        for way in ways:  # side by side, and every time with fresh processes: memory is from the start
            with tempfile.TemporaryDirectory() as directory:
                cluster = NullCluster(directory, args.step_ms, args.workers, ["--http-threads", args.http_threads])
                nginx = None
                try:
                    nginx = Nginx(directory, cluster.gateway.address) if way == "nginx" else None
                    reports[way].append(cluster.load(
                        nginx and nginx.address, processes=[("nginx", nginx.popen.pid)] if nginx else [], streams=args.streams,
                        slow=args.slow, slow_rate=args.slow_rate, tokens=args.tokens))
                    if way == "gateway":
                        direct.append(cluster.direct_load(streams=args.streams, tokens=args.tokens))
                finally:
                    if nginx:
                        nginx.stop()
                    cluster.stop()
    for way in ways:
        table(way, reports[way])
    print(f"\nwithout a gateway: {args.streams} streams; median (least .. most) of {args.repeats} runs")
    for quantile in ("p50", "p99"):
        print(f"  age on arrival, {quantile:4} ms   {spread([r['age_ms'][quantile] for r in direct], '{:.2f}')}")
        added = [a["age_ms"][quantile] - b["age_ms"][quantile] for a, b in zip(reports["gateway"], direct)]
        print(f"  the gateway adds, {quantile} ms  {spread(added, '{:.2f}')}")
    reports["direct"] = direct
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(reports, indent=1))


if __name__ == "__main__":
    main()
