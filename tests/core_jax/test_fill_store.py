"""The command that fills a store for a log: what production says to each context, and what it does not begin with."""

import json

import pytest

from afrl_jax.schema import Document
from core_jax.fill_store import main
from core_jax.ratio_reward import Rewrite
from core_jax.registry import Registry, golden_self_test
from core_jax.rewrite_format import RewriteFormat
from core_jax.rewriter import Rewriter
from core_jax.schema import Context
from core_jax.search.rewrite_store import RewriteStore, SQLite


def log(tmp_path, contexts):
    shown = [
        {"doc_id": f"d{place}", "title": "chess", "action": action} for place, action in enumerate(("click", "none"))
    ]
    rows = [
        {
            "session_id": f"s{number}", "time": 1, "query": context.query, "shown": shown,
            "random": [{"doc_id": "r", "title": "bread"}],
        }
        | ({"watched": {"doc_id": context.watched.doc_id, "title": context.watched.title}} if context.watched else {})
        for number, context in enumerate(contexts)
    ]  # fmt: skip
    file = tmp_path / "sessions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_every_context_of_a_log_gets_what_production_says(
    tmp_path, tiny_shape, clips_tokenizer, random_model, capsys, monkeypatch
):
    rewriter = Rewriter(tiny_shape, random_model(tiny_shape, 1), RewriteFormat(clips_tokenizer), max_new_tokens=6)
    contexts = [Context(f"chess {number}", Document("w", "German openings")) for number in range(5)]
    contexts += [Context("bread"), Context("bread" * 201)]
    rewriter.export(tmp_path / "export", contexts[:1])
    registry = Registry(tmp_path / "registry", golden_self_test)
    options = [f"--registry={registry.folder}", f"--sessions={log(tmp_path, [*contexts, contexts[0]])}"]
    options += [f"--store={tmp_path / 'store.sqlite'}", f"--secret={tmp_path / 'key'}"]
    version = registry.publish(tmp_path / "export", who="t", why="w")
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert "nothing is in production" in capsys.readouterr().err and not (tmp_path / "key").exists()
    registry.promote(version, who="t", why="w")

    def rewrite(self, asked):  # what a model of noise says could not be told from what is refused
        return [Rewrite(f"german {context.query}", 3, truncated=context.query == "bread") for context in asked]

    monkeypatch.setattr(Rewriter, "rewrite", rewrite)
    unsafe = tmp_path / "words"
    unsafe.write_text("chess 3\n")
    monkeypatch.setattr("core_jax.fill_store.BLOCK", 4)
    main([*options, f"--unsafe={unsafe}"])
    store = RewriteStore(SQLite(tmp_path / "store.sqlite"), (tmp_path / "key").read_bytes())
    found = [store.read(context.key, version).text for context in contexts]
    assert found == [*(f"german chess {number}" if number != 3 else None for number in range(5)), None, None]
    assert capsys.readouterr().out == "1 cut off, 4 written, 1 unsafe, 1 too long\n"


def test_a_store_that_is_not_there_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "registry" / "versions").mkdir(parents=True)
    monkeypatch.setattr(Registry, "production", lambda self: "v")
    options = [f"--registry={tmp_path / 'registry'}", f"--sessions={log(tmp_path, [Context('chess')])}"]
    options += [f"--secret={tmp_path / 'key'}"]
    for store, said in (
        ("redis://127.0.0.1:1/0", "the store of rewrites: ConnectionError"),
        (tmp_path / "absent" / "store", "unable to open database file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*options, f"--store={store}"])
        assert said in capsys.readouterr().err
