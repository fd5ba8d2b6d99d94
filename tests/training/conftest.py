"""Fixtures of the training tests."""

import jax
import pytest


@pytest.fixture
def compilations():
    """Grows by one entry whenever XLA compiles a program."""
    seen = []

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listener)
