"""The image and the overlays in real containers, inside namespaces made for it (pods.py says what is seen)."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

import harness

# A network of its own, and a /sys/fs/cgroup without the second version's mount in it, which crun refuses beside the first's.
ENTER = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


@pytest.fixture
def containers(request):
    if not request.config.getoption("--containers"):
        pytest.skip("runs for minutes and needs podman, catatonit and root: by hand, with --containers")
    assert os.geteuid() == 0 and shutil.which("podman") and shutil.which("catatonit")


def test_pods_run_and_rolling_restarts_lose_nothing(containers, kubectl):
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:  # podman wants a short path
        subprocess.run(
            ["unshare", "--net", "--mount", "--propagation", "slave", "bash", "-c", ENTER, "enter", sys.executable,
             pathlib.Path(__file__).with_name("pods.py"), harness.binary(), harness.ROOT / "deploy/models/ling-tiny", kubectl,
             directory], check=True, timeout=1800)
