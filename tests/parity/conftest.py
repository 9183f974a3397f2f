import json
import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "reference"))


class Probe:
    """engine_probe behind its JSON lines (tests/engine/probe.cc says the protocol)."""

    def __init__(self, path):
        self.process = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request):
        """The answer, whether ok or not."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "engine_probe died"
        return json.loads(line)

    def must(self, **request):
        answer = self.ask(**request)
        assert answer["ok"], answer
        return answer

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0


@pytest.fixture
def probe():
    probe = Probe(os.environ["MILLRACE_PROBE"])
    yield probe
    probe.close()
