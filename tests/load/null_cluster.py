"""null_worker, a gateway before it, and stream_load against them; see stream_load.cc for what is measured."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))

import harness  # noqa: E402

MODEL = ROOT / "deploy/models/ling-tiny"


def program(name):
    path = pathlib.Path(harness.binary()).parent / "tests/load" / name
    assert path.exists(), f"{path} does not exist: build target {name}"
    return str(path)


class NullCluster:
    """One null_worker, of one or several workers, and one gateway. `prefix` is what both are started with; `run(call)` calls where they can be reached."""

    def __init__(self, log_dir, step_ms, workers=1, gateway_args=(), prefix=(), listen="127.0.0.1:0", run=lambda call: call()):
        log_dir = pathlib.Path(log_dir)
        self.tokens_file = log_dir / "tokens.json"
        self.log = open(log_dir / "null_worker.log", "wb")
        self.worker = subprocess.Popen([*prefix, program("null_worker"), "--model", MODEL, "--step-ms", str(step_ms), "--workers",
                                        str(workers), "--running-max", str(max(1500 // workers * 2, 64) if workers > 1 else 1500)],
                                       stdout=subprocess.PIPE, stderr=self.log, text=True)
        try:
            line = self.worker.stdout.readline()
            self.tokens_file.write_text(line)
            self.gateway = harness.Process(log_dir, "gateway", [
                "gateway", "--model", MODEL, "--listen", listen, *(f"--decode={address}" for address in json.loads(line)["addresses"]),
                "--requests-max", 2000, "--queue-max", 2000, *gateway_args], prefix=prefix).wait_started()
            run(lambda: harness.wait_ready(self.gateway.address))
        except BaseException:
            self.worker.kill()
            raise

    def load(self, address=None, patience=120, processes=(), **options):
        """The report of one stream_load."""
        args = [program("stream_load"), "--address", address or self.gateway.address, "--tokens-file", self.tokens_file,
                "--patience", patience]
        for name, pid in [("gateway", self.gateway.popen.pid), ("worker", self.worker.pid), *processes]:
            args += ["--process", f"{name}={pid}"]
        for name, value in options.items():
            args += [f"--{name.replace('_', '-')}", value]
        done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=patience + 60)
        assert done.returncode == 0, done.stderr + self.gateway.output()[-2000:]
        return json.loads(done.stdout)

    def direct_load(self, patience=120, **options):
        """The report of one direct_load: the same streams without the gateway."""
        args = [program("direct_load"), "--tokens-file", self.tokens_file]
        for name, value in options.items():
            args += [f"--{name.replace('_', '-')}", value]
        done = subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=patience)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def gateway_files(self):
        return len(os.listdir(f"/proc/{self.gateway.popen.pid}/fd"))

    def stop(self):
        code = self.gateway.stop()
        self.worker.terminate()
        worker_code = self.worker.wait(60)
        self.log.close()
        assert (code, worker_code) == (0, 0), self.gateway.output()[-4000:]
