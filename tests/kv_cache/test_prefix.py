from __future__ import annotations

from gossamer.kv_cache.pages import PagePool
from gossamer.kv_cache.prefix import PrefixCache, page_digest, root_digest


def chain(tokens, page_size=4, salt=None):
    digests = [root_digest(salt)]
    for start in range(0, len(tokens), page_size):
        digests.append(page_digest(digests[-1], tokens[start : start + page_size]))
    return digests[1:]


def test_equal_prefixes_have_equal_digests_and_diverge_for_good():
    a = chain([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
    b = chain([1, 2, 3, 4, 5, 6, 7, 99, 9, 10, 11, 12])
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert a[2] != b[2], "equal tokens after a different past are different pages"


def test_equal_pages_at_different_places_differ():
    first, second = chain([1, 2, 3, 4, 1, 2, 3, 4])
    assert first != second


def test_salts_isolate():
    tokens = [1, 2, 3, 4]
    digests = {chain(tokens, salt=salt)[0] for salt in (None, "", "a", "b", "\ud800")}
    assert len(digests) == 5
    assert chain(tokens, salt="a") == chain(tokens, salt="a")


def test_ids_beyond_32_bits_do_not_collide():
    assert page_digest(root_digest(None), [1]) != page_digest(root_digest(None), [1 + 2**32])


def cache_of(num_pages):
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool)


def test_a_registered_page_is_found_until_it_is_evicted():
    pool, cache = cache_of(2)
    (page,) = pool.allocate(1)
    cache.insert(b"a", page)
    pool.release([page])
    assert cache.lookup(b"a") == page
    assert cache.lookup(b"b") is None
    pool.allocate(2)
    assert cache.lookup(b"a") is None
    assert len(cache) == 0


def test_the_first_of_two_equal_pages_stays():
    pool, cache = cache_of(2)
    first, twin = pool.allocate(2)
    cache.insert(b"a", first)
    cache.insert(b"a", twin)
    pool.release([first])
    pool.release([twin])
    assert cache.lookup(b"a") == first
    assert pool.num_cached == 1


def test_remove_and_clear_free_the_pages():
    pool, cache = cache_of(4)
    pages = pool.allocate(3)
    for digest, page in zip((b"a", b"b", b"c"), pages, strict=True):
        cache.insert(digest, page)
    pool.release(pages[:2])
    cache.remove(pages[0])
    cache.remove(pages[0])
    assert cache.lookup(b"a") is None
    assert cache.lookup(b"b") == pages[1]
    cache.clear()
    assert len(cache) == 0
    assert pool.num_cached == 0
    pool.release(pages[2:])
    assert pool.num_cached == 0
    assert pool.num_in_use == 0
