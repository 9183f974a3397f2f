"""Ling v2 in PyTorch, for training: packed rows, every expert computed and weighted (most weights are zero)."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def weight(rows, cols, std):
    return nn.Parameter(torch.randn(rows, cols) * std)


class RmsNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x, cos, sin):
    """Half-rotation of the first dims of x [B, heads, T, D]; cos, sin [B, 1, T, r/2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Attention(nn.Module):
    def __init__(self, c, out_std):
        super().__init__()
        self.c = c
        heads, kv, dim, h = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["hidden_size"]
        self.query_key_value = weight((heads + 2 * kv) * dim, h, h**-0.5)
        self.dense = weight(h, heads * dim, out_std)
        self.query_layernorm = RmsNorm(dim, c["rms_norm_eps"])
        self.key_layernorm = RmsNorm(dim, c["rms_norm_eps"])

    def forward(self, u, rope, mask):
        heads, kv, dim = self.c["num_attention_heads"], self.c["num_key_value_heads"], self.c["head_dim"]
        rows, length, _ = u.shape
        z = F.linear(u, self.query_key_value).view(rows, length, heads + 2 * kv, dim).transpose(1, 2)
        q = rotate(self.query_layernorm(z[:, :heads]), *rope)
        k = rotate(self.key_layernorm(z[:, heads:heads + kv]), *rope)
        v = z[:, heads + kv:]
        k, v = (x.repeat_interleave(heads // kv, 1).to(v.dtype) for x in (k, v))
        o = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=mask.to(v.dtype))
        return F.linear(o.transpose(1, 2).reshape(rows, length, heads * dim), self.dense)


class Mlp(nn.Module):
    def __init__(self, h, inner, out_std):
        super().__init__()
        self.gate_proj = weight(inner, h, h**-0.5)
        self.up_proj = weight(inner, h, h**-0.5)
        self.down_proj = weight(h, inner, out_std)

    def forward(self, u):
        return F.linear(F.silu(F.linear(u, self.gate_proj)) * F.linear(u, self.up_proj), self.down_proj)


class Moe(nn.Module):
    def __init__(self, c, out_std):
        super().__init__()
        self.c = c
        h, inner, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
        self.gate = weight(experts, h, h**-0.5)
        self.register_buffer("expert_bias", torch.zeros(experts))
        self.gate_proj = weight(experts * inner, h, h**-0.5)  # expert e: rows e*inner ..
        self.up_proj = weight(experts * inner, h, h**-0.5)
        self.down_proj = weight(h, experts * inner, out_std)  # expert e: columns e*inner ..
        self.shared_experts = Mlp(h, inner * c["num_shared_experts"], out_std)

    def route(self, u):
        """Weight of every expert for every token [N, E], zero for those not chosen."""
        c = self.c
        with torch.autocast(u.device.type, enabled=False):
            scores = torch.sigmoid(F.linear(u.float(), self.gate))
        with torch.no_grad():
            biased = scores + self.expert_bias
            groups = biased.view(len(u), c["n_group"], -1)
            kept = groups.topk(2, -1).values.sum(-1).topk(c["topk_group"], -1).indices
            is_kept = torch.zeros(len(u), c["n_group"], device=u.device).scatter(1, kept, 1.0) > 0
            biased = groups.masked_fill(~is_kept[:, :, None], -math.inf).view(len(u), -1)
            chosen = torch.zeros_like(scores).scatter(1, biased.topk(c["num_experts_per_tok"], -1).indices, 1.0)
        picked = scores * chosen
        return picked / (picked.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"], chosen

    def forward(self, u):
        flat = u.reshape(-1, u.shape[-1])
        weights, chosen = self.route(flat)
        inner = F.silu(F.linear(flat, self.gate_proj)) * F.linear(flat, self.up_proj)
        inner = inner.view(len(flat), self.c["num_experts"], -1) * weights[:, :, None].to(inner.dtype)
        out = F.linear(inner.view(len(flat), -1), self.down_proj) + self.shared_experts(flat)
        return out.view_as(u), chosen.sum(0)


class Layer(nn.Module):
    def __init__(self, c, is_dense, is_mtp=False):
        super().__init__()
        h, eps = c["hidden_size"], c["rms_norm_eps"]
        depth = math.sqrt(2 * c["num_hidden_layers"])
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(h, eps), RmsNorm(h, eps)
        self.attention = Attention(c, h**-0.5 / depth)
        inner = c["intermediate_size"] if is_dense else c["moe_intermediate_size"]
        out_std = inner**-0.5 / depth
        self.is_dense = is_dense
        self.mlp = Mlp(h, inner, out_std) if is_dense else Moe(c, out_std)
        if is_mtp:
            self.enorm, self.hnorm, self.final_layernorm = RmsNorm(h, eps), RmsNorm(h, eps), RmsNorm(h, eps)
            self.eh_proj = weight(h, 2 * h, (2 * h)**-0.5)

    def forward(self, x, rope, mask):
        x = x + self.attention(self.input_layernorm(x), rope, mask)
        out = self.mlp(self.post_attention_layernorm(x))
        out, load = (out, None) if self.is_dense else out
        return x + out, load


class Ling(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.word_embeddings = weight(c["vocab_size"], c["hidden_size"], 0.5)
        self.lm_head = weight(c["vocab_size"], c["hidden_size"], 0.02)
        dense = c["first_k_dense_replace"]
        self.layers = nn.ModuleList(Layer(c, i < dense) for i in range(c["num_hidden_layers"]))
        self.layers.append(Layer(c, False, is_mtp=True))
        self.norm = RmsNorm(c["hidden_size"], c["rms_norm_eps"])

    def moe_layers(self):
        return [layer.mlp for layer in self.layers if not layer.is_dense]

    def rope(self, positions):
        r = int(self.c["head_dim"] * self.c["partial_rotary_factor"])
        steps = torch.arange(r // 2, device=positions.device, dtype=torch.float32)
        angles = positions[:, None, :, None].float() * self.c["rope_theta"] ** (-2 * steps / r)
        return angles.cos(), angles.sin()

    def forward(self, ids, positions, documents):
        """Hidden rows before the head: (main, MTP) [B, T, h], and how many tokens each expert of each MoE layer got.

        ids, positions, documents are [B, T]; a token sees the earlier ones of its own document. MTP row t predicts
        token t + 2.
        """
        rope = self.rope(positions)
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        sees = (documents[:, :, None] == documents[:, None, :]) & causal
        mask = torch.zeros(sees.shape, device=ids.device).masked_fill(~sees, -math.inf)[:, None]
        embedded = F.embedding(ids, self.word_embeddings)
        x, loads = embedded, []
        for layer in self.layers[:-1]:
            x, load = layer(x, rope, mask)
            if load is not None:
                loads.append(load)
        main = self.norm(x)
        mtp = self.layers[-1]
        z = F.linear(torch.cat([mtp.enorm(embedded.roll(-1, 1)), mtp.hnorm(main)], -1), mtp.eh_proj)
        z, load = mtp(z.float(), rope, mask)
        return main, mtp.final_layernorm(z), torch.stack(loads + [load])


def to_checkpoint(model):
    """Tensors by their Hugging Face names: bf16, but fp32 for expert_bias."""
    c, result = model.c, {}
    for name, value in list(model.named_parameters()) + list(model.named_buffers()):
        value = value.detach().cpu()
        is_routed = any(name.endswith(f".mlp.{p}_proj") for p in ("gate", "up", "down")) and \
            int(name.split(".")[1]) >= c["first_k_dense_replace"]
        if is_routed:
            prefix, projection = name.rsplit(".", 1)
            parts = value.chunk(c["num_experts"], 1 if projection == "down_proj" else 0)
            for e, part in enumerate(parts):
                result[f"model.{prefix}.experts.{e}.{projection}.weight"] = part.bfloat16().contiguous()
        elif name.endswith("expert_bias"):
            result["model." + name.replace("mlp.expert_bias", "mlp.gate.expert_bias")] = value.float()
        else:
            full = name if name == "lm_head" else "model." + name
            result[full + ("" if name.endswith(".weight") else ".weight")] = value.bfloat16().contiguous()
    return result


def from_checkpoint(model, tensors):
    """Loads what to_checkpoint wrote, so that what is measured is what is shipped."""
    c = model.c
    with torch.no_grad():
        for name, value in list(model.named_parameters()) + list(model.named_buffers()):
            full = "lm_head.weight" if name == "lm_head" else "model." + name
            if full.endswith("expert_bias"):
                full = full.replace("mlp.expert_bias", "mlp.gate.expert_bias")
            elif not full.endswith(".weight"):
                full += ".weight"
            if full in tensors:
                value.copy_(tensors[full])
                continue
            prefix, projection = name.rsplit(".", 1)
            parts = [tensors[f"model.{prefix}.experts.{e}.{projection}.weight"] for e in range(c["num_experts"])]
            value.copy_(torch.cat(parts, 1 if projection == "down_proj" else 0))
    return model
