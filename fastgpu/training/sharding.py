"""Fully sharded data parallelism: each device holds a part of the state and of the batch.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020,
arXiv:1910.02054, stage 3. The mesh may be that of devices which are not there
(`fastgpu.compile.absent_mesh`): then `fastgpu.plan` says what each device would need.
"""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fastgpu.errors import BatchError
from fastgpu.training.step import LossFn


def shard_fsdp(state: Any, batch: Any, mesh: Mesh) -> tuple[Any, Any]:
    """`state` and `batch` split over all devices of `mesh`: structs stay structs, arrays move.

    Each leaf of the state is split along its largest axis that the number of devices divides, and
    repeated on all if there is none; the batch is split along its first axis. Train with
    `gather_params(loss_fn, mesh)`.

    Raises `BatchError` when the batch cannot be split evenly.

    >>> import jax.numpy as jnp
    >>> from fastgpu.compile import absent_mesh
    >>> state = {"w": jax.ShapeDtypeStruct((64, 24), jnp.float32)}
    >>> batch = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    >>> state, batch = shard_fsdp(state, batch, absent_mesh("h100:2x4"))
    >>> state["w"].sharding.shard_shape((64, 24)), batch.sharding.shard_shape((32, 64))
    ((8, 24), (4, 64))
    """
    count = mesh.size

    def place(leaf: Any, axis: int | None) -> Any:
        spec = [mesh.axis_names if i == axis else None for i in range(len(leaf.shape))]
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(sharding=sharding)
        return jax.device_put(leaf, sharding)

    def of_state(leaf: Any) -> Any:
        sizes = [(size, -i) for i, size in enumerate(leaf.shape) if size and size % count == 0]
        return place(leaf, -max(sizes)[1] if sizes else None)

    def of_batch(path: Any, leaf: Any) -> Any:
        if not leaf.shape or leaf.shape[0] % count:
            raise BatchError(
                f"batch{jax.tree_util.keystr(path)} cannot be split over {count} devices",
                expected=f"a first axis that is a multiple of {count}",
                got=str(list(leaf.shape)),
            )
        return place(leaf, 0)

    sharded_batch = jax.tree_util.tree_map_with_path(of_batch, batch)
    return jax.tree.map(of_state, state), sharded_batch


def gather_params(loss_fn: LossFn, mesh: Mesh) -> LossFn:
    """`loss_fn` on whole parameters, of which each device holds a part.

    The compiler gathers a parameter where it is used and scatters the sum of its gradients back;
    without this it may split the arithmetic along the parameters' axes instead of the batch's.

    >>> from fastgpu.compile import absent_mesh
    >>> gather_params(lambda params, *rest: ..., absent_mesh("h100:2")).__name__
    'loss_of_gathered_params'
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def loss_of_gathered_params(params: Any, model_state: Any, batch: Any, rng: jax.Array) -> Any:
        params = jax.tree.map(lambda p: jax.lax.with_sharding_constraint(p, whole), params)
        return loss_fn(params, model_state, batch, rng)

    return loss_of_gathered_params
