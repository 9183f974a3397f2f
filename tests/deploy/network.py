"""What a cluster's network gives to pods: DNS for headless services, a Service's address, and network policies. All inside a network
namespace that the caller made."""

import random
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time

DNS_ADDRESS = "10.99.0.53"
SERVICE_ADDRESS = "10.99.0.80"
DNS_CACHE_SECONDS = 30  # the longest that a cluster's DNS answers with what was


class Names:
    """Cluster DNS: each name's addresses, up to DNS_CACHE_SECONDS old, by UDP."""

    def __init__(self):
        self.addresses = {}  # "service" or "pod.service" -> callable that gives addresses
        self.cache = {}      # the same -> (end on the monotonic clock, addresses)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((DNS_ADDRESS, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            question, client = self.socket.recvfrom(512)
            end = question.index(b"\0", 12) + 5
            labels, at = [], 12
            while question[at]:
                labels.append(question[at + 1:at + 1 + question[at]].decode())
                at += 1 + question[at]
            is_a = question[end - 4:end - 2] == b"\0\1"
            name = next((n for n in (".".join(labels[:2]), labels[0]) if n in self.addresses), None)
            seconds, found = self._cached(name) if name else (0, [])
            if not is_a:
                found = []
            answer = question[:2] + struct.pack(">HHHHH", 0x8580 if name else 0x8583, 1, len(found), 0, 0) + question[12:end]
            for address in found:
                answer += b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", seconds, 4) + socket.inet_aton(address)
            self.socket.sendto(answer, client)

    def _cached(self, name):
        now = time.monotonic()
        end, found = self.cache.get(name, (0, []))
        if now >= end:
            end, found = now + DNS_CACHE_SECONDS, self.addresses[name]()
            self.cache[name] = end, found
        return int(end - now), found


class Service:
    """One address in front of the ready pods, for new connections; those that run stay where they are."""

    def __init__(self):
        self.backends = list  # callable: [(host, port)]
        self.listener = socket.create_server((SERVICE_ADDRESS, 80), backlog=256)
        self.address = f"{SERVICE_ADDRESS}:80"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self._join, args=(client,), daemon=True).start()

    def _join(self, client):
        backends = self.backends()
        if not backends:
            client.close()
            return
        try:
            server = socket.create_connection(random.choice(backends), timeout=10)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        other = {client: server, server: client}
        try:
            while other:
                for side in select.select(list(other), [], [])[0]:
                    data = side.recv(65536)
                    if data:
                        other[side].sendall(data)
                    else:
                        other[side].shutdown(socket.SHUT_WR)
                        raise EOFError
        except (EOFError, OSError):
            # Half-closed by one side: let the other finish what it is sending.
            try:
                for source, sink in ((server, client), (client, server)):
                    source.settimeout(5)
                    while data := source.recv(65536):
                        sink.sendall(data)
            except OSError:
                pass
        finally:
            client.close()
            server.close()


class Policies:
    """NetworkPolicy objects as nftables rules in each pod's own network namespace, as a network plugin would enforce them: what
    comes from the node (probes, the Service's proxy) passes always. Pods are known by host, labels, ports and pid."""

    def __init__(self, documents, node):
        self.specs = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
        self.node = node
        self.lock = threading.Lock()

    def apply(self, pods):
        """To be called when pods come and go."""
        with self.lock:
            for pod in pods:
                try:
                    in_namespace(pod, ["nft", "-f", "-"], self._rules(pod, pods))
                except AssertionError:
                    if not pod.terminating:  # else its namespace may be gone
                        raise

    def dropped(self, pod):
        """Packets so far: (towards the pod, from it)."""
        text = in_namespace(pod, ["nft", "list", "counters", "table", "inet", "pod"])
        return tuple(int(re.search(rf"counter dropped_{way} {{\s*packets (\d+)", text)[1]) for way in ("in", "out"))

    def _rules(self, pod, pods):
        mine = [s for s in self.specs if s["podSelector"]["matchLabels"].items() <= pod.labels.items()]
        lines = ["add table inet pod"]
        for way, kind, rules, peers, address in (("in", "Ingress", "ingress", "from", "saddr"), ("out", "Egress", "egress", "to", "daddr")):
            policy = "drop" if any(kind in spec["policyTypes"] for spec in mine) else "accept"
            lines += [f"add counter inet pod dropped_{way}",
                      f"add chain inet pod {way} {{ type filter hook {way}put priority 0; policy {policy}; }}",
                      f"flush chain inet pod {way}",
                      f"add rule inet pod {way} ct state established,related accept",
                      f"add rule inet pod {way} {'i' if way == 'in' else 'o'}ifname lo accept"]
            if way == "in":
                lines.append(f"add rule inet pod in ip saddr {self.node} accept")
            for rule in (rule for spec in mine for rule in spec.get(rules, [])):
                match = ""
                if peers in rule:
                    hosts = {p.host for peer in rule[peers] for p in pods if "namespaceSelector" not in peer  # one namespace is here
                             and peer["podSelector"]["matchLabels"].items() <= p.labels.items()}
                    if not hosts:
                        continue
                    match = f"ip {address} {{ {', '.join(sorted(hosts))} }} "
                if "ports" not in rule:
                    lines.append(f"add rule inet pod {way} {match}accept")
                for port in rule.get("ports", []):
                    number = pod.ports[port["port"]] if isinstance(port["port"], str) else port["port"]
                    lines.append(f"add rule inet pod {way} {match}{port.get('protocol', 'TCP').lower()} dport {number} accept")
            if policy == "drop":
                lines.append(f"add rule inet pod {way} counter name dropped_{way} drop")
        return "\n".join(lines) + "\n"


def in_namespace(pod, command, text=None):
    """Runs a command of this machine in the pod's network namespace; its output."""
    run = subprocess.run(["nsenter", "--target", str(pod.pid), "--net", *command], input=text, capture_output=True, text=True)
    assert run.returncode == 0, f"{command} for {pod.name}: {run.stderr}\n{text or ''}"
    return run.stdout


def listening(pod):
    """The TCP ports that the pod has open to others."""
    lines = in_namespace(pod, ["ss", "--no-header", "--listening", "--tcp", "--numeric"]).splitlines()
    return {int(port) for host, _, port in (line.split()[3].rpartition(":") for line in lines)
            if not host.startswith(("127.", "[::ffff:127.", "[::1]"))}


def reaches(pod, host, port):
    """Whether the pod can connect there."""
    tried = f"import socket\ntry: socket.create_connection(('{host}', {port}), 2); print('yes')\nexcept OSError: print('no')"
    return in_namespace(pod, [sys.executable, "-c", tried]).strip() == "yes"
