"""Where every request stands: waiting or running, its slot, its pages, what the prefix cache knows of it.

Holds the state transitions (enqueue, admit, grow, preempt, finish) and no policy: who is admitted, preempted or given
tokens is decided in prefill.py and decode.py.
"""

import heapq
from bisect import bisect_left, insort

from gossamer.config import CacheConfig
from gossamer.core import AdmittedSequence, EngineStats, Request, RequestStatus
from gossamer.kv_cache.pages import PagePool
from gossamer.kv_cache.prefix import PrefixCache, page_digest, root_digest

# The watermark is one page for each running sequence, but at most this fraction of the pool.
WATERMARK_FRACTION = 32


def arrival(request: Request) -> tuple[float, int]:
    return request.arrival_time, request.arrival_index


class Sequences:
    """All unfinished requests and the pages and slots they hold. `waiting` and `running` are in order of arrival."""

    def __init__(self, config: CacheConfig, num_slots: int, num_pages: int, *, lookahead: int) -> None:
        """lookahead: of how many tokens behind a page its content is made too (a draft layer's KV: 1)."""
        self.page_size = config.page_size
        self._lookahead = lookahead
        self.pool = PagePool(num_pages)
        self.prefix_cache = PrefixCache(self.pool) if config.enable_prefix_caching else None
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.by_id: dict[str, Request] = {}
        self.free_slots = list(range(num_slots))
        self.counted = EngineStats(num_pages=num_pages)
        self._num_arrivals = 0

    def enqueue(self, request: Request) -> None:
        self._num_arrivals += 1
        request.arrival_index = self._num_arrivals
        self.by_id[request.request_id] = request
        insort(self.waiting, request, key=arrival)

    def cached_pages(self, request: Request) -> list[int]:
        """The longest cached prefix of a waiting request, in full pages; at least its last token stays to compute."""
        if self.prefix_cache is None or _needs_prompt_logprobs(request):
            return []
        pages: list[int] = []
        for index in range((request.num_known_tokens - 1) // self.page_size):
            page_id = self.prefix_cache.lookup(self._digest(request, index))
            if page_id is None:
                break
            pages.append(page_id)
        return pages

    def is_being_computed(self, request: Request, num_cached: int) -> bool:
        """Whether a running prefill is about to fill the very page that a waiting request would compute first."""
        end = (num_cached + 1) * self.page_size
        if self.prefix_cache is None or end >= request.num_known_tokens or _needs_prompt_logprobs(request):
            return False
        digest = self._digest(request, num_cached)
        return any(
            other.is_prefilling
            and other.num_registered_pages == num_cached
            and other.num_prefill_tokens >= end + self._lookahead
            and self._digest(other, num_cached) == digest
            for other in self.running
        )

    def fits(self, request: Request, cached: list[int]) -> bool:
        """Whether all known tokens of a waiting request get pages, with some left for the growth of the others."""
        fresh = self.num_pages_for(request.num_known_tokens) - len(cached)
        watermark = min(len(self.running), max(1, self.pool.num_pages // WATERMARK_FRACTION))
        return fresh + self.pool.num_unreferenced(cached) + watermark <= self.pool.num_available

    def admit(self, request: Request, cached: list[int]) -> AdmittedSequence:
        """Moves a waiting request that fits into a slot, with `cached` and new pages for all its known tokens."""
        self._remove(self.waiting, request)
        insort(self.running, request, key=arrival)
        request.status = RequestStatus.RUNNING
        request.slot = heapq.heappop(self.free_slots)
        # Referenced first: the allocation that follows may evict whatever nobody holds.
        self.pool.acquire(cached)
        num_fresh = self.num_pages_for(request.num_known_tokens) - len(cached)
        request.page_ids = cached + self.pool.allocate(num_fresh, cached[-1] if cached else None)
        request.num_registered_pages = len(cached)
        request.num_computed_tokens = len(cached) * self.page_size
        request.num_prefill_tokens = request.num_known_tokens
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = request.num_computed_tokens
            if self.prefix_cache is not None and not _needs_prompt_logprobs(request):
                self.counted.prefix_cache_queries += request.num_prompt_tokens
                self.counted.prefix_cache_hits += request.num_computed_tokens
        return AdmittedSequence(
            request.slot, request.request_id, request.prompt_token_ids, request.output_token_ids.copy(),
            request.params, request.seed, request.stop_token_ids,
        )  # fmt: skip

    def register_full_pages(self, request: Request) -> None:
        """Offers a running request's pages to others: those that scheduled batches fill with tokens known by now."""
        if self.prefix_cache is None:
            return
        num_full = min(request.num_computed_tokens, request.num_known_tokens - self._lookahead) // self.page_size
        for index in range(request.num_registered_pages, num_full):
            self.prefix_cache.insert(self._digest(request, index), request.page_ids[index])
        request.num_registered_pages = max(request.num_registered_pages, num_full)

    def preempt(self, request: Request) -> None:
        """Takes a running request's pages and slot; it waits, at its place by arrival, to be computed again."""
        self._leave(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.counted.num_preemptions += 1
        insort(self.waiting, request, key=arrival)

    def finish(self, request: Request) -> None:
        """Takes a request out for good, waiting or running. The caller sets its finish_reason."""
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        else:
            self._remove(self.waiting, request)
        request.status = RequestStatus.FINISHED
        del self.by_id[request.request_id]

    def distrust(self, request: Request) -> None:
        """Unregisters every page with this request's content: what was computed into them may be wrong."""
        if self.prefix_cache is not None:
            for digest in request.page_digests:
                if (page_id := self.prefix_cache.lookup(digest)) is not None:
                    self.prefix_cache.remove(page_id)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _leave(self, request: Request) -> None:
        self._remove(self.running, request)
        self.pool.release(request.page_ids)
        heapq.heappush(self.free_slots, request.slot)
        request.slot = -1
        request.page_ids = []
        request.num_registered_pages = 0
        request.num_computed_tokens = 0
        request.num_prefill_tokens = 0

    def _remove(self, queue: list[Request], request: Request) -> None:
        del queue[bisect_left(queue, arrival(request), key=arrival)]

    def _digest(self, request: Request, index: int) -> bytes:
        digests, size = request.page_digests, self.page_size
        for i in range(len(digests), index + 1):
            parent = digests[-1] if digests else root_digest(request.cache_salt)
            digests.append(page_digest(parent, request.known_token_ids(i * size, (i + 1) * size + self._lookahead)))
        return digests[index]


def _needs_prompt_logprobs(request: Request) -> bool:
    """Then every prompt position must be computed, unless they have been delivered with the first token."""
    return request.params.prompt_logprobs is not None and not request.output_token_ids
