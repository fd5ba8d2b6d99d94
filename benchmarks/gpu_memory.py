"""Temporaries of gradients on an H100, by its compiler: attention and large vocabularies.

    python benchmarks/gpu_memory.py --json benchmarks/results/gpu_memory.json    (about 2 minutes)

needs no GPU, but the extras `plan` and `cudnn`. Plain is `jax.grad` of the function as written;
ours is the same of `fastgpu.optimize`, or `fastgpu.value_and_grad`.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import fastgpu as fgpu
from fastgpu.compile import compile_for


def linen(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return nn.dot_product_attention(q, k, v)


def jax_nn_causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3)


def by_hand(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def cross_entropy(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    scores = (jnp.tanh(x @ params["hidden"]) @ params["words"]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()


def attention_gradient(attend: Callable[..., Any]) -> Callable[..., Any]:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))


def measure(plain: Callable[..., Any], ours: Callable[..., Any], structs: Any) -> dict[str, Any]:
    sizes = [
        compile_for(fn, structs, "h100").memory_analysis().temp_size_in_bytes
        for fn in (plain, ours)
    ]
    return {"plain_bytes": sizes[0], "fastgpu_bytes": sizes[1], "ratio": sizes[1] / sizes[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    rows = []
    for attend in (linen, jax_nn_causal, heads_first, by_hand):
        for length in (1024, 2048, 4096):
            q = jax.ShapeDtypeStruct((4, length, 8, 64), jnp.bfloat16)
            fast = fgpu.optimize(attend, target="h100")
            row = measure(attention_gradient(attend), attention_gradient(fast), (q, q, q))
            rows.append({"program": f"attention, {attend.__name__}, {length} tokens", **row})
            show(rows[-1])
    for dtype in (jnp.float32, jnp.bfloat16):
        for tokens in (4096, 16384):
            shapes = {"hidden": (768, 768), "words": (768, 50257)}
            params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
            x = jax.ShapeDtypeStruct((tokens, 768), dtype)
            structs = (params, x, jax.ShapeDtypeStruct((tokens,), jnp.int32))
            ours = fgpu.value_and_grad(cross_entropy, target="h100")
            row = measure(jax.value_and_grad(cross_entropy), ours, structs)
            name = f"cross-entropy over 50257, {tokens} tokens, {jnp.dtype(dtype).name}"
            rows.append({"program": name, **row})
            show(rows[-1])
    if options.json:
        report = {"target": "h100", "jax": jax.__version__, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def show(row: dict[str, Any]) -> None:
    plain, ours = (row[name] / 2**20 for name in ("plain_bytes", "fastgpu_bytes"))
    print(f"{row['program']:<52}{plain:9.1f} MiB{ours:9.1f} MiB{row['ratio']:8.1%}", flush=True)


if __name__ == "__main__":
    main()
