"""Fixtures: kubectl, the rendered overlays. What runs the server comes from tests/e2e."""

import kustomize
import pytest


def pytest_addoption(parser):
    parser.addoption("--containers", action="store_true", help="also what runs containers (test_pods.py)")
    parser.addoption("--faults", action="store_true", help="also the alerts' real faults (test_faults.py)")
    parser.addoption("--image-ccache", metavar="DIRECTORY", help="compiler cache for the image's build")
    parser.addoption("--image-cuda", metavar="DIRECTORY", help="CUDA toolkit for the image's build")


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory):
    return kustomize.extract_kubectl(tmp_path_factory.mktemp("kubectl"))


@pytest.fixture(scope="session")
def overlays(kubectl):
    return {name: kustomize.render(kubectl, kustomize.KUBERNETES / "overlays" / name) for name in kustomize.OVERLAYS}
