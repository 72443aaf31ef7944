"""GPTQ (Frantar et al. 2023, arXiv 2210.17323): what rounding takes from a column of a weight, the columns after it
give back, so that the layer computes almost the same on its inputs.

    min over Q on the grid of  Σ_n |W x_n − Q x_n|²,        H = Σ_n x_n x_nᵀ
    for each column k:  q_k = round(w_k),  e = (w_k − q_k) / U[k,k],  w_j ← w_j − e U[k,j] for j > k,
    where U is the upper Cholesky factor of (H + damping)⁻¹

A fine-tuning moves a weight by a tenth of a step of a 4-bit grid: rounded one by one, most do not move at all.
"""

import mlx.core as mx
import numpy as np

DAMPING = 0.01  # of H's mean diagonal, added to its diagonal
_ROWS = 1024  # packed at a time


def inverse_factor(hessian: mx.array) -> mx.array:
    """U, upper triangular, with Uᵀ U = (H + damping)⁻¹: (I, I) float32, of H (I, I) float32.

    An input that is always zero has no part in H; the damping alone says what its column costs, which is nothing.
    """
    mean = max(float(mx.diag(hessian).mean().item()), 1e-12)
    damped = hessian + DAMPING * mean * mx.eye(hessian.shape[0])
    with mx.stream(mx.cpu):  # MLX has these on the CPU alone
        inverse = mx.linalg.cholesky_inv(mx.linalg.cholesky(damped))
        return mx.linalg.cholesky(inverse, upper=True)


def quantize(
    weight: mx.array, hessian: mx.array, bits: int, group_size: int, dtype: mx.Dtype = mx.float32
) -> tuple[mx.array, mx.array, mx.array]:
    """A weight on MLX's affine grid, by GPTQ: packed weight, scales and biases as `mx.quantize` gives them.

    Args:
        weight: (..., O, I), in float32; leading axes (experts) share `hessian`.
        hessian: H (I, I), float32.
        dtype: of scales and biases, which are rounded to it before the weights are.
    """
    factor = inverse_factor(hessian)
    weight, codes, scales, biases = mx.array(weight), [], [], []
    levels = 2**bits - 1
    for start in range(0, weight.shape[-1], group_size):
        end = start + group_size
        group, block = weight[..., start:end], factor[start:end, start:end]
        scale, bias = (x.astype(dtype) for x in mx.quantize(group, group_size, bits)[1:])
        s, b = scale.astype(mx.float32), bias.astype(mx.float32)
        own, errors = [], []
        for k in range(group_size):
            w = group[..., k : k + 1]
            code = mx.clip(mx.round((w - b) / mx.where(s == 0, 1.0, s)), 0, levels)
            error = (w - (s * code + b)) / block[k, k]
            group = group - error * block[k]  # nothing before column k: the factor is upper triangular
            own.append(code)
            errors.append(error)
        if end < weight.shape[-1]:
            weight[..., end:] -= mx.concatenate(errors, axis=-1) @ factor[start:end, end:]
        codes.append(mx.concatenate(own, axis=-1).astype(mx.uint8))
        scales.append(scale)
        biases.append(bias)
        mx.eval(weight, codes[-1], scale, bias)
    return pack(mx.concatenate(codes, axis=-1), bits), mx.concatenate(scales, -1), mx.concatenate(biases, -1)


def pack(codes: mx.array, bits: int) -> mx.array:
    """Codes (..., I), uint8 below 2^bits, as MLX packs them: their bits one after another, the lowest first, in
    words of 32: (..., I · bits / 32) uint32."""
    flat = np.array(codes).reshape(-1, codes.shape[-1])
    words = []
    for start in range(0, len(flat), _ROWS):
        spelled = np.unpackbits(flat[start : start + _ROWS, :, None], axis=-1, count=bits, bitorder="little")
        words.append(np.packbits(spelled.reshape(len(spelled), -1), axis=-1, bitorder="little").view("<u4"))
    return mx.array(np.concatenate(words).reshape(*codes.shape[:-1], -1))
