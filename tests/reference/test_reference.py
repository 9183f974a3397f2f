"""The reference against itself, written another way, and against routing worked out by hand."""

import math

import checkpoints
import ling
import numpy as np
import pytest


def config_with(**changes):
    return ling.Config({**checkpoints.base_config("v2"), **changes})


def test_group_score_is_the_sum_of_the_two_best_and_masked_groups_stay_out():
    config = config_with(num_experts=6, num_experts_per_tok=2, n_group=3, topk_group=1, routed_scaling_factor=1.0)
    logits = np.zeros(6)  # every score is 0.5
    # Group 1 holds the best expert but group 2 the best pair; all others are negative after the bias.
    bias = np.array([-3.0, -3.0, 0.9, -3.0, 0.2, 0.1])
    ids, weights = ling.route(logits, bias, config)
    assert ids == [4, 5]
    assert np.allclose(weights, 0.5)  # the unbiased scores, normalised
    # Both experts of the kept group are negative: a mask of 0 would let others win.
    ids, _ = ling.route(logits, np.array([-3.0, -3.0, -5.0, -5.0, -2.0, -2.0]), config)
    assert ids == [4, 5]


def test_ties_go_to_the_lowest_index_and_one_expert_is_not_normalised():
    config = config_with(num_experts=4, num_experts_per_tok=1, n_group=2, topk_group=1, routed_scaling_factor=2.5)
    ids, weights = ling.route(np.zeros(4), np.zeros(4), config)
    assert ids == [0]
    assert np.allclose(weights, 0.5 * 2.5)


def test_partial_rotation_uses_the_rotary_dimension_in_its_exponent():
    config = config_with(head_dim=128, partial_rotary_factor=0.5)
    w, m = ling.frequencies(config)
    assert len(w) == 32 and m == 1.0
    assert abs(w[1] - 0.65983109) < 1e-8 and abs(w[31] - 2.525899e-6) < 1e-12


def test_yarn_numbers():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_with(head_dim=128, partial_rotary_factor=0.5, rope_scaling=scaling)
    plain, _ = ling.frequencies(config_with(head_dim=128, partial_rotary_factor=0.5))
    w, m = ling.frequencies(config)
    assert abs(m - 1.1386294) < 1e-7
    assert np.allclose(w[:13], plain[:13]) and np.allclose(w[21:], plain[21:] / 4)  # the ramp runs from 12 to 21


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_attention_equals_naive_loops(variant, tmp_path):
    raw, values = checkpoints.make(variant, str(tmp_path))
    config, tensors = ling.Config(raw), ling.dequantise(values)
    rng = np.random.default_rng(1)
    u = rng.normal(size=(5, config.hidden))
    prefix = "model.layers.0."
    want = ling.attention(u, prefix, tensors, config)
    w_qkv, d = tensors[prefix + "attention.query_key_value.weight"], config.head_dim

    def head_vector(t, index, norm):
        x = [float(np.dot(w_qkv[index * d + i], u[t])) for i in range(d)]
        if norm is not None and config.v2:
            scale = 1 / math.sqrt(sum(v * v for v in x) / d + config.eps)
            x = [v * scale * g for v, g in zip(x, tensors[prefix + f"attention.{norm}_layernorm.weight"])]
        if norm is None:
            return x
        half = config.rotary // 2
        out = list(x)
        for i in range(half):
            angle = t * config.theta ** (-2 * i / config.rotary)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    for t in range(5):
        joined = []
        for h in range(config.heads):
            group = h // (config.heads // config.kv_heads)
            q = head_vector(t, h, "query")
            scores = [sum(a * b for a, b in zip(q, head_vector(s, config.heads + group, "key"))) / math.sqrt(d)
                      for s in range(t + 1)]
            p = [math.exp(s - max(scores)) for s in scores]
            vs = [head_vector(s, config.heads + config.kv_heads + group, None) for s in range(t + 1)]
            joined += [sum(p[s] * vs[s][i] for s in range(t + 1)) / sum(p) for i in range(d)]
        got = tensors[prefix + "attention.dense.weight"] @ np.array(joined)
        assert np.allclose(got, want[t], rtol=1e-10, atol=1e-12)


def test_block_fp8_is_multiplied_by_its_scale_and_edges_may_be_ragged():
    x = np.random.default_rng(2).normal(size=(130, 200))
    codes, scales = checkpoints.quantise_block(x, power_of_two=True)
    got = ling.dequantise({"w": checkpoints.E4M3[codes], "w_scale_inv": scales})["w"]
    assert scales.shape == (2, 2) and np.all(np.log2(scales) % 1 == 0)
    assert np.abs(got - x).max() < np.abs(x).max() / 16  # three bits of mantissa
    assert checkpoints.E4M3[0x7E] == 448 and np.isnan(checkpoints.E4M3[0x7F])
