"""The store of rewrites on SQLite and on a real Redis server, and everything it must refuse."""

import json
import time

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from core_jax.search.rewrite_store import Found, Refusals, RewriteStore, SQLite, open_backend, read_refusals
from tests.absent import absent

SECRET = b"sixteen or more bytes"


@pytest.fixture(params=["sqlite", "redis"])
def backend(request, tmp_path):
    if request.param == "sqlite":
        return open_backend(str(tmp_path / "rewrites.sqlite"))
    url = request.getfixturevalue("redis_url")
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return open_backend(url)


def test_what_was_written_is_read_by_key_and_version(backend):
    store = RewriteStore(backend, SECRET)
    assert store.write("v1", [("a", "chess for kids"), ("b", "ログ 入門")]) == {"written": 2}
    assert store.read("a", "v1") == Found("chess for kids", "used")
    assert store.read("b", "v1") == Found("ログ 入門", "used")
    assert store.read("c", "v1") == Found(None, "absent")
    assert store.read("a", "v2") == Found(None, "stale")
    store.write("v2", [("a", "chess openings")])
    assert store.read("a", "v2") == Found("chess openings", "used")
    assert store.read("a", "v1") == Found(None, "stale")


def test_an_entry_expires(backend):
    now = [1000.0]
    store = RewriteStore(backend, SECRET, seconds=60, clock=lambda: now[0])
    store.write("v1", [("a", "chess")])
    now[0] = 1059.9
    assert store.read("a", "v1").reason == "used"
    now[0] = 1060.0
    assert store.read("a", "v1") == Found(None, "expired")


def test_the_backend_forgets_what_has_expired(backend):
    RewriteStore(backend, SECRET, seconds=0.05).write("v1", [("short", "chess")])
    time.sleep(0.1)
    RewriteStore(backend, SECRET).write("v1", [("long", "chess")])
    assert backend.read("short") is None and backend.read("long") is not None


def test_whatever_is_not_sealed_is_refused(backend):
    store = RewriteStore(backend, SECRET)
    store.write("v1", [("a", "chess"), ("b", "go")])
    sealed = backend.read("a")
    _, text, until, seal = json.loads(sealed)
    poison = [
        b"", b"\xff\xfe", b"null", b"5", b"[]", b'{"a": 1}', b"[" * 100_000, b'["v1", "chess"]', sealed[:-1],
        json.dumps(["v1", "go", until, seal]).encode(),
        json.dumps(["v2", text, until, seal]).encode(),
        json.dumps(["v1", text, until + 1e9, seal]).encode(),
        json.dumps(["v1", text, until, None]).encode(),
        json.dumps(["v1", text, until, "é"]).encode(),
        json.dumps([["v1"], {"text": 1}, "x", 3]).encode(),
        backend.read("b"),  # sealed, for another context
    ]  # fmt: skip
    for entry in poison:
        backend.write({"a": entry}, 100.0)
        assert store.read("a", "v1") == Found(None, "not sealed"), entry[:60]
    backend.write({"a": sealed}, 100.0)
    assert store.read("a", "v1").reason == "used"
    assert RewriteStore(backend, b"another secret of length").read("a", "v1").reason == "not sealed"


def test_a_short_secret_is_refused(tmp_path):
    with pytest.raises(ValueError, match="16 bytes"):
        RewriteStore(SQLite(tmp_path / "s"), b"short")


def test_refused_rewrites_are_neither_written_nor_read(backend):
    strict = Refusals(most_characters=20, unsafe=frozenset({"Poker", "賭け"}))
    store = RewriteStore(backend, SECRET, refusals=strict)
    texts = {
        "ok": "chess for kids", "part": "spokers", "blank": " \t", "long": "a" * 21, "unsafe": "ＰＯＫＥＲ night",
        "script": "楽しい賭け事", "control": "a\x00b", "direction": "a\u202eb", "line": "a\nb",
    }  # fmt: skip
    counts = store.write("v1", texts.items())
    assert counts == {"written": 2, "empty": 1, "overlong": 1, "unsafe": 2, "control characters": 3}
    found = {key: store.read(key, "v1").text for key in texts}
    assert {key for key, text in found.items() if text} == {"ok", "part"}
    RewriteStore(backend, SECRET).write("v1", texts.items())  # by a program with looser rules
    assert {key for key in texts if store.read(key, "v1").text} == {"ok", "part"}
    assert store.read("unsafe", "v1") == Found(None, "unsafe")


@given(st.text(max_size=30))
def test_a_refusal_never_fails_and_lets_plain_words_pass(text):
    reason = Refusals(unsafe=frozenset({"x"})).reason(text)
    assert reason in (None, "empty", "control characters", "unsafe")
    assert Refusals().reason("chess for kids") is None


@pytest.mark.parametrize(
    "text",
    [
        "po\u200cker night",
        "p\u200doker",
        "po\ufe0fker",
        "po\u034fker",
        "po\U000e0100ker",
        "free  money",
        "free\u00a0\u3000 MONEY now",
    ],
)
def test_an_unsafe_word_is_found_behind_what_nobody_sees(text, tmp_path):
    words = tmp_path / "words"
    words.write_bytes("\ufeffPoker\r\n\r\nfree money\r\n".encode())  # as Windows writes it
    refusals = read_refusals(words)
    assert refusals.reason(text) == "unsafe"
    assert refusals.reason("chess for kids") is None and refusals.reason("carefree moneys") is None
    assert read_refusals("").reason(text) is None


@pytest.mark.parametrize(
    ("word", "held", "part"),
    [("секс", "секс видео", "секстант"), ("cul", "le cul", "culé"), ("폭탄", "폭탄을", "폭"), ("賭け", "x賭け", "賭")],
)
def test_words_stand_alone_where_their_script_lets_them(word, held, part):
    refusals = Refusals(unsafe=frozenset({word}))
    assert (refusals.reason(held), refusals.reason(part)) == ("unsafe", None)


def test_a_down_backend_raises(tmp_path):
    store = RewriteStore(open_backend("redis://127.0.0.1:1/0", timeout=0.2), SECRET)
    with pytest.raises(Exception, match="Connection refused"):
        store.read("a", "v1")
    file = tmp_path / "rewrites"
    backend = SQLite(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(Exception, match="unable to open"):
        RewriteStore(backend, SECRET).read("a", "v1")


def test_joiners_are_letters_of_persian_and_other_control_characters_are_not():
    assert Refusals().reason("آموزش شطرنج برای بچه\u200cها") is None
    assert Refusals().reason("chess\u200f kids") == "control characters"


@pytest.mark.parametrize(("asked", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_what_is_absent_skips_a_test_or_fails_it(monkeypatch, asked, outcome):
    monkeypatch.setenv("AFRL_SKIP_NOTHING", asked)
    with pytest.raises(outcome, match="no redis-server"):
        absent("no redis-server")


def test_an_address_that_is_no_store_is_named():
    with pytest.raises(ValueError, match=r"redis\+tls://h:1/0: a store is redis://"):
        open_backend("redis+tls://h:1/0")
