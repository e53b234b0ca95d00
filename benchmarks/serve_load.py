"""The service under an open-loop load: what it answers, refuses and loses at half, once and twice its capacity, of
requests of one document, of few and of many.

  python -m benchmarks.serve_load                  SmolLM2-135M zero-shot (`make smollm2` fetches it)
  python -m benchmarks.serve_load --model=runs/quickstart/export --quick

Starts `python -m afrl_jax.serve` and measures its capacity with as many requests in flight as it pleases. Then requests
arrive at random times (Poisson) at a multiple of that rate, whether or not earlier ones were answered; a latency
counts from the time a request was due. Every answer under load is compared with the answer the same request gets from
the idle service: a mixed-up or made-up order would show. What becomes of requests is also told by their size. Prints a
table, and one line of JSON last. Client and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
WORDS = "chess openings explained to children robots interview sourdough at home iceland beginners german".split()
LOADS = (0.5, 1.0, 2.0)
SIZES = {1: 13, 8: 17, 200: 2}  # documents of a request, and how many of 32 requests are of that size
CLOSED_LOOP = 16  # requests in flight while capacity is measured
# Scores in another batch are rounded otherwise; another document's are off by more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.03}


def requests_of(seed: int) -> list[dict[str, Any]]:
    """Different requests of all `SIZES`, mixed: a query of a few words and documents of 20 to 60."""
    random = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(low, high)))

    return [
        {"query": text(2, 6), "documents": [text(20, 60) for _ in range(size)], "return_documents": False}
        for size in random.permutation(np.repeat(list(SIZES), list(SIZES.values()))).tolist()
    ]


async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[int, dict[int, float]]:
    """Status and scores by document; status 0 is no answer at all."""
    try:
        answer = await client.post("/v1/rerank", json=body)
    except httpx2.HTTPError:
        return 0, {}
    rows = answer.json().get("results", [])
    return answer.status_code, {row["index"]: row["relevance_score"] for row in rows}


async def closed_loop(client: httpx2.AsyncClient, bodies: list[dict[str, Any]], seconds: float) -> float:
    """Answered requests a second with `CLOSED_LOOP` in flight."""
    until, answered = time.perf_counter() + seconds, 0

    async def one(place: int) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            status, _ = await ask(client, bodies[place % len(bodies)])
            answered += status == 200
            place += CLOSED_LOOP

    start = time.perf_counter()
    await asyncio.gather(*map(one, range(CLOSED_LOOP)))
    return answered / (time.perf_counter() - start)


async def steady(client: httpx2.AsyncClient, bodies: list[dict[str, Any]], seconds: float) -> float:
    """Requests a second once they do not rise any more: what is met for the first time is compiled first."""
    before, rate = 0.0, await closed_loop(client, bodies, seconds)
    while rate > 1.1 * before:
        before, rate = rate, await closed_loop(client, bodies, seconds)
    return max(before, rate)


async def open_loop(
    client: httpx2.AsyncClient,
    bodies: list[dict[str, Any]],
    expected: list[dict[int, float]],
    rate: float,
    seconds: float,
    tolerance: float,
) -> dict[str, Any]:
    """What becomes of requests that arrive at `rate` a second for `seconds`; `by_documents` of those of each size."""
    random = np.random.default_rng(0)
    due = np.cumsum(random.exponential(1 / rate, max(1, round(rate * seconds))))
    start = time.perf_counter()

    async def one(place: int, at: float) -> tuple[int, float, bool]:
        await asyncio.sleep(start + at - time.perf_counter())
        status, scores = await ask(client, bodies[place % len(bodies)])
        latency = time.perf_counter() - start - at
        known = expected[place % len(bodies)]
        wrong = status == 200 and (
            scores.keys() != known.keys() or max(abs(scores[i] - known[i]) for i in known) > tolerance
        )
        return status, latency, wrong

    found = await asyncio.gather(*(one(place, at) for place, at in enumerate(due)))
    elapsed = time.perf_counter() - start
    sizes = [len(bodies[place % len(bodies)]["documents"]) for place in range(len(found))]
    by_size = {size: [one for one, of in zip(found, sizes, strict=True) if of == size] for size in SIZES}
    rates = {"offered_per_second": len(found) / due[-1]}
    rates["answered_per_second"] = sum(status == 200 for status, *_ in found) / elapsed
    return {**rates, **fates(found), "by_documents": {size: fates(some) for size, some in by_size.items()}}


def fates(found: list[tuple[int, float, bool]]) -> dict[str, float]:
    """How many requests ended how, and the latencies of those answered, from (status, seconds, wrong) of each."""
    statuses = Counter(status for status, _, _ in found)
    latencies = np.array([latency for status, latency, _ in found if status == 200] or [np.nan])
    p50, p95, p99 = np.percentile(latencies, [50, 95, 99])
    return {
        "answered": statuses[200],
        "refused_429": statuses[429],
        "late_504": statuses[504],
        "lost_or_failed": len(found) - statuses[200] - statuses[429] - statuses[504],
        "wrong": sum(wrong for *_, wrong in found),
        "p50_ms": 1e3 * p50,
        "p95_ms": 1e3 * p95,
        "p99_ms": 1e3 * p99,
        "max_ms": 1e3 * latencies.max(),
    }


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Capacity, then each load."""
    bodies = requests_of(seed=1)
    documents = float(np.mean([len(body["documents"]) for body in bodies]))
    tolerance = TOLERANCE[args.dtype]
    async with httpx2.AsyncClient(base_url=url, timeout=120, limits=httpx2.Limits(max_connections=None)) as client:
        expected = [(await ask(client, body))[1] for body in bodies]
        capacity = await steady(client, bodies, args.seconds)
        figures: dict[str, Any] = {"capacity_requests_per_second": capacity, "mean_documents": documents}
        figures["capacity_pairs_per_second"] = capacity * documents
        print(f"capacity {capacity:.1f} requests/s, {capacity * documents:.0f} pairs/s, {os.cpu_count()} cores")
        for load in LOADS:
            row = await open_loop(client, bodies, expected, load * capacity, args.seconds, tolerance)
            figures[f"{load:g}x"] = row
            for of, part in {"all": row, **row["by_documents"]}.items():
                told = "  ".join(f"{name} {value:.5g}" for name, value in part.items() if name != "by_documents")
                print(f"{load:4g}x  {of:>3}  {told}")
    return figures


def start(args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """A server that is ready, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("model", "dtype", "deadline_seconds", "batch_pairs")
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "afrl_jax.serve",
            f"--port={port}",
            *(f"--{name}={getattr(args, name)}" for name in options),
        ],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}; run it by itself to see why")
        try:
            if httpx2.get(f"{url}/ready", timeout=60).status_code == 200:
                return server, url
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)


def main() -> None:
    """Start, measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "weights" / "smollm2-135m-instruct-q4_1.gguf")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--deadline_seconds", type=float, default=10.0)
    parser.add_argument("--batch_pairs", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load")
    parser.add_argument("--quick", action="store_true", help="10 seconds of each load")
    args = parser.parse_args()
    args.model = args.model.resolve()
    if args.quick:
        args.seconds = 10.0
    if not args.model.exists():
        parser.error(f"{args.model} is absent: `make smollm2` fetches it, or name another --model")
    server, url = start(args)
    try:
        figures = asyncio.run(measure(url, args))
    finally:
        server.terminate()
        server.wait()
    rows = [figures[f"{load:g}x"] for load in LOADS]
    checks = {
        "nothing_lost": all(row["lost_or_failed"] == 0 for row in rows),
        "nothing_wrong": all(row["wrong"] == 0 for row in rows),
        "accepted_in_time": all(row["late_504"] == 0 and row["max_ms"] < 1e3 * args.deadline_seconds for row in rows),
        "overload_is_refused": rows[-1]["refused_429"] > 0,
        "every_size_is_answered": all(part["answered"] for row in rows for part in row["by_documents"].values()),
    }
    print(json.dumps({"benchmark": "serve_load", "model": args.model.name, "dtype": args.dtype, **figures, **checks}))
    if not all(checks.values()):
        raise SystemExit(f"failed: {', '.join(name for name, held in checks.items() if not held)}")


if __name__ == "__main__":
    main()
