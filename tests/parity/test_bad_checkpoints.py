"""Damaged or unsupported checkpoints: an error that names the file and what is wrong with it, and a living process."""

import json
import os

import checkpoints
import pytest


@pytest.fixture
def directory(tmp_path):
    checkpoints.make("v2", str(tmp_path))
    return tmp_path


def refused(probe, directory, *words):
    answer = probe.ask(op="load", directory=str(directory))
    assert not answer["ok"]
    for word in words:
        assert word in answer["error"], answer["error"]
    return answer


def edit_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def rewrite_header(directory, change):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("name", ["BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BailingMoeLinearForCausalLM",
                                  "LlamaForCausalLM"])
def test_unsupported_architecture_is_named(probe, directory, name):
    edit_config(directory, architectures=[name])
    refused(probe, directory, "config.json", name)


@pytest.mark.parametrize("changes, word", [
    ({"hidden_size": None}, "hidden_size"), ({"hidden_size": "many"}, "hidden_size"), ({"hidden_size": -1}, "hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"), ({"n_group": 5}, "n_group"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"), ({"vocab_size": 10**12}, "vocab_size"),
])
def test_bad_config_names_the_field(probe, directory, changes, word):
    edit_config(directory, **changes)
    refused(probe, directory, "config.json", word)


def test_damaged_json(probe, directory):
    (directory / "config.json").write_text('{"hidden_size": ')
    refused(probe, directory, "config.json")


@pytest.mark.parametrize("keep", [0, 7, 8, 500, 0.5, 0.999])
def test_truncated_weights(probe, directory, keep):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    refused(probe, directory, "model.safetensors")


def test_missing_tensor_wrong_shape_and_wrong_dtype(probe, directory):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    rewrite_header(directory, lambda header: header.pop(name))
    refused(probe, directory, name)
    checkpoints.make("v2", str(directory))
    rewrite_header(directory, lambda header: header[name].update(shape=list(reversed(header[name]["shape"]))))
    refused(probe, directory, "model.safetensors", name)
    checkpoints.make("v2", str(directory))
    rewrite_header(directory, lambda header: header[name].update(dtype="I16"))
    refused(probe, directory, "model.safetensors", name)


def test_lying_offsets(probe, directory):
    name = "model.layers.0.attention.dense.weight"

    def overlap(header):
        header[name]["data_offsets"] = [o - 2 for o in header[name]["data_offsets"]]

    rewrite_header(directory, overlap)
    refused(probe, directory, "model.safetensors", name)


def test_missing_shard(probe, directory):
    os.remove(directory / "model.safetensors")
    checkpoints.make("v2-sharded", str(directory))
    os.remove(directory / "model-00002-of-00003.safetensors")
    refused(probe, directory, "model-00002-of-00003.safetensors")


def test_the_process_lives_on(probe, directory):
    refused(probe, directory / "nowhere")
    probe.must(op="load", directory=str(directory))
