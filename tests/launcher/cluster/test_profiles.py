"""Site profiles: found, judged, and turned into batch scripts that run nothing but what they should."""

import json
import shlex
import subprocess
from pathlib import Path

import msgspec
import pytest
from tests.launcher.scripted_runs import make_plan

from ftlaunch.backend.slurm import request
from ftlaunch.cluster.profiles import exclude, load_cluster
from ftlaunch.cluster.vocabulary import Cluster, seconds
from ftlaunch.errors import RecipeError, UserError
from ftlaunch.load import load_recipe
from ftlaunch.recipe.stages import Parallel, Sft


def write(folder: Path, text: str, name: str = "site") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str) -> dict[str, str]:
    with pytest.raises(RecipeError) as raised:
        load_cluster(str(write(folder, text)))
    return {problem.key: f"{problem.where.rpartition(':')[2]}: {problem.message}" for problem in raised.value.problems}


def test_the_projects_profile_comes_before_the_users_and_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load_cluster("dev").partition == "main"
    for folder, partition in (("home/.config/ftlaunch", "mine"), ("slurm/profiles", "ours")):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder, f'partition = "{partition}"', "dev")
        assert load_cluster("dev").partition == partition


def test_an_unknown_cluster_is_named_with_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no cluster") as raised:
        load_cluster("dve")
    assert raised.value.remedy == 'did you mean "dev"?'


def test_every_mistake_is_named_with_its_line(tmp_path: Path) -> None:
    text = 'partition = "a\\nb"\ntime_limit = "5h"\ngpu = "gres"\n[sbatch]\n"A b" = 1\n[stage.merge]\nqoss = "q"\n'
    assert problems(tmp_path, text) == {
        "partition": "1: has the control character '\\n' in 'a\\nb'",
        "time_limit": '2: expected a time as in "4:00:00" (hours, minutes, seconds) or "2-12:00:00" (with days), '
        "got '5h'",
        "gpu": "3: is not a known key",
        'sbatch."A b"': "5: expected a name that is a flag without its dashes, got 'A b'",
        "stage.merge.qoss": "7: is not a known key",
    }


def test_what_ftlaunch_sets_itself_is_not_to_be_set(tmp_path: Path) -> None:
    assert problems(tmp_path, "[sbatch]\ndependency = 3\npartition = 'x'") == {
        "sbatch.dependency": "2: is ftlaunch's own to set",
        "sbatch.partition": "3: is ftlaunch's own to set",
    }


def test_names_that_nothing_heeds_are_told_with_everything_else(tmp_path: Path) -> None:
    text = 'gpu = "none"\ntime_limit = "1:30"\nnotify = "echo ("\n'
    text += '[stage.sfft]\nqos = "q"\n[sbatch]\nparsable = true\nwait = true\n'
    with pytest.raises(RecipeError) as raised:
        load_cluster(str(write(tmp_path, text)))
    told = {problem.key: problem.remedy for problem in raised.value.problems}
    assert {*told} == {"gpu", "time_limit", "notify", "stage.sfft", "sbatch.parsable", "sbatch.wait"}
    assert {*problems(tmp_path, 'time_limit = "1:30"\nsignal_lead = "x"')} == {"signal_lead"}
    assert told["stage.sfft"] == 'did you mean "sft"?'


@pytest.mark.parametrize("key", ["setup", "notify"])
def test_lines_that_are_no_bash_are_refused(key: str, tmp_path: Path) -> None:
    line = """["echo 'open"]""" if key == "setup" else """"echo 'open\""""
    assert "is no bash" in problems(tmp_path, f"{key} = {line}")[key]


def test_a_profile_that_others_may_write_is_not_run(tmp_path: Path) -> None:
    path = write(tmp_path, 'setup = ["true"]')
    path.chmod(0o666)
    with pytest.raises(UserError, match="can be written by"):
        load_cluster(str(path))


def test_a_profile_extends_another_and_is_set_for_once(tmp_path: Path) -> None:
    write(tmp_path, 'partition = "gpu"\nqos = "q"\n[stage.merge]\nqos = "m"\n', "base")
    path = write(tmp_path, 'extends = "base.toml"\npartition = "debug"\n[stage.merge]\npartition = "cpu"\n')
    cluster = load_cluster(str(path), ["time_limit=0:20:00", "stage.merge.qos=other"])
    assert (cluster.partition, cluster.qos, cluster.time_limit) == ("debug", "q", "0:20:00")
    assert (cluster.stage["merge"].partition, cluster.stage["merge"].qos) == ("cpu", "other")
    with pytest.raises(RecipeError) as raised:
        load_cluster(str(path), ["partitoin=x"])
    assert str(raised.value).startswith("--site partitoin=x: partitoin: is not a known key")


@pytest.mark.parametrize(
    ("base", "why"), [("none-such", "no cluster"), ("./gone.toml", "no profile"), ("own", "extends")]
)
def test_a_base_that_cannot_be_had_is_told_with_its_line(
    tmp_path: Path, base: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm/profiles").mkdir(parents=True)
    path = write(tmp_path / "slurm/profiles", f'partition = "x"\nextends = "{base}"\n', "own")
    with pytest.raises(RecipeError) as raised:
        load_cluster(str(path))
    assert str(raised.value).startswith(f"{path}:2: extends: ")
    assert why in str(raised.value)


def test_the_first_line_of_setup_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "sourced.sh").write_text("false\nexport FOUND=1\n")
    lines = {
        "nosuch load cuda": "127 at: nosuch load cuda",
        "source /no/such": "1 at: source /no/such",
        "exit 0": "0 at: exit 0",
        f"source {tmp_path}/sourced.sh": None,
        "grep -q x /dev/null || true": None,
    }
    for line, told in lines.items():
        batch = tmp_path / "batch.sh"
        batch.write_text(script(Cluster(setup=[line])).replace("\nsrun ", "\necho started; exit 0; srun "))
        done = subprocess.run(["bash", str(batch)], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is (told is None), done.stderr
        assert ("started" in done.stdout) is (told is None)
        assert told is None or f"ftlaunch: setup ended the job with exit code {told}" in done.stderr


BANNER = "sbatch: warning: job 4711 is what the site says\n*** your batch job 12 hours limit ***\n"


@pytest.mark.parametrize(
    "printed", ["38", f"{BANNER}38", f"{BANNER}38;alpha\n*** bye 99 ***", f"{BANNER}Submitted batch job 38 on alpha"]
)
def test_the_id_of_a_job_is_not_what_a_site_prints_around_it(printed: str) -> None:
    assert request.Batch._get_job_id_from_submission_command(printed) == "38"


def test_a_run_folder_that_slurm_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "perc%j_%x", "train")
    with pytest.raises(UserError, match="a % or a backslash"):
        request.request(plan, plan.stages[0], Cluster())


def test_a_path_that_leads_nowhere_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no profile") as raised:
        load_cluster(str(tmp_path / "nothere.toml"))
    assert "nothere.toml.toml" not in str(raised.value)
    write(tmp_path, 'partition = "p"')
    assert load_cluster(str(tmp_path / "site")).partition == "p"


def test_a_time_limit_leaves_time_to_train(tmp_path: Path) -> None:
    found = problems(tmp_path, 'signal_lead = 300\n[stage.merge]\ntime_limit = "0:05:30"')
    assert found["stage.merge.time_limit"].startswith("3: leaves no time to train")


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("0:01:30", 90), ("4:00:00", 14400), ("1-00:00:01", 86401), ("90", 5400), ("2-0", 172800), ("1:30", 90)],
)
def test_seconds_of_a_time_limit(limit: str, expected: int) -> None:
    assert seconds(limit) == expected


def script(cluster: Cluster) -> str:
    plan = make_plan(Path("/runs/r"), "train")
    return request.request(plan, plan.stages[0], cluster).script


def flags(text: str) -> dict[str, str]:
    lines = [
        shlex.split(line.removeprefix("#SBATCH --"))[0] for line in text.splitlines() if line.startswith("#SBATCH")
    ]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_a_stage_is_given_what_the_profile_says() -> None:
    cluster = Cluster(
        partition="gpu",
        account="a1",
        cpus_per_node=8,
        memory_per_node="64G",
        exclude=["n7", "n9"],
        setup=["source /etc/profile", "module load cuda"],
        sbatch={"reservation": "course", "exclusive": True},
        srun=["--cpu-bind=none"],
    )
    text = script(cluster)
    found = flags(text)
    expected = {"partition": "gpu", "account": "a1", "cpus-per-task": "8", "mem": "64G", "exclude": "n7,n9"}
    expected |= {"reservation": "course", "exclusive": "", "time": "4:00:00", "signal": "USR2@120", "requeue": ""}
    assert expected.items() <= found.items()
    assert "\nsource /etc/profile\nmodule load cuda\n" in text
    assert "--kill-on-bad-exit=1 --wait=60 --export=ALL --cpus-per-task=8 --cpu-bind=none" in text


@pytest.mark.parametrize("text", ['exclude = ["n1"]\npartition = "a"\n', 'partition = "a"\n[sbatch]\nnice = 5\n'])
def test_nodes_are_excluded_in_the_profiles_own_text(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    before = load_cluster(str(path))
    exclude(str(path), ["n3", "n2"])
    assert load_cluster(str(path)) == msgspec.structs.replace(before, exclude=sorted({*before.exclude, "n2", "n3"}))


def test_a_text_that_cannot_be_changed_is_left_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, text := 'exclude = [\n  "n1",\n]\n')
    with pytest.raises(UserError, match="cannot be changed"):
        exclude(str(path), ["n2"])
    assert path.read_text() == text


def test_mail_comes_when_a_stage_fails_and_when_the_run_is_done() -> None:
    plan = make_plan(Path("/runs/r"), "train", "train")
    sent = [flags(request.request(plan, planned, Cluster(mail="me@site")).script) for planned in plan.stages]
    assert [(one["mail-user"], one["mail-type"]) for one in sent] == [("me@site", "FAIL"), ("me@site", "END,FAIL")]
    assert "mail-type" not in flags(script(Cluster()))


def test_a_task_runs_in_the_container_that_the_profile_names() -> None:
    inside = Cluster(container="apptainer:/images/ft one.sif", mounts=["/data", "/a:/b"], python="/opt/bin/python")
    task, _, afterwards = script(inside).rpartition("\nsrun ")[2].partition("\ncode=")
    binds = "--bind=/runs/r:/runs/r --bind=/data:/data --bind=/a:/b"
    python = f"apptainer exec {binds} '/images/ft one.sif' /opt/bin/python"
    assert f"{python} -u -m submitit" in task
    assert f"|| {python} -P -m ftlaunch.backend.slurm.epilogue /runs/r/01-sft $code\n" in afterwards
    text = script(msgspec.structs.replace(inside, container="pyxis:reg#ft"))
    task, _, afterwards = text.partition("\nsrun ")[2].partition("\ncode=")
    image = "'--container-image=reg#ft' --container-mounts=/runs/r:/runs/r,/data:/data,/a:/b "
    assert image in task
    assert " /opt/bin/python -u -m submitit" in task
    assert f'{image}--nodelist="$SLURMD_NODENAME" /opt/bin/python -P -m ftlaunch.backend.slurm.epilogue' in afterwards
    assert "apptainer" not in text


def test_without_scontrol_on_the_nodes_other_jobs_take_over() -> None:
    found = flags(script(Cluster(restart="successor")))
    assert "no-requeue" in found
    assert "requeue" not in found


def asked_for_gpus(cluster: Cluster) -> request.Request:
    """What SLURM is asked for on behalf of a training stage on two nodes with four processes each."""
    plan = make_plan(Path("/runs/r"), "train")
    parallel = Parallel(nodes=2, procs_per_node=4)
    spec = msgspec.structs.replace(plan.stages[0].spec, stage=Sft(data="d"), parallel=parallel)
    return request.request(plan, msgspec.structs.replace(plan.stages[0], spec=spec), cluster)


GPU_STYLES = {
    "gpus-per-node": {"gpus-per-node": "4"},
    "gpus-per-node:a100": {"gpus-per-node": "a100:4"},
    "gres": {"gres": "gpu:4"},
    "gres:a100": {"gres": "gpu:a100:4"},
    "none": {},
}


@pytest.mark.parametrize("style", GPU_STYLES)
def test_gpus_are_asked_for_as_the_site_wants_it(style: str) -> None:
    found = flags(asked_for_gpus(Cluster(gpus=style)).script)
    assert {key: found[key] for key in ("gres", "gpus-per-node") if key in found} == GPU_STYLES[style]


def test_the_price_is_that_of_all_starts() -> None:
    asked = asked_for_gpus(Cluster(time_limit="2:00:00", max_restarts=4))
    assert asked.price == "2 nodes × 4 GPUs × 2:00:00 = 16 GPU-hours a start; at most 80 in 5 starts"
    assert asked.cpus == "as many CPUs as the site gives by default, often one (cpus_per_node) for 4 processes a node"
    assert (
        "= 3,200 GPU-hours a start; at most 6,400"
        in asked_for_gpus(Cluster(time_limit="400:00:00", max_restarts=1)).price
    )
    asked = asked_for_gpus(Cluster(time_limit="2:00:00", gpus="none", restart="successor", successors=1))
    assert asked.price == "2 nodes × 2:00:00 = 4 node-hours a start; at most 8 in 2 starts"


TRICKS = ("$(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "-x", "--wrap=true", "a,b", "\\")
LONG = "x" * 1024
FLAGS = ("partition", "account", "qos", "constraint", "exclude", "sbatch.comment", "mail", "stage.sft.qos")
WORDS = ("srun", "container", "mounts", "python")


def profile_with(key: str, text: str) -> str:
    """A profile in which one key is a text."""
    value = json.dumps({"container": f"pyxis:{text}", "mounts": f"/{text}"}.get(key, text))
    more = '\ncontainer = "pyxis:i"' if key == "mounts" else ""
    return f"{key} = {f'[{value}]' if key in ('exclude', 'srun', 'mounts') else value}{more}"


@pytest.mark.parametrize("key", FLAGS)
def test_the_value_of_a_flag_is_handed_over_as_it_is(key: str, tmp_path: Path) -> None:
    flag = {"sbatch.comment": "comment", "mail": "mail-user", "stage.sft.qos": "qos"}.get(key, key)
    for text in (*TRICKS, LONG):
        written = script(load_cluster(str(write(tmp_path, profile_with(key, text)))))
        assert flags(written)[flag] == text
        run_as_bash_would(written, tmp_path)


@pytest.mark.parametrize("key", WORDS)
def test_a_word_of_the_command_is_handed_over_as_it_is(key: str, tmp_path: Path) -> None:
    for text in (*TRICKS, LONG[:1000]):
        profile = str(write(tmp_path, profile_with(key, text)))
        if key == "mounts" and {*text} & {*":,"}:
            with pytest.raises(RecipeError, match="mounts"):
                load_cluster(profile)
            continue
        written = script(load_cluster(profile))
        words = shlex.split(written[written.index("\nsrun ") :])
        mounts = f"--container-mounts=/runs/r:/runs/r,/{text}:/{text}"
        assert {"container": f"--container-image={text}", "mounts": mounts}.get(key, text) in words
        run_as_bash_would(written, tmp_path)


def run_as_bash_would(written: str, folder: Path) -> None:
    """Everything of a batch script, with a srun that only takes note of its words."""
    told = folder / "words"
    srun = f"srun() {{ printf '%s\\n' \"$@\" > {shlex.quote(str(told))}; }}\n"
    subprocess.run(["bash", "-c", srun + written], cwd=folder, check=True)
    assert "--kill-on-bad-exit=1" in told.read_text()
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("text", [*TRICKS[:4], "a b", "ü"])
def test_a_runs_folder_is_handed_over_as_it_is(text: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / text, "train")
    written = request.request(plan, plan.stages[0], Cluster()).script
    assert flags(written)["chdir"] == str(tmp_path / text)
    run_as_bash_would(written, tmp_path)


@pytest.mark.parametrize("text", ['"a\\nb"', '"a\\rb"', '"a\\u0000b"', '"a\\u001bb"', f'"{"x" * 65536}"', '""'])
@pytest.mark.parametrize("key", [*FLAGS, *WORDS, "setup", "notify", "interface", "slurm_conf", "environment.A"])
def test_control_characters_and_endless_texts_are_refused(key: str, text: str, tmp_path: Path) -> None:
    value = f"[{text}]" if key in ("exclude", "setup", "srun", "mounts") else text
    assert len(problems(tmp_path, f"{key} = {value}")) == 1


@pytest.mark.parametrize("text", [*TRICKS, "a b", "x" * 65536, "a\nb"])
def test_a_runs_name_is_one_plain_word(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(f'name = {json.dumps(text)}\nmodel.path = "m"\n[[stage]]\nkind = "merge"\n')
    with pytest.raises(RecipeError, match="name"):
        load_recipe(tmp_path / "r.toml", [])


def test_digits_in_a_call_are_a_text_where_the_key_wants_one(tmp_path: Path) -> None:
    """SLURM's own forms, as a shell passes them on: minutes, all memory, an account that is a number."""
    called = ["time_limit=90", "memory_per_node=0", "account=12345", "stage.merge.time_limit=30", "environment.X=1"]
    numbers = ["cpus_per_node=8", "signal_lead=20", "hang_after=9", "max_restarts=2", "successors=1", "sbatch.nice=5"]
    cluster = load_cluster(str(write(tmp_path, "")), [*called, *numbers])
    assert (cluster.time_limit, cluster.memory_per_node, cluster.account) == ("90", "0", "12345")
    assert (cluster.stage["merge"].time_limit, cluster.environment) == ("30", {"X": "1"})
    assert (cluster.cpus_per_node, cluster.successors, cluster.sbatch) == (8, 1, {"nice": 5})
