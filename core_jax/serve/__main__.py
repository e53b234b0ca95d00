"""Search over HTTP with rewrites beside the query, and a page that shows what they change.

  python -m core_jax.serve --model=runs/quickstart/export --run=runs/core --clips_week=7
      The built-in world of that week; rewrites from the run's store, of the version its registry has in production.

  python -m core_jax.serve --model=DIR --documents=documents.jsonl --store=redis://cache:6379/0 \\
      --secret=FILE --registry=DIR
      Your documents ({"doc_id", "title"[, "text", other fields]} a line), a store that many searchers share.

  curl localhost:8001/search -H "Content-Type: application/json" -d '{"query": "chess for kids"}'

  /        the page: the same search without and with the rewrite, side by side
  /search  results with what every stage contributed, and milliseconds by stage
  /docs    the interface

Without a store every search is the original path. A store that is slow, down or poisoned makes it so, too. Stores are
filled by the weeks of core_jax.main and, for a log of your own, by core_jax.fill_store.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from afrl_jax.command_line import at_least, make_parser, parse, told_plainly, zero_shot_instruction


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments, load, serve."""
    parser = make_parser("core_jax.serve", __doc__)
    parser.add_argument("--documents", type=Path, help="the collection, .jsonl, .jsonl.gz or .parquet")
    parser.add_argument("--clips_week", type=int, help="instead: the documents of a week of the built-in world")
    parser.add_argument("--run", type=Path, help="a workdir of core_jax.main: its store, secret and registry")
    parser.add_argument("--store", help="redis://host:port/0, or the file of an SQLite store")
    parser.add_argument("--secret", type=Path, help="the file whose bytes seal the store's rewrites")
    parser.add_argument("--registry", type=Path, help="says which rewriter is in production")
    parser.add_argument(
        "--deadline_ms", type=float, default=20.0, help="that a search waits for the store (%(default)s)"
    )
    parser.add_argument(
        "--patience_ms", type=float, default=1000.0, help="in which a rewrite is consumed or given up (%(default)s)"
    )
    parser.add_argument("--unsafe", type=Path, help="a file of words, a line each, that no rewrite may hold")
    parser.add_argument(
        "--recall",
        default="bm25",
        help="bm25, or a server that holds the collection: opensearch:https://host:9200/INDEX (Elasticsearch too), "
        "vespa:http://host:8080/SCHEMA (%(default)s)",
    )
    parser.add_argument("--recalled", type=at_least(1), default=100, help="recalled for a query (%(default)s)")
    parser.add_argument("--ranked", type=at_least(1), default=30, help="of them scored by the model (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="(%(default)s)")
    args = parse(parser, arguments)
    # Imported here, so that --help and a mistyped argument answer at once.
    import uvicorn

    from afrl_jax.scoring import RelevanceModel
    from core_jax.registry import Registry, golden_self_test, is_registry
    from core_jax.search.engine import Engine, warm_up
    from core_jax.search.finerank import Finerank
    from core_jax.search.rawrank import LightRanker
    from core_jax.search.recall import LexicalRecall
    from core_jax.search.remote_recall import open_recall
    from core_jax.search.rewrite_store import RewriteStore, open_backend, read_refusals
    from core_jax.search.stages import Stages
    from core_jax.serve.app import make_app
    from core_jax.serve.collection import clips_collection, read_collection, settings_of, world_of
    from core_jax.weekly import KEY, REGISTRY, STORE
    from lm_jax import run_log
    from lm_jax.program import use_kernels
    from lm_jax.source import locate

    use_kernels(args.kernels)
    with told_plainly(parser):
        if args.run:
            weekly = settings_of(args.run).weekly
            args.store = args.store or weekly.store or str(args.run / STORE)
            args.unsafe = args.unsafe or weekly.unsafe
            args.secret, args.registry = args.secret or args.run / KEY, args.registry or args.run / REGISTRY
        if (args.documents is None) == (args.clips_week is None):
            raise ValueError("one of --documents and --clips_week says what is searched")
        if args.store and not (args.secret and args.registry):
            raise ValueError("--store needs --secret and --registry: which rewrites to trust, and whose to use")
        world = world_of(args.run) if args.run else {}
        for option in ("store", "secret", "registry"):
            path = str(getattr(args, option) or "")
            if path and "://" not in path and not Path(path).exists():
                raise ValueError(f"--{option}: there is no {path}")
        if args.registry and not is_registry(args.registry):
            raise ValueError(f"--registry: there is none in {args.registry}")
        refusals = read_refusals(args.unsafe)
        server = None if args.recall == "bm25" else open_recall(args.recall)
        locate(args.model, ("config.json",))  # a wrong path is told before any work
        if args.documents:
            documents, examples = read_collection(args.documents), []
        else:
            documents, examples = clips_collection(args.clips_week, **world)
        store = version = None
        if args.store:
            store = RewriteStore(open_backend(args.store), args.secret.read_bytes(), refusals=refusals)
            version = Registry(args.registry, golden_self_test).production
        model = RelevanceModel.load(
            args.model, instruction=zero_shot_instruction(args.labels, args.task), dtype=args.dtype
        )
        recall, light = server or LexicalRecall(documents), LightRanker(documents)
        stages = Stages(recall, light, Finerank(model), recalled=args.recalled, ranked=args.ranked)
        run_log.say("compiling: the first start takes minutes, later ones find what it left")
        warm_up(stages, documents)
    engine = Engine(
        stages,
        store=store,
        version=version or (lambda: None),
        refusals=refusals,
        deadline=args.deadline_ms / 1000,
        patience=args.patience_ms / 1000,
    )
    about = {"model": Path(args.model).name, "model_version": model.version, "documents": len(documents)}
    uvicorn.run(make_app(engine, about, examples), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
