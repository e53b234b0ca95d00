"""Fill a store with rewrites of the version in production, for the contexts of a log of your own.

  python -m core_jax.fill_store --registry=DIR --sessions=sessions.jsonl --store=redis://cache:6379/0 --secret=FILE

The table is that of `core_jax.session_reader`; of each session only query and watched document count, and a context
that comes twice is written once. A search finds a rewrite under the very same context, so give the sessions of the last
weeks, whose contexts come again. Run it after a promotion: rewrites of another version are not used, and a rewrite is
used for two weeks. The secret is made if absent; `core_jax.serve` needs the same. Prints how many rewrites were
written, and how many were cut off, or refused and why.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from afrl_jax.command_line import told_plainly
from lm_jax.program import before_jax


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
    from core_jax.registry import Registry, golden_self_test
    from core_jax.rewriter import Rewriter
    from core_jax.search.rewrite_store import RewriteStore, open_backend, read_refusals, read_secret
    from core_jax.session_reader import read_sessions

    with told_plainly(parser):
        if not args.registry.is_dir():
            raise ValueError(f"--registry: there is none in {args.registry}")
        registry = Registry(args.registry, golden_self_test)
        if (version := registry.production()) is None:
            raise ValueError(f"--registry: nothing is in production in {args.registry}")
        refusals = read_refusals(args.unsafe)
        contexts = list({session.context.key: session.context for session in read_sessions(args.sessions)}.values())
        backend = open_backend(args.store, timeout=30.0)
        store = RewriteStore(backend, read_secret(args.secret), refusals=refusals)
        rewriter = Rewriter.load(registry.path(version), dtype=args.dtype)
    pairs = zip(contexts, rewriter.rewrite(contexts), strict=True)
    usable = [(context.key, rewrite.text) for context, rewrite in pairs if rewrite.usable]
    counts = {"cut off": len(contexts) - len(usable)} | store.write(version, usable)
    print(", ".join(f"{count} {reason}" for reason, count in counts.items()))


if __name__ == "__main__":
    main()
