"""How Keras spells the names of classes in files."""

import re


def snake_case(name: str) -> str:
    """Keras's spelling of a class in a file.

    >>> [snake_case(name) for name in ("PReLU", "ConvLSTM2D", "RMSNormalization")]
    ['p_re_lu', 'conv_lstm2d', 'rms_normalization']
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
