"""The transformer in NumPy, one layer, head and query at a time; independent of dualsm/model."""

import math

import numpy as np


def logits(config, params, tokens_L, key_start_L, key_end_L) -> np.ndarray:
    """Returns the logits of one sequence, float64 [L, V]."""
    params = to_float64(params)
    embedding_VxD = params["embedding"]["embedding"]
    x_LxD = embedding_VxD[tokens_L]
    for i in range(config.num_layers):
        attention, mlp = (layer(params["blocks"][name], i) for name in ("attention", "mlp"))
        has_rope = not config.no_rope_layer_interval or (i + 1) % config.no_rope_layer_interval
        for function, part in (
            (lambda p, x, r=has_rope: attend(config, p, x, key_start_L, key_end_L, r), attention),
            (swiglu, mlp),
        ):
            if config.norm_placement == "pre":
                x_LxD = x_LxD + function(part, norm(config, x_LxD, part["norm"]))
            else:
                x_LxD = x_LxD + norm(config, function(part, x_LxD), part["norm"])
    head = params["head"]
    x_LxD = norm(config, x_LxD, head["norm"])
    if config.head == "projected":
        x_LxD = x_LxD @ head["projection"]["kernel"]
        x_LxD = 0.5 * x_LxD * (1 + np.tanh(math.sqrt(2 / math.pi) * (x_LxD + 0.044715 * x_LxD**3)))
    output = head.get("output", {})
    matrix_DxV = embedding_VxD.T if config.tie_word_embeddings else output["kernel"]
    return x_LxD @ matrix_DxV + output.get("bias", 0)


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)


def layer(tree, i: int):
    return {k: layer(v, i) for k, v in tree.items()} if isinstance(tree, dict) else tree[i]


def linear(part, x):
    return x @ part["kernel"] + part.get("bias", 0)


def norm(config, x, part):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * part["scale"]


def swiglu(part, x):
    gate = linear(part["gate"], x)
    return linear(part["down"], linear(part["value"], x) * gate / (1 + np.exp(-gate)))


def attend(config, part, x_LxD, key_start_L, key_end_L, has_rope: bool):
    size = config.head_dim or config.d_model // config.num_heads
    q, k, v = (linear(part[name], x_LxD) for name in ("query", "key", "value"))
    if config.qk_norm == "projection":
        q, k = norm(config, q, part["query_norm"]), norm(config, k, part["key_norm"])
    group = config.num_heads // (config.num_kv_heads or config.num_heads)
    attended_LxHxK = np.zeros((len(x_LxD), config.num_heads, size))
    for h in range(config.num_heads):
        g = h // group
        q_LxK, k_LxK, v_LxK = (
            q[:, h * size :][:, :size],
            k[:, g * size :][:, :size],
            v[:, g * size :][:, :size],
        )
        if config.qk_norm == "head":
            q_LxK, k_LxK = norm(config, q_LxK, part["query_norm"]), norm(config, k_LxK, part["key_norm"])
        if has_rope:
            q_LxK, k_LxK = rotated(config, q_LxK), rotated(config, k_LxK)
        for i, (start, end) in enumerate(zip(key_start_L, key_end_L, strict=True)):
            scores = k_LxK[start:end] @ q_LxK[i] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            attended_LxHxK[i, h] = weights @ v_LxK[start:end] / weights.sum()
    return linear(part["output"], attended_LxHxK.reshape(len(x_LxD), -1))


def rotated(config, x_LxK):
    """Rotates pairs (j, j + K/2) as complex numbers."""
    half = x_LxK.shape[1] // 2
    turned = np.zeros_like(x_LxK)
    for j in range(half):
        angle_L = np.arange(len(x_LxK)) * frequency(config, config.rope_theta ** (-j / half))
        pair_L = (x_LxK[:, j] + 1j * x_LxK[:, j + half]) * np.exp(1j * angle_L)
        turned[:, j], turned[:, j + half] = pair_L.real, pair_L.imag
    return turned


def frequency(config, plain: float) -> float:
    """Follows the case distinction of Llama 3.1's reference code."""
    scaling = config.rope_scaling
    if scaling.name == "none":
        return plain
    wavelength = 2 * math.pi / plain
    original, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    if wavelength < original / high:
        return plain
    if wavelength > original / low:
        return plain / scaling.factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * plain / scaling.factor + smooth * plain
