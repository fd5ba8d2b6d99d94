"""The table of Keras layers: every class that fastgpu has an equal of, and its rule.

The others are in `REFUSED`, each with the reason.
"""

from fastgpu.importers.keras.layers.applications import CustomScaleLayer, LayerScale
from fastgpu.importers.keras.layers.attention import (
    AdditiveAttention,
    Attention,
    GroupedQueryAttention,
    MultiHeadAttention,
)
from fastgpu.importers.keras.layers.augmentation import (
    INFERENCE_ONLY,
    RandomBrightness,
    RandomCrop,
    RandomFlip,
)
from fastgpu.importers.keras.layers.cells import (
    GRUCell,
    LSTMCell,
    SimpleRNNCell,
    StackedRNNCells,
)
from fastgpu.importers.keras.layers.conv_lstm import ConvLSTM
from fastgpu.importers.keras.layers.convolution import (
    Conv,
    ConvTranspose,
    DepthwiseConv,
    SeparableConv,
)
from fastgpu.importers.keras.layers.core import (
    ELU,
    ActivationLayer,
    Dense,
    Embedding,
    Identity,
    LeakyReLU,
    Masking,
    PReLU,
    ReLU,
    Rescaling,
    ReversibleEmbedding,
    Softmax,
    ThresholdedReLU,
)
from fastgpu.importers.keras.layers.einsum_dense import EinsumDense
from fastgpu.importers.keras.layers.layer import Layer, LayerState
from fastgpu.importers.keras.layers.locally_connected import LocallyConnected
from fastgpu.importers.keras.layers.merging import (
    Add,
    Average,
    Concatenate,
    Dot,
    Maximum,
    Minimum,
    Multiply,
    Subtract,
)
from fastgpu.importers.keras.layers.normalization import (
    BatchNormalization,
    LayerNormalization,
    Normalization,
)
from fastgpu.importers.keras.layers.normalization_by_example import (
    GroupNormalization,
    RMSNormalization,
    UnitNormalization,
)
from fastgpu.importers.keras.layers.operations import OPERATIONS
from fastgpu.importers.keras.layers.pooling import (
    AdaptiveAveragePooling,
    AdaptiveMaxPooling,
    AveragePooling,
    GlobalAveragePooling,
    GlobalMaxPooling,
    MaxPooling,
)
from fastgpu.importers.keras.layers.preprocessing import (
    AutoContrast,
    CategoryEncoding,
    CenterCrop,
    Discretization,
    IntegerLookup,
    Resizing,
)
from fastgpu.importers.keras.layers.recurrent import (
    GRU,
    LSTM,
    RNN,
    Bidirectional,
    CuDNNGRU,
    CuDNNLSTM,
    SimpleRNN,
)
from fastgpu.importers.keras.layers.regularization import (
    ActivityRegularization,
    AlphaDropout,
    Dropout,
    GaussianDropout,
    GaussianNoise,
    SpatialDropout,
)
from fastgpu.importers.keras.layers.reshaping import (
    Cropping,
    Flatten,
    Permute,
    RepeatVector,
    Reshape,
    UpSampling,
    ZeroPadding,
)
from fastgpu.importers.keras.layers.spectrogram import MelSpectrogram, STFTSpectrogram
from fastgpu.importers.keras.layers.wrappers import (
    Pipeline,
    SpectralNormalization,
    TimeDistributed,
    Wrapper,
)

TABLE: dict[str, type[Layer]] = {
    # core
    "Dense": Dense,
    "EinsumDense": EinsumDense,
    "Embedding": Embedding,
    "Identity": Identity,
    "Masking": Masking,
    "ReversibleEmbedding": ReversibleEmbedding,
    "Wrapper": Wrapper,
    # convolution
    "Conv1D": Conv,
    "Conv2D": Conv,
    "Conv3D": Conv,
    "Conv1DTranspose": ConvTranspose,
    "Conv2DTranspose": ConvTranspose,
    "Conv3DTranspose": ConvTranspose,
    "DepthwiseConv1D": DepthwiseConv,
    "DepthwiseConv2D": DepthwiseConv,
    "LocallyConnected1D": LocallyConnected,
    "LocallyConnected2D": LocallyConnected,
    "SeparableConv1D": SeparableConv,
    "SeparableConv2D": SeparableConv,
    # normalization
    "BatchNormalization": BatchNormalization,
    "GroupNormalization": GroupNormalization,
    "LayerNormalization": LayerNormalization,
    "Normalization": Normalization,
    "RMSNormalization": RMSNormalization,
    "SpectralNormalization": SpectralNormalization,
    "UnitNormalization": UnitNormalization,
    "Rescaling": Rescaling,
    # activation
    "Activation": ActivationLayer,
    "ELU": ELU,
    "LeakyReLU": LeakyReLU,
    "PReLU": PReLU,
    "ReLU": ReLU,
    "Softmax": Softmax,
    "ThresholdedReLU": ThresholdedReLU,
    # merging
    "Add": Add,
    "Average": Average,
    "Concatenate": Concatenate,
    "Dot": Dot,
    "Maximum": Maximum,
    "Minimum": Minimum,
    "Multiply": Multiply,
    "Subtract": Subtract,
    # pooling
    "AdaptiveAveragePooling1D": AdaptiveAveragePooling,
    "AdaptiveAveragePooling2D": AdaptiveAveragePooling,
    "AdaptiveAveragePooling3D": AdaptiveAveragePooling,
    "AdaptiveMaxPooling1D": AdaptiveMaxPooling,
    "AdaptiveMaxPooling2D": AdaptiveMaxPooling,
    "AdaptiveMaxPooling3D": AdaptiveMaxPooling,
    "AveragePooling1D": AveragePooling,
    "AveragePooling2D": AveragePooling,
    "AveragePooling3D": AveragePooling,
    "GlobalAveragePooling1D": GlobalAveragePooling,
    "GlobalAveragePooling2D": GlobalAveragePooling,
    "GlobalAveragePooling3D": GlobalAveragePooling,
    "GlobalMaxPooling1D": GlobalMaxPooling,
    "GlobalMaxPooling2D": GlobalMaxPooling,
    "GlobalMaxPooling3D": GlobalMaxPooling,
    "MaxPooling1D": MaxPooling,
    "MaxPooling2D": MaxPooling,
    "MaxPooling3D": MaxPooling,
    # reshaping
    "Cropping1D": Cropping,
    "Cropping2D": Cropping,
    "Cropping3D": Cropping,
    "Flatten": Flatten,
    "Permute": Permute,
    "RepeatVector": RepeatVector,
    "Reshape": Reshape,
    "UpSampling1D": UpSampling,
    "UpSampling2D": UpSampling,
    "UpSampling3D": UpSampling,
    "ZeroPadding1D": ZeroPadding,
    "ZeroPadding2D": ZeroPadding,
    "ZeroPadding3D": ZeroPadding,
    # regularization
    "ActivityRegularization": ActivityRegularization,
    "AlphaDropout": AlphaDropout,
    "Dropout": Dropout,
    "GaussianDropout": GaussianDropout,
    "GaussianNoise": GaussianNoise,
    "SpatialDropout1D": SpatialDropout,
    "SpatialDropout2D": SpatialDropout,
    "SpatialDropout3D": SpatialDropout,
    # attention
    "AdditiveAttention": AdditiveAttention,
    "Attention": Attention,
    "GroupQueryAttention": GroupedQueryAttention,
    "GroupedQueryAttention": GroupedQueryAttention,
    "MultiHeadAttention": MultiHeadAttention,
    # recurrent
    "Bidirectional": Bidirectional,
    "ConvLSTM1D": ConvLSTM,
    "ConvLSTM2D": ConvLSTM,
    "ConvLSTM3D": ConvLSTM,
    "CuDNNGRU": CuDNNGRU,
    "CuDNNLSTM": CuDNNLSTM,
    "GRU": GRU,
    "GRUCell": GRUCell,
    "LSTM": LSTM,
    "LSTMCell": LSTMCell,
    "RNN": RNN,
    "SimpleRNN": SimpleRNN,
    "SimpleRNNCell": SimpleRNNCell,
    "StackedRNNCells": StackedRNNCells,
    "TimeDistributed": TimeDistributed,
    # preprocessing
    "AutoContrast": AutoContrast,
    "CategoryEncoding": CategoryEncoding,
    "CenterCrop": CenterCrop,
    "Discretization": Discretization,
    "IntegerLookup": IntegerLookup,
    "MelSpectrogram": MelSpectrogram,
    "Pipeline": Pipeline,
    "Resizing": Resizing,
    "STFTSpectrogram": STFTSpectrogram,
    # augmentation
    "RandomBrightness": RandomBrightness,
    "RandomCrop": RandomCrop,
    "RandomFlip": RandomFlip,
    **INFERENCE_ONLY,
    # private to keras.applications
    "CustomScaleLayer": CustomScaleLayer,
    "LayerScale": LayerScale,
}

REFUSED: dict[str, str] = {
    "ContrastLimitedAdaptiveHistogramEqualization": "its histograms have no equal here",
    "DenseFeatures": "feature columns are TensorFlow code",
    "FlaxLayer": "its code is not in the file",
    "HashedCrossing": "hashes strings",
    "Hashing": "hashes strings, also those of numbers",
    "JaxLayer": "its code is not in the file",
    "Lambda": "holds Python bytecode, which is never run",
    "Layer": "the base class computes nothing",
    "MaxNumBoundingBoxes": "works on bounding boxes, not on arrays",
    "StringLookup": "strings are no arrays: look them up before the model",
    "TFSMLayer": "runs a TensorFlow program",
    "TensorFlowOpLayer": "a TensorFlow node recorded before Keras 2.4: save it anew",
    "TextVectorization": "strings are no arrays: vectorize them before the model",
    "TorchModuleWrapper": "its code is not in the file",
}

__all__ = ["OPERATIONS", "REFUSED", "TABLE", "Layer", "LayerState"]
