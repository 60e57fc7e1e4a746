import pytest

from pipeproof.sched import CATALOG, ParameterError, catalog


def test_makes_by_name_and_leaves_out_what_is_none() -> None:
    plain = catalog.make("gpipe", devices=2, micro_batches=3)
    fifo = catalog.make("gpipe", devices=2, micro_batches=3, backward="fifo")

    assert catalog.make("gpipe", devices=2, micro_batches=3, backward=None) == plain
    assert fifo != plain
    assert CATALOG["gpipe"].options == ("backward",)
    assert CATALOG["1f1b"].options == ()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("1f1", {}, "no schedule is called '1f1': did you mean '1f1b'"),
        ("GPipe", {}, "no schedule is called 'GPipe': did you mean 'gpipe'"),
        (
            "xyz",
            {},
            "no schedule is called 'xyz': the catalogue has naive, gpipe, 1f1b",
        ),
        ("1f1b", {"chunks": 2}, "1f1b does not take chunks: it has no options"),
        ("gpipe", {"waves": 2}, "gpipe does not take waves: it has backward"),
        ("gpipe", {"backward": "no"}, "backward must be 'lifo' or 'fifo', got 'no'"),
        ("gpipe", {"devices": 0}, "devices must be at least 1, got 0"),
        (
            "gpipe",
            {"micro_batches": 1.5},
            "micro_batches must be an integer .* got 1.5",
        ),
        ("gpipe", {"devices": True}, "devices must be an integer .* got True"),
    ],
)
def test_says_what_is_wrong(
    name: str, options: dict[str, object], message: str
) -> None:
    sizes = {"devices": 2, "micro_batches": 2, **options}
    with pytest.raises(ParameterError, match=message):
        catalog.make(name, **sizes)  # type: ignore[arg-type]
