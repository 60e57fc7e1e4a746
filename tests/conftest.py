"""Hypothesis without deadlines: a busy machine must not fail a test.

`make test` tries the same examples each time, so that what passes here passes
elsewhere; `make test-all` tries new ones, by `--hypothesis-profile=new-examples`.
"""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "new-examples",
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "pipeproof", settings.get_profile("new-examples"), derandomize=True
)
settings.load_profile("pipeproof")
