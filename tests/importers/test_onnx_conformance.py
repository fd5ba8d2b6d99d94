"""The operator tests that ship in the onnx package: a few of each kind; all of them if slow."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest

# Modules of onnx.backend.test.case.node that are quick to import, and the cases that run here.
CHOSEN = {
    "clip": ["clip_outbounds", "clip_min_greater_than_max"],
    "col2im": ["col2im_pads"],
    "convtranspose": ["convtranspose_group_2", "convtranspose_output_shape"],
    "cumsum": ["cumsum_1d_reverse_exclusive"],
    "deformconv": ["deform_conv_with_mask_bias"],
    "dequantizelinear": ["dequantizelinear_blocked"],
    "dft": ["dft_inverse"],
    "einsum": ["einsum_batch_diagonal"],
    "gathernd": ["gathernd_example_int32_batch_dim1"],
    "gridsample": ["gridsample_bicubic", "gridsample_reflection_padding"],
    "groupnormalization": ["group_normalization_epsilon"],
    "gru": ["gru_seq_length", "gru_batchwise"],
    "loop": ["loop11"],
    "lrn": ["lrn"],
    "lstm": ["lstm_with_peepholes"],
    "maxunpool": ["maxunpool_export_with_output_shape"],
    "mod": ["mod_mixed_sign_int32", "mod_mixed_sign_float32"],
    "onehot": ["onehot_negative_indices"],
    "pad": ["constant_pad_negative_axes", "reflect_pad"],
    "qlinearconv": ["qlinearconv"],
    "quantizelinear": ["quantizelinear_axis"],
    "reduce_log_sum_exp": ["reduce_log_sum_exp_negative_axes_keepdims_random"],
    "resize": [
        "resize_downsample_scales_cubic_antialias",
        "resize_tf_crop_and_resize",
        "resize_upsample_sizes_nearest_not_larger",
        "resize_upsample_scales_linear_align_corners",
    ],
    "reversesequence": ["reversesequence_batch"],
    "roialign": ["roialign_aligned_true"],
    "rotaryembedding": ["rotary_embedding_interleaved"],
    "scan": ["scan9_sum", "scan_sum"],
    "scatternd": ["scatternd_multiply"],
    "slice": ["slice_negative_axes", "slice_neg_steps"],
    "split": ["split_variable_parts_2d_opset13"],
    "stft": ["stft_with_window"],
    "topk": ["top_k_smallest"],
    "trilu": ["tril_neg"],
    "unique": ["unique_sorted_with_axis_3d"],
}
LEAST_SHARE = 0.9


@pytest.fixture(scope="module")
def conformance() -> Any:
    """The benchmark's script as a module."""
    path = Path(__file__).parents[2] / "benchmarks" / "onnx_conformance.py"
    spec = importlib.util.spec_from_file_location("onnx_conformance", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::RuntimeWarning:onnx")
@pytest.mark.parametrize("module", CHOSEN)
def test_chosen_cases_pass(conformance: Any, module: str) -> None:
    node = importlib.import_module("onnx.backend.test.case.node")
    importlib.import_module(f"onnx.backend.test.case.node.{module}")
    names = {f"test_{name}" for name in CHOSEN[module]}
    cases = {case.name: case for case in node._NodeTestCases if case.name in names}
    assert set(cases) == names
    outcomes = [conformance.check(case) for case in cases.values()]
    assert [outcome for outcome in outcomes if outcome.status != "passed"] == []


@pytest.mark.slow
def test_of_all_cases_nine_in_ten_pass_and_none_fails(conformance: Any) -> None:
    kinds = ("node", "simple", "pytorch-converted", "pytorch-operator")
    outcomes = [conformance.check(case) for kind in kinds for case in conformance.cases(kind)]
    found = conformance.summary(outcomes)
    assert found["failed"] == {}
    assert found["float"]["share_passed"] >= LEAST_SHARE
