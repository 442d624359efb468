"""Preflight: silent on a sound run, and each kind of trouble is found before the run starts."""

import json
from pathlib import Path

import pytest

from svdtune.config.load import load_config
from svdtune.data.demo import write_demo
from svdtune.guards.findings import Finding, Report, Stage
from svdtune.guards.preflight import check_model, run_preflight

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_demo(folder, clips=3, motion="down", seed=0)
    return folder


def report(clips, *overrides):
    return run_preflight(load_config(TINY, [f"data.root={clips}", "train.batch_size=1", *overrides]))


def codes(found):
    return [(finding.code, finding.severity) for finding in found.findings]


def test_a_sound_run_has_no_findings(clips):
    found = report(clips)
    assert codes(found) == []
    assert found.ok
    assert [(stage.name, stage.status) for stage in found.stages] == [("data", "ok"), ("model", "ok"), ("shapes", "ok")]
    assert found.axes == {"b": 1, "t": 8, "h": 64, "w": 96, "c": 3, "z": 4, "f": 8, "d": 64, "m": 3}


def test_no_clips_is_an_error_and_the_other_stages_still_run(tmp_path):
    found = report(tmp_path)
    assert codes(found) == [("DAT301", "error")]
    assert "no videos in" in found.findings[0].got
    assert [stage.status for stage in found.stages] == ["failed", "ok", "ok"]
    assert not found.ok


def test_a_clip_that_would_be_left_out_is_a_warning(clips, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.mp4").symlink_to(clips / "demo-0000.mp4")
    (folder / "text.mp4").write_text("not a video")
    found = report(folder)
    assert codes(found) == [("DAT302", "warning")]
    assert found.findings[0].where.endswith("text.mp4")
    assert found.ok


def test_a_missing_model_skips_the_shapes(clips, tmp_path):
    found = report(clips, f"model.pretrained={tmp_path / 'gone'}")
    assert codes(found) == [("CKP201", "error")]
    assert [stage.status for stage in found.stages] == ["ok", "failed", "skipped"]


def test_another_number_of_frames_is_a_warning_with_the_change(clips):
    found = report(clips, "data.num_frames=5")
    assert codes(found) == [("CKP202", "warning")]
    assert found.findings[0].patch == ("data.num_frames=8",)
    assert not found.findings[0].verified


def test_ignored_findings_are_shown_and_do_not_count(clips):
    found = report(clips, "data.num_frames=5", "preflight.ignore=[CKP202]")
    assert codes(found) == []
    assert "ignored CKP202" in found.render()


def test_shapes_runs_the_real_step(clips, monkeypatch):
    """Break the conditioning that training uses, and preflight fails with the record's field."""
    from svdtune.diffusion import conditioning

    ids = conditioning.added_time_ids
    monkeypatch.setattr(conditioning, "added_time_ids", lambda *a: ids(*a)[:, :1])
    found = report(clips)
    assert codes(found) == [("SHP401", "error")]
    assert "UNetInput.added_time_ids: got (1, 1), expected (b m) = (1, 3)" in found.findings[0].got


def test_shapes_runs_backward(clips, monkeypatch):
    from svdtune.diffusion import edm

    monkeypatch.setattr(
        edm, "v_loss", lambda output, target: edm.reduce((output.detach() - target) ** 2, "b ... -> b", "mean")
    )
    found = report(clips)
    assert codes(found) == [("SHP401", "error")]
    assert "does not require grad" in found.findings[0].got


def test_lora_targets_that_match_nothing_are_found(clips):
    found = report(clips, "adapt.method=lora", "adapt.targets=[attn1.to_quary]")
    assert codes(found) == [("SHP401", "error")]
    assert "Did you mean" in found.findings[0].got


def test_an_image_to_sample_from_that_cannot_be_opened_is_found(clips, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    found = report(clips, f"validation.images=[{tmp_path / 'text.png'},{tmp_path / 'gone.png'}]")
    assert codes(found) == [("DAT303", "error"), ("DAT303", "error")]
    assert "text.png" in found.findings[0].got
    assert "gone.png" in found.findings[1].got


def test_weights_still_to_be_downloaded_are_said(clips, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    xt = load_config(TINY.parent / "svd_xt_lora.yaml", [f"data.root={clips}"])
    assert [(f.code, f.severity) for f in check_model(xt)] == [("CKP203", "warning")]


def test_a_huge_batch_does_not_take_minutes(clips):
    """The VAE's chunks are a loop; 100,000 clips in chunks of 4 frames would be 200,000 fake encodings."""
    assert report(clips, "train.batch_size=100000").ok


def test_json_is_the_whole_report():
    finding = Finding("SHP401", "error", "train_step", "x", "y", "because", "do", ("a.b=1",))
    made = Report([Stage("shapes", 1.0, "failed")], [finding], axes={"b": 1})
    parsed = json.loads(json.dumps(made.as_json()))
    assert parsed["ok"] is False
    assert parsed["stages"] == [{"name": "shapes", "seconds": 1.0, "status": "failed"}]
    assert parsed["findings"][0].keys() == {
        "code",
        "severity",
        "where",
        "expected",
        "got",
        "why",
        "fix",
        "patch",
        "verified",
    }
    assert parsed["axes"] == {"b": 1}


def test_a_finding_reads_as_a_paragraph():
    made = Report(
        [Stage("model", 0.5, "ok")],
        [Finding("CKP202", "warning", "data.num_frames", "5", "8", "Why.", "data.num_frames=8")],
    )
    assert made.render() == (
        "preflight: model ok (0.5 s)\n"
        "  warning CKP202 data.num_frames: 5, expected 8\n"
        "      Why.\n"
        "      Fix: data.num_frames=8"
    )
