"""Which blocks a token attends to: the rule that references and kernels share."""

from typing import NamedTuple


class Selection(NamedTuple):
    """Of `num_blocks` blocks the `first` and the last `local` (the token's own included) are forced, the best scored.

    A token at a position below `dense_below` attends to all of its blocks. A block is `pages` pages.
    """

    num_blocks: int
    first: int
    local: int
    dense_below: int
    pages: int = 1

    @property
    def num_scored(self) -> int:
        return self.num_blocks - self.first - self.local


class Entries(NamedTuple):
    """The compressed entries that score blocks: `per_block` of each page.

    A query at position t sees entries begin .. (t + 1 - tail) // (page_size / per_block) - 1 of its sequence, and a
    block's score is the weighted sum of its entries' probabilities and of the next block's first.
    """

    per_block: int
    begin: int
    tail: int

    @property
    def weights(self) -> tuple[int, ...]:
        """Of a block's entries, and of the next block's first: how many strides each shares with the block."""
        return (1, 0) if self.per_block == 1 else (1, *[2] * (self.per_block - 1), 1)


def page_entries(rule: Selection, page_size: int) -> Entries:
    """One entry a page: the candidates alone, which are complete."""
    return Entries(1, rule.first, page_size * (rule.local - 1) + 1)


def nsa_entries() -> Entries:
    """Blocks of half a page, every quarter: entry e, with the page of its last token, begins at (e - 1) strides."""
    return Entries(4, 1, 0)
