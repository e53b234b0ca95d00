"""Fill a store with rewrites of the version in production, for the contexts of a log of your own.

  python -m core_jax.fill_store --registry=DIR --sessions=sessions.jsonl --store=redis://cache:6379/0 --secret=FILE

The table is that of `core_jax.session_reader`; of each session only query and watched document count, and a context
that comes twice is written once. A search finds a rewrite under the very same context, so give the sessions of the last
weeks, whose contexts come again. Run it every week, because a rewrite is used for two, and after every promotion and
rollback, because rewrites of another version are not used. The secret is made if absent; `core_jax.serve` needs the
same. What is written stays where the program is stopped. Prints how many rewrites were written, and how many were cut
off, refused and why, or not made because the query is longer than a search may be.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Sequence
from pathlib import Path

from afrl_jax.command_line import told_plainly
from lm_jax.program import before_jax

BLOCK = 512  # contexts rewritten, then written, at a time


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments, rewrite, write."""
    parser = argparse.ArgumentParser(
        prog="python -m core_jax.fill_store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--registry", required=True, type=Path, help="its version in production rewrites")
    parser.add_argument("--sessions", required=True, type=Path, help="the log, .jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--store", required=True, help="redis://host:port/0, or the file of an SQLite store")
    parser.add_argument("--secret", required=True, type=Path, help="the file whose bytes seal the rewrites")
    parser.add_argument("--unsafe", type=Path, help="a file of words, a line each, that no rewrite may hold")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    args = parser.parse_args(arguments)
    before_jax()
    # Imported here, so that --help and a mistyped argument answer at once.
    from core_jax.registry import Registry, golden_self_test, is_registry
    from core_jax.rewriter import Rewriter
    from core_jax.schema import LONGEST_QUERY
    from core_jax.search.rewrite_store import RewriteStore, open_backend, read_refusals, read_secret
    from core_jax.session_reader import read_sessions
    from lm_jax import run_log

    with told_plainly(parser):
        if not is_registry(args.registry):
            raise ValueError(f"--registry: there is none in {args.registry}")
        registry = Registry(args.registry, golden_self_test)
        if (version := registry.production()) is None:
            raise ValueError(f"--registry: nothing is in production in {args.registry}")
        refusals = read_refusals(args.unsafe)
        distinct = {session.context.key: session.context for session in read_sessions(args.sessions)}
        contexts = [context for context in distinct.values() if len(context.query) <= LONGEST_QUERY]
        backend = open_backend(args.store, timeout=30.0)
        store = RewriteStore(backend, read_secret(args.secret), refusals=refusals)
        store.check()
        rewriter = Rewriter.load(registry.path(version), dtype=args.dtype)
        counts = collections.Counter({"cut off": 0, "written": 0})
        contexts.sort(key=lambda context: len(context.query))  # alike in length, a block is padded to
        blocks = [contexts[start : start + BLOCK] for start in range(0, len(contexts), BLOCK)]
        for block in run_log.progress(blocks, "rewriting", len(blocks)):
            pairs = zip(block, rewriter.rewrite(block), strict=True)
            usable = [(context.key, rewrite.text) for context, rewrite in pairs if rewrite.usable]
            counts.update({"cut off": len(block) - len(usable)} | store.write(version, usable))
    if left_out := len(distinct) - len(contexts):
        counts["too long"] = left_out
    print(", ".join(f"{count} {reason}" for reason, count in counts.items()))


if __name__ == "__main__":
    main()
