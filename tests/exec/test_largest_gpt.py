"""The largest GPT, as the experiment counts it: predicted, and executed on meta."""

from __future__ import annotations

import pytest
from largest_gpt import Size, Way, executed, largest, parameters, predicted

SMALL = Size(width=32, heads=2, tokens=16, vocabulary=64, rows=16)


@pytest.mark.parametrize("policy", ["never", "always"])
@pytest.mark.parametrize(("devices", "name"), [(1, "gpipe"), (4, "gpipe"), (4, "1f1b")])
def test_the_executor_counts_what_is_predicted_and_temporaries(
    devices: int, name: str, policy: str
) -> None:
    way, blocks = Way(devices, name, 8, policy), 6
    cuts = predicted(SMALL, way, blocks, 1e9)
    assert cuts is not None

    found = executed(SMALL, way, blocks, cuts.sizes)

    for counted, foretold in zip(found, cuts.bytes, strict=True):
        assert foretold < 1.02 * counted
        assert counted < 1.5 * foretold


def test_parameters_are_those_of_the_model() -> None:
    layers = SMALL.layers(3)

    found = sum(p.numel() for layer in layers for p in layer.parameters())
    assert parameters(SMALL, 3) == found


def test_more_fit_with_recomputation_and_on_more_devices() -> None:
    without, again, more = (
        largest(SMALL, Way(devices, "gpipe", 8, policy), 2e6)
        for devices, policy in ((1, "never"), (1, "always"), (4, "always"))
    )

    assert without is not None
    assert again is not None
    assert more is not None
    assert without[0] < again[0] < more[0]
    assert predicted(SMALL, Way(1, "gpipe", 8, "never"), without[0] + 1, 2e6) is None
