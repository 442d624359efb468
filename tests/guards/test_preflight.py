"""Preflight as a whole: stages, skipped ones, ignored findings, proved changes, what the verbs print and write."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from svdtune import cli
from svdtune.config.load import load_config
from svdtune.errors import PreflightError, UsageError
from svdtune.guards import clips as clips_stage
from svdtune.guards import settings, shapes
from svdtune.guards.findings import Finding, Report, Stage
from svdtune.guards.preflight import STAGES, Options, merged, run_preflight
from svdtune.guards.render import render
from svdtune.trainer.run_folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs"


def codes(report):
    return [(finding.code, finding.severity) for finding in report.findings]


def statuses(report):
    return {stage.name: stage.status for stage in report.stages}


def test_a_sound_run_has_no_findings(tiny):
    seen = []
    report = run_preflight(tiny(), Options(on_stage=seen.append))
    assert codes(report) == []
    assert report.ok
    assert statuses(report) == dict.fromkeys(STAGES, "ok")
    assert seen == report.stages
    assert report.axes == {"b": 1, "t": 8, "h": 64, "w": 96, "c": 3, "z": 4, "f": 8, "d": 64, "m": 3}
    assert report.predicted["trained_parameters"] > 10**6


def test_all_findings_are_collected(tiny, tmp_path):
    (tmp_path / "empty").mkdir()
    report = run_preflight(tiny(f"data.root={tmp_path / 'empty'}", "data.num_frames=5", "validation.images=[gone.png]"))
    assert {("DAT301", "error"), ("DAT303", "error"), ("CFG104", "warning")} <= set(codes(report))
    assert statuses(report)["shapes"] == "ok"
    assert not report.ok


def test_a_missing_model_skips_what_needs_its_configs(tiny, tmp_path):
    report = run_preflight(tiny(f"model.pretrained={tmp_path / 'gone'}"))
    assert ("CKP201", "error") in codes(report)
    assert [statuses(report)[name] for name in ("checkpoint", "shapes", "memory")] == ["failed", "skipped", "skipped"]
    assert report.axes == {}


def test_ignored_findings_are_shown_and_do_not_count(tiny):
    report = run_preflight(tiny("data.num_frames=5", "preflight.ignore=[CFG104]"))
    assert codes(report) == []
    assert "ignored      CFG104 data.num_frames (preflight.ignore)" in render(report)


def test_a_change_that_helps_is_marked_verified(tiny):
    [finding] = run_preflight(tiny("data.num_frames=5")).findings
    assert (finding.patch, finding.verified) == (("data.num_frames=8",), True)
    assert "set       data.num_frames=8   (verified: with it this finding is gone)" in render(Report([], [finding]))


def claim(monkeypatch, *findings):
    """The config stage says `findings`, each as long as its key has not the value that its patch gives."""
    real = settings.check_settings

    def check(config):
        said = [f for f in findings if not all(_set(config, override) for override in f.expected.split())]
        return [*real(config), *(replace(f, expected="") for f in said)]

    monkeypatch.setattr(settings, "check_settings", check)
    monkeypatch.setattr(shapes, "rehearse", lambda config: shapes.Rehearsal([]))


def _set(config, override):
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    return str(getattr(getattr(config, section), name)) == value


def test_a_change_that_does_not_help_is_dropped(tiny, monkeypatch):
    claim(monkeypatch, Finding("CFG104", "warning", "x", "y", "train.steps=1", patch=("train.log_interval=3",)))
    [finding] = run_preflight(tiny()).findings
    assert (finding.patch, finding.verified) == ((), False)


def test_a_change_that_breaks_something_else_is_dropped(tiny, monkeypatch):
    claim(monkeypatch, Finding("CFG104", "warning", "x", "y", "data.num_frames=7000", patch=("data.num_frames=7000",)))
    [finding] = run_preflight(tiny()).findings
    assert (finding.patch, finding.verified) == ((), False)


def test_a_change_that_the_schema_refuses_is_dropped(tiny, monkeypatch):
    claim(monkeypatch, Finding("CFG104", "warning", "x", "y", "train.lr=-1", patch=("train.lr=-1",)))
    [finding] = run_preflight(tiny()).findings
    assert (finding.patch, finding.verified) == ((), False)


def test_one_bad_change_does_not_take_a_good_one_along(tiny, monkeypatch):
    claim(
        monkeypatch,
        Finding("CFG104", "warning", "good", "y", "train.log_interval=3", patch=("train.log_interval=3",)),
        Finding("CFG104", "warning", "bad", "y", "data.num_frames=7000", patch=("data.num_frames=7000",)),
    )
    good, bad = run_preflight(tiny()).findings
    assert (good.patch, good.verified) == (("train.log_interval=3",), True)
    assert (bad.patch, bad.verified) == ((), False)


def test_a_change_that_undoes_one_before_it_is_dropped(tiny, monkeypatch):
    claim(
        monkeypatch,
        Finding("CFG104", "warning", "one", "y", "train.log_interval=3", patch=("train.log_interval=3",)),
        Finding("CFG104", "warning", "other", "y", "train.log_interval=4", patch=("train.log_interval=4",)),
    )
    one, other = run_preflight(tiny()).findings
    assert (one.verified, other.verified, other.patch) == (True, False, ())


def test_a_finding_that_another_change_mended_claims_no_change_of_its_own(tiny, monkeypatch):
    claim(
        monkeypatch,
        Finding("CFG104", "warning", "one", "y", "train.log_interval=3", patch=("train.log_interval=3",)),
        Finding("CFG104", "warning", "other", "y", "train.log_interval=3", fix="Set it.", patch=("run.seed=9",)),
    )
    one, other = run_preflight(tiny()).findings
    assert (one.verified, other.verified, other.patch) == (True, False, ())
    assert other.fix == "Set it. It is gone with the changes above."


def test_changes_that_help_only_together_are_offered_together(tiny, monkeypatch):
    def check(config):
        first = Finding("CFG104", "warning", "x", "y", "z", fix="First this.", patch=("train.log_interval=3",))
        then = replace(first, fix="Then that.", patch=("run.seed=9",))
        return [] if config.run.seed == 9 else [then if config.train.log_interval == 3 else first]

    claim(monkeypatch)
    monkeypatch.setattr(settings, "check_settings", check)
    [finding] = run_preflight(tiny()).findings
    assert (finding.verified, finding.patch) == (True, ("train.log_interval=3", "run.seed=9"))
    assert finding.fix == "First this. Then that."


def test_what_is_left_after_all_changes_is_told(tiny, monkeypatch):
    claim(
        monkeypatch,
        Finding("CFG104", "warning", "one", "y", "train.log_interval=3", patch=("train.log_interval=3",)),
        Finding("CFG105", "error", "adapt.targets", "y", "run.seed=9", fix="Think."),
    )
    report = run_preflight(tiny())
    assert [(f.code, f.where) for f in report.left] == [("CFG105", "adapt.targets")]
    assert "with all changes above: still CFG105 adapt.targets" in render(report)


def test_the_last_value_of_a_key_counts():
    assert merged([["train.lr=1", "run.seed=2"], ["train.lr=3"]]) == ["train.lr=3", "run.seed=2"]


def test_a_change_that_uncovers_a_later_stage_is_kept(tiny):
    """The dead target hid the memory stage, which now finds that nothing fits: that is not the change's fault."""
    config = tiny("adapt.method=lora", "adapt.targets=[attn2.to_q,attn1.to_q]")
    [finding] = run_preflight(config, Options(device_bytes=2**20)).findings
    assert (finding.code, finding.verified) == ("CFG105", True)


@pytest.mark.parametrize("stage", ["shapes", "memory"])
def test_a_stage_that_cannot_run_alone_says_why(tiny, tmp_path, stage):
    report = run_preflight(tiny(f"model.pretrained={tmp_path / 'gone'}"), Options(only=stage))
    assert codes(report) == [("CKP201", "error")]


@pytest.mark.parametrize("stage", STAGES)
def test_one_stage_alone(tiny, stage):
    report = run_preflight(tiny(), Options(only=stage))
    assert [(s.name, s.status) for s in report.stages] == [(stage, "ok")]
    assert codes(report) == []


def invoke(*arguments):
    """The verb as the command line runs it, errors as they would be printed."""
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


@pytest.fixture
def own(clips, tmp_path):
    return [CONFIGS / "tiny.yaml", f"data.root={clips}", f"run.dir={tmp_path / 'runs'}", "train.batch_size=1"]


def test_the_verb_prints_and_writes_the_report(own, tmp_path):
    done = invoke("preflight", *own, "data.num_frames=5")
    assert done.exit_code == 0, done.output
    assert "warning  CFG104" in done.stdout
    assert "preflight: 1 warning; needs about" in done.stdout
    written = json.loads((tmp_path / "runs" / "tiny" / "preflight.json").read_text())
    assert written["findings"][0]["verified"] is True


def test_json_is_one_object_with_all_that_the_design_names(own):
    done = invoke("preflight", *own, "data.num_frames=5", "--json")
    parsed = json.loads(done.stdout)
    assert parsed.keys() == {"ok", "stages", "findings", "ignored", "left", "axes", "predicted", "measured"}
    wanted = {"code", "severity", "where", "expected", "got", "why", "fix", "patch", "verified"}
    assert parsed["findings"][0].keys() == wanted
    assert parsed["predicted"]["peak_gib"] > 0


def test_errors_exit_with_3(own, tmp_path):
    done = invoke("preflight", *own, f"data.root={tmp_path}")
    assert done.exit_code == 3
    assert "error    DAT301" in done.stdout


def test_a_size_the_vae_would_floor_is_repaired_and_the_rest_is_checked(own, tmp_path):
    done = invoke("preflight", *own, "data.height=65", "data.num_frames=5", "--fix", tmp_path / "out.yaml", "--json")
    assert done.exit_code == 2
    first, second = json.loads(done.stdout)["findings"]
    assert (first["code"], first["patch"], first["verified"]) == ("CFG101", ["data.height=64"], True)
    assert (first["where"], first["got"]) == ("override 'data.height=65': data.height", "65")
    assert "the VAE would floor it silently" in first["expected"]
    assert (second["code"], second["verified"]) == ("CFG104", True)
    repaired = load_config(tmp_path / "out.yaml")
    assert (repaired.data.height, repaired.data.num_frames) == (64, 8)
    assert run_preflight(repaired).ok


def test_two_sizes_that_do_not_load_are_both_told_and_repaired(own, tmp_path):
    done = invoke("preflight", *own, "data.height=66", "data.width=97", "--fix", tmp_path / "out.yaml", "--json")
    found = json.loads(done.stdout)["findings"]
    assert [(f["code"], f["where"], f["patch"]) for f in found] == [
        ("CFG101", "override 'data.height=66': data.height", ["data.height=64"]),
        ("CFG101", "override 'data.width=97': data.width", ["data.width=96"]),
    ]
    assert load_config(tmp_path / "out.yaml").data.width == 96


def test_a_size_that_is_no_size_has_no_change_to_offer(own):
    [found] = json.loads(invoke("preflight", *own, "data.width=-96", "--json").stdout)["findings"]
    assert (found["patch"], found["verified"]) == ([], False)


@pytest.mark.parametrize("size", ["", "0", "much", "24 TiB"])
def test_a_gpu_of_no_size_is_refused(own, size):
    done = invoke("preflight", *own, "--gpu", size)
    assert isinstance(done.exception, UsageError)
    assert f"--gpu: got {size!r}, expected a size such as 24GiB" in str(done.exception)


def test_a_typing_mistake_is_a_finding_too(own):
    done = invoke("preflight", *own, "train.stepz=3", "--json")
    assert done.exit_code == 2
    [finding] = json.loads(done.stdout)["findings"]
    assert finding["code"] == "CFG101"
    assert "Did you mean train.steps?" in finding["got"]


def test_a_message_without_a_key_is_taken_apart_too(tmp_path):
    (tmp_path / "merge.yaml").write_text("train:\n  <<: {steps: 300}\n")
    [finding] = json.loads(invoke("preflight", tmp_path / "merge.yaml", "--json").stdout)["findings"]
    assert (finding["where"].endswith("merge.yaml:2"), finding["got"], finding["expected"]) == (
        True,
        "the key '<<'",
        "a plain name",
    )


def test_nothing_to_repair_writes_nothing(own, tmp_path):
    done = invoke("preflight", *own, "--fix", tmp_path / "out.yaml")
    assert done.exit_code == 0
    assert "was not written: there is nothing to repair" in done.stderr
    assert not (tmp_path / "out.yaml").exists()


def test_a_rented_gpu_that_is_too_small(own):
    done = invoke("preflight", *own, "--gpu", "30MiB")
    assert done.exit_code == 3
    assert "MEM701" in done.stdout
    fits = invoke("preflight", *own, "--gpu", "24GiB")
    assert fits.exit_code == 0
    assert ", of 24.0 GiB" in fits.stdout


def test_env_needs_no_configuration():
    done = invoke("preflight", "--only", "env", "--json")
    parsed = json.loads(done.stdout)
    assert parsed["environment"]["torch"]
    assert [stage["name"] for stage in parsed["stages"]] == ["env"]


def test_train_refuses_and_starts_nothing(own, tmp_path, capsys):
    config = load_config(own[0], [*own[1:], f"data.root={tmp_path}"])
    with pytest.raises(PreflightError, match=r"(?s)nothing was started.*DAT301"):
        cli._require_preflight(config)
    folder = tmp_path / "runs" / "tiny"
    assert {path.name for path in folder.iterdir()} <= {"preflight.json", "status.json", ".lock", ".status.lock"}
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
    assert status["reason"].startswith("preflight: DAT301 ")


def test_a_refusal_leaves_the_status_of_a_run_that_is_going_on(own, tmp_path):
    config = load_config(own[0], [*own[1:], f"data.root={tmp_path}"])
    folder = RunFolder(tmp_path / "runs" / "tiny")
    with folder.lock():
        folder.write_status(state="running", exit_code=None, reason=None, world_size=1)
        with pytest.raises(PreflightError):
            cli._require_preflight(config)
        assert json.loads((folder.path / "status.json").read_text())["state"] == "running"


def test_train_preflight_only_stops_after_it(own, tmp_path):
    done = invoke("train", *own, "--preflight-only")
    assert done.exit_code == 0, done.output
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["preflight.json"]


def test_configuration_only_never_imports_torch(own):
    code = (
        "import sys; from svdtune.cli import app\n"
        f"app(['preflight', *{list(map(str, own))!r}, 'data.num_frames=5', '--only', 'config'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.rstrip().endswith("False"), done.stderr
    assert "CFG104" in done.stdout


def test_two_ranks_refused_before_the_process_group(own, tmp_path):
    """Rank 0 prints the report once; nobody waits for a rank that never comes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "svdtune"]
    done = subprocess.run(
        [*command, "train", *map(str, own), f"data.root={tmp_path}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("error    DAT301") == 1


def test_training_and_preflight_break_alike(tiny, monkeypatch):
    """One step, three callers: a broken conditioning is refused by the rehearsal and by the real step."""
    from svdtune.diffusion import conditioning
    from svdtune.errors import ContractError
    from svdtune.trainer.run import train

    ids = conditioning.added_time_ids
    monkeypatch.setattr(conditioning, "added_time_ids", lambda *a: ids(*a)[:, :2])
    assert [f.where for f in shapes.rehearse(tiny()).findings] == ["UNetInput.added_time_ids"]
    with pytest.raises(ContractError, match=r"UNetInput\.added_time_ids: got \(1, 2\)"):
        train(tiny("validation.clips=0", "validation.samples=0"), config_text="")


def test_an_unforeseen_error_is_explained_before_its_traceback(tiny, capsys):
    message = "mat1 and mat2 shapes cannot be multiplied (4x32 and 96x256)"
    in_the_step, elsewhere = (
        compile(f"raise RuntimeError({message!r})", file, "exec")
        for file in ("/x/svdtune/trainer/step.py", "/x/mine.py")
    )
    with pytest.raises(RuntimeError, match="mat1"), cli._explained(tiny()):
        exec(in_the_step)
    assert "SHP402" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="mat1"), cli._explained(tiny()):
        exec(elsewhere)
    assert capsys.readouterr().err == ""


def test_an_error_nobody_knows_is_left_alone(tiny, capsys):
    with pytest.raises(KeyError), cli._explained(tiny()):
        raise KeyError("left")
    assert capsys.readouterr().err == ""


def test_a_stage_that_raises_is_told_and_takes_no_other_along(tiny, monkeypatch, capsys):
    def broken(*_args, **_keywords):
        raise ZeroDivisionError("nobody foresaw it")

    monkeypatch.setattr(clips_stage, "check_clips", broken)
    report = run_preflight(tiny("data.num_frames=5"))
    assert codes(report) == [("CFG104", "warning"), ("ENV014", "error")]
    assert (report.findings[1].where, report.findings[1].got) == (
        "stage data",
        "ZeroDivisionError: nobody foresaw it",
    )
    assert statuses(report) == {**dict.fromkeys(STAGES, "ok"), "data": "failed"}
    assert "Traceback" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_has_its_own_advice(tiny, monkeypatch):
    def denied(*_args, **_keywords):
        raise PermissionError(13, "Permission denied", "/models/unet/config.json")

    monkeypatch.setattr(clips_stage, "check_clips", denied)
    [finding] = run_preflight(tiny()).findings
    assert (finding.code, finding.got) == (
        "ENV014",
        "PermissionError: [Errno 13] Permission denied: '/models/unet/config.json'",
    )
    assert finding.fix == "Make it readable, or point elsewhere."


def test_a_finding_reads_as_a_block():
    finding = Finding("CFG101", "error", "data.height", "65", "64", "Because.", "Change it.", ("data.height=64",), True)
    report = Report([Stage("config", 0.04, "failed")], [finding], predicted={"peak_gib": 3.21})
    assert render(report).splitlines() == [
        "config       failed      0.0 s",
        "",
        "error    CFG101  the configuration cannot be read",
        "  where     data.height",
        "  got       65",
        "  expected  64",
        "  why       Because.",
        "  fix       Change it.",
        "  set       data.height=64   (verified: with it this finding is gone)",
        "",
        "with all changes above: no error left",
        "preflight: 1 error; needs about 3.2 GiB of device memory in each process",
    ]


class Watched:
    """A configuration that remembers which options were read."""

    def __init__(self, inside, name="", read=None):
        vars(self).update(inside=inside, name=name, read=set() if read is None else read)

    def __getattr__(self, key):
        value, name = getattr(self.inside, key), f"{self.name}.{key}".lstrip(".")
        if is_dataclass(value):
            return Watched(value, name, self.read)
        self.read.add(name)
        return value


def test_the_step_is_rehearsed_again_only_where_a_patch_changes_what_it_reads(tiny, monkeypatch):
    watched = Watched(tiny())
    shapes.rehearse(watched)
    sizes = {"data.num_frames", "data.height", "data.width", "data.latents"}
    whole = {"run", "model", "conditioning", "adapt", "train", "memory", "validation"}
    assert {name for name in watched.read if name.partition(".")[0] not in whole} == sizes
    rehearsed = []
    monkeypatch.setattr(shapes, "rehearse", lambda config: rehearsed.append(config) or shapes.Rehearsal([]))
    patched = run_preflight(
        tiny("tracking.backends=[wandb]", "tracking.wandb_mode=online", "conditioning.noise_aug=[-3.0,0.5]")
    )
    assert [finding.verified for finding in patched.findings] == [True]
    assert len(rehearsed) == 1
    run_preflight(tiny("data.num_frames=7"))
    assert [config.data.num_frames for config in rehearsed[1:]] == [7, 8]
