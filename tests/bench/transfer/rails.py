"""Shaped rails between two network namespaces, what they can carry by themselves, and how to break and heal them."""

import json
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/e2e"))

import harness  # noqa: E402
from namespaces import Pair, ip  # noqa: E402

IPERF_PORT = 5201


class Rails(Pair):
    """Rails 1..n of the given rates in Mbit/s, both ways; link 0 carries control and is not shaped. Side 0 sends."""

    def __init__(self, rates):
        super().__init__(len(rates) + 1)
        self.rates = list(rates)

    def __enter__(self):
        super().__enter__()
        for rail, rate in enumerate(self.rates, 1):
            for side in range(2):
                subprocess.run(self.shape_command(rail, rate, side), shell=True, check=True)
        return self

    @property
    def rails(self):
        return range(1, len(self.rates) + 1)

    def shape_command(self, rail, rate_mbit, side):
        burst = max(16_000, int(rate_mbit * 1e6 / 8 * 0.002))  # 2 ms of the rate
        return (f"tc -n {self.names[side]} qdisc replace dev rail{rail} root tbf rate {rate_mbit}mbit "
                f"burst {burst} latency 20ms")

    def inside(self, side, command):
        return f"nsenter --net=/var/run/netns/{self.names[side]} {command}"

    def iperf(self, rails, seconds=3):
        """Bytes per second that iperf3 moves over each of `rails`, all at once, one stream each."""
        servers, clients = [], []
        for rail in rails:
            address = self.address(1, rail)
            servers.append(subprocess.Popen([*self.prefix(1), "iperf3", "-s", "-1", "-B", address, "-p", str(IPERF_PORT)],
                                            stdout=subprocess.DEVNULL))
        try:
            self._wait_listening(len(servers))
            for rail in rails:
                clients.append(subprocess.Popen(
                    [*self.prefix(0), "iperf3", "-J", "-c", self.address(1, rail), "-B", self.address(0, rail),
                     "-p", str(IPERF_PORT), "-t", str(seconds), "-O", "1"], stdout=subprocess.PIPE, text=True))
            figures = {}
            for rail, client in zip(rails, clients):
                report = json.loads(client.communicate(timeout=seconds + 60)[0])
                if "error" in report:
                    raise RuntimeError(f"iperf3 over rail {rail}: {report['error']}")
                figures[rail] = report["end"]["sum_received"]["bits_per_second"] / 8
            return figures
        finally:
            for process in servers + clients:
                process.kill()
                process.wait()

    def _wait_listening(self, servers):
        until = time.monotonic() + 30
        while True:
            text = subprocess.run([*self.prefix(1), "ss", "-Hltn", f"sport = :{IPERF_PORT}"], capture_output=True, text=True,
                                  check=True).stdout
            if len(text.splitlines()) == servers:
                return
            if time.monotonic() > until:
                raise RuntimeError(f"iperf3 does not listen: {text}")
            time.sleep(0.05)

    def index(self, row, rail):
        """Where a rail stands in a row's rails; the control session may stand among them."""
        return next(i for i, entry in enumerate(row["rails"]) if entry["local"] == self.address(0, rail))

    # Each gives (break, heal): shell commands. All act on the receiving side's end, except the rate.
    def link_down(self, rail):
        device = f"ip -n {self.names[1]} link set rail{rail}"
        return f"{device} down", f"{device} up"

    def black_hole(self, rail):
        """What is sent to the target vanishes; the carrier stays, nothing is reset."""
        nft = self.inside(1, "nft")
        table = f"netdev hole{rail}"
        chain = f"{{ type filter hook ingress device rail{rail} priority 0; }}"
        return (f"{nft} 'add table {table}; add chain {table} drops {chain}; add rule {table} drops drop'",
                f"{nft} delete table {table}")

    def reset(self, rail):
        """Every connection of the rail is reset; nothing keeps it from being made again 50 ms later."""
        rule = f"INPUT -i rail{rail} -p tcp -j REJECT --reject-with tcp-reset"
        return self.inside(1, f"sh -c 'iptables -I {rule}; sleep 0.05; iptables -D {rule}'"), "true"

    def collapse(self, rail):
        """The rate falls to a hundredth."""
        rate = self.rates[rail - 1]
        return self.shape_command(rail, rate / 100, 0), self.shape_command(rail, rate, 0)


class Target:
    """millrace transfer-bench --target on side 1, reached over link 0."""

    def __init__(self, rails, log_dir, name="target", port=0):
        self.process = harness.Process(
            log_dir, name, ["transfer-bench", "--target", "--listen", f"{rails.address(1, 0)}:{port}",
                            *[a for rail in rails.rails for a in ("--rail", f"{rails.address(1, rail)}:0")]],
            prefix=rails.prefix(1)).wait_started()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.popen.wait()

    @property
    def address(self):
        return self.process.address


def run_initiator(rails, address, *args, seconds=30):
    """The first row of a transfer-bench initiator's JSON. A failed transfer or a wrong byte is in the row as well."""
    command = [*rails.prefix(0), harness.binary(), "transfer-bench", "--connect", address, "--json",
               *[a for rail in rails.rails for a in ("--rail", f"{rails.address(0, rail)}:0")], *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if not done.stdout.strip():
        raise RuntimeError(f"transfer-bench failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)["rows"][0]


__all__ = ["Rails", "Target", "run_initiator", "ip", "harness", "ROOT"]
