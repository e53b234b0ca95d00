"""Serve a model over HTTP: scores and rankings at once, explanations as they are written, and a page to try it.

  python -m afrl_jax.serve --model=runs/quickstart/export --port=8000

  curl localhost:8000/v1/rerank -H "Content-Type: application/json" \\
      -d '{"query": "chess for kids", "documents": ["Sourdough at home", "Chess openings, explained to children"]}'
  curl -N localhost:8000/v1/relevance -H "Content-Type: application/json" \\
      -d '{"query": "chess for kids", "document": "Chess openings, explained to children", "explain": true}'

  /                 the page: type a query, paste candidates, click one to watch its explanation
  /v1/rerank        what clients of Cohere, Jina and vLLM send; also /rerank and /v2/rerank
  /v1/score         pairs of texts as for vLLM, or a query, items and label probabilities as for SGLang; also /score
  /v1/relevance     one pair; with "explain": true, server-sent events: the grade first, then the reasoning
  /v1/models /info  what is served
  /health /ready    the process is alive; the model is loaded, has proved its golden pairs, and scores
  /metrics /docs    Prometheus; the interface, to read and to try, as /openapi.json describes it

With --api_keys=FILE, one key a line, scoring asks for `Authorization: Bearer KEY`. The log is JSON lines on stderr;
what ends the server before its time is told after them in plain words.
SIGTERM lets the requests that were admitted end, and no others begin; before the model is there it ends all at once.
Status 0 after that, 2 if the model cannot be loaded or the service breaks down.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from afrl_jax.command_line import CACHE_HELP, at_least, make_parser, parse, told_plainly, zero_shot_instruction
from afrl_jax.serve.keys import read_keys
from afrl_jax.serve.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """Read arguments, check what can be checked at once, serve."""
    parser = make_arguments()
    args = parse(parser, arguments)
    with told_plainly(parser):
        settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
        keys = read_keys(args.api_keys) if args.api_keys else ()
        instruction = zero_shot_instruction(args.labels, args.task)
    # Imported here, so that --help and a mistyped argument answer at once.
    import uvicorn

    from afrl_jax import relevance_file
    from afrl_jax.scoring import RelevanceModel
    from afrl_jax.serve.app import make_app
    from afrl_jax.serve.monitoring import log, log_to_stderr
    from afrl_jax.serve.scorer import Scorer
    from afrl_jax.serve.service import Service
    from kernels import implementation

    with told_plainly(parser):
        relevance_file.instruction_of(relevance_file.read(args.model), instruction)
    log_to_stderr()
    implementation.setting.set_global(args.kernels)
    service = Service(args.name or Path(args.model).resolve().name, settings, keys)

    def load() -> Scorer:
        model = RelevanceModel.load(args.model, instruction=instruction, dtype=args.dtype, cache_bytes=args.cache_bytes)
        return Scorer(model, settings.max_explanation_tokens)

    def stop() -> None:
        server.should_exit = True

    config = uvicorn.Config(
        make_app(service, load, on_failure=stop),
        host=args.host,
        port=args.port,
        log_config=None,  # it goes where all goes
        log_level="warning",  # every request has a line of ours
        access_log=False,
        # An admitted request may take its deadline to be scored, and as long again to be explained.
        timeout_graceful_shutdown=int(2 * settings.deadline_seconds) + 1,
    )
    server = uvicorn.Server(config)
    # The server raises the signal it was ended by once more when all is done; nothing is left to end then.
    signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        listening = socket.create_server((args.host, args.port), family=family)
    except (OSError, OverflowError) as error:
        parser.exit(2, f"{parser.prog}: error: --host={args.host} --port={args.port}: {error}\n")
    log("listening", url=f"http://{args.host}:{listening.getsockname()[1]}")
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    if service.failure:
        if not isinstance(service.failure, ValueError | OSError):  # nobody foresaw it
            traceback.print_exception(service.failure)
        parser.exit(2, f"{parser.prog}: error: {service.failure}\n")
    if not service.ready:
        # The thread that loads or compiles would be waited for, minutes for a large model.
        sys.stderr.flush()
        os._exit(0)


def make_arguments() -> argparse.ArgumentParser:
    """The arguments: the model's, the address, and every field of `Settings`."""
    parser = make_parser("afrl_jax.serve", __doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves all networks of the machine (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 finds a free one (%(default)s)")
    parser.add_argument("--name", help="what answers call the model; by default the name of its folder")
    parser.add_argument("--api_keys", type=Path, help="a file of API keys, one a line; without one, nobody is asked")
    parser.add_argument("--cache_bytes", type=at_least(0), help=CACHE_HELP)
    for field in dataclasses.fields(Settings):
        told = f"{field.metadata['meaning']} (%(default)s)"
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default, help=told)
    return parser


if __name__ == "__main__":
    main()
