"""Changes that no test can notice, each with the reason."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "check",
        "late = np.flatnonzero(before > after)",
        "before > after → before >= after",
    ): "no op depends on itself",
    (
        "check",
        "own = own[own >= 0]",
        "own >= 0 → own > 0",
    ): "it leaves out place 0, and nothing stands before that",
    (
        "check",
        "own = own[own >= 0]",
        "own >= 0 → own >= 1",
    ): "it leaves out place 0, and nothing stands before that",
    (
        "check",
        "last = int(own.max(initial=-1))",
        "-1 → -2",
    ): "any number below all places will do",
    (
        "check",
        "last = max(last, reduced.get((device, op[1:]), -1))",
        "-1 → -2",
    ): "any number below all places will do",
    (
        "check",
        "if last > index:",
        "last > index → last >= index",
    ): "a B, W or REDUCE does not stand where the op does that comes after it",
    (
        "check",
        "waits_for = np.full(len(stuck), -1, dtype=np.int64)",
        "np.full(len(stuck), -1, dtype=np.int64) → "
        "np.full(len(stuck), 1, dtype=np.int64)",
    ): "what is stuck waits for something stuck, so what is read was written",
    (
        "check",
        "waits_for = np.full(len(stuck), -1, dtype=np.int64)",
        "-1 → -2",
    ): "what is stuck waits for something stuck, so what is read was written",
    (
        "deadlock",
        "turns = (first[before] != first[after]) | (first[before] < size)",
        "first[before] < size → first[before] <= size",
    ): "the first node of a group comes behind the transfers of its messages",
    (
        "deadlock",
        "nobody = np.full(2 * len(program.groups), -1)",
        "2 * len(program.groups) → 3 * len(program.groups)",
    ): "rows of nodes that there are not are never looked at",
    (
        "deadlock",
        "nobody = np.full(2 * len(program.groups), -1)",
        "-1 → -2",
    ): "any number below 0 says that it is about none",
    **{
        (
            "deadlock",
            "left = (level[self.before] < 0) & (level[self.after] < 0)",
            change,
        ): "what waits for something stuck is stuck, and so not at level 0"
        for change in (
            "level[self.after] < 0 → level[self.after] <= 0",
            "level[self.after] < 0 → level[self.after] < 1",
        )
    },
    **{
        (
            "prove",
            "Chain(device, tuple(wanted.get(term, (-1, -1)) for term in chain))",
            change,
        ): "a tree with a foreign term is that of a refutation, which shows none"
        for change in ("(-1, -1) → (1, -1)", "(-1, -1) → (-1, 1)", "-1 → -2")
    },
    **{
        ("tied", "NO_STAGE = -(2**31)", f"2 ** 31 → {change}"): "any number that is no "
        "stage's will do"
        for change in ("2 ** 32", "3 ** 31")
    },
}
"""(module, line, change) → why no test can notice."""
