"""Explain: causes by arithmetic on the model's own numbers, and silence where nothing is known."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from svdtune.guards.catalog import RULES
from svdtune.guards.explain.messages import GRAMMAR
from svdtune.guards.explain.numbers import Numbers, shipped_numbers
from svdtune.guards.explain.report import CAUSES, explain, explain_exception, nearest_rules, render
from svdtune.guards.explain.spatial import failing_sizes, halvings
from svdtune.guards.explain.verb import explain_verb

ASSETS = Path(__file__).parents[1] / "assets"
SVD = replace(shipped_numbers(), own=True)
OTHER = Numbers(
    source="other", own=True, in_channels=10, latent_channels=5, id_width=96, ids_width=480, context=1536,
    channels=(192, 384, 576), heads=3, factor=4, clip_hidden=1664, clip_width=1536,
)  # fmt: skip
"""No width of this model occurs in SVD."""

OF_CLASS = {
    "A": ("CKP250", "CKP251", "CKP255", "SHP402"),
    "B": ("CKP252", "CKP253", "CKP254", "CKP256"),
    "C": ("SHP404", "SHP412"),
    "D": ("SHP411",),
    "E": ("SHP413", "SHP414", "SHP415"),
    "F": ("SHP402", "SHP403", "SHP414", "SHP415", "SHP416", "CKP257", "SEM550", "SEM551"),
    "G": ("NUM601", "NUM650", "NUM651"),
    "H": ("ENV050", "ENV051", "ENV052"),
    "I": ("DAT350", "DAT351", "DAT352"),
    "J": ("DST801", "DST802", "DST803", "DST804", "DST805", "SHP406", "CKP251"),
    "K": ("ENV055",),
    "L": ("MEM701",),
}
"""Codes that are right for a class of failures; SHP410, "two sizes do not agree", is right for none."""

ODD = Numbers(
    source="odd", own=True, in_channels=8, latent_channels=4, id_width=48, ids_width=144, context=88,
    channels=(32, 96, 160), heads=2, factor=8, clip_hidden=40, clip_width=88, height=64, width=96, batch=4,
)  # fmt: skip
"""The model on which the real texts of explained.txt were made."""
CASES = [
    (*map(str.strip, head.split("|")), text)
    for head, _, text in (block.partition("\n") for block in (ASSETS / "explained.txt").read_text().split("\n=== ")[1:])
]

TRACE = """Traceback (most recent call last):
  File "train.py", line 90, in <module>
    main()
  File "/site/diffusers/models/unets/unet_spatio_temporal_condition.py", line 363, in forward
    {code}
  File "/site/torch/nn/modules/module.py", line 1700, in _wrapped_call_impl
    return self._call_impl(*args, **kwargs)
  File "/site/torch/nn/modules/linear.py", line 120, in forward
    return F.linear(input, self.weight, self.bias)
RuntimeError: {message}
"""
IDS = "aug_emb = self.add_embedding(time_embeds)"
WORDINGS = (
    "mat1 and mat2 shapes cannot be multiplied ({}x{} and {}x{})",
    "a and b must have same reduction dim, but got [{}, {}] X [{}, {}].",
)


def rows():
    lines = (ASSETS / "failures.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines if not line.startswith("#")]


def codes(text: str, facts: Numbers | None = None) -> list[str]:
    return [one.code for one in explain(text, facts)]


def score(change, facts=None) -> tuple[int, int, list[str]]:
    missed = [
        row for row, kind, text in rows() if not (codes(change(text), facts) or ["none"])[0].startswith(OF_CLASS[kind])
    ]
    return len(rows()) - len(missed), len(rows()), missed


@pytest.mark.parametrize(("name", "assumed", "own", "text"), CASES, ids=[case[0] for case in CASES])
def test_texts_of_all_kinds(name, assumed, own, text):
    for facts, expected in ((None, assumed), (ODD, own)):
        told = explain(text, facts)
        assert (" ".join(f"{one.code}:{one.confidence}" for one in told) or "-") == expected, told
        for one in told:
            assert all(
                part.strip() == part and part for part in (one.title, one.reason, one.evidence, one.why, one.fix)
            )
            assert one.why.endswith(".")
            assert one.fix.endswith((".", ")"))
            assert not re.search(
                r"  |(?<![.(])\.\.(?!\.)|\b1 (?:clips|frames|rows|channels|ids)\b", one.title + one.why + one.fix
            ), one


def test_nine_in_ten_real_messages_get_their_class(capsys):
    right, of, missed = score(lambda text: text)
    with capsys.disabled():
        print(f"\nexplain: {right} of {of} real messages get their class; not: {', '.join(missed)}")
    assert of > 110
    assert right >= 0.9 * of


def test_it_is_no_table_of_sentences(capsys):
    """The same messages of a model with other widths: renamed consistently, with that model's numbers."""
    renamed = {
        256: 96,
        768: 288,
        320: 120,
        1280: 480,
        1024: 1056,
        512: 576,
        640: 240,
        128: 384,
        64: 48,
        96: 288,
        32: 96,
    }
    facts = replace(
        SVD,
        source="renamed",
        id_width=96,
        ids_width=288,
        context=1056,
        channels=(120, 240, 480, 480),
        clip_width=1056,
        clip_hidden=480,
    )
    widths = ("cannot be multiplied", "expected input", "attn2", "conv_in", "input of shape")

    def rename(text: str) -> str:
        if not any(word in text for word in widths):
            return text
        return re.sub(r"(?<![\w.])\d+|(?<=x)\d+", lambda m: str(renamed.get(int(m[0]), int(m[0]))), text)

    changed = sum(rename(text) != text for _, _, text in rows())
    right, of, missed = score(rename, facts)
    with capsys.disabled():
        print(f"\nexplain: {right} of {of} with {changed} messages renamed")
    assert changed >= 12
    assert right >= 0.9 * of, missed
    # Classes are coarse, so the numbers themselves too: they are read from the facts, and another model's do not fit.
    told = explain(rename(WORDINGS[0].format(4, 256, 768, 1280)), facts)
    assert "96 = 1 x 96, 288 = 3 x 96" in told[0].evidence
    assert codes(rename(WORDINGS[0].format(4, 256, 768, 1280)), SVD) == ["SHP410"]


def test_case_a_one_time_id():
    for wording in WORDINGS:
        (one,) = explain(wording.format(4, 256, 768, 1280))
        assert (one.code, one.confidence) == ("SHP402", "medium")
        assert "add_embedding.linear_1" in one.evidence
        assert (
            "added_time_ids was (4, 1), expected (4, 3) = [fps - 1, motion_bucket_id, noise_aug_strength]"
            in one.evidence
        )
        assert "256 = 1 x 256, 768 = 3 x 256" in one.evidence
        assert "assumed" in one.reason
        (own,) = explain(wording.format(4, 256, 768, 1280), SVD)
        assert own.confidence == "high"
        (named,) = explain(TRACE.format(code=IDS, message=wording.format(4, 256, 768, 1280)))
        assert named.confidence == "high"


def test_case_c_video_weights_in_an_image_model():
    (one,) = explain("conv_in.weight expected shape … (320, 4, 3, 3), but got … (320, 8, 3, 3)")
    assert (one.code, one.confidence) == ("CKP250", "high")
    assert one.title == "an SVD checkpoint is opened as an image model"
    assert "UNetSpatioTemporalConditionModel" in one.fix
    assert "Do not follow the advice `ignore_mismatched_sizes=True`" in one.fix
    assert "random" in one.fix
    assert "whole" in one.fix
    assert "diffusers' version" in one.fix


@pytest.mark.parametrize(
    ("model", "file", "means"), [(4, 9, "mask"), (12, 8, "second condition"), (4, 13, "custom class"), (9, 4, "mask")]
)
def test_input_channels_are_told_by_meaning(model, file, means):
    text = (
        f"size mismatch for conv_in.weight: copying a param with shape torch.Size([320, {file}, 3, 3]) from checkpoint, "
        f"the shape in current model is torch.Size([320, {model}, 3, 3])."
    )
    (one,) = explain(text)
    assert (one.code, one.confidence) == ("CKP250", "high")
    assert means in one.evidence
    assert f"the model is built with {model} input channels, the file has {file}" == one.title
    (unrelated,) = explain(text.replace("320", "77"))
    assert unrelated.confidence == "medium"
    assert "SVD" not in unrelated.evidence + unrelated.title


@pytest.mark.parametrize("seed", range(30))
def test_ids_are_counted_in_any_model(seed):
    draw = random.Random(seed)
    width, ids, level, given, rows_ = (
        draw.choice([24, 40, 72, 96]),
        draw.randint(2, 7),
        draw.choice([48, 112, 208]),
        draw.randint(1, 9),
        11,
    )
    if given == ids:
        given += 1
    facts = replace(OTHER, id_width=width, ids_width=ids * width, channels=(level, 2 * level))
    text = draw.choice(WORDINGS).format(rows_, given * width, ids * width, 4 * level)
    found = explain(text, facts)
    assert found[0].code == "SHP402"
    assert f"({rows_}, {given}), expected ({rows_}, {ids})" in found[0].evidence
    assert ("motion_bucket_id" in found[0].evidence) == (ids == 3)
    # The numbers of another model do not fit: no story.
    assert [one.code for one in explain(text)] == ["SHP410"]


def test_five_ids_of_96():
    (one,) = explain(WORDINGS[0].format(6, 96, 480, 768), OTHER)
    assert one.title == "1 time id for each clip instead of 5"
    assert "96 = 1 x 96, 480 = 5 x 96" in one.evidence


def test_rows_of_ids_against_rows_of_the_sample():
    tiny = replace(SVD, id_width=32, ids_width=96, channels=(32, 64))
    (one,) = explain(WORDINGS[0].format(8, 12, 96, 128), tiny)
    assert one.code == "SHP414"
    assert "8 x 12 = 96 = 1 x 96" in one.evidence
    assert "5 axes" in one.fix
    (two,) = explain(WORDINGS[0].format(2, 48, 96, 128), tiny)
    assert two.title == "time ids for 1 clip, but a sample whose first axis is 2"


def test_two_causes_that_no_number_tells_apart():
    both = explain(WORDINGS[0].format(3, 256, 768, 1280), SVD)
    assert {one.code for one in both} == {"SHP402", "SHP414"}
    assert {one.confidence for one in both} == {"medium"}
    assert all("more than one cause" in one.reason for one in both)


@pytest.mark.parametrize(("taken", "family"), [(256, "SV3D-u"), (1280, "SV3D-p")])
def test_add_embedding_of_sv3d(taken, family):
    text = TRACE.format(code=IDS, message=WORDINGS[0].format(2, 768, taken, 1280))
    (one,) = explain(text)
    assert one.code == "SHP402"
    assert family in one.evidence
    assert one.confidence == "medium"


def test_width_of_the_context():
    text = TRACE.format(code="key = attn.to_k(encoder_hidden_states)", message=WORDINGS[1].format(7, 640, 1536, 384))
    (one,) = explain(text, OTHER)
    assert (one.code, one.confidence) == ("SHP403", "high")
    assert one.title == "the image embedding has width 640, the cross-attention takes 1536"
    (clip,) = explain(WORDINGS[0].format(14, 768, 1024, 320), SVD)
    assert (clip.code, clip.confidence) == ("SHP403", "high")
    assert "ViT-L/14" in clip.evidence
    (hidden,) = explain(WORDINGS[0].format(14, 1280, 1024, 320), SVD)
    assert "hidden width of this model's image encoder" in hidden.evidence
    assert hidden.fix == "Take image_embeds, not last_hidden_state: the projection brings 1280 to 1024."


@pytest.mark.parametrize("seed", range(60))
def test_unrelated_linear_layers_get_no_story(seed):
    draw = random.Random(seed)
    rows_, given, taken, out = (
        draw.randint(1, 64),
        *(draw.choice([10, 77, 100, 130, 200, 512, 784, 1050, 1568, 2048, 3072]) for _ in range(3)),
    )
    if given == taken:
        given += 1
    (one,) = explain(draw.choice(WORDINGS).format(rows_, given, taken, out))
    assert (one.code, one.confidence) == ("SHP410", "low")
    assert one.title == f"a Linear layer expects in_features={taken}, got {given}"
    assert not re.search("SVD|clip|time id", one.title + one.evidence + one.why + one.fix)


@pytest.mark.parametrize("code", ["x = self.fc1(x)", "x = self.head(self.pool(x))", "logits = self.classifier[2](x)"])
def test_a_module_of_another_network_overrides_numbers_that_fit(code):
    (one,) = explain(TRACE.format(code=code, message=WORDINGS[0].format(4, 256, 768, 1280)))
    assert (one.code, one.confidence) == ("SHP410", "low")


@pytest.mark.parametrize(
    "near",
    [
        "(4x255 and 768x1280)",
        "(4x256 and 767x1280)",
        "(4x256 and 768x1281)",
        "(4x250 and 768x640)",
        "(5x300 and 768x1280)",
    ],
)
def test_near_misses_get_no_story(near):
    (one,) = explain(f"RuntimeError: mat1 and mat2 shapes cannot be multiplied {near}")
    assert (one.code, one.confidence) == ("SHP410", "low")


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 'pixel_values'",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040).",
        "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='x', port=443): Max retries exceeded",
        "AssertionError: my own check failed",
        "AttributeError: 'Trainer' object has no attribute 'foo'",
        "AttributeError: 'NoneType' object has no attribute 'split'",
        "TypeError: 'int' object is not iterable",
        "TypeError: Dog.__init__() missing 1 required positional argument: 'name'",
        "ZeroDivisionError: division by zero",
        "ModuleNotFoundError: No module named 'cv3'",
        "FileNotFoundError: [Errno 2] No such file or directory: 'a.json'",
        "ValueError: not enough values to unpack (expected 2, got 1)",
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "IndexError: list index out of range",
        "PermissionError: [Errno 13] Permission denied: '/data'",
        "",
        "step 12/100 loss 0.1 [3, 4, 5] 768x1280",
    ],
)  # fmt: skip
def test_what_it_does_not_know_it_says_it_does_not_know(text):
    assert explain(text) == []
    told = render([], text)
    assert told.startswith("I do not know this one.")
    assert "send the whole traceback" in told
    assert explain_exception(RuntimeError(text)) is None


def test_unknown_says_what_was_understood():
    told = render([], "ValueError: odd thing with [2, 7, 9]")
    assert "error: ValueError: odd thing" in told
    assert "shapes: [2, 7, 9]" in told


def test_ranks_interleaved_under_a_launcher():
    frames = TRACE.format(code=IDS, message=WORDINGS[0].format(4, 256, 768, 1280)).splitlines()
    lines = [
        "\x1b[31mW1124 16:00:00.000 77 torch/distributed/run.py:766] ***\x1b[0m",
        "Steps:   3%|▎  | 3/100 [00:01<00:30]\r",
    ]
    for line in frames:
        lines += [f"[rank{rank}]: {line}" for rank in (0, 1)]
    lines += [
        "E1124 torch.distributed.elastic.multiprocessing.errors.ChildFailedError:",
        "subprocess.CalledProcessError: Command returned 1",
    ]
    (one,) = explain("\n".join(lines))
    assert (one.code, one.confidence) == ("SHP402", "high")
    assert "(ranks 0, 1)" in one.evidence


def test_halving_chains():
    assert halvings(68, 4) == [68, 34, 17, 9]
    for levels in (2, 3, 4, 5):
        for skip in (3, 15, 17, 23, 39):
            sizes = failing_sizes(skip, levels)
            for size in sizes:
                odd = [here for here in halvings(size, levels)[:-1] if here % 2]
                assert odd[-1] == skip


def test_skip_sizes_give_the_pixels():
    text = "RuntimeError: Sizes of tensors must match except in dimension 1. Expected size 18 but got size 17 for tensor number 1."
    (assumed,) = explain(text)
    assert (assumed.code, assumed.confidence) == ("SHP411", "medium")
    assert "520, 528, 536, 544 pixels" in assumed.evidence
    assert "68 -> 34 -> 17 -> 9" in assumed.evidence
    assert "512 or 576" in assumed.fix
    (own,) = explain(text, replace(SVD, height=544, width=1024))
    assert own.confidence == "high"
    assert own.reason == "data.height 544 gives exactly these sizes"
    (fake,) = explain(
        "Sizes of tensors must match except in dimension 1. Expected 18 in dimension 2 but got 17 for tensor number 1 in the list"
    )
    assert fake == assumed
    assert codes(text.replace("18", "21")) == ["SHP410"]


@pytest.mark.parametrize(("a", "b", "axis"), [(5, 7, 1), (10, 3, 0), (100, 37, 2), (13, 130, 1)])
def test_unrelated_broadcasts_get_no_story(a, b, axis):
    (one,) = explain(
        f"The size of tensor a ({a}) must match the size of tensor b ({b}) at non-singleton dimension {axis}"
    )
    assert (one.code, one.confidence) == ("SHP410", "low")


def test_both_conv_channels_and_swapped_axes():
    message = (
        "Given groups=1, weight of size [192, 10, 3, 3], expected input[{}, {}, 9, 7] to have 10 channels, "
        "but got {} channels instead"
    )
    (forgotten,) = explain(message.format(21, 5, 5), OTHER)
    assert forgotten.code == "SHP404"
    assert "torch.cat([noisy_latents, conditioning_latents], dim=2)" in forgotten.fix
    (swapped,) = explain(message.format(20, 7, 7), OTHER)
    assert swapped.code == "SHP405"
    (flat,) = explain(message.format(1, 30, 30), OTHER)
    assert flat.code == "SHP415"
    assert "(3, 10)" in flat.evidence
    (plain,) = explain(message.format(21, 6, 6).replace("192", "191"), OTHER)
    assert (plain.code, plain.confidence) == ("SHP412", "low")


@pytest.mark.parametrize(
    ("text", "code", "confidence", "said"),
    [
        ("'DistributedDataParallel' object has no attribute 'dtype'", "DST801", "high", "accelerator.unwrap_model(model).dtype"),
        ("'MyVideoModel' object has no attribute 'module'", "DST801", "high", "unwrap_model(model) instead of model.module"),
        ("Expected to have finished reduction in the prior iteration before", "DST802", "high", "use_reentrant=False"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)", "DST803", "medium", "save_state on all ranks"),
        ("a parameter group that doesn't match the size of optimizer's group", "DST804", "high", "same adapt section"),
        ("manual_seed expected a long, but got NoneType", "DST805", "high", "run.seed"),
        ("element 0 of tensors does not require grad and does not have a grad_fn", "SHP406", "medium", "requires_grad"),
        ("Attempting to unscale FP16 gradients.", "NUM601", "high", "Keep trained parameters in float32"),
        ("Input type (double) and bias type (c10::BFloat16) should be the same", "NUM650", "high", ".astype('float32')"),
        ("NaN detected in latents: a.mp4", "NUM651", "medium", "VAE in float32"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.25 GiB.", "MEM701", "high", "preflight CONFIG"),
        ("CUDA error: invalid configuration argument", "ENV050", "low", "scaled_dot_product_attention"),
        ("Conv3D is not supported on MPS", "ENV051", "high", "another device"),
        ("Expected all tensors on the same device, but found at least two devices, cuda:0 and cpu!", "ENV052", "high", "one device"),
        ("type object 'OtherVideoPipeline' has no attribute 'load_lora_weights'", "ENV055", "high", "peft"),
        ("OSError: bf16 is not a valid git identifier", "CKP256", "high", "variant='bf16'"),
        ("OSError: Error no file named config.json found in directory /m/x.", "CKP253", "medium", "config.json of each part"),
        ("Error while deserializing header: incomplete metadata, file not fully covered", "CKP252", "high", "download it again"),
        ("without having git-lfs installed", "CKP254", "high", "git lfs pull"),
        ('Missing key(s) in state_dict: "a.weight", "a.bias".', "CKP251", "medium", "inspect FILE"),
        ("MyUNet.__init__() missing 1 required positional argument: 'depth'", "CKP255", "low", "depth"),
        ("'NoneType' object has no attribute 'encode_image'", "CKP257", "high", "image_encoder/"),
        ("Input image size (90*160) doesn't match model (112*112).", "SHP416", "high", "112 x 112"),
        ("tensor a (196) must match the size of tensor b (576) at non-singleton dimension 1", "SHP416", "low", "vision tower"),
        ("M has upper limit of 20 frames, but received frame_number = 77.", "SHP413", "low", "at most 20 frames"),
        ("too many values to unpack (expected 4)", "SHP415", "low", "first frame alone"),
        ("each tensor to be equal size, but got [9, 3, 5, 7] at entry 0 and [8, 3, 5, 7] at entry 2", "DAT350", "high", "fixed number"),
        ("ValueError: folder has fewer than 19 frames", "DAT351", "high", "data scan"),
        ("decord._ffi.base.DECORDError: [12:00:00] avcodec failed", "DAT352", "medium", "data.decoder=pyav"),
        ("'DDPMScheduler' object has no attribute 'get_velocity'", "SEM550", "high", "Draw sigma"),
        ("randn_like(): argument 'input' (position 1) must be Tensor, not NoneType", "SEM551", "low", "first frame"),
    ],
)  # fmt: skip
def test_what_each_family_says(text, code, confidence, said):
    (one,) = explain(text)
    assert (one.code, one.confidence) == (code, confidence)
    assert said in one.fix
    assert code in render([one])


@pytest.mark.parametrize(
    "text",
    [
        "ValueError: shapes [2, 3] and [4, 5] differ",
        "ValueError: Expected size 10, the file has 5 bytes",
        "AttributeError: 'NoneType' object has no attribute 'shape'",
        "AttributeError: 'StableVideoDiffusionPipeline' object has no attribute 'foo'",
        "RuntimeError: Input type (float) and bias type (float) should be the same",
        "loaded with 0 missing and 0 unexpected keys",
        "TypeError: linear(): argument 'weight' (position 2) must be Tensor, not NoneType",
        "INFO video 3x576x1024 has 25 frames",
    ],
)  # fmt: skip
def test_words_that_look_like_a_family(text):
    assert explain(text) == []


@pytest.mark.parametrize("seed", range(40))
def test_no_number_alone_is_believed(seed):
    """Common widths and sizes of any network, without module names or a config, never give high confidence."""
    draw = random.Random(seed)
    common = [16, 24, 32, 64, 128, 256, 320, 512, 640, 768, 1024, 1280]
    a, b, c = draw.sample(common, 3)
    for text in (
        WORDINGS[seed % 2].format(draw.randint(1, 32), a, b, c),
        f"The size of tensor a ({a}) must match the size of tensor b ({b}) at non-singleton dimension {seed % 4}",
        f"Sizes of tensors must match except in dimension {seed % 3}. Expected size {a} but got size {b} for tensor "
        f"number 1 in the list.",
        f"shape '[{a}, {b}]' is invalid for input of size {c}",
        f"Given groups=1, weight of size [{a}, {b}, 3, 3], expected input[2, {c}, 9, 9] to have {b} channels, but got "
        f"{c} channels instead",
    ):
        for one in explain(text):
            assert one.confidence == "low" or (one.code, one.confidence) == ("SHP402", "medium"), (text, one)


def test_a_rule_by_its_code():
    assert "time ids do not fill" in run("shp402").stdout
    assert json.loads(run("SHP402", "--json").stdout)["rule"]["code"] == "SHP402"
    assert nearest_rules("SHP42").startswith("SHP4")
    assert nearest_rules("train.log") == ""
    mistyped = run("SHP42")
    assert mistyped.returncode == 2
    assert "Did you mean SHP4" in mistyped.stderr


def test_every_grammar_has_a_cause_and_every_code_a_rule():
    assert {kind for kind, _ in GRAMMAR} == set(CAUSES)
    source = "".join(
        path.read_text() for path in (Path(sys.modules["svdtune.guards.explain"].__file__ or "").parent).glob("*.py")
    )
    named = set(re.findall(r'"([A-Z]{3}\d{3})"', source))
    assert len(named) > 30
    assert named <= set(RULES)


def run(*arguments: object, stdin: str | bytes = "") -> subprocess.CompletedProcess[str]:
    raw = subprocess.run(
        [sys.executable, "-m", "svdtune", "explain", *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        check=False,
    )
    return subprocess.CompletedProcess(raw.args, raw.returncode, raw.stdout.decode(), raw.stderr.decode())


IDS_TRACE = TRACE.format(code=IDS, message=WORDINGS[0].format(4, 256, 768, 1280))


@pytest.mark.parametrize(
    "around",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("    return F.linear(input, self.weight, self.bias)\n", ""),
        lambda text: "\n".join(f"> {line}" for line in text.splitlines()),
        lambda text: "\n".join(f"2026-01-01T12:00:00.123456Z {line}" for line in text.splitlines()),
        lambda text: "\n".join(f"[rank0]:E1125 21:42:00.100000 77 x.py:3] {line}" for line in text.splitlines()),
        lambda text: text + "step 1 of 9\n" * 300_000,
        lambda text: "step 1 of 9\n" * 300_000 + text,
        lambda text: text + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n",
    ],
)
def test_what_stands_around_a_traceback(around):
    (one,) = explain(around(IDS_TRACE))
    assert (one.code, one.confidence) == ("SHP402", "high")


def test_an_error_that_was_handled_is_not_the_one_that_ended_the_run():
    text = "NotImplementedError: No operator found for `memory_efficient_attention_forward`, falling back\nKeyError: 'caption'\n"
    (one,) = explain(text)
    assert (one.code, one.confidence) == ("ENV051", "medium")
    assert "not the error that the text ends with" in one.reason
    assert render([one], text).endswith("The text ends with another error, which I do not know: KeyError: 'caption'")
    chained = text.replace(
        "\nKeyError", "\n\nDuring handling of the above exception, another exception occurred:\n\nKeyError"
    )
    assert explain(chained)[0].confidence == "high"


def test_where_the_text_comes_from(tmp_path):
    log = tmp_path / "my log.txt"
    log.write_bytes(IDS_TRACE.encode("utf-16"))
    assert run(log).stdout.startswith("SHP402")
    assert run("-", stdin=IDS_TRACE.encode() + b"\xff\xfe").stdout.startswith("SHP402")
    assert "I do not know this one." in run("KeyError").stdout
    folder = run(tmp_path)
    assert (folder.returncode, folder.stdout) == (2, "")
    assert "is a folder. Give the file in it" in folder.stderr


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "addition_time_embed_dim", 0),
        ("unet", "cross_attention_dim", None),
        ("vae", "block_out_channels", []),
        ("image_encoder", "projection_dim", "1024"),
    ],
)
def test_a_config_that_is_itself_wrong_is_named(tmp_path, part, key, value):
    from svdtune.model.facts import PACKAGE

    model = tmp_path / "model"
    shutil.copytree(PACKAGE / "facts" / "svd-xt", model)
    content = json.loads((model / part / "config.json").read_text())
    (model / part / "config.json").write_text(json.dumps({**content, key: value}))
    config = tmp_path / "run.yaml"
    config.write_text(f"model:\n  pretrained: {model}\n")
    note = explain_verb(IDS_TRACE, config, json_out=False).split("\n")[0]
    assert f"{part}/config.json: {key} is {value!r}, expected" in note
    assert note.endswith("SVD-XT's numbers are assumed.")
    assert ".." not in note
    assert json.loads(explain_verb(IDS_TRACE, config, json_out=True))["note"] == note


def test_the_verb(tmp_path):
    message = f"RuntimeError: {WORDINGS[0].format(4, 256, 768, 1280)}"
    log = tmp_path / "train.log"
    log.write_text(message)
    of_file = run(str(log))
    assert of_file.returncode == 0, of_file.stderr
    assert of_file.stdout.startswith("SHP402  1 time id for each clip instead of 3\n  confidence medium")
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  pretrained: stabilityai/stable-video-diffusion-img2vid\n")
    exact = json.loads(run("-", "--config", str(config), "--json", stdin=message).stdout)["findings"]
    assert [(one["code"], one["confidence"]) for one in exact] == [("SHP402", "high")]
    assert json.loads(run("-", "--json", stdin="KeyError: 1").stdout) == {"findings": []}
    assert "I do not know this one." in run("KeyError: 'a b'").stdout
    missing = run("nothing.log")
    assert missing.returncode == 2
    assert "nothing.log: no such file, and no rule's code" in missing.stderr


def test_it_needs_no_torch():
    code = "import sys; from svdtune.guards.explain.report import explain as e; e('(4x2 and 7x1)'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_very_long_line_is_read_in_part():
    """The grammar's cost grows with the square of a line; without the limit this takes minutes."""
    assert explain("a." * 200_000) == []
    assert explain("x" * 300_000 + "\n" + f"RuntimeError: {WORDINGS[0].format(4, 256, 768, 1280)}")[0].code == "SHP402"


def test_the_memory_that_is_full_is_named():
    """The GPU's, another process's, or the machine's: three causes with three fixes."""
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.5 GiB of which 1.0 GiB is free."
    [own], [other], [machine] = (
        explain(text)
        for text in (
            f"{full} Process 7 has 2.50 GiB memory in use. Including non-PyTorch memory, this process has 20.1 GiB memory in use.",
            f"{full} Process 7 has 20.1 GiB memory in use. Including non-PyTorch memory, this process has 2.50 GiB memory in use.",
            "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        )
    )
    assert (own.code, own.title) == ("MEM701", "out of memory")
    assert (other.code, other.evidence) == ("MEM701", "process 7 holds 20.1 GiB of 23.5 GiB.")
    assert (machine.code, "data.workers" in machine.fix) == ("MEM750", True)


def test_a_rank_that_waited_names_the_error_of_the_one_that_failed():
    text = (
        "[rank0]: torch.distributed.DistBackendError: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3)\n"
        "[rank1]: FileNotFoundError: [Errno 2] No such file or directory: 'clips/31.mp4'\n"
    )
    [found] = [one for one in explain(text) if one.code == "DST803"]
    assert "Another rank's own error: FileNotFoundError: [Errno 2] No such file" in found.evidence
    assert found.fix.startswith("Mend that error first.")
