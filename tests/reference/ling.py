"""Ling v1 and v2 in float64 numpy, straight from the formulas: what the engine is compared with.

No cache, no batches, no speed: one sequence, the whole forward. Weights come as a dict of arrays by their Hugging Face
names (block-FP8 already multiplied out, see dequantise).
"""

import math

import numpy as np


class Config:
    """config.json, with every alias under which released checkpoints write a field."""

    def __init__(self, raw):
        def get(*names, default=None):
            for name in names:
                if raw.get(name) is not None:
                    return raw[name]
            return default

        self.v2 = raw["architectures"][0] == "BailingMoeV2ForCausalLM"
        self.hidden = raw["hidden_size"]
        self.layers = raw["num_hidden_layers"]
        self.heads = raw["num_attention_heads"]
        self.kv_heads = raw["num_key_value_heads"]
        self.head_dim = get("head_dim", default=self.hidden // self.heads)
        self.experts = get("num_experts", "n_routed_experts")
        self.top_k = raw["num_experts_per_tok"]
        self.shared = get("num_shared_experts", "n_shared_experts", default=0)
        self.dense_layers = get("first_k_dense_replace", default=0)
        self.groups = get("n_group", default=0)
        self.top_groups = get("topk_group", default=0)
        self.scaling = get("routed_scaling_factor", default=1.0)
        self.norm_topk = get("norm_topk_prob", default=True)
        self.norm_head = bool(get("norm_head", default=False))
        self.eps = raw["rms_norm_eps"]
        self.theta = raw["rope_theta"]
        factor = get("partial_rotary_factor")
        if factor is not None:
            self.rotary = int(self.head_dim * factor)
        else:
            self.rotary = get("rotary_dim", default=self.head_dim // 2 if self.v2 else self.head_dim)
        self.rope_scaling = get("rope_scaling")


def dequantise(tensors, block=128):
    """Multiplies float8 tensors by their block scales; drops the scales. Other tensors become float64."""
    result = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        value = value.astype(np.float64)
        scale = tensors.get(name + "_scale_inv")
        if scale is not None:
            rows, cols = value.shape
            wide = np.repeat(np.repeat(scale.astype(np.float64), block, 0), block, 1)
            value = value * wide[:rows, :cols]
        result[name] = value
    return result


def rms_norm(x, weight, eps):
    return weight * (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def silu(x):
    return x / (1.0 + np.exp(-x))


def frequencies(config):
    """Radians per position of each rotated pair, and the factor on cos and sin."""
    r = config.rotary
    w = np.array([config.theta ** (-2.0 * i / r) for i in range(r // 2)])
    scaling = config.rope_scaling
    if not scaling:
        return w, 1.0
    f = scaling["factor"]
    kind = scaling.get("type") or scaling.get("rope_type")
    if kind == "linear":
        return w / f, 1.0
    assert kind == "yarn", kind
    original = scaling["original_max_position_embeddings"]

    def correction(turns):
        return r * math.log(original / (2 * math.pi * turns)) / (2 * math.log(config.theta))

    low = max(math.floor(correction(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction(scaling.get("beta_slow", 1))), r - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(r // 2) - low) / (high - low), 0, 1)
    return ramp * w / f + (1 - ramp) * w, scaling.get("attention_factor", 0.1 * math.log(f) + 1.0)


def rotate(x, positions, config):
    """x: [tokens, heads, head_dim]; half-rotation of the first `rotary` dimensions."""
    w, m = frequencies(config)
    angles = positions[:, None] * w[None, :]
    cos, sin = m * np.cos(angles)[:, None, :], m * np.sin(angles)[:, None, :]
    half = config.rotary // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attention(u, prefix, tensors, config):
    tokens = u.shape[0]
    h, k, d = config.heads, config.kv_heads, config.head_dim
    z = u @ tensors[prefix + "attention.query_key_value.weight"].T
    q = z[:, : h * d].reshape(tokens, h, d)
    key = z[:, h * d : (h + k) * d].reshape(tokens, k, d)
    value = z[:, (h + k) * d :].reshape(tokens, k, d)
    if config.v2:
        q = rms_norm(q, tensors[prefix + "attention.query_layernorm.weight"], config.eps)
        key = rms_norm(key, tensors[prefix + "attention.key_layernorm.weight"], config.eps)
    positions = np.arange(tokens, dtype=np.float64)
    q, key = rotate(q, positions, config), rotate(key, positions, config)
    out = np.zeros((tokens, h, d))
    mask = np.tril(np.ones((tokens, tokens), dtype=bool))
    for head in range(h):
        group = head // (h // k)
        scores = q[:, head] @ key[:, group].T / math.sqrt(d)
        scores = np.where(mask, scores, -np.inf)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = (p / p.sum(axis=1, keepdims=True)) @ value[:, group]
    return out.reshape(tokens, h * d) @ tensors[prefix + "attention.dense.weight"].T


def route(logits, bias, config):
    """Expert ids in order of choice and their weights, of one token."""
    if config.v2:
        scores = 1.0 / (1.0 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    choice = scores + (bias if bias is not None else 0.0)
    if config.groups:
        grouped = choice.reshape(config.groups, -1)
        group_scores = np.sort(grouped, axis=1)[:, -2:].sum(axis=1)
        kept = sorted(range(config.groups), key=lambda g: (-group_scores[g], g))[: config.top_groups]
        limited = np.full_like(grouped, -np.inf)
        limited[kept] = grouped[kept]
        choice = limited.reshape(-1)
    ids = sorted(range(config.experts), key=lambda e: (-choice[e], e))[: config.top_k]
    weights = scores[ids]
    if config.norm_topk and config.top_k > 1:
        weights = weights / (weights.sum() + (1e-20 if config.v2 else 0.0))
    return ids, weights * config.scaling


def mlp(u, prefix, tensors):
    gate = u @ tensors[prefix + "gate_proj.weight"].T
    up = u @ tensors[prefix + "up_proj.weight"].T
    return (silu(gate) * up) @ tensors[prefix + "down_proj.weight"].T


def moe(u, prefix, tensors, config, trace):
    out = np.zeros_like(u)
    logits = u @ tensors[prefix + "gate.weight"].T
    bias = tensors.get(prefix + "gate.expert_bias")
    chosen = []
    for t in range(u.shape[0]):
        ids, weights = route(logits[t], bias, config)
        chosen.append(ids)
        for expert, weight in zip(ids, weights):
            out[t] += weight * mlp(u[t : t + 1], f"{prefix}experts.{expert}.", tensors)[0]
    trace.append(chosen)
    if config.shared:
        out += mlp(u, prefix + "shared_experts.", tensors)
    return out


def layer(x, prefix, tensors, config, is_moe, trace):
    x = x + attention(rms_norm(x, tensors[prefix + "input_layernorm.weight"], config.eps), prefix, tensors, config)
    u = rms_norm(x, tensors[prefix + "post_attention_layernorm.weight"], config.eps)
    return x + (moe(u, prefix + "mlp.", tensors, config, trace) if is_moe else mlp(u, prefix + "mlp.", tensors))


def head_weight(tensors, config):
    weight = tensors["lm_head.weight"]
    if config.norm_head:
        weight = weight / (np.sqrt((weight * weight).sum(axis=0, keepdims=True)) + 1e-7)
    return weight


def forward(raw_config, tensors, tokens, mtp=False):
    """Logits of every position [tokens, vocab], MTP logits [tokens - 1, vocab] or None, and per MoE layer (the MTP
    layer last) the chosen experts of every token."""
    config = Config(raw_config)
    tensors = dequantise(tensors)
    head = head_weight(tensors, config)
    embedding = tensors["model.word_embeddings.weight"]
    trace = []
    x = embedding[np.array(tokens)]
    for l in range(config.layers):
        x = layer(x, f"model.layers.{l}.", tensors, config, l >= config.dense_layers, trace)
    hidden = rms_norm(x, tensors["model.norm.weight"], config.eps)
    logits = hidden @ head.T
    if not mtp:
        return logits, None, trace
    prefix = f"model.layers.{config.layers}."
    after = rms_norm(embedding[np.array(tokens[1:])], tensors[prefix + "enorm.weight"], config.eps)
    before = rms_norm(hidden[:-1], tensors[prefix + "hnorm.weight"], config.eps)
    z = np.concatenate([after, before], axis=1) @ tensors[prefix + "eh_proj.weight"].T
    z = layer(z, prefix, tensors, config, True, trace)
    return logits, rms_norm(z, tensors[prefix + "final_layernorm.weight"], config.eps) @ head.T, trace
