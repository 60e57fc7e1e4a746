"""Hypothesis runs without deadlines: a busy machine must not fail a test."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "pipeproof",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pipeproof")
