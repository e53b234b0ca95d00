"""The registry of rewriters: versions by content, one production pointer, a log of every move.

  python -m core_jax.registry --registry=DIR history              who moved production, when, why, with which figures
  python -m core_jax.registry --registry=DIR rollback --why=...   back to the version before, after it passed its tests
  python -m core_jax.registry --registry=DIR publish FOLDER --why=...       a model folder becomes a version
  python -m core_jax.registry --registry=DIR promote VERSION --why=...      a version becomes production
  python -m core_jax.registry --registry=DIR verify [VERSION]     content and golden self-test, of production by default

In the folder: versions/<digest of the content>/, `production`, a symbolic link to one of them that programs read like a
folder, and audit.jsonl, a line a move, each carrying the digest of the line before; `head` has the digest of a line up
to which the log must reach: the last one, or the one before where a kill came in between. A move first writes its line,
then changes the link by one atomic rename. So whatever instant a process is killed at, the link names a complete
version; where a kill came between the two, the next command adds a line that says so. Moves wait for each other
(flock).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import getpass
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

MOVES = ("promote", "rollback", "recovered")
VERSIONS = "versions"


class RegistryError(ValueError):
    """A version is unknown, damaged, or does not pass its self-test; or the log was changed. Nothing was moved."""


class Registry:
    """A registry folder, made if absent.

    Args:
        self_test: called with a version's folder before it becomes production; raises where the version does not load
            or does not answer its golden inputs as recorded.
        clock: seconds since 1970.
    """

    def __init__(
        self, folder: Path | str, self_test: Callable[[Path], None], *, clock: Callable[[], float] = time.time
    ):
        self.folder, self._self_test, self._clock = Path(folder), self_test, clock
        self._versions, self._link, self._audit = (self.folder / n for n in (VERSIONS, "production", "audit.jsonl"))
        self._head = self.folder / "head"
        self._versions.mkdir(parents=True, exist_ok=True)

    def production(self) -> str | None:
        """The version in production, None before the first promotion."""
        try:
            return Path(os.readlink(self._link)).name
        except FileNotFoundError:
            return None

    def path(self, version: str) -> Path:
        """The folder of a version, given whole or by the beginning of its digest.

        Raises:
            RegistryError: no version, or more than one, begins so.
        """
        digests = [path for path in self._versions.iterdir() if not path.name.startswith(".")]
        found = [path for path in digests if path.name.startswith(version)]
        if len(found) != 1 or not version:
            raise RegistryError(f"{version!r} begins {len(found)} versions in {self._versions}")
        return found[0]

    def publish(self, source: Path | str, *, who: str, why: str, figures: Mapping[str, float] | None = None) -> str:
        """Copy a model folder in and return its version: the digest of all files' names and bytes.

        Production stays where it is. The same content again is the same version.
        """
        with self._locked():
            for left_over in self._versions.glob(".partial*"):
                shutil.rmtree(left_over)
            partial = self._versions / ".partial"
            shutil.copytree(source, partial)
            version = content_digest(partial)
            held = self._versions / version
            for path in (*partial.rglob("*"), partial):
                _flush(path)
            if not held.exists():
                partial.rename(held)
                _flush(self._versions)
            elif content_digest(held) != version:
                _mend(held, partial)
            shutil.rmtree(partial, ignore_errors=True)
            if not any(record["action"] == "publish" and record["to"] == version for record in self.history()):
                self._record("publish", who, why, None, version, figures)
            return version

    def verify(self, version: str) -> Path:
        """The folder of a version whose content is what its name says and whose self-test passes.

        Raises:
            RegistryError: one of the two is not so.
        """
        path = self.path(version)
        found = content_digest(path)
        if found != path.name:
            raise RegistryError(f"{path} was changed: its content has the digest {found}")
        try:
            self._self_test(path)
        except Exception as error:  # whatever keeps it from loading keeps it from production
            raise RegistryError(f"{path} does not pass its self-test: {error}") from error
        return path

    def promote(
        self,
        version: str,
        *,
        who: str,
        why: str,
        figures: Mapping[str, float] | None = None,
        instead_of: str | None = None,
    ) -> None:
        """Make a version production, after verifying it.

        Args:
            figures: what speaks for it, kept in the log.
            instead_of: the incumbent that it was compared with.

        Raises:
            RegistryError: it does not verify, or another than `instead_of` is in production by now.
        """
        with self._locked():
            now = self.production()
            if instead_of is not None and now != self.path(instead_of).name:
                raise RegistryError(f"{now} is in production, the candidate was compared with {instead_of}")
            self._move("promote", self.verify(version).name, who, why, figures)

    def rollback(self, *, who: str, why: str, to: str | None = None) -> str:
        """Go back to the version that was production before, or to the one named, after verifying it; returns it.

        Two rollbacks go back two promotions.

        Raises:
            RegistryError: there was none before, or it does not verify: production stays.
        """
        with self._locked():
            stack = self._promoted()
            if to is None and len(stack) < 2:
                raise RegistryError("no version was in production before this one")
            target = self.verify(stack[-2] if to is None else to).name
            self._move("rollback", target, who, why, None)
            return target

    def history(self) -> list[dict[str, Any]]:
        """The log, oldest first: time, action, who, why, from, to, figures. A last line that a kill cut short is none.

        Raises:
            RegistryError: a line was changed or taken out, or one is no record, by its number.
        """
        head = self._head.read_text().strip() if self._head.exists() else ""  # before the log, which may grow meanwhile
        records, before, reached = [], "", not head
        for number, line in enumerate(self._lines(), start=1):
            try:
                record = json.loads(line)
                previous = record["previous"]
            except (ValueError, TypeError, KeyError) as error:
                raise RegistryError(f"{self._audit}:{number}: no record of a move: {error!r}") from error
            if previous != before:
                raise RegistryError(f"{self._audit}:{number}: the line before it is not the one it was written after")
            records.append(record)
            before = hashlib.sha256(line).hexdigest()
            reached |= before == head
        if not reached:
            raise RegistryError(
                f"{self._audit}:{len(records)}: the log ends here, before the line that {self._head} names"
            )
        return records

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time. What a killed one left between log and link is told first."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            told, real = next(reversed(self._promoted()), None), self.production()
            if told != real:
                why = "production is not what the last move says: it was cut short, or the link was set by hand"
                self._record("recovered", "registry", why, told, real, None)
            yield

    def _promoted(self) -> list[str]:
        """Versions in the order they became production, without those that were rolled back.

        Promoting what is in production already changes nothing, and a move that a kill kept from happening is undone.
        """
        stack: list[str] = []
        before: list[str] = []
        for record in self.history():
            action, target = record["action"], record["to"]
            if action not in MOVES:
                continue
            last, before = before, list(stack)
            if action == "recovered" and last[-1:] == [target]:
                stack = last
            elif action == "promote":
                stack += [target] if stack[-1:] != [target] else []
            elif target is None or target in stack:
                while stack and stack[-1] != target:
                    stack.pop()
            else:  # a rollback to one that was not in production before, or a link set by hand
                stack.append(target)
        return stack

    def _move(self, action: str, target: str, who: str, why: str, figures: Mapping[str, float] | None) -> None:
        self._record(action, who, why, self.production(), target, figures)
        temporary = self.folder / ".production"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(Path(self._versions.name, target))
        temporary.replace(self._link)
        _flush(self.folder)

    def _lines(self) -> list[bytes]:
        """The complete lines of the log."""
        content = self._audit.read_bytes() if self._audit.exists() else b""
        return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)

    def _record(
        self, action: str, who: str, why: str, old: str | None, new: str | None, figures: Mapping[str, float] | None
    ) -> None:
        lines = self._lines()
        record = {
            "time": datetime.datetime.fromtimestamp(self._clock(), datetime.UTC).isoformat(timespec="seconds"),
            "action": action,
            "who": who,
            "why": why,
            "from": old,
            "to": new,
            "figures": dict(figures or {}),
            "previous": hashlib.sha256(lines[-1]).hexdigest() if lines else "",
        }
        with self._audit.open("ab") as file:
            file.truncate(sum(map(len, lines)))  # of a line that a kill cut short
            file.write(line := json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary = self.folder / ".head"
        temporary.write_text(hashlib.sha256(line).hexdigest() + "\n")
        _flush(temporary)
        temporary.replace(self._head)


def is_registry(folder: Path) -> bool:
    """Whether a registry is there already."""
    return (folder / VERSIONS).is_dir()


def _mend(damaged: Path, whole: Path) -> None:
    """Give a folder the files of another, each by one rename: at no instant is it gone, or worse than it was."""
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    for path in sorted(damaged.rglob("*"), reverse=True):  # what is inside a folder before the folder
        name = path.relative_to(damaged)
        if path.is_dir() and not path.is_symlink():
            if not any(file.is_relative_to(name) and file != name for file in files):
                path.rmdir()
        elif name not in files:
            path.unlink()
    for name in sorted(files):
        (damaged / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).replace(damaged / name)
    for path in (*damaged.rglob("*"), damaged):
        _flush(path)


def content_digest(folder: Path) -> str:
    """SHA-256, as hex digits, of the names and bytes of all files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            of_file = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{of_file} {path.relative_to(folder).as_posix()}\n".encode())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Make what was written to a file or folder outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def golden_self_test(folder: Path, mesh: Mesh | None = None) -> None:
    """Load a rewriter's folder and let it answer its golden inputs again; raises where it cannot, or answers otherwise.

    Where `mesh` is given it must be set.
    """
    from core_jax import rewriter  # it imports jax, which most commands here do not need

    rewriter.Rewriter.load(folder, mesh=mesh)
    if not json.loads((folder / rewriter.NAME).read_text(encoding="utf-8"))["golden"]:
        raise ValueError("the folder brings no golden contexts")


def main(arguments: Sequence[str] | None = None) -> None:
    """One command; status 2 and one line where it is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m core_jax.registry", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--registry", required=True, type=Path, metavar="DIR")
    parser.add_argument("--who", help="for the log; default: the user who runs this")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("history")
    for name, argument in (("publish", "folder"), ("promote", "version"), ("rollback", ""), ("verify", "")):
        command = commands.add_parser(name)
        if argument:
            command.add_argument(argument)
        if name == "verify":
            command.add_argument("version", nargs="?")
        else:
            command.add_argument("--why", required=True, help="for the log")
        if name == "rollback":
            command.add_argument("--to", metavar="VERSION", help="default: what was production before")
    args = parser.parse_args(arguments)
    args.who = args.who or _user()
    if args.command != "publish" and not is_registry(args.registry):
        parser.exit(2, f"{parser.prog}: error: --registry: there is none in {args.registry}; publish makes one\n")
    try:
        _run(args, Registry(args.registry, golden_self_test))
    except (RegistryError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name at times
        return f"uid {os.getuid()}"


def _run(args: argparse.Namespace, registry: Registry) -> None:
    match args.command:
        case "publish":
            print(registry.publish(args.folder, who=args.who, why=args.why))
        case "promote":
            registry.promote(args.version, who=args.who, why=args.why)
        case "rollback":
            registry.rollback(who=args.who, why=args.why, to=args.to)
        case "verify":
            if not (version := args.version or registry.production()):
                raise RegistryError("nothing is in production")
            print(f"{registry.verify(version).name} is whole and passes")
        case "history":
            for record in registry.history():
                moved = f"{(record['from'] or '-')[:12]} -> {(record['to'] or '-')[:12]}"
                print(f"{record['time']}  {record['action']:9}  {moved}  {record['who']}: {record['why']}")
                for name, figure in record["figures"].items():
                    print(f"    {name} {figure:.4g}")
    if args.command != "verify":
        print(f"production: {registry.production()}", file=sys.stderr)


if __name__ == "__main__":
    main()
