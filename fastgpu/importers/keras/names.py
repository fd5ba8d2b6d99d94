"""How Keras spells the names of classes in files."""

import re

# Classes that are exported, and named in configs, by another name than their own.
_OWN_NAMES = {"GroupQueryAttention": "GroupedQueryAttention"}


def snake_case(name: str) -> str:
    """Keras's spelling of a class in a file.

    >>> [snake_case(name) for name in ("PReLU", "ConvLSTM2D", "RMSNormalization")]
    ['p_re_lu', 'conv_lstm2d', 'rms_normalization']
    """
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def group_name(class_name: str) -> str:
    """The name of the group of weights of a layer, by the class that its config names.

    >>> group_name("GroupQueryAttention")
    'grouped_query_attention'
    """
    return snake_case(_OWN_NAMES.get(class_name, class_name))
