"""Builds the image from nothing but Debian's packages: no registry."""

import os
import pathlib
import subprocess
import time

from kustomize import ROOT

IMAGE = "localhost/millrace:0.1.0"
BASE = "localhost/base"


def build(podman, directory, compiler_cache=None, cuda=None):
    """deploy/Containerfile, whole, on a base of mmdebstrap's; what it saw, in words. `compiler_cache` is a ccache directory (with
    its ccache.conf) and `cuda` a CUDA toolkit, both mounted while it builds."""
    began = time.monotonic()
    base = pathlib.Path(directory) / "base.tar"
    subprocess.run(["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates", "bookworm", base], check=True)
    podman("import", base, BASE)
    base.unlink()
    made_base = time.monotonic() - began
    mounts = []
    if compiler_cache:
        mounts += ["--volume", f"{compiler_cache}:/root/.ccache"]
    if cuda:
        mounts += ["--volume", f"{cuda}:/usr/local/cuda:ro"]
    began = time.monotonic()
    log = pathlib.Path(directory) / "build.log"
    # The build needs Debian's packages from outside: it has this machine's network. No cgroups, no namespaces of its own.
    with open(log, "wb") as output:
        code = subprocess.run([*podman.command, "build", "--network", "host", "--isolation", "chroot", "--layers=false",
                               "--build-arg", f"BASE={BASE}", "--file", ROOT / "deploy/Containerfile", "--tag", IMAGE, *mounts, ROOT],
                              stdout=output, stderr=subprocess.STDOUT, env=podman.environment).returncode
    assert code == 0, log.read_text(errors="replace")[-6000:]
    size = int(podman("image", "inspect", IMAGE, "--format", "{{.Size}}"))
    return (f"image: base in {made_base:.0f} s, build in {time.monotonic() - began:.0f} s on {os.cpu_count()} cores"
            f"{' with a compiler cache' if compiler_cache else ''}, {size / 1e6:.0f} MB")
