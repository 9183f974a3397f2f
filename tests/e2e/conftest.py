"""Fixtures: the model, a server in one process, roles apart. MILLRACE_BIN names the binary, MILLRACE_MODEL the checkpoint."""

import json
import os
import pathlib
import random
import sys

import pytest

import harness

sys.path.insert(0, str(harness.ROOT / "tests/reference"))

LONG_CONTEXT = 16384


@pytest.fixture(scope="session")
def logs(tmp_path_factory):
    """Where processes log; named in every failure that concerns one."""
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def model():
    path = pathlib.Path(os.environ.get("MILLRACE_MODEL", harness.ROOT / "deploy/models/ling-tiny")).resolve()
    assert (path / "config.json").exists(), f"{path} holds no checkpoint: set MILLRACE_MODEL"
    return path


@pytest.fixture(scope="session")
def long_model(model, tmp_path_factory):
    """The same checkpoint with more context, so that there is time to be interrupted in every phase."""
    directory = tmp_path_factory.mktemp("long") / model.name
    directory.mkdir()
    for file in model.iterdir():
        if file.name != "config.json":
            (directory / file.name).symlink_to(file)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = LONG_CONTEXT
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def vocabulary(model):
    """The ids of ordinary tokens."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = {token["id"] for token in tokenizer["added_tokens"]}
    return [i for i in tokenizer["model"]["vocab"].values() if i not in added]


@pytest.fixture(scope="session")
def make_prompt(vocabulary):
    """make_prompt(length, seed): token ids."""
    return lambda length, seed=0: random.Random(length * 1000 + seed).choices(vocabulary, k=length)


@pytest.fixture(scope="session")
def server(logs, model):
    """millrace serve: prefill and decode in one process."""
    directory = logs / "serve"
    directory.mkdir()
    process = harness.Process(directory, "serve", ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1,
                                                   "--kv-memory", "64MiB", "--batch-tokens-max", 128]).wait_started()
    harness.wait_ready(process.address)
    yield process
    assert process.stop() == 0, process.output()[-4000:]


@pytest.fixture(scope="session")
def cluster(logs, long_model):
    """2 prefill and 2 decode workers behind a gateway, all alive. Nobody kills these."""
    directory = logs / "cluster"
    directory.mkdir()
    cluster = harness.Cluster(directory, long_model, prefill=2, decode=2, worker_args=["--batch-tokens-max", 128])
    yield cluster
    cluster.stop()
