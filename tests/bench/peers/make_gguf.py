#!/usr/bin/env python3
"""Write a random-weight GGUF with the shape of a Ling MoE v2 ("bailingmoe2") model.

For speed and memory measurements only: the weights are noise scaled to keep
activations finite, the vocabulary is made up. Quantised tensors are written
straight as random blocks, so a 17 GB file takes about as long as the disk needs.

  make_gguf.py --shape ling-bench-s  --type bf16 OUT.gguf
  make_gguf.py --shape ling-mini-2.0 --type q8_0 OUT.gguf
  make_gguf.py --shape ling-mini-2.0 --layers 4 --type q4_0 OUT.gguf

Needs numpy and the `gguf` python package on the module path.
"""
import argparse
import itertools
import string
import numpy as np
import gguf
from gguf import GGMLQuantizationType as QT

SHAPES = {
    "ling-bench-s": dict(hidden=512, layers=8, dense_layers=1, inter=1536, experts=16, topk=4,
                       moe_inter=256, groups=4, top_groups=2, shared=1, heads=8, kv_heads=2,
                       head_dim=64, vocab=32768, ctx=8192, scale=2.5),
    "ling-mini-2.0": dict(hidden=2048, layers=20, dense_layers=1, inter=5120, experts=256, topk=8,
                          moe_inter=512, groups=8, top_groups=4, shared=1, heads=16, kv_heads=4,
                          head_dim=128, vocab=157184, ctx=32768, scale=2.5),
}
SHAPES["ling-mini-e64"] = dict(SHAPES["ling-mini-2.0"], experts=64)

POOL = 48 << 20  # bytes of noise reused for all tensors of one type


class Noise:
    """Serves row-quantised noise with a given standard deviation."""

    def __init__(self, kind, seed):
        self.kind, self.rng = kind, np.random.default_rng(seed)
        self.cache = {}

    def row_bytes(self, n):
        if self.kind == "bf16":
            return 2 * n
        if self.kind == "f16":
            return 2 * n
        return n // 32 * (34 if self.kind == "q8_0" else 18)

    def pool(self, std):
        key = round(std, 8)
        if key in self.cache:
            return self.cache[key]
        r = self.rng
        if self.kind == "bf16":
            f = (r.standard_normal(POOL // 2, dtype=np.float32) * np.float32(std)).view(np.uint32)
            buf = (f >> 16).astype(np.uint16).view(np.uint8)
        elif self.kind == "f16":
            buf = (r.standard_normal(POOL // 2, dtype=np.float32) * np.float32(std)).astype(np.float16).view(np.uint8)
        else:
            payload = 32 if self.kind == "q8_0" else 16
            blocks = POOL // (payload + 2)
            out = np.empty((blocks, payload + 2), np.uint8)
            if self.kind == "q8_0":
                q = np.clip(np.rint(r.standard_normal((blocks, 32), dtype=np.float32) * 40), -127, 127)
                out[:, 2:] = q.astype(np.int8).view(np.uint8)
                unit = 40.0
            else:
                q = np.clip(np.rint(r.standard_normal((blocks, 32), dtype=np.float32) * 3), -8, 7).astype(np.int8) + 8
                out[:, 2:] = (q[:, :16] | (q[:, 16:] << 4)).astype(np.uint8)
                unit = 3.0
            d = (std / unit * r.uniform(0.8, 1.2, blocks)).astype(np.float16)
            out[:, :2] = d[:, None].view(np.uint8)
            buf = out.reshape(-1)
        self.cache[key] = buf  # one pool per distinct fan-in: at most four
        return buf

    def unit_bytes(self):
        return {"bf16": 2, "f16": 2, "q8_0": 34, "q4_0": 18}[self.kind]

    def tensor(self, shape, std):
        """uint8 array of shape (..., row_bytes)."""
        rb = self.row_bytes(shape[-1])
        total = rb * int(np.prod(shape[:-1]))
        src, u = self.pool(std), self.unit_bytes()
        out = np.empty(total, np.uint8)
        pos = 0
        while pos < total:
            start = int(self.rng.integers(0, len(src) // u // 2)) * u
            n = min(total - pos, (len(src) - start) // u * u)
            out[pos:pos + n] = src[start:start + n]
            pos += n
        return out.reshape(*shape[:-1], rb)


def byte_chars():
    """The printable stand-ins that byte-level BPE uses for the 256 byte values."""
    keep = set(range(0x21, 0x7F)) | set(range(0xA1, 0xAD)) | set(range(0xAE, 0x100))
    spare = itertools.count(0x100)
    return [chr(b) if b in keep else chr(next(spare)) for b in range(256)]


def made_up_vocab(size):
    """256 byte tokens, then words grown letter by letter (each with its merge), then 4 specials."""
    specials = ["<|startoftext|>", "<|endoftext|>", "<|role_end|>", "<|pad|>"]
    tokens, merges = byte_chars(), []
    space = byte_chars()[0x20]
    letters = string.ascii_lowercase
    layer = [space] + list(letters)          # strings that may be grown further
    while len(tokens) < size - len(specials):
        grown = []
        for head in layer:
            for c in letters:
                if len(tokens) + len(grown) >= size - len(specials):
                    break
                grown.append(head + c)
                merges.append(f"{head} {c}")
        tokens += grown
        layer = grown
    types = [gguf.TokenType.NORMAL] * len(tokens) + [gguf.TokenType.CONTROL] * len(specials)
    return tokens + specials, types, merges


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("--shape", choices=SHAPES, required=True)
    ap.add_argument("--type", choices=["bf16", "f16", "q8_0", "q4_0"], required=True)
    ap.add_argument("--layers", type=int, help="keep only this many layers")
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    s = dict(SHAPES[a.shape])
    if a.layers:
        s["layers"] = a.layers
    H, V, F, E, D = s["hidden"], s["vocab"], s["moe_inter"], s["experts"], s["head_dim"]

    w = gguf.GGUFWriter(a.out, "bailingmoe2")
    w.add_name(f"{a.shape} random {a.type}")
    w.add_block_count(s["layers"]); w.add_context_length(s["ctx"]); w.add_embedding_length(H)
    w.add_feed_forward_length(s["inter"]); w.add_head_count(s["heads"]); w.add_head_count_kv(s["kv_heads"])
    w.add_key_length(D); w.add_value_length(D); w.add_rope_dimension_count(D // 2); w.add_rope_freq_base(600000.0)
    w.add_layer_norm_rms_eps(1e-6); w.add_vocab_size(V)
    w.add_leading_dense_block_count(s["dense_layers"]); w.add_expert_count(E); w.add_expert_used_count(s["topk"])
    w.add_expert_feed_forward_length(F); w.add_expert_shared_feed_forward_length(F * s["shared"])
    w.add_expert_shared_count(s["shared"]); w.add_expert_weights_scale(s["scale"]); w.add_expert_weights_norm(True)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    w.add_expert_group_count(s["groups"]); w.add_expert_group_used_count(s["top_groups"])
    w.add_file_type({"bf16": 32, "f16": 1, "q8_0": 7, "q4_0": 2}[a.type])
    tokens, types, merges = made_up_vocab(V)
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("bailingmoe2")
    w.add_token_list(tokens); w.add_token_types(types); w.add_token_merges(merges)
    w.add_bos_token_id(V - 4); w.add_eos_token_id(V - 3); w.add_pad_token_id(V - 1)

    noise, rng = Noise(a.type, a.seed), np.random.default_rng(a.seed + 1)
    raw = {"bf16": QT.BF16, "f16": QT.F16, "q8_0": QT.Q8_0, "q4_0": QT.Q4_0}[a.type]
    plan = []  # (name, shape, make)

    def weight(name, *shape):
        plan.append((name, shape, lambda: noise.tensor(shape, 1.0 / np.sqrt(shape[-1])), True))

    def plain(name, arr):
        plan.append((name, arr.shape, lambda: arr, False))

    weight("token_embd.weight", V, H)
    plain("output_norm.weight", np.ones(H, np.float32))
    weight("output.weight", V, H)
    for i in range(s["layers"]):
        p = f"blk.{i}."
        plain(p + "attn_norm.weight", np.ones(H, np.float32))
        weight(p + "attn_qkv.weight", (s["heads"] + 2 * s["kv_heads"]) * D, H)
        weight(p + "attn_output.weight", H, s["heads"] * D)
        plain(p + "attn_q_norm.weight", np.ones(D, np.float32))
        plain(p + "attn_k_norm.weight", np.ones(D, np.float32))
        plain(p + "ffn_norm.weight", np.ones(H, np.float32))
        if i < s["dense_layers"]:
            weight(p + "ffn_gate.weight", s["inter"], H)
            weight(p + "ffn_up.weight", s["inter"], H)
            weight(p + "ffn_down.weight", H, s["inter"])
            continue
        plain(p + "ffn_gate_inp.weight", (rng.standard_normal((E, H)) / np.sqrt(H)).astype(np.float32))
        plain(p + "exp_probs_b.bias", (rng.standard_normal(E) * 0.01).astype(np.float32))
        for part, kind in (("exps", None), ("shexp", s["shared"])):
            lead, width = ((E,), F) if kind is None else ((), F * kind)
            weight(p + f"ffn_gate_{part}.weight", *lead, width, H)
            weight(p + f"ffn_up_{part}.weight", *lead, width, H)
            weight(p + f"ffn_down_{part}.weight", *lead, H, width)

    for name, shape, make, quant in plan:
        if quant:
            bshape = (*shape[:-1], noise.row_bytes(shape[-1]))
            w.add_tensor_info(name, bshape, np.dtype(np.uint8), int(np.prod(bshape)), raw_dtype=raw)
        else:
            w.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) * 4)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_ti_data_to_file()
    for name, shape, make, quant in plan:
        w.write_tensor_data(make())
    w.close()


if __name__ == "__main__":
    main()
