"""The registry: moves, refusals, the log, kills at every step, many at once, the command line."""

import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from core_jax import registry
from core_jax.registry import Registry, RegistryError, content_digest

HERE = pathlib.Path(__file__).parent
REPOSITORY = HERE.parents[1]
WHO = {"who": "ada", "why": "because"}


def passes(folder):
    if (folder / "weights").read_text() == "broken":
        raise ValueError("golden input 0 is answered otherwise")


@pytest.fixture
def of(tmp_path):
    return Registry(tmp_path / "registry", passes, clock=lambda: 86400.0)


def model(tmp_path, name):
    folder = tmp_path / name
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(name)
    (folder / "tokenizer" / "vocab").write_text("a b c")
    return folder


def published(of, tmp_path, *names):
    return [of.publish(model(tmp_path, name), **WHO) for name in names]


def test_a_version_is_named_by_its_content(of, tmp_path):
    first, second = published(of, tmp_path, "first", "second")
    assert first != second and first == content_digest(of.path(first)) == content_digest(model(tmp_path, "first"))
    assert published(of, tmp_path, "first") == [first]
    assert (of.path(first) / "tokenizer" / "vocab").read_text() == "a b c"
    assert of.production() is None
    assert [record["action"] for record in of.history()] == ["publish", "publish"]
    renamed = model(tmp_path, "renamed")
    (renamed / "weights").write_text("first")
    (renamed / "tokenizer" / "vocab").rename(renamed / "tokenizer" / "words")
    assert of.publish(renamed, **WHO) != first


def test_promote_and_two_rollbacks(of, tmp_path):
    first, second, third = published(of, tmp_path, "first", "second", "third")
    for version in (first, second, third):
        of.promote(version, who="ada", why="better", figures={"log_ratio": 0.25})
    assert of.production() == third
    assert (of.folder / "production" / "weights").read_text() == "third"
    assert of.rollback(**WHO) == second == of.production()
    assert of.rollback(**WHO) == first == of.production()
    with pytest.raises(RegistryError, match="no version was in production before"):
        of.rollback(**WHO)
    assert of.production() == first
    of.promote(third, **WHO)
    of.promote(second, **WHO)
    assert of.rollback(to=first[:8], **WHO) == first
    moves = [(record["action"], record["from"], record["to"]) for record in of.history()[3:]]
    assert moves == [
        ("promote", None, first), ("promote", first, second), ("promote", second, third), ("rollback", third, second),
        ("rollback", second, first), ("promote", first, third), ("promote", third, second), ("rollback", second, first),
    ]  # fmt: skip
    record = of.history()[3]
    assert record["figures"] == {"log_ratio": 0.25} and record["time"] == "1970-01-02T00:00:00+00:00"
    assert (record["who"], record["why"]) == ("ada", "better")


def test_an_old_version_promoted_again_rolls_back_to_what_was_there_before(of, tmp_path):
    first, second = published(of, tmp_path, "first", "second")
    for version in (first, second, first):
        of.promote(version, **WHO)
    assert of.rollback(**WHO) == second


def test_promoting_what_is_in_production_already_keeps_the_way_back(of, tmp_path):
    first, second = published(of, tmp_path, "first", "second")
    for version in (first, second, second):
        of.promote(version, **WHO)
    assert of.rollback(**WHO) == first
    with pytest.raises(RegistryError, match="no version was in production before"):
        of.rollback(**WHO)


@pytest.mark.parametrize("name", ["/etc", "../audit", "*", "[0-9a-f]"])
def test_a_version_is_no_path_and_no_pattern(of, tmp_path, name):
    published(of, tmp_path, "first")
    with pytest.raises(RegistryError, match="begins 0 versions"):
        of.promote(name, **WHO)


def test_a_line_that_is_no_record_is_told_by_its_number(of, tmp_path):
    published(of, tmp_path, "first", "second")
    log = of.folder / "audit.jsonl"
    log.write_bytes(log.read_bytes() + b"null\n")
    with pytest.raises(RegistryError, match=r"audit\.jsonl:3: no record of a move"):
        of.history()


def test_what_does_not_verify_does_not_move_the_pointer(of, tmp_path):
    first, second, broken = published(of, tmp_path, "first", "second", "broken")
    of.promote(first, **WHO)
    of.promote(second, **WHO)
    with pytest.raises(RegistryError, match="self-test: golden input 0"):
        of.promote(broken, **WHO)
    with pytest.raises(RegistryError, match="begins 0 versions"):
        of.promote("abc123", **WHO)
    with pytest.raises(RegistryError, match="begins 3 versions"):
        of.promote("", **WHO)
    (of.path(first) / "weights").write_text("changed")
    with pytest.raises(RegistryError, match="was changed"):
        of.rollback(**WHO)
    assert of.production() == second
    assert [record["action"] for record in of.history()] == ["publish"] * 3 + ["promote"] * 2


def test_a_candidate_takes_the_place_of_the_incumbent_it_was_compared_with_only(of, tmp_path):
    first, second, third = published(of, tmp_path, "first", "second", "third")
    of.promote(first, **WHO)
    of.promote(second, instead_of=first, **WHO)
    with pytest.raises(RegistryError, match="was compared with"):
        of.promote(third, instead_of=first, **WHO)
    assert of.production() == second


def test_a_changed_log_is_noticed_and_a_torn_line_is_none(of, tmp_path):
    first, second = published(of, tmp_path, "first", "second")
    of.promote(first, **WHO)
    log = of.folder / "audit.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"action": "promote", "to": "')
    assert len(of.history()) == 3
    of.promote(second, **WHO)
    assert [record["to"] for record in of.history()] == [first, second, first, second]
    log.write_bytes(log.read_bytes().replace(b"because", b"by fate", 1))
    with pytest.raises(RegistryError, match=r"audit.jsonl:2"):
        of.history()


def test_a_link_set_by_hand_is_written_down_by_the_next_command(of, tmp_path):
    first, second = published(of, tmp_path, "first", "second")
    of.promote(first, **WHO)
    (of.folder / "production").unlink()
    (of.folder / "production").symlink_to(pathlib.Path("versions", second))
    of.promote(first, **WHO)
    assert [(r["action"], r["from"], r["to"]) for r in of.history()[3:]] == [
        ("recovered", first, second),
        ("promote", second, first),
    ]
    assert of.rollback(**WHO) == second


def test_killed_at_every_step_the_pointer_names_a_complete_version(tmp_path):
    run = subprocess.run(
        [sys.executable, HERE / "killed_registry.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["deaths"] > 150
    assert found["seen"] == [
        ["second", "as logged"],  # before, and after the rollback
        ["second", "log ahead"],  # the promotion is written down, the link not yet changed
        ["third", "as logged"],
        ["third", "log ahead"],
    ]


def test_many_promote_at_once_and_the_log_is_one_chain(of, tmp_path):
    versions = published(of, tmp_path, *(f"m{i}" for i in range(12)))

    def promote(version):
        Registry(of.folder, passes).promote(version, **WHO)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(promote, versions))
    records = [record for record in of.history() if record["action"] == "promote"]
    assert {record["to"] for record in records} == set(versions)
    assert [record["from"] for record in records] == [None, *(record["to"] for record in records[:-1])]
    assert of.production() == records[-1]["to"]


def test_a_relevance_model_is_no_rewriter(tmp_path, relevance_folder):
    of = Registry(tmp_path / "registry", registry.golden_self_test)
    version = of.publish(relevance_folder, **WHO)
    with pytest.raises(
        RegistryError, match=r"does not pass its self-test: .* is no rewriter: it has no rewriter\.json"
    ):
        of.promote(version, **WHO)
    assert of.production() is None


def test_a_folder_that_is_no_registry_stays_as_it_is(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        registry.main([f"--registry={tmp_path}", "history"])
    assert "--registry: there is none in" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_the_command_line_goes_back_with_one_command(of, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(registry, "golden_self_test", passes)

    def command(*arguments):
        registry.main([f"--registry={of.folder}", "--who=grace", *arguments])
        return capsys.readouterr().out

    first = command("publish", str(model(tmp_path, "first")), "--why=start").strip()
    second = command("publish", str(model(tmp_path, "second")), "--why=next").strip()
    command("promote", first[:8], "--why=start")
    command("promote", second, "--why=better")
    command("rollback", "--why=clicks fell")
    assert of.production() == first
    assert command("verify") == f"{first} is whole and passes\n"
    lines = command("history").splitlines()
    assert (
        len(lines) == 5 and lines[-1].endswith("grace: clicks fell") and f"{second[:12]} -> {first[:12]}" in lines[-1]
    )
    with pytest.raises(SystemExit, match="2"):
        command("rollback", "--why=again")
    assert "no version was in production before" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        registry.main([f"--registry={tmp_path / 'mistyped'}", "history"])
    assert "mistyped; publish makes one" in capsys.readouterr().err and not (tmp_path / "mistyped").exists()


def test_a_rollback_to_a_version_rolled_back_before_keeps_the_way_back(of, tmp_path):
    first, second, third = published(of, tmp_path, "first", "second", "third")
    for version in (first, second, third):
        of.promote(version, **WHO)
    assert of.rollback(**WHO) == second
    assert of.rollback(**WHO, to=third) == third
    assert of.rollback(**WHO) == second


def test_killed_while_it_is_mended_a_version_in_production_is_still_there(of, tmp_path, monkeypatch):
    (first,) = published(of, tmp_path, "first")
    of.promote(first, **WHO)
    source = model(tmp_path, "first")
    template = shutil.copytree(of.folder, tmp_path / "template", symlinks=True)
    (template / "versions" / first / "weights").write_text("rot")
    (template / "versions" / first / "tokenizer" / "vocab").unlink()
    (template / "versions" / first / "stray").mkdir()
    (template / "versions" / first / "stray" / "file").write_text("x")

    class Killed(BaseException):
        pass

    for steps in itertools.count():
        shutil.rmtree(of.folder)
        shutil.copytree(template, of.folder, symlinks=True)
        left = itertools.count(steps, -1)
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "unlink", "rmdir"):
                real = getattr(pathlib.Path, name)

                def step(*arguments, real=real, left=left, **options):
                    if next(left) <= 0:
                        raise Killed
                    return real(*arguments, **options)

                patch.setattr(pathlib.Path, name, step)
            try:
                of.publish(source, **WHO)
                ended = True
            except Killed:
                ended = False
        assert (of.folder / "production" / "weights").read_text() in ("rot", "first")
        assert of.publish(source, **WHO) == first and of.verify(first)
        assert not list(of.path(first).glob("stray"))
        if ended:
            break
    assert steps > 3


def test_a_log_whose_end_was_cut_off_is_noticed(of, tmp_path):
    first, second = published(of, tmp_path, "first", "second")
    of.promote(first, **WHO)
    log, head = of.folder / "audit.jsonl", of.folder / "head"
    before, named = log.read_bytes(), head.read_text()
    of.promote(second, **WHO)
    whole = log.read_bytes()
    for cut in (before, b""):
        log.write_bytes(cut)
        with pytest.raises(RegistryError, match=r"audit\.jsonl:\d: the log ends here, before .*head names"):
            of.history()
        with pytest.raises(RegistryError, match="the log ends here"):
            of.rollback(**WHO)
    log.write_bytes(whole)
    head.write_text(named)  # as a kill between the two leaves it
    assert len(of.history()) == 4 and of.rollback(**WHO) == first
    log.write_bytes(whole)
    with pytest.raises(RegistryError, match="the log ends here"):
        of.history()


def test_publishing_again_mends_a_damaged_version(of, tmp_path):
    (first,) = published(of, tmp_path, "first")
    of.promote(first, **WHO)
    (of.path(first) / "weights").write_text("rot")
    with pytest.raises(RegistryError, match="was changed"):
        of.verify(first)
    assert published(of, tmp_path, "first") == [first]
    assert of.verify(first) == of.path(first) and (of.folder / "production" / "weights").read_text() == "first"


def test_the_command_line_works_for_a_user_without_a_name(of, tmp_path, capsys, monkeypatch):
    def nameless():
        raise KeyError("uid not found")

    monkeypatch.setattr(registry.getpass, "getuser", nameless)
    registry.main(["--registry", str(of.folder), "publish", str(model(tmp_path, "first")), "--why=x"])
    assert of.history()[0]["who"] == f"uid {os.getuid()}"
    with pytest.raises(SystemExit):
        registry.main(["--registry", str(of.folder), "verify"])
    assert "nothing is in production" in capsys.readouterr().err
