"""Every family of `fastgpu.models`: sizes, shapes, dtypes, training behaviour, transforms."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastgpu import models
from fastgpu.errors import ModelError

FAMILIES = models.families()
WITH_BATCH_NORM = ["resnet", "mobilenetv2", "googlenet", "unet"]
WITH_DROPOUT = ["mlp", "convnet", "mobilenetv2", "vgg", "googlenet", "vit", "gpt", "unet"]
DECODERS = ["gpt", "llama"]
IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 1024), jnp.int32)


def example(family: str, seed: int = 0) -> np.ndarray:
    _, struct = models.tiny(family)
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(struct.dtype, jnp.integer):
        return rng.integers(0, 32, struct.shape, np.int32)
    return rng.normal(size=struct.shape).astype(struct.dtype)


@functools.cache
def tiny(family: str, **overrides):
    """A tiny model, random variables (batch statistics included), and an input."""
    model, struct = models.tiny(family, **overrides)
    rng = np.random.default_rng(1)

    def random(path, leaf):
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1]) if path[-1].key == "kernel" else 100
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), struct)
    return model, jax.tree.map_with_path(random, shapes), example(family)


@functools.cache
def inference(model):
    return jax.jit(model.apply)


@functools.cache
def training(model):
    """`(variables, x, seed) -> (output, updated collections, gradient)`: one compilation for all.

    The loss has random weights, so that no parameter's gradient vanishes by symmetry.
    """

    @jax.jit
    def run(variables, x, seed):
        # XLA's own generator: threefry takes a second to compile for each dropout.
        rngs = {"dropout": jax.random.key(seed, impl="rbg")}
        rest = {name: value for name, value in variables.items() if name != "params"}

        def loss(params):
            y, updates = model.apply(
                {"params": params, **rest}, x, train=True, mutable=["batch_stats"], rngs=rngs
            )
            weights = np.random.default_rng(5).normal(size=y.shape)
            return jnp.sum(weights * jax.nn.log_softmax(y)), (y, updates)

        gradient, (y, updates) = jax.grad(loss, has_aux=True)(variables["params"])
        return y, updates, gradient

    return run


def expected_shape(family: str, x: np.ndarray) -> tuple[int, ...]:
    tokens = (*x.shape, 32)
    per_position = {"gpt": tokens, "llama": tokens, "unet": (*x.shape[:-1], 3)}
    return per_position.get(family, (len(x), 4))


# --- published sizes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "x", "count"),
    [
        # torchvision's tables of weights, without the batch statistics
        ("resnet18", IMAGE, 11_689_512),
        ("resnet50", IMAGE, 25_557_032),
        ("mobilenetv2", IMAGE, 3_504_872),
        ("vgg16", IMAGE, 138_357_544),
        ("vgg19", IMAGE, 143_667_240),
        ("googlenet", IMAGE, 6_624_904),
        ("vit-b16", IMAGE, 86_567_656),
        # timm's tables of vit_tiny_patch16_224 and vit_small_patch16_224
        ("vit-ti16", IMAGE, 5_717_416),
        ("vit-s16", IMAGE, 22_050_664),
        # Hugging Face's gpt2, gpt2-medium, gpt2-large, gpt2-xl
        ("gpt2-small", TOKENS, 124_439_808),
        ("gpt2-medium", TOKENS, 354_823_168),
        ("gpt2-large", TOKENS, 774_030_080),
        ("gpt2-xl", TOKENS, 1_557_611_200),
        # Hugging Face's meta-llama/Llama-3.2-1B
        ("llama-1b", TOKENS, 1_235_814_400),
    ],
)
def test_parameter_count_is_the_published_one(name, x, count):
    variables = jax.eval_shape(models.create(name).init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


def test_parameter_count_does_not_depend_on_scanning_the_layers():
    model = models.create("llama-1b", scan_layers=True)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 1_235_814_400
    assert all(leaf.shape[0] == 16 for leaf in jax.tree.leaves(params["blocks"]))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenetv2", "vgg16", "googlenet", "vit-b16"]
)
def test_image_classifiers_have_a_thousand_classes(name):
    y, _ = jax.eval_shape(models.create(name).init_with_output, jax.random.key(0), IMAGE)
    assert (y.shape, y.dtype) == ((1, 1000), jnp.float32)


def test_resnet_halves_the_image_five_times():
    model = models.create("resnet50")
    _, state = jax.eval_shape(
        lambda key, x: model.init_with_output(key, x, capture_intermediates=True),
        jax.random.key(0),
        IMAGE,
    )
    stages = {
        name: state["intermediates"][name]["__call__"][0].shape
        for name in state["intermediates"]
        if name.startswith("stage")
    }
    assert stages["stage1_block3"] == (1, 56, 56, 256)
    assert stages["stage2_block4"] == (1, 28, 28, 512)
    assert stages["stage3_block6"] == (1, 14, 14, 1024)
    assert stages["stage4_block3"] == (1, 7, 7, 2048)


def test_resnet_50_strides_in_the_3x3_convolution():
    """What v1.5 changed: the first 1×1 of a shrinking bottleneck still sees the whole image."""
    model = models.create("resnet50")
    _, state = jax.eval_shape(
        lambda key, x: model.init_with_output(key, x, capture_intermediates=True),
        jax.random.key(0),
        IMAGE,
    )
    block = state["intermediates"]["stage2_block1"]
    assert block["conv1"]["__call__"][0].shape == (1, 56, 56, 128)
    assert block["conv2"]["__call__"][0].shape == (1, 28, 28, 128)


@pytest.mark.parametrize(
    ("size", "expected"), [(224, (28, 14, 7)), (33, (4, 2, 1)), (15, (2, 1, 1))]
)
def test_googlenet_pools_like_torchvision(size, expected):
    """Rounding up, but with no window that starts beyond the image: 8 x 8 after 17 x 17."""
    model = models.create("googlenet")
    _, state = jax.eval_shape(
        lambda key, x: model.init_with_output(key, x, capture_intermediates=True),
        jax.random.key(0),
        jnp.ones((1, size, size, 3)),
    )
    blocks = ["stage1_block2", "stage2_block5", "stage3_block2"]
    shapes = [state["intermediates"][block]["__call__"][0].shape for block in blocks]
    assert shapes == [(1, n, n, c) for n, c in zip(expected, (480, 832, 1024), strict=True)]


def test_mobilenet_multiplier_rounds_channels_to_eight():
    config = models.MobileNetV2Config(multiplier=0.35)
    # 0.35 * 24 = 8.4 -> 8; 0.35 * 32 = 11.2 -> 8 would lose more than 10 %, so 16
    assert [config.scaled(c) for c in (24, 32, 96, 320)] == [8, 16, 32, 112]


# --- every family ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_output_shape_and_dtype(family):
    model, variables, x = tiny(family)
    y = inference(model)(variables, x)
    assert (y.shape, y.dtype) == (expected_shape(family, x), jnp.float32)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_computes_near_float32_with_float32_parameters(family):
    model, variables, x = tiny(family)
    half, _, _ = tiny(family, dtype=jnp.bfloat16)
    assert all(
        leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0), x))
    )
    exact, rounded = inference(model)(variables, x), inference(half)(variables, x)
    assert rounded.dtype == jnp.float32 and not np.array_equal(exact, rounded)
    # A bfloat16 has 8 bits: 0.4 % a rounding, and a few tens of roundings follow each other.
    np.testing.assert_allclose(rounded, exact, atol=0.05 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_reaches_every_convolution_and_dot(family):
    half, variables, x = tiny(family, dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(half.apply)(variables, x))
    results = re.findall(r":(\w+)\[([\d,]*)\] = (?:conv_general_dilated|dot_general)\[", jaxpr)
    assert results
    # Attention scores, alone of rank 5, are accumulated in float32 for the softmax.
    assert {dtype for dtype, shape in results if shape.count(",") < 4} == {"bf16"}


@pytest.mark.parametrize("family", FAMILIES)
def test_inference_is_the_default_and_updates_nothing(family):
    model, variables, x = tiny(family)
    default = jax.make_jaxpr(model.apply)(variables, x)
    assert str(default) == str(
        jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, x)
    )
    assert "random_bits" not in str(default)
    _, updates = jax.eval_shape(
        functools.partial(model.apply, mutable=["batch_stats"]), variables, x
    )
    assert set(updates) <= {"batch_stats"}


@pytest.mark.parametrize("family", WITH_DROPOUT)
def test_dropout_follows_its_rng(family):
    model, variables, x = tiny(family)
    first, again, other = (training(model)(variables, x, seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("family", WITH_BATCH_NORM)
def test_training_moves_the_batch_statistics(family):
    model, variables, x = tiny(family)
    _, updates, _ = training(model)(variables, x, 0)
    before, after = variables["batch_stats"], updates["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, after)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(WITH_BATCH_NORM)))
def test_families_without_batch_norm_have_only_parameters(family):
    _, variables, _ = tiny(family)
    assert set(variables) == {"params"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_finite_gradient(family):
    model, variables, x = tiny(family)
    _, _, gradient = training(model)(variables, x, 0)
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf != 0), path


@pytest.mark.parametrize("family", FAMILIES)
def test_vmap_gives_the_numbers_of_a_loop(family):
    model, variables, _ = tiny(family)
    x = np.stack([example(family, seed) for seed in (2, 3)])
    looped = np.stack([inference(model)(variables, each) for each in x])
    mapped = jax.jit(jax.vmap(model.apply, in_axes=(None, 0)))(variables, x)
    # float32, sums of at most a few hundred terms in another order
    np.testing.assert_allclose(mapped, looped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_does_not_depend_on_its_neighbours_in_inference(family):
    model, variables, x = tiny(family)
    other = np.concatenate([x[:1], example(family, seed=4)[1:]])
    before, after = (inference(model)(variables, each) for each in (x, other))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(after[1], before[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_are_frozen_and_hashable(family):
    model, _ = models.tiny(family)
    assert hash(model) == hash(models.tiny(family)[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.num_classes = 3


# --- what one family promises ---------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_mlp_is_its_formula(activation):
    model, variables, x = tiny("mlp", activation=activation)
    params, y = variables["params"], x
    for layer in ("dense1", "dense2"):
        y = getattr(jax.nn, activation)(y @ params[layer]["kernel"] + params[layer]["bias"])
    y = y @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(inference(model)(variables, x), y, rtol=1e-5, atol=1e-5)


def test_mlp_refuses_an_activation_it_does_not_have():
    with pytest.raises(ModelError, match="expected: one of relu, gelu, silu, tanh\n  got: 'swish'"):
        models.MLPConfig(activation="swish")


@pytest.mark.slow
def test_vgg16_computes_what_keras_does():
    import keras

    oracle = keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), classes=4)
    oracle.layers[-1].activation = None
    model = models.create("vgg16", num_classes=4)
    layers = [layer.get_weights() for layer in oracle.layers if layer.weights]
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 32, 32, 3)))["params"]
    # flax made them in the order of the network: five stages, two dense layers, the head
    names = sorted(shapes, key=lambda name: ("stage dense head".index(name[:4]), name))
    params = {
        name: {"kernel": kernel, "bias": bias}
        for name, (kernel, bias) in zip(names, layers, strict=True)
    }
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = np.asarray(oracle(x))
    atol = 1e-5 * np.abs(expected).max()  # float32, sums in another order
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, atol=atol)


@pytest.mark.parametrize("family", ["vgg", "googlenet"])
def test_an_image_too_small_to_pool_is_refused(family):
    model, variables, _ = tiny(family)
    smallest = model.config.smallest
    with pytest.raises(ModelError, match=f"expected: .*, H and W at least {smallest}\n") as e:
        model.apply(variables, np.ones((1, 32, smallest - 1, 3), np.float32))
    assert f"got: [1, 32, {smallest - 1}, 3]" in str(e.value)


def test_vgg_refuses_stages_without_channels():
    with pytest.raises(ModelError, match="stage_sizes and channels of the same length"):
        models.VGGConfig(stage_sizes=(1, 1))


def test_every_googlenet_kernel_is_1x1_or_3x3_after_the_stem():
    """Torchvision's "5×5" branch is a 3×3 one: the published count belongs to that."""
    shapes = jax.eval_shape(models.create("googlenet").init, jax.random.key(0), IMAGE)["params"]
    sizes = {
        branch: {
            shapes[block][branch]["conv"]["kernel"].shape[:2] for block in shapes if "_" in block
        }
        for branch in shapes["stage1_block1"]
    }
    reduces = {"one", "three_reduce", "five_reduce", "pool"}
    assert sizes == {b: {(1, 1)} for b in reduces} | {b: {(3, 3)} for b in ("three", "five")}


@pytest.mark.parametrize("position", [1, 7, 15])
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_does_not_see_the_future(family, position):
    model, variables, x = tiny(family)
    changed = x.copy()
    changed[:, position] = (x[:, position] + 1) % 32
    before, after = (np.asarray(inference(model)(variables, each)) for each in (x, changed))
    np.testing.assert_array_equal(after[:, :position], before[:, :position])
    assert np.all(np.any(after[:, position:] != before[:, position:], axis=-1))


@pytest.mark.parametrize("family", DECODERS)
def test_logits_come_from_the_token_embedding(family):
    """Tied: the same table reads tokens in and scores them at the end."""
    model, variables, x = tiny(family)
    table = variables["params"]["token"]["embedding"]
    unused = next(token for token in range(32) if token not in x)
    changed = table.copy()
    changed[unused] *= 2
    params = variables["params"] | {"token": {"embedding": changed}}
    before, after = (inference(model)({"params": p}, x) for p in (variables["params"], params))
    np.testing.assert_allclose(after[..., unused], 2 * before[..., unused], rtol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_reads_a_shorter_sequence_with_the_same_parameters(family):
    model, variables, x = tiny(family)
    y = inference(model)
    np.testing.assert_allclose(y(variables, x[:, :5]), y(variables, x)[:, :5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "x",
    [np.zeros((1, 17), np.int32), np.zeros((1, 16), np.float32), np.zeros((16,), np.int32)],
    ids=["too long", "not whole numbers", "no batch"],
)
@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_refuses_what_is_no_token_sequence(family, x):
    model, variables, _ = tiny(family)
    with pytest.raises(ModelError, match=r"whole numbers \[N, T\], T up to the context of 16") as e:
        model.apply(variables, x)
    assert f"got: {x.dtype} {list(x.shape)}" in str(e.value)


def llama_in_numpy(params, tokens, config) -> np.ndarray:
    """One sequence, head and position at a time, in float64; positions are complex turns."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    heads, kv_heads, width = config.heads, config.kv_heads, config.head_width

    def norm(x, name, of=params):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * of[name]["scale"]

    def turned(x, position):
        pairs = x[: width // 2] + 1j * x[width // 2 :]
        pairs = pairs * np.exp(1j * position / config.theta ** (np.arange(width // 2) * 2 / width))
        return np.concatenate([pairs.real, pairs.imag])

    x = params["token"]["embedding"][tokens]  # [T, C]
    for i in range(config.depth):
        block = params[f"block{i + 1}"]
        qkv = norm(x, "attention_norm", block) @ block["attention"]["qkv"]["kernel"]
        qkv = qkv.reshape(len(tokens), heads + 2 * kv_heads, width)
        attended = np.zeros((len(tokens), heads, width))
        for head in range(heads):
            shared = heads + head // (heads // kv_heads)
            keys = np.stack([turned(key, s) for s, key in enumerate(qkv[:, shared])])
            for t in range(len(tokens)):
                scores = keys[: t + 1] @ turned(qkv[t, head], t) / np.sqrt(width)
                weights = np.exp(scores) / np.exp(scores).sum()
                attended[t, head] = weights @ qkv[: t + 1, shared + kv_heads]
        x = x + attended.reshape(x.shape) @ block["attention"]["output"]["kernel"]
        y = norm(x, "mlp_norm", block)
        gate = y @ block["mlp_gate"]["kernel"]
        gated = gate / (1 + np.exp(-gate)) * (y @ block["mlp_in"]["kernel"])
        x = x + gated @ block["mlp_out"]["kernel"]
    return norm(x, "norm") @ params["token"]["embedding"].T


@pytest.mark.parametrize(
    "settings", [{}, {"theta": 10.0}, {"kv_heads": 1}, {"kv_heads": 4}], ids=str
)
def test_llama_is_its_formula(settings):
    model, variables, x = tiny("llama", **settings)
    expected = [llama_in_numpy(variables["params"], tokens, model.config) for tokens in x]
    # float32: sums of tens of terms, a few tens of them in a row
    np.testing.assert_allclose(inference(model)(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_llama_with_scanned_layers_is_the_same_function_of_stacked_parameters():
    model, variables, x = tiny("llama")
    scanned, shapes, _ = tiny("llama", scan_layers=True)
    params = dict(variables["params"])
    blocks = [params.pop(f"block{i + 1}") for i in range(model.config.depth)]
    stacked = {"params": params | {"blocks": jax.tree.map(lambda *b: np.stack(b), *blocks)}}
    assert jax.tree.map(np.shape, stacked) == jax.tree.map(np.shape, shapes)

    expected, _, gradients = training(model)(variables, x, 0)
    y, _, gradient = training(scanned)(stacked, x, 0)
    # float32: the same operations, which the compiler may fuse in another way
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for i in range(model.config.depth):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], gradient["blocks"])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            layer,
            gradients[f"block{i + 1}"],
        )


def test_scanned_layers_start_different():
    model, x = models.tiny("llama", scan_layers=True)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros(x.shape, x.dtype))["params"]
    first, second = params["blocks"]["mlp_in"]["kernel"]
    assert not np.any(first == second)


def test_llama_refuses_heads_that_do_not_fit():
    with pytest.raises(ModelError, match="heads=32 cannot share kv_heads=12") as e:
        models.LlamaConfig(kv_heads=12)
    assert "got: 32 = 2 * 12 + 8" in str(e.value)
    with pytest.raises(ModelError, match="a head has an odd number") as e:
        models.LlamaConfig(width=96)
    assert "to do: take width=128" in str(e.value)


def test_unet_skips_carry_detail_to_the_output():
    """With the way through the bottom cut, the output still depends on single pixels."""
    model, variables, x = tiny("unet")
    params = variables["params"]
    cut = {
        **variables,
        "params": params | {"up1_conv": jax.tree.map(np.zeros_like, params["up1_conv"])},
    }
    changed = x.copy()
    changed[0, 3, 5] += 10
    before, after = (inference(model)(cut, each) for each in (x, changed))
    difference = np.abs(after - before).sum(-1)
    assert difference[0, 3, 5] > 0
    # four 3×3 convolutions at full resolution see four pixels each way
    rows, columns = np.nonzero(difference[0])
    assert rows.max() <= 3 + 4 and columns.max() <= 5 + 4 and np.all(difference[1] == 0)


@pytest.mark.parametrize(("height", "width"), [(8, 24), (4, 4)])
def test_unet_takes_any_multiple(height, width):
    model, variables, _ = tiny("unet")
    y = jax.eval_shape(model.apply, variables, np.ones((1, height, width, 1), np.float32))
    assert y.shape == (1, height, width, 3)


def test_unet_refuses_a_size_whose_skips_would_not_meet():
    model, variables, _ = tiny("unet")
    with pytest.raises(ModelError) as e:
        model.apply(variables, np.ones((1, 16, 18, 1), np.float32))
    assert str(e.value) == (
        "this image cannot be halved 2 times by the U-Net\n"
        "  expected: [N, H, W, C], H and W multiples of 4\n"
        "  got: [1, 16, 18, 1]\n"
        "  to do: pad the images to 16 by 20, or use fewer scales"
    )


def test_vit_refuses_an_image_of_another_size():
    model, variables, _ = tiny("vit")
    with pytest.raises(ModelError, match=r"expected: \[N, 16, 16, C\]\n  got: \[1, 32, 16, 3\]"):
        model.apply(variables, np.ones((1, 32, 16, 3), np.float32))


@pytest.mark.parametrize("config", [models.ViTConfig, models.GPTConfig, models.LlamaConfig])
def test_heads_must_share_the_width(config):
    with pytest.raises(ModelError, match="width=100 cannot be shared by heads=12") as e:
        config(width=100, heads=12)
    assert "to do: take width=96" in str(e.value)


# --- the registry ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.names())
def test_every_name_gives_a_module_of_its_dtype(name):
    assert models.create(name, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_overrides_replace_fields_of_the_preset():
    model = models.create("resnet50", num_classes=10)
    assert model.config == models.ResNetConfig.resnet50(num_classes=10)


def test_an_unknown_name_lists_the_known_ones_nearest_first():
    with pytest.raises(ModelError) as e:
        models.create("gpt2_small")
    expected = e.value.expected
    assert expected is not None and expected.startswith("one of gpt2-small, ")
    assert all(name in expected for name in models.names())
    with pytest.raises(ModelError, match="to do: take 'resnet'"):
        models.tiny("resnet50")


def test_an_unknown_setting_lists_the_known_ones_nearest_first():
    with pytest.raises(ModelError, match="expected: one of num_classes, ") as e:
        models.create("resnet50", classes=10)
    assert "'resnet50' has no setting 'classes'" in str(e.value)
