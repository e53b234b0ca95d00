"""What the commands that use a model share: its arguments, and errors told in one line to the person who made them."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence

from afrl_jax.schema import Instruction, Scale
from lm_jax.program import before_jax

KERNELS = ("auto", "xla", "pallas_tpu")  # with the names of `kernels.implementation`, which imports jax
CACHE_HELP = "of keys and values of queries, kept for their next documents (2 GiB, on a CPU 256 MiB); 0 keeps none"


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser whose --help is `description` as it is written, and that knows `--model`, how it is asked and computed.

    The program hands `--kernels` to `lm_jax.program.use_kernels`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="a model folder such as runs/quickstart/export, a hub id, or a .gguf file"
    )
    parser.add_argument(
        "--labels",
        help="zero-shot only: the scale, least relevant first, each label optionally with its meaning: "
        '"0=irrelevant,1=related,2=relevant"',
    )
    parser.add_argument("--task", help="zero-shot only: one sentence that tells the model what to judge")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="what kernels must run by (%(default)s)")
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an argument that is a whole number of at least `least`."""

    def whole(text: str) -> int:
        if not (text.removeprefix("-").isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole


def zero_shot_instruction(labels: str | None, task: str | None) -> Instruction | None:
    """The instruction that `--labels` and `--task` describe, None where neither is given.

    Raises:
        ValueError: the labels make no scale.
    """
    if labels is None and task is None:
        return None
    from afrl_jax.relevance_file import DEFAULT_INSTRUCTION

    scale = DEFAULT_INSTRUCTION.scale
    if labels is not None:
        parts = [[text.strip() for text in label.partition("=")[::2]] for label in labels.split(",")]
        if not all(label for label, _ in parts):
            raise ValueError(f"--labels: an empty label in {labels!r}")
        meanings = tuple(meaning for _, meaning in parts)
        scale = Scale(tuple(label for label, _ in parts), meanings if any(meanings) else ())
    return Instruction(DEFAULT_INSTRUCTION.task if task is None else task, scale)


@contextlib.contextmanager
def told_plainly(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A wrong argument, file or row found inside ends the program with status 2 and one message, no traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and settle what must be before JAX is imported: call it before that."""
    parsed = parser.parse_args(arguments)
    before_jax()
    return parsed
