"""Unshaped loopback: shared memory next to memcpy, one and four paths next to iperf3 and bare sockets, small writes idle and under bulk load, scattered descriptors."""

import ctypes
import json
import mmap
import os
import resource
import selectors
import socket
import statistics
import subprocess
import time

from rails import harness


def iperf(streams, block, *flags, seconds=3):
    """(bytes per second, CPU seconds per GB of both ends) of iperf3 over loopback. It sends from and receives into one block again
    and again, which stays in the caches, and sums nothing up."""
    port = str(harness.free_port())
    server = subprocess.Popen(["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port], stdout=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        text = subprocess.run(["iperf3", "-J", "-c", "127.0.0.1", "-p", port, "-t", str(seconds), "-l", str(block),
                               "-P", str(streams), *flags], capture_output=True, text=True, check=True, timeout=60).stdout
    finally:
        server.kill()
        server.wait()
    end = json.loads(text)["end"]
    cpu = end["cpu_utilization_percent"]
    received = end["sum_received"]
    cpu_seconds = (cpu["host_total"] + cpu["remote_total"]) / 100 * received["seconds"]
    return received["bits_per_second"] / 8, cpu_seconds / (received["bytes"] / 1e9)


def bare(streams, memory_bytes, seconds=3):
    """(bytes per second, CPU seconds per GB of both ends) of nothing but sockets, set as ours are: one thread at each end, that sends
    from memory and receives into memory of this size, 512 KiB a call, and sums nothing up."""
    chunk = 512 << 10

    def memory():
        pages = mmap.mmap(-1, memory_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, memory_bytes, 4096):
            pages[at] = 1
        return memoryview(pages)

    def end(connections, pages, sends):
        selector = selectors.EpollSelector()
        for connection in connections:
            connection.setblocking(False)
            selector.register(connection, selectors.EVENT_WRITE if sends else selectors.EVENT_READ)
        at = moved = 0
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        while selector.get_map() and not (sends and time.monotonic() - began > seconds):
            for key, _ in selector.select():
                part = pages[at:at + chunk]
                count = key.fileobj.send(part) if sends else key.fileobj.recv_into(part)
                if count == 0:
                    selector.unregister(key.fileobj)
                moved += count
                at = at + count if at + count + chunk <= memory_bytes else 0
        now = resource.getrusage(resource.RUSAGE_SELF)
        return moved, time.monotonic() - began, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime

    def tuned(connection):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    with socket.create_server(("127.0.0.1", 0)) as listener:
        news, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                pages = memory()
                os.write(tell, json.dumps(end([tuned(listener.accept()[0]) for _ in range(streams)], pages, False)).encode())
            finally:
                os._exit(0)
        os.close(tell)
        pages = memory()
        connections = [tuned(socket.create_connection(listener.getsockname())) for _ in range(streams)]
        sent = end(connections, pages, True)
        for connection in connections:
            connection.close()
        with os.fdopen(news) as report:
            received = json.load(report)
        os.waitpid(child, 0)
    return received[0] / received[1], (sent[2] + received[2]) / (received[0] / 1e9)


class LoopbackTarget:
    def __init__(self, log_dir, rails):
        self.rails = [f"127.0.0.{i}" for i in range(1, rails + 1)]
        self.process = harness.Process(log_dir, f"target-{time.monotonic_ns()}",
                                       ["transfer-bench", "--target", "--listen", "127.0.0.1:0", *self.flags()]).wait_started()

    def flags(self):
        return [a for rail in self.rails for a in ("--rail", f"{rail}:0")]

    def run(self, *args):
        done = subprocess.run([harness.binary(), "transfer-bench", "--connect", self.process.address, "--json",
                               *self.flags(), *map(str, args)], capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"transfer-bench failed: {done.stderr[-2000:]}")
        return json.loads(done.stdout)["rows"][0]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.popen.wait()


def cpu_per_gb(row):
    moved = row["bytes"] + row.get("background", {}).get("bytes_per_second", 0) * row["seconds"]
    return (row["cpu_seconds"] + row["target_cpu_seconds"]) / (moved / 1e9)


def med(values, form="{:.2f}"):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} .. {form.format(max(values))})"


def throughput(args, log_dir, results):
    for rails in (1, 4):
        for block, depth in (("1MiB", 8), ("16MiB", 4)):
            moved = []
            # Ours is reno within a host, and from and to 64 MiB.
            beside = {"iperf3": [], "iperf3 -C reno": [], "bare sockets, 1 MiB of memory": [], "bare sockets, 64 MiB of memory": []}
            for _ in range(args.runs):
                with LoopbackTarget(log_dir, rails) as target:
                    row = target.run("--kind", "tcp", "--block", block, "--depth", depth, "--seconds", 3)
                moved.append(row["bytes_per_second"] / 1e9)
                for name, ratios in beside.items():
                    if "bare" in name:
                        limit, limit_cpu = bare(rails, (64 if "64" in name else 1) << 20)
                    else:
                        limit, limit_cpu = iperf(rails, 1 << 20, *(["-C", "reno"] if "reno" in name else []))
                    ratios.append((row["bytes_per_second"] / limit, cpu_per_gb(row) / limit_cpu))
                    results.append({"case": "throughput", "rails": rails, "block": block, "beside": name, "limit": limit,
                                    "limit_cpu_per_gb": limit_cpu, "row": row})
            print(f"{rails} path(s), {block:>5} writes: {med(moved)} GB/s", flush=True)
            for name, ratios in beside.items():
                print(f"    beside {name}, {rails} stream(s): {med([r[0] for r in ratios])} x its rate, "
                      f"{med([r[1] for r in ratios])} x its CPU s/GB", flush=True)


def latency(args, log_dir, results):
    for block in ("4KiB", "64KiB"):
        idle, loaded = [], []
        for _ in range(args.runs):
            with LoopbackTarget(log_dir, 1) as target:
                common = ["--kind", "tcp", "--block", block, "--depth", 1, "--seconds", 3]
                idle.append(target.run(*common))
                loaded.append(target.run(*common, "--background", "1MiB"))
        results += [{"case": "latency", "block": block, "idle": idle, "loaded": loaded}]
        for name, rows in (("idle", idle), ("under bulk writes", loaded)):
            print(f"{block:>5} writes {name:18} P50 {med([r['latency_us']['p50'] for r in rows], '{:.0f}')} us, "
                  f"P99 {med([r['latency_us']['p99'] for r in rows], '{:.0f}')} us", flush=True)
        growth = [b["latency_us"]["p99"] / a["latency_us"]["p99"] for a, b in zip(idle, loaded)]
        print(f"{block:>5} writes, P99 under load over idle: {med(growth)}", flush=True)


def descriptors(args, log_dir, results):
    rows = []
    for _ in range(args.runs):
        with LoopbackTarget(log_dir, 1) as target:
            rows.append(target.run("--kind", "tcp", "--block", "8KiB", "--batch", 100_000, "--scatter", "--prepare", "--depth", 1,
                                   "--memory", "8KiB", "--seconds", 4))
    results.append({"case": "descriptors", "rows": rows})
    print(f"100,000 x 8 KiB scattered: posted in {med([r['submit_us']['p50'] / 1e3 for r in rows])} ms, "
          f"{med([r['bytes_per_second'] / 1e9 for r in rows])} GB/s", flush=True)


def shared_memory(args, log_dir, results):
    """Writes between two processes of this host, next to memcpy in blocks of the same size through as much memory."""
    memory = 512 << 20
    source, target_memory = (ctypes.create_string_buffer(memory) for _ in range(2))
    for pages in (source, target_memory):
        ctypes.memset(pages, 1, memory)
    for block, depth in ((1 << 20, 8), (16 << 20, 4), (64 << 20, 2)):
        ratios, moved = [], []
        for _ in range(args.runs):
            start, done = time.monotonic(), 0
            while time.monotonic() < start + 1:
                at = done % memory
                ctypes.memmove(ctypes.byref(target_memory, at), ctypes.byref(source, at), block)
                done += block
            copied = done / (time.monotonic() - start)
            with LoopbackTarget(log_dir, 1) as target:
                row = target.run("--kind", "shm", "--block", block, "--depth", depth, "--memory", memory, "--seconds", 2)
            ratios.append(row["bytes_per_second"] / copied)
            moved.append(row["bytes_per_second"] / 1e9)
            results.append({"case": "shm", "block": block, "memcpy": copied, "row": row})
        print(f"shm, {block >> 20:>2} MiB writes: {med(moved)} GB/s, {med(ratios)} x memcpy", flush=True)


def measure(args, log_dir):
    results = []
    for case in (throughput, latency, descriptors, shared_memory):
        if not args.only or case.__name__ in args.only:
            case(args, log_dir, results)
    return results
