"""`millrace doctor` on this machine, and as the manifests call it. What it says of other machines: tests/server/doctor_test.cc."""

import json
import socket
import subprocess

import pytest
from kustomize import OVERLAYS
from test_manifests import templates

import harness


def doctor(*args):
    run = subprocess.run([harness.binary(), "doctor", *map(str, args)], capture_output=True, text=True, timeout=120)
    return run.returncode, run.stdout, run.stderr


def of_topic(report, topic):
    return [finding for finding in report["findings"] if finding["topic"] == topic]


def test_a_machine_that_runs_the_suite_can_serve():
    status, text, errors = doctor()
    assert status == 0 and errors == "", text
    assert text.splitlines()[-1] == "This machine can serve."
    status, text, _ = doctor("--json")
    report = json.loads(text)
    assert status == 0 and report["can_serve"] is True
    assert {"processor", "memory", "open files", "io_uring", "gpu", "rdma"} <= {f["topic"] for f in report["findings"]}
    for finding in report["findings"]:
        assert finding["what"] and (finding["severity"] == "ok" or (finding["why"] and finding["mend"]))


def test_memory_that_is_not_there_is_a_problem():
    status, text, _ = doctor("--memory", "1000000GiB", "--json")
    report = json.loads(text)
    assert status == 1 and report["can_serve"] is False
    assert [f["severity"] for f in of_topic(report, "memory")] == ["problem"]
    assert doctor("--memory", "much")[0] == 1


def test_ports_and_peers_are_tried():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = f"127.0.0.1:{taken.getsockname()[1]}"
        free = f"127.0.0.1:{harness.free_port()}"
        assert doctor("--listen", free, "--peer", used)[0] == 0
        for args, topic in ((("--listen", used), "port"), (("--peer", free), "peer"), (("--peer", "no-such-host.invalid:7001"), "peer")):
            status, text, _ = doctor(*args, "--json")
            (finding,) = of_topic(json.loads(text), topic)
            assert status == 1 and finding["severity"] == "problem", finding
            assert args[1] in finding["what"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_init_checks_of_the_manifests_are_understood(overlays, overlay):
    """The flags are known; whether this machine would do is another question."""
    checks = [template["spec"]["initContainers"][0]["args"] for template in templates(overlays[overlay])
              if "initContainers" in template["spec"]]
    assert checks
    for command, *args in checks:
        assert command == "doctor"
        status, text, errors = doctor(*args, "--json")
        assert errors == "" and status in (0, 1)
        report = json.loads(text)
        assert report["can_serve"] is (status == 0)
