"""Finds KV pages that were computed before: full pages under a hash of all tokens up to and including theirs."""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from gossamer.kv_cache.pages import PagePool

DIGEST_BYTES = 32


def root_digest(cache_salt: str | None) -> bytes:
    """The parent of a sequence's first page. Sequences with different salts never share a page."""
    if cache_salt is None:
        return bytes(DIGEST_BYTES)
    return blake2b(cache_salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES, person=b"salt").digest()


def page_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The digest of a full page: of its own tokens and, through the parent page's digest, of all before them."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_BYTES, person=b"page").digest()


class PrefixCache:
    """Digest -> page id of every full page whose KV is written, or will be by a batch already scheduled."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        pool.on_evict = self._on_evict

    def __len__(self) -> int:
        return len(self._page_of)

    def lookup(self, digest: bytes) -> int | None:
        """The page with this content, in use or cached; the caller acquires it before anything is allocated."""
        return self._page_of.get(digest)

    def insert(self, digest: bytes, page_id: int) -> None:
        """Registers a page in use. The first page with a given content stays: a later twin is not registered."""
        if digest not in self._page_of:
            self._page_of[digest] = page_id
            self._digest_of[page_id] = digest
            self._pool.keep(page_id)

    def remove(self, page_id: int) -> None:
        """Unregisters a page whose content can no longer be trusted. No-op for a page that is not registered."""
        digest = self._digest_of.pop(page_id, None)
        if digest is not None:
            del self._page_of[digest]
            self._pool.forget(page_id)

    def clear(self) -> None:
        for page_id in list(self._digest_of):
            self.remove(page_id)

    def _on_evict(self, page_id: int) -> None:
        del self._page_of[self._digest_of.pop(page_id)]
