"""Who holds which KV page: reference counts, an LRU of cached pages, and free pages kept as contiguous runs.

Host side only, no tensors. Runs matter because a sequence whose pages are consecutive can be read as one view.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

# Free pages left before a new run, so that the sequence to its left can grow in place.
GROWTH_GAP = 8
# Evictions come in batches of up to 1/256 of the pool: neighbouring pages then become free together, as runs.
EVICTION_FRACTION = 256


class OutOfPages(RuntimeError):
    """`allocate` was asked for more pages than are free or evictable."""


class PagePool:
    """Reference-counted page ids `0 .. num_pages - 1`.

    A page is in exactly one state: *in use* (references > 0), *cached* (no reference, but `keep` was called: its
    content may serve a later request; evicted in LRU order when pages run out) or *free*. `on_evict(page_id)` is
    called when a cached page loses its content to an allocation.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self.on_evict: Callable[[int], None] | None = None
        self._references = [0] * num_pages
        self._kept = bytearray(num_pages)
        self._lru: OrderedDict[int, None] = OrderedDict()
        self._num_free = 0
        self._length_at_start: dict[int, int] = {}
        self._start_at_end: dict[int, int] = {}
        self._longest: list[tuple[int, int]] = []  # heap of (-length, start); entries of vanished runs are skipped
        self._free_run(0, num_pages)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now: free ones and cached ones."""
        return self._num_free + len(self._lru)

    @property
    def num_cached(self) -> int:
        """Pages without a reference whose content is kept."""
        return len(self._lru)

    @property
    def num_in_use(self) -> int:
        return self.num_pages - self.num_available

    def num_references(self, page_id: int) -> int:
        return self._references[page_id]

    def num_unreferenced(self, page_ids: Iterable[int]) -> int:
        """How many of these pages `acquire` would take from `num_available`."""
        return sum(not self._references[page_id] for page_id in page_ids)

    def allocate(self, num: int, after: int | None = None) -> list[int]:
        """Returns `num` pages with one reference each, evicting the least recently used cached pages if needed.

        Pages that follow page `after` directly are preferred; otherwise the longest free runs are used. Raises
        OutOfPages, with nothing changed, when fewer than `num` pages are available.
        """
        if num > self.num_available:
            raise OutOfPages(f"{num} pages wanted, {self.num_available} of {self.num_pages} available")
        if num > self._num_free:
            self._evict(num - self._num_free)
        pages: list[int] = []
        if num and after is not None and after + 1 in self._length_at_start:
            pages += self._take(after + 1, 0, num)
        while len(pages) < num:
            start, length = self._longest_run()
            gap = 0 if start == 0 else min(GROWTH_GAP, max(length - (num - len(pages)), 0) // 2)
            pages += self._take(start, gap, num - len(pages))
        for page_id in pages:
            self._references[page_id] = 1
        return pages

    def acquire(self, page_ids: Sequence[int]) -> None:
        """Adds a reference to each page; all of them must be in use or cached."""
        for page_id in page_ids:
            if not self._references[page_id]:
                if page_id not in self._lru:
                    raise ValueError(f"page {page_id} is free: it has no content to share")
                del self._lru[page_id]
            self._references[page_id] += 1

    def release(self, page_ids: Sequence[int]) -> None:
        """Drops a reference to each page of one sequence, given in the sequence's order.

        Its last page becomes the first candidate for eviction, for a prefix is of use without its tail only.
        """
        freed = []
        for page_id in reversed(page_ids):
            if not self._references[page_id]:
                raise ValueError(f"page {page_id} is released but has no reference")
            self._references[page_id] -= 1
            if self._references[page_id]:
                continue
            if self._kept[page_id]:
                self._lru[page_id] = None
            else:
                freed.append(page_id)
        self._free(freed)

    def keep(self, page_id: int) -> None:
        """Marks the content of a page in use as worth keeping once nobody references it."""
        if not self._references[page_id]:
            raise ValueError(f"page {page_id} is not in use")
        self._kept[page_id] = 1

    def forget(self, page_id: int) -> None:
        """Undoes `keep`: a cached page becomes free, a page in use will be free when it is released."""
        self._kept[page_id] = 0
        if page_id in self._lru:
            del self._lru[page_id]
            self._free([page_id])

    def _evict(self, num: int) -> None:
        num = min(len(self._lru), max(num, self.num_pages // EVICTION_FRACTION))
        evicted = [self._lru.popitem(last=False)[0] for _ in range(num)]
        for page_id in evicted:
            self._kept[page_id] = 0
            if self.on_evict is not None:
                self.on_evict(page_id)
        self._free(evicted)

    def _free(self, page_ids: list[int]) -> None:
        page_ids.sort()
        first = 0
        for i in range(1, len(page_ids) + 1):
            if i == len(page_ids) or page_ids[i] != page_ids[i - 1] + 1:
                self._free_run(page_ids[first], i - first)
                first = i

    def _free_run(self, start: int, length: int) -> None:
        """Adds pages start .. start + length - 1 to the free runs, merging with the runs on both sides."""
        self._num_free += length
        if start - 1 in self._start_at_end:
            left = self._start_at_end.pop(start - 1)
            length += self._length_at_start.pop(left)
            start = left
        right = self._length_at_start.pop(start + length, 0)
        if right:
            length += right
        self._add_run(start, length)

    def _add_run(self, start: int, length: int) -> None:
        self._length_at_start[start] = length
        self._start_at_end[start + length - 1] = start
        heapq.heappush(self._longest, (-length, start))
        if len(self._longest) > 64 + 4 * len(self._length_at_start):
            self._longest = [(-n, s) for s, n in self._length_at_start.items()]
            heapq.heapify(self._longest)

    def _longest_run(self) -> tuple[int, int]:
        while True:
            length, start = self._longest[0]
            if self._length_at_start.get(start) == -length:
                return start, -length
            heapq.heappop(self._longest)

    def _take(self, start: int, skip: int, num: int) -> range:
        """Takes up to `num` pages from the free run at `start`, leaving its first `skip` pages free."""
        length = self._length_at_start.pop(start)
        del self._start_at_end[start + length - 1]
        num = min(num, length - skip)
        if skip:
            self._add_run(start, skip)
        if skip + num < length:
            self._add_run(start + skip + num, length - skip - num)
        self._num_free -= num
        return range(start + skip, start + skip + num)
