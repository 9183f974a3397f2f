"""Random tiny checkpoints in Hugging Face layout, seeded:  checkpoints.py VARIANT DIRECTORY

Weights are decisive (standard deviation about 1/sqrt(in)), so that routing and logits are far from ties, and are exactly
what the file stores (bf16 or block FP8), so that both sides of a comparison see the same numbers.
"""

import json
import os
import sys

import numpy as np

VOCAB = 320


def to_bf16_bits(x):
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_table():
    """All 256 values of float8_e4m3fn."""
    values = np.zeros(256)
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent, mantissa = (code >> 3) & 15, code & 7
        if exponent == 15 and mantissa == 7:
            values[code] = np.nan
        elif exponent == 0:
            values[code] = sign * mantissa / 8 * 2.0**-6
        else:
            values[code] = sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return values


E4M3 = e4m3_table()


def to_e4m3_codes(x):
    """The nearest finite code of each value."""
    finite = np.array([c for c in range(256) if not np.isnan(E4M3[c]) and c != 0x80])
    order = finite[np.argsort(E4M3[finite])]
    values = E4M3[order]
    right = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
    nearer_left = np.abs(x - values[right - 1]) <= np.abs(values[right] - x)
    return order[np.where(nearer_left, right - 1, right)].astype(np.uint8)


def write_safetensors(path, tensors):
    """tensors: name -> (dtype name, array of raw bits)."""
    header, blobs, offset = {}, [], 0
    for name, (dtype, bits) in tensors.items():
        blob = np.ascontiguousarray(bits).tobytes()
        header[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def base_config(variant):
    v1 = variant.startswith("v1")
    config = {
        "architectures": ["BailingMoeForCausalLM" if v1 else "BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe", "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 160, "moe_intermediate_size": 48, "num_experts": 16,
        "num_experts_per_tok": 4, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_theta": 600000,
        "max_position_embeddings": 2048, "vocab_size": VOCAB, "hidden_act": "silu", "tie_word_embeddings": False,
        "use_bias": False, "use_qkv_bias": False, "eos_token_id": 257, "pad_token_id": 257, "torch_dtype": "bfloat16",
    }
    if v1:
        config.update(num_shared_experts=2, norm_head=True, first_k_dense_replace=0)
        if variant == "v1-wide-head":  # a head dimension that is no power of two, and the other names of two keys
            config.update(hidden_size=144, num_attention_heads=3, num_key_value_heads=1)
            config["n_routed_experts"], config["n_shared_experts"] = config.pop("num_experts"), config.pop("num_shared_experts")
        if variant == "v1-head-96":  # Ling-plus's head dimension
            config.update(hidden_size=192, num_attention_heads=2, num_key_value_heads=1)
        return config
    config.update(num_shared_experts=1, head_dim=32, first_k_dense_replace=1, n_group=4, topk_group=2,
                  score_function="sigmoid", moe_router_enable_expert_bias=True, routed_scaling_factor=2.5,
                  use_qk_norm=True, partial_rotary_factor=0.5, num_nextn_predict_layers=1, router_dtype="fp32",
                  moe_shared_expert_intermediate_size=48)
    if variant == "v2-rotary-dim":
        del config["partial_rotary_factor"]
        config.update(rotary_dim=16, first_k_dense_replace=2)
    if variant == "v2-yarn":
        config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    if variant == "v2-fp8-whole":  # whole blocks: what released checkpoints have, and what a GPU keeps as it is
        config.update(hidden_size=256, moe_intermediate_size=128, moe_shared_expert_intermediate_size=128)
    if variant == "v2-fp8":
        config.update(hidden_size=192, moe_intermediate_size=144, moe_shared_expert_intermediate_size=144)
    if variant.startswith("v2-fp8"):
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                         "weight_block_size": [128, 128]}
    return config


def shapes(config):
    """(name, shape) of every tensor, in file order."""
    h, v2 = config["hidden_size"], config["architectures"][0] == "BailingMoeV2ForCausalLM"
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim", h // heads)
    experts = config.get("num_experts") or config["n_routed_experts"]
    shared = config.get("num_shared_experts") or config["n_shared_experts"]
    m = config["moe_intermediate_size"]
    yield "model.word_embeddings.weight", (config["vocab_size"], h)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (config["vocab_size"], h)

    def ffn(prefix, width):
        yield prefix + "gate_proj.weight", (width, h)
        yield prefix + "up_proj.weight", (width, h)
        yield prefix + "down_proj.weight", (h, width)

    layers = config["num_hidden_layers"]
    for l in range(layers + config.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{l}."
        yield p + "input_layernorm.weight", (h,)
        yield p + "post_attention_layernorm.weight", (h,)
        yield p + "attention.query_key_value.weight", ((heads + 2 * kv) * d, h)
        yield p + "attention.dense.weight", (h, heads * d)
        if v2:
            yield p + "attention.query_layernorm.weight", (d,)
            yield p + "attention.key_layernorm.weight", (d,)
        if l < config["first_k_dense_replace"]:
            yield from ffn(p + "mlp.", config["intermediate_size"])
            continue
        yield p + "mlp.gate.weight", (experts, h)
        if v2:
            yield p + "mlp.gate.expert_bias", (experts,)
        for e in range(experts):
            yield from ffn(f"{p}mlp.experts.{e}.", m)
        yield from ffn(p + "mlp.shared_experts.", shared * config.get("moe_shared_expert_intermediate_size", m))
        if l == layers:
            yield p + "enorm.weight", (h,)
            yield p + "hnorm.weight", (h,)
            yield p + "eh_proj.weight", (h, 2 * h)
            yield p + "final_layernorm.weight", (h,)


def quantised_in_fp8(name):
    """What the released FP8 checkpoints quantise: every projection but the router, the MTP projection and the head."""
    return name.endswith((".query_key_value.weight", ".attention.dense.weight", "gate_proj.weight", "up_proj.weight",
                          "down_proj.weight"))


def quantise_block(x, power_of_two):
    rows, cols = x.shape
    blocks = (-(-rows // 128), -(-cols // 128))
    codes, scales = np.zeros(x.shape, np.uint8), np.zeros(blocks, np.float32)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale = np.float32(max(np.abs(x[at]).max(), 1e-4) / 448)
            if power_of_two:
                scale = np.float32(2.0 ** np.ceil(np.log2(scale)))
            scales[i, j], codes[at] = scale, to_e4m3_codes(x[at] / scale)
    return codes, scales


def make(variant, directory, seed=7):
    """Writes the checkpoint; returns (config, name -> array as the file stores it, FP8 codes as their values)."""
    rng = np.random.default_rng(seed)
    config = base_config(variant)
    stored, values = {}, {}
    for name, shape in shapes(config):
        if len(shape) == 1:
            if name.endswith("expert_bias"):
                x = rng.normal(0, 0.1, shape)
                stored[name] = ("F32", x.astype(np.float32))
                values[name] = x.astype(np.float32)
                continue
            x = rng.normal(1, 0.1, shape)
        else:
            x = rng.normal(0, 1.0 if "word_embeddings" in name else shape[1] ** -0.5, shape)
        if "quantization_config" in config and quantised_in_fp8(name):
            codes, scales = quantise_block(x, ".dense." in name or "gate_proj" in name or "up_proj" in name)
            stored[name], values[name] = ("F8_E4M3", codes), E4M3[codes]
            stored[name + "_scale_inv"], values[name + "_scale_inv"] = ("F32", scales), scales
            continue
        bits = to_bf16_bits(x)
        stored[name], values[name] = ("BF16", bits), from_bf16_bits(bits)
    os.makedirs(directory, exist_ok=True)
    write_weights(directory, stored, 3 if variant == "v2-sharded" else 1)
    write_json(directory, "config.json", config)
    write_tokenizer(directory)
    return config, values


def write_weights(directory, stored, shards):
    if shards == 1:
        return write_safetensors(os.path.join(directory, "model.safetensors"), stored)
    names, weight_map = list(stored), {}
    for s in range(shards):
        file = f"model-{s + 1:05}-of-{shards:05}.safetensors"
        part = {name: stored[name] for name in names[s::shards]}
        weight_map.update({name: file for name in part})
        write_safetensors(os.path.join(directory, file), part)
    write_json(directory, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(directory, name, value):
    with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)


def byte_alphabet():
    """GPT-2's printable stand-in of each byte, in id order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {b: chr(b) for b in printable}
    extra = (b for b in range(256) if b not in stand_in)
    stand_in.update({b: chr(256 + i) for i, b in enumerate(extra)})
    return [stand_in[b] for b in printable] + [stand_in[b] for b in range(256) if b not in printable]


SPLIT = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
SPECIALS = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>"]


def write_tokenizer(directory):
    """Byte tokens and Ling's specials, no merges."""
    vocab = {c: i for i, c in enumerate(byte_alphabet())}
    added = [{"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, text in enumerate(SPECIALS)]
    write_json(directory, "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": []}})


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2])
