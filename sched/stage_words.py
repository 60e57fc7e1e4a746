"""Groups of stages as a schedule lists them, and as words of its text: `0>3`, `0=1`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from pipeproof.sched.errors import ParameterError, ParseError

MAX_STAGE = 2**31 - 1

_STAGE = "(?:0|[1-9][0-9]{0,9})"

Group = TypeVar("Group", bound=tuple[int, ...])


@dataclass(frozen=True, slots=True)
class StageWords:
    """One sort of groups of stages.

    Attributes:
        what: as the schedule calls them: `skips`.
        sign: stands between the stages of one: `>`.
        many: whether more than two stages may be in one.
        once: why none stands twice.
    """

    what: str
    sign: str
    many: bool
    once: str

    def stages(self, given: Any, where: str) -> tuple[int, ...]:
        """The stages of one group.

        Raises:
            ParameterError: something else than as many numbers of stages.
        """
        group = tuple(given) if isinstance(given, Sequence) else (given,)
        fits = len(group) == 2 or (self.many and len(group) > 2)
        if not fits or any(
            type(stage) is not int or not 0 <= stage <= MAX_STAGE for stage in group
        ):
            kind = "groups of two stages or more" if self.many else "pairs of stages"
            raise ParameterError(
                f"{where}: expected {kind}, as (0, 3), found {given!r:.40}"
            )
        return group

    def each_once(self, groups: list[Group], where: str) -> tuple[Group, ...]:
        """All in order.

        Raises:
            ParameterError: one twice.
        """
        groups = sorted(groups)
        for one, other in pairwise(groups):
            if one == other:
                name = self.named(one)
                raise ParameterError(f"{where} name {name} twice: {self.once}")
        return tuple(groups)

    def named(self, group: tuple[int, ...]) -> str:
        """As the text form writes it."""
        return self.sign.join(map(str, group))

    def format(self, groups: Iterable[tuple[int, ...]]) -> str:
        """As the text form has them."""
        return " ".join(map(self.named, groups))

    def parse(
        self, text: str, where: str, listed: Callable[..., tuple[Group, ...]]
    ) -> tuple[Group, ...]:
        """What `format` wrote, as `listed` keeps them.

        Raises:
            ParseError: saying where, what was expected and found.
        """
        more = "+" if self.many else ""
        word = re.compile(rf"{_STAGE}(?:{self.sign}{_STAGE}){more}", re.ASCII)
        words = text.split()
        for found in words:
            if word.fullmatch(found) is None:
                raise ParseError(
                    f"{where}: expected {self.what} as 0{self.sign}3, found "
                    f"{found[:40]!r}"
                )
        groups = (tuple(map(int, found.split(self.sign))) for found in words)
        try:
            return listed(groups, where)
        except ParameterError as error:
            raise ParseError(str(error)) from None
