"""The image and the overlays in real containers (pods.py says what is seen)."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from cluster import Podman
from image import build
from kustomize import ROOT

import harness

# A network of its own, and a /sys/fs/cgroup without the second version's mount in it, which crun refuses beside the first's.
ENTER = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'


@pytest.fixture(scope="module")
def image(request):
    """A directory with podman's storage, and in it the image."""
    if not request.config.getoption("--containers"):
        pytest.skip("runs for minutes and needs podman, catatonit, mmdebstrap and root: by hand, with --containers")
    assert os.geteuid() == 0 and all(map(shutil.which, ("podman", "catatonit", "mmdebstrap", "nft")))
    with tempfile.TemporaryDirectory(prefix="mr-") as directory:  # podman wants a short path
        podman = Podman(directory)
        try:
            print(build(podman, directory, *map(request.config.getoption, ("--image-ccache", "--image-cuda"))), flush=True)
            yield directory
        finally:
            podman("system", "reset", "--force", check=False)


@pytest.mark.parametrize("overlay", ["single-node", "pd", "pd-expert-groups"])
def test_an_overlay_runs_and_what_ends_loses_nothing(image, kubectl, overlay):
    subprocess.run(
        ["unshare", "--net", "--mount", "--propagation", "slave", "bash", "-c", ENTER, "enter", sys.executable,
         ROOT / "tests/deploy/pods.py", overlay, harness.binary(), ROOT / "deploy/models/ling-tiny", kubectl, image],
        check=True, timeout=3600)
