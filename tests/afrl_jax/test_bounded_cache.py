from afrl_jax.bounded_cache import BoundedCache


def test_the_least_recently_used_make_room():
    cache = BoundedCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A" and cache.bytes == 9
    cache.put("d", "D", 4)  # b goes, which was used before c and a
    assert cache.get("b") is None and cache.get("c") == "C" and len(cache) == 3 and cache.bytes == 10
    assert (cache.hits, cache.misses, cache.evictions) == (2, 1, 1)
    cache.put("e", "E", 10)
    assert len(cache) == 1 and "e" in cache and cache.bytes == 10 and cache.evictions == 4


def test_a_value_is_replaced_and_one_too_large_is_not_held():
    cache = BoundedCache(10)
    cache.put("a", 1, 4)
    cache.put("a", 2, 6)
    assert cache.get("a") == 2 and cache.bytes == 6
    cache.put("b", 3, 11)
    assert "b" not in cache and "a" in cache
    cache.put("a", 4, 11)
    assert "a" not in cache and cache.bytes == 0
    assert BoundedCache(0).get("a") is None
