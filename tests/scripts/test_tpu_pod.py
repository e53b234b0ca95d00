"""The pod script's decisions, with a gcloud of one worker: what is to run there runs here, in a home made up."""

import os
import pathlib
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts/tpu_pod.sh"
READ_ONE = """
next_of() { # a line a call, the last one again and again
    head -n 1 "$FAKE/$1"
    [ "$(wc -l < "$FAKE/$1")" = 1 ] || sed -i 1d "$FAKE/$1"
}
"""
# A state, a creation, an end of ssh a call; a line that begins with ! is an error.
GCLOUD = f"""#!/usr/bin/env bash
{READ_ONE}
told() {{ case $1 in !*) echo "ERROR: ${{1#!}}" >&2; exit 1 ;; esac }}
if [ "$1" = storage ]; then
    case $2 in
    cat) cat "$FAKE/home/bucket/status/"* ;;
    rm) rm -f "$FAKE/home/bucket/status/"* ;;
    ls) cat "$FAKE/left" 2> /dev/null ;;
    esac
    exit
fi
case $4 in
describe)
    line=$(next_of states)
    echo "Updates are available." >&2
    told "$line"
    echo "$line" ;;
create)
    echo create >> "$FAKE/asked"
    told "$(next_of creations)"
    rm -rf "$FAKE/home/afrl/installed" ;;
delete) echo delete >> "$FAKE/asked" ;;
scp) echo scp >> "$FAKE/asked" ;;
ssh)
    command=${{*: -2:1}}
    command=${{command#--command=}}
    case $command in
    *apt-get*) echo install >> "$FAKE/asked"; mkdir -p "$FAKE/home/afrl"; touch "$FAKE/home/afrl/installed"; exit ;;
    *setsid*) echo start >> "$FAKE/asked" ;;
    esac
    cd "$FAKE/home" && HOME=$FAKE/home bash -c "$command" || exit $?
    case $command in *setsid*) exit "$(next_of ssh)" ;; esac ;;
esac
"""
PYTHON = f"""#!/usr/bin/env bash
{READ_ONE}
printf '%s\\n' "$@" > "$FAKE/arguments"
printf '%s\\n' "$JAX_COMPILATION_CACHE_DIR" > "$FAKE/cache"
mkdir "$FAKE/lives" || echo twice >> "$FAKE/asked"
/bin/sleep 0.5
rmdir "$FAKE/lives"
case $(next_of progress) in yes) echo checkpoint >> "$FAKE/left" ;; esac
status=$(next_of ends)
[ "$status" = gone ] && kill -9 $PPID
exit "$status"
"""
QUIET = "#!/bin/sh\n"


@pytest.fixture
def pod(tmp_path):
    """Runs the script with what the outside says, a line a call: (what ran, what was asked for)."""
    (tmp_path / "home/afrl/.venv/bin").mkdir(parents=True)
    (tmp_path / "home/afrl/installed").touch()
    (tmp_path / "home/bucket/status").mkdir(parents=True)
    commands = {
        "gcloud": GCLOUD, "sleep": "#!/bin/sh\nexec /bin/sleep 0.2\n", "tar": QUIET, "gcsfuse": QUIET,
        "hostname": "#!/bin/sh\necho w-0\n",
        "mountpoint": '#!/bin/sh\n[ -e "$FAKE/mounted" ]\n',
        "home/afrl/.venv/bin/python": PYTHON,
    }  # fmt: skip
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mounted").touch()
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "TPU": "t", "ZONE": "z"}
    environment |= {"BUCKET": "b", "SLICE": "v5p-8"}

    def run(*arguments, script=SCRIPT, **said):
        for name, lines in ({"creations": ["made"], "ssh": ["0"], "progress": ["no"], "ends": ["0"]} | said).items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        ran = subprocess.run(
            ["bash", script, "run", *arguments], env=environment, cwd=tmp_path, capture_output=True, timeout=120
        )
        asked = tmp_path / "asked"
        return ran, asked.read_text().split() if asked.exists() else []

    run.folder = tmp_path
    return run


NEW = ["create", "scp", "install"]


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ({"states": ["READY"]}, ["start"]),
        ({"states": ["PREEMPTED", "!NOT_FOUND: gone", "READY"]}, ["delete", *NEW, "start"]),
        ({"states": ["!NOT_FOUND: Resource 'x' was not found", "READY"]}, [*NEW, "start"]),
        ({"states": ["!UNAUTHENTICATED: expired", "!unreachable", "CREATING", "READY"]}, ["start"]),
        (
            {"states": ["!NOT_FOUND"] * 3 + ["READY"], "creations": ["!no more capacity in the zone"] * 2 + ["made"]},
            ["create", "create", *NEW, "start"],
        ),
    ],
)  # fmt: skip
def test_a_slice_is_made_where_there_is_none_and_deleted_only_when_it_is_known_to_be_lost(pod, said, asked):
    ran, found = pod("--config=c", **said)
    assert ran.returncode == 0, ran.stderr.decode()
    assert found == asked
    told = [state for state in said["states"] if state.startswith("!U") or state == "CREATING"]
    assert all(state.removeprefix("!") in ran.stderr.decode() for state in told)


def test_a_slice_that_cannot_be_is_not_asked_for_again(pod):
    ran, asked = pod(states=["!NOT_FOUND"], creations=["!INVALID_ARGUMENT: no such type"])
    assert (ran.returncode, asked) == (1, ["create"])
    assert "no such type" in ran.stderr.decode()


@pytest.mark.parametrize(
    ("ends", "status", "starts"),
    [
        (["0"], 0, 1),
        (["1"], 1, 1),
        (["2"], 2, 1),
        (["75", "0"], 0, 2),
        (["134", "0"], 0, 2),
        (["255", "0"], 0, 2),
        (["gone", "0"], 0, 2),  # a machine that went down wrote nothing
    ],
)
def test_the_runs_own_status_decides(pod, ends, status, starts):
    ran, asked = pod("--config=c", states=["READY"], ends=ends)
    assert ran.returncode == status, ran.stderr.decode()
    assert asked == ["start"] * starts


@pytest.mark.parametrize("ssh", ["1", "255"])
def test_what_ssh_says_is_not_the_runs_verdict(pod, ssh):
    ran, asked = pod("--config=c", states=["READY"], ssh=[ssh, "0"], ends=["0", "1"])
    assert ran.returncode == 0, ran.stderr.decode()
    assert asked == ["start"]


@pytest.mark.parametrize(("progress", "starts", "status"), [(["no"], 5, 1), (["no", "yes", "no"], 7, 1)])
def test_starts_without_progress_come_to_an_end(pod, progress, starts, status):
    ran, asked = pod("--config=c", states=["READY"], ends=["134"], progress=progress)
    assert (ran.returncode, asked) == (status, ["start"] * starts)
    assert "given up" in ran.stderr.decode()


def test_arguments_arrive_as_they_were_given(pod):
    given = ["--config=a b.py", '--config.stages=("sft","rl")', "--config.title=it's $HOME"]
    ran, _ = pod(*given, states=["READY"])
    assert ran.returncode == 0, ran.stderr.decode()
    found = (pod.folder / "arguments").read_text().splitlines()
    assert found == ["-m", "afrl_jax.main", "--workdir=../bucket/run", *given]
    assert (pod.folder / "cache").read_text() == f"{pod.folder / 'home'}/bucket/compiled\n"


def test_without_the_bucket_nothing_is_started(pod):
    (pod.folder / "mounted").unlink()
    ran, asked = pod("--config=c", states=["READY"])
    assert ran.returncode == 1 and asked == ["start"] * 5
    assert not (pod.folder / "arguments").exists()


def test_a_run_that_lives_is_followed_and_no_second_one_started(pod):
    """Another start's: it holds the lock for longer than a new one waits, then writes its status."""
    script = SCRIPT.read_text()
    assert "flock -w 150" in script
    quick = pod.folder / "quick.sh"
    quick.write_text(script.replace("flock -w 150", "flock -w 0.2"))
    lives = "echo locked; /bin/sleep 3; echo 0 > home/bucket/status/w-0"
    holding = ["flock", "home/afrl.lock", "bash", "-c", lives]
    with subprocess.Popen(holding, cwd=pod.folder, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        ran, asked = pod("--config=c", states=["READY"], script=quick)
    assert first.returncode == 0
    assert (ran.returncode, asked) == (0, ["start"]), ran.stderr.decode()
    assert not (pod.folder / "arguments").exists()
