"""Where the sides of a branch meet again, and what lies between."""

from __future__ import annotations

from .ptx import Program


def successors(program: Program) -> list[list[int]]:
    """Of each block; the number after the last one is the end of a thread."""
    found = []
    for number, block in enumerate(program.blocks):
        branch = block.branch
        if branch is None:
            found.append([number + 1])
        elif branch.guard is None:
            found.append([branch.target])
        else:
            found.append(sorted({branch.target, number + 1}))
    return found


def meetings(program: Program) -> list[int]:
    """Of each block, its immediate post-dominator: the first that every way to the end passes."""
    after = successors(program)
    end = len(after)
    everything = set(range(end + 1))
    passes: list[set[int]] = [set(everything) for _ in range(end)] + [{end}]
    changed = True
    while changed:
        changed = False
        for number in reversed(range(end)):
            new = {number} | set.intersection(*(passes[one] for one in after[number]))
            if new != passes[number]:
                passes[number], changed = new, True
    # Of the strict post-dominators, the nearest passes all of the others.
    return [
        max(passes[number] - {number}, key=lambda one: len(passes[one])) for number in range(end)
    ]


def between(program: Program, number: int, meeting: int) -> set[int]:
    """Blocks on the ways from a block's branch to the one where they meet."""
    after = successors(program)
    found: set[int] = set()
    ahead = [one for one in after[number] if one != meeting]
    while ahead:
        one = ahead.pop()
        if one not in found and one < len(after):
            found.add(one)
            ahead += [following for following in after[one] if following != meeting]
    return found
