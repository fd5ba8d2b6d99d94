"""Small ONNX models with seeded weights, as exporters write them; onnxruntime is the oracle."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper, parser

Arrays = dict[str, np.ndarray]


def parsed(text: str, weights: Arrays | None = None, opset: int = 17) -> onnx.ModelProto:
    """A model from ONNX's text form, with initializers."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    for name, value in (weights or {}).items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def runtime(model: onnx.ModelProto, *inputs: np.ndarray) -> list[Any]:
    """What onnxruntime gives, without its graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, inputs, strict=True)))


def normal(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    """Seeded float32 weights of unit fan-in, by name (`__` stands for a dot)."""
    rng = np.random.default_rng(seed)
    return {
        name.replace("__", "."): (
            rng.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1))
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def residual_network() -> onnx.ModelProto:
    """Convolution, batch normalization, a residual block, pooling, dropout, a classifier."""
    weights = normal(
        0,
        stem__weight=(6, 3, 3, 3),
        block__weight=(6, 6, 3, 3),
        bn1__weight=(6,),
        bn1__bias=(6,),
        bn1__mean=(6,),
        bn2__weight=(6,),
        bn2__bias=(6,),
        bn2__mean=(6,),
        fc__weight=(5, 6),
        fc__bias=(5,),
    )
    rng = np.random.default_rng(1)
    weights |= {f"bn{i}.var": rng.uniform(0.5, 1.5, 6).astype(np.float32) for i in (1, 2)}
    return parsed(
        """resnet (float[n, 3, 9, 9] image) => (float[n, 5] logits) {
            c1 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (image, "stem.weight")
            b1 = BatchNormalization (c1, "bn1.weight", "bn1.bias", "bn1.mean", "bn1.var")
            r1 = Relu (b1)
            p1 = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [1, 1]> (r1)
            c2 = Conv <auto_pad = "SAME_UPPER"> (p1, "block.weight")
            b2 = BatchNormalization (c2, "bn2.weight", "bn2.bias", "bn2.mean", "bn2.var")
            sum = Add (b2, p1)
            r2 = Relu (sum)
            pooled = GlobalAveragePool (r2)
            flat = Flatten (pooled)
            ratio = Constant <value_float = 0.5> ()
            dropped = Dropout (flat, ratio)
            logits = Gemm <transB = 1> (dropped, "fc.weight", "fc.bias")
        }""",
        weights,
    )


def transformer_block() -> onnx.ModelProto:
    """Embedding, attention with a batch and a length from `Shape`, layer normalization, exact GELU.

    The shapes of the heads are computed as torch's exporter computes them.
    """
    weights = normal(
        2,
        embedding=(11, 8),
        qkv__weight=(8, 24),
        out__weight=(8, 8),
        up__weight=(8, 16),
        up__bias=(16,),
        down__weight=(16, 8),
        norm__weight=(8,),
        norm__bias=(8,),
    )
    return parsed(
        """block (int64[n, t] tokens) => (float[n, t, 8] y) {
            x = Gather (embedding, tokens)
            zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            first = Constant <value_ints = [0]> ()
            heads = Constant <value_ints = [2]> ()
            rest = Constant <value_ints = [-1]> ()
            shape = Shape (x)
            n = Gather (shape, zero)
            t = Gather (shape, one)
            n1 = Unsqueeze (n, first)
            t1 = Unsqueeze (t, first)
            split_shape = Concat <axis = 0> (n1, t1, heads, rest)
            whole_shape = Concat <axis = 0> (n1, t1, rest)
            qkv = MatMul (x, "qkv.weight")
            q, k, v = Split <axis = -1, num_outputs = 3> (qkv)
            qs = Reshape (q, split_shape)
            ks = Reshape (k, split_shape)
            vs = Reshape (v, split_shape)
            qh = Transpose <perm = [0, 2, 1, 3]> (qs)
            kh = Transpose <perm = [0, 2, 3, 1]> (ks)
            vh = Transpose <perm = [0, 2, 1, 3]> (vs)
            scores = MatMul (qh, kh)
            size = Constant <value_float = 2.0> ()
            scaled = Div (scores, size)
            square = Concat <axis = 0> (t1, t1)
            ones = ConstantOfShape <value = float[1] {1.0}> (square)
            seen = Trilu <upper = 0> (ones)
            nothing = Constant <value_float = 0.0> ()
            hidden = Equal (seen, nothing)
            low = Constant <value_float = -3.4e38> ()
            masked = Where (hidden, low, scaled)
            weights = Softmax (masked)
            mixed = MatMul (weights, vh)
            back = Transpose <perm = [0, 2, 1, 3]> (mixed)
            joined = Reshape (back, whole_shape)
            projected = MatMul (joined, "out.weight")
            a = Add (x, projected)
            normed = LayerNormalization (a, "norm.weight", "norm.bias")
            up = MatMul (normed, "up.weight")
            up_b = Add (up, "up.bias")
            root = Constant <value_float = 1.4142135> ()
            scaled_up = Div (up_b, root)
            erf = Erf (scaled_up)
            unit = Constant <value_float = 1.0> ()
            erf1 = Add (erf, unit)
            product = Mul (up_b, erf1)
            half = Constant <value_float = 0.5> ()
            gelu = Mul (product, half)
            down = MatMul (gelu, "down.weight")
            y = Add (a, down)
        }""",
        weights,
        opset=18,
    )


def tagger() -> onnx.ModelProto:
    """A two-way LSTM with lengths, a GRU, and a classifier for each step."""
    weights = normal(
        3,
        w=(2, 24, 4),
        r=(2, 24, 6),
        b=(2, 48),
        gru_w=(1, 15, 12),
        gru_r=(1, 15, 5),
        gru_b=(1, 30),
        head=(5, 3),
    )
    return parsed(
        """tagger (float[t, n, 4] x, int32[n] lengths) => (float[t, n, 3] logits, float[2, n, 6] c)
        {
            y, h, c = LSTM <direction = "bidirectional", hidden_size = 6> (x, w, r, b, lengths)
            moved = Transpose <perm = [0, 2, 1, 3]> (y)
            shape = Constant <value_ints = [0, 0, 12]> ()
            both = Reshape (moved, shape)
            g, last = GRU <hidden_size = 5, linear_before_reset = 1> (both, gru_w, gru_r, gru_b)
            axis = Constant <value_ints = [1]> ()
            steps = Squeeze (g, axis)
            logits = MatMul (steps, head)
        }""",
        weights,
    )


def loops() -> onnx.ModelProto:
    """A branch, a loop of a computed length, and one whose steps are collected."""
    return parsed(
        """g (float[n] x, bool up, int64 steps) => (float[n] y, float[n] z, float[m, n] powers) {
            many = Constant <value_int = 40> ()
            yes = Constant <value = bool {1}> ()
            y = If (up) <
                then_branch = a () => (float[n] t) { t = Exp (x) },
                else_branch = b () => (float[n] e) { e = Neg (x) }
            >
            z = Loop (steps, yes, x) <
                body = c (int64 i, bool go, float[n] v) => (bool again, float[n] w) {
                    again = Identity (go)
                    w = Add (v, x)
                }
            >
            last, powers = Loop (many, yes, x) <
                body = d (int64 j, bool on, float[n] p) => (bool more, float[n] q, float[n] kept) {
                    more = Identity (on)
                    half = Constant <value_float = 0.5> ()
                    q = Mul (p, half)
                    kept = Identity (q)
                }
            >
        }"""
    )


def functions() -> onnx.ModelProto:
    """Functions of the file that call one another, with attributes handed on."""
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
        g (float[n, 4] x) => (float[n, 4] y) {
            a = own.scaled <factor = 3.0> (x)
            b = own.scaled (a)
            y = own.both (a, b)
        }
        <opset_import: ["" : 17], domain: "own">
        scaled <factor: float = 0.5> (v) => (w) {
            f = Constant <value_float: float = @factor> ()
            w = Mul (v, f)
        }
        <opset_import: ["" : 17, "own" : 1], domain: "own">
        both (p, q) => (r) {
            s = own.scaled <factor = -1.0> (p)
            t = Sum (s, q)
            r = Celu <alpha = 2.0> (t)
        }"""
    )
    onnx.checker.check_model(model)
    return model
