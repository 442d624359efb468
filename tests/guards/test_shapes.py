"""The rehearsed step: silent on sound code, and a broken conditioning or step is told by field, module and repair."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from svdtune.config.load import load_config
from svdtune.contracts import ModelFacts
from svdtune.diffusion import conditioning
from svdtune.guards import shapes
from svdtune.guards.shapes import Strict, distinct_axes, rehearse
from svdtune.trainer import build, step

CONFIGS = Path(__file__).parents[2] / "configs"
ids, predict, unet_input = conditioning.added_time_ids, step.predict, conditioning.unet_input


def only(config):
    [finding] = rehearse(config).findings
    return finding


@pytest.mark.parametrize(
    "overrides", [[], ["adapt.method=lora"], ["adapt.method=temporal", "memory.checkpointing=diffusers"]]
)
def test_a_sound_step_has_no_findings_and_an_estimate(tiny, overrides):
    rehearsal = rehearse(tiny(*overrides))
    assert rehearsal.findings == []
    assert rehearsal.needed is not None
    assert rehearsal.needed.step > 0


def test_xt_is_stepped_at_25_frames_of_576_by_1024(monkeypatch):
    seen = []
    monkeypatch.setattr(shapes, "train_step", lambda *a: seen.append(step.train_step(*a)) or seen[-1])
    assert rehearse(load_config(CONFIGS / "svd_xt_full.yaml")).findings == []
    at_its_size, at_distinct_sizes = (tuple(result.unet_input.sample.shape) for result in seen)
    assert at_its_size == (1, 25, 8, 72, 128)
    assert len(set(at_distinct_sizes)) == 5
    assert tuple(seen[0].encoded.image_embeds.shape) == (1, 1024)


def test_one_time_id_is_told_by_its_field(tiny, monkeypatch):
    monkeypatch.setattr(conditioning, "added_time_ids", lambda *a: ids(*a)[:, :1])
    found = only(tiny())
    assert (found.code, found.where, found.got) == ("SHP402", "UNetInput.added_time_ids", "(1, 1)")
    assert found.expected.startswith("(b m) = (1, 3)")
    assert found.fix == "Its 3 columns are fps - 1, motion_bucket_id, noise_aug_strength."
    assert "flattened" in found.why


@pytest.mark.parametrize(
    ("code", "field", "change", "fix"),
    [
        (
            "SHP403",
            "encoder_hidden_states",
            lambda x: x.squeeze(1),
            "An axis of size 1 is missing: .unsqueeze(1) would match.",
        ),
        (
            "SHP403",
            "encoder_hidden_states",
            lambda x: x.repeat(8, 1, 1),
            "It has one row per frame; one row per clip is wanted",
        ),
        ("SHP403", "encoder_hidden_states", lambda x: torch.cat([x, x]), "Axis 0 is twice as long"),
        (
            "SHP404",
            "sample",
            lambda x: x[:, :, :4],
            "Half of axis 2 is missing: the other half is joined by torch.cat([...], dim=2).",
        ),
        (
            "SHP404",
            "sample",
            lambda x: torch.cat([x, x[:, :, :1]], 2),
            "Axis 2 is too long: .narrow(2, 0, 8) would match.",
        ),
        (
            "SHP404",
            "sample",
            lambda x: x.permute(0, 1, 2, 4, 3),
            "Axes are swapped: .permute(0, 1, 2, 4, 3) would match.",
        ),
        ("SHP401", "timestep", lambda x: x.half(), ""),
    ],
)
def test_each_repair_is_named(tiny, monkeypatch, code, field, change, fix):
    """The change sits in the conditioning: training's own check and preflight see the same."""
    from dataclasses import replace

    def broken(*args):
        made = unet_input(*args)
        return replace(made, **{field: change(getattr(made, field))})

    monkeypatch.setattr(conditioning, "unet_input", broken)
    found = only(tiny())
    assert (found.code, found.where) == (code, f"UNetInput.{field}")
    assert found.fix.startswith(fix)


def test_what_bypasses_the_table_is_found_at_the_network(tiny, monkeypatch):
    def ids_of_one_column(parts, given):
        return parts.unet(given.sample, given.timestep, encoder_hidden_states=given.encoder_hidden_states,
                          added_time_ids=given.added_time_ids[:, :1], return_dict=False)[0].float()  # fmt: skip

    monkeypatch.setattr(step, "predict", ids_of_one_column)
    assert only(tiny("train.precision=no")).where == "UNetInput.added_time_ids"


def test_more_than_one_token_behind_the_table_is_refused_by_the_folded_cross_attention(tiny, monkeypatch):
    def patches(parts, given):
        tokens = given.encoder_hidden_states.repeat(1, 5, 1)
        return parts.unet(given.sample, given.timestep, encoder_hidden_states=tokens, added_time_ids=given.added_time_ids,
                          return_dict=False)[0].float()  # fmt: skip

    monkeypatch.setattr(step, "predict", patches)
    found = only(tiny("train.precision=no"))
    assert (found.code, found.where) == ("SHP403", "UNetInput.encoder_hidden_states")
    assert found.got == "5 tokens at down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert found.expected.startswith("1 token, SVD's image context is one CLIP embedding per clip")
    assert found.fix.startswith("Give the projected image embedding")


def test_a_failure_inside_a_network_names_module_and_what_it_takes(tiny, monkeypatch):
    monkeypatch.setattr(conditioning, "clip_pixels", lambda frame, clip: torch.zeros(len(frame), 5, 224, 224))
    found = only(tiny())
    assert found.code == "SHP401"
    assert found.where == "image_encoder.vision_model.embeddings.patch_embedding"
    assert found.expected == "axis 1 = 3 (in_channels)"
    assert "Conv2d was given (1, 5, 224, 224)" in found.got


def test_a_linear_layer_speaks_as_with_real_tensors(tiny, monkeypatch):
    def wide(parts, given):
        return parts.unet.add_embedding(torch.zeros(1, 32)) + predict(parts, given)

    monkeypatch.setattr(step, "predict", wide)
    found = only(tiny("train.precision=no"))
    assert found.where == "unet.add_embedding.linear_1"
    assert "mat1 and mat2 shapes cannot be multiplied (1x32 and" in found.got
    assert found.why.startswith("It is fed by UNetInput.added_time_ids.")


def test_axes_of_equal_length_cannot_hide(tiny, monkeypatch):
    """Height and width mixed up, at a square size: the user's sizes pass, the distinct ones do not."""
    monkeypatch.setattr(step, "predict", lambda parts, given: predict(parts, given).transpose(3, 4))
    found = only(tiny("data.width=64"))
    assert found.code == "SHP405"
    assert found.where == "Prediction.model_output"
    assert "equally long" in found.why


def test_a_failure_only_in_backward(tiny, monkeypatch):
    def in_place(parts, given):
        out = torch.sigmoid(predict(parts, given))
        kept = out * out
        out.add_(1)
        return kept

    monkeypatch.setattr(step, "predict", in_place)
    found = only(tiny())
    assert (found.code, found.where) == ("SHP401", "backward pass")
    assert "modified by an inplace operation" in found.got


def test_a_value_read_on_the_host_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(step, "predict", lambda parts, given: predict(parts, given) * given.timestep[0].item())
    assert "a value is read on the host" in only(tiny()).got


def test_parameters_without_a_gradient_are_counted(tiny, monkeypatch):
    def cut(parts, given):
        return predict(parts, given).detach() + parts.unet.conv_out.bias.sum()

    monkeypatch.setattr(step, "predict", cut)
    found = only(tiny())
    assert found.code == "SHP406"
    assert "trained parameters get no gradient (conv_in.weight, ...)" in found.got


def test_half_precision_trained_parameters(tiny, monkeypatch):
    adapt = build.adapt

    def halved(unet, *args, **keywords):
        trained = adapt(unet, *args, **keywords)
        for parameter in trained.values():
            parameter.data = parameter.data.to(torch.bfloat16)
        return trained

    monkeypatch.setattr(build, "adapt", halved)
    found = rehearse(tiny("train.precision=bf16")).findings[0]
    assert (found.code, found.expected) == ("NUM601", "float32, from memory.parameters=fp32")
    assert "trained parameters are bfloat16" in found.got


def test_bfloat16_parameters_where_they_were_asked_for_and_float32_ones_where_not(tiny):
    asked = tiny("train.precision=bf16", "memory.parameters=bf16", "train.optimizer=adamw8bit", "train.ema=true")
    assert list(rehearse(asked).findings) == []
    [found] = shapes._precision(asked, {"p": torch.nn.Parameter(torch.zeros(1))})
    assert (found.code, found.expected) == ("NUM601", "bfloat16, from memory.parameters=bf16")
    assert found.got == "1 of 1 trained parameters are float32"


def test_a_frozen_set_that_is_not_the_trained_one(tiny, monkeypatch):
    adapt = build.adapt

    def without_biases(unet, *args, **keywords):
        return {name: p for name, p in adapt(unet, *args, **keywords).items() if not name.endswith("bias")}

    monkeypatch.setattr(build, "adapt", without_biases)
    found = only(tiny())
    assert found.code == "SHP408"
    assert "are in one set only (add_embedding.linear_1.bias, ...)" in found.got


@pytest.mark.parametrize("layer", [torch.nn.Conv2d(3, 4, 1, bias=False), torch.nn.Linear(3, 4, bias=False)])
def test_tensors_of_two_dtypes_raise_as_real_ones_do(layer):
    """A fake convolution without bias would let them pass."""
    pixels = {"Conv2d": (1, 3, 5, 5), "Linear": (5, 3)}[type(layer).__name__]
    with FakeTensorMode(allow_non_fake_inputs=True), Strict():
        layer(torch.zeros(pixels))
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(torch.zeros(pixels, dtype=torch.float16))


def test_random_numbers_inside_the_step(tiny, monkeypatch):
    monkeypatch.setattr(step, "predict", lambda parts, given: predict(parts, given) + torch.randn(1))
    assert "draws random numbers inside the step; everything random arrives in Draws" in only(tiny()).got


def test_a_unet_that_is_asked_for_each_frame_alone(tiny, monkeypatch):
    """It runs and gives the right shapes: only what the UNet was given shows it."""
    from dataclasses import replace

    def alone(parts, given):
        frames = given.sample.shape[1]
        parts_of = [predict(parts, replace(given, sample=given.sample[:, i : i + 1])) for i in range(frames)]
        return torch.cat(parts_of, 1)

    monkeypatch.setattr(step, "predict", alone)
    found = only(tiny())
    assert (found.code, found.where) == ("SHP404", "UNetInput.sample")
    assert found.got == "(1, 1, 8, 8, 12)"


@pytest.mark.parametrize("method", ["temporal", "temporal_attention", "spatial", "full", "lora"])
def test_each_method_trains_what_it_names(tiny, monkeypatch, method):
    assert rehearse(tiny(f"adapt.method={method}")).findings == []


def test_a_method_that_trains_something_else(tiny, monkeypatch):
    from svdtune.model import adapt as module

    monkeypatch.setattr(module, "TEMPORAL", module.DEAD)
    monkeypatch.setattr(module, "_learns", lambda name, method: "conv_in" in name)
    found = only(tiny("adapt.method=temporal"))
    assert (found.code, found.where) == ("SHP408", "conv_in.bias")
    assert found.got.startswith("2 too many (conv_in.bias, ...) and ")
    assert found.expected == "only and all of what adapt.method=temporal names"


def test_a_method_that_matches_nothing(tiny, monkeypatch):
    from svdtune.errors import ConfigError

    def nothing(*args, **keywords):
        raise ConfigError("adapt.method=spatial matches no parameter of this UNet, so nothing would be trained.")

    monkeypatch.setattr(build, "adapt", nothing)
    found = only(tiny())
    assert (found.code, found.where) == ("CFG117", "adapt")


def test_a_model_that_cannot_be_built(tiny, monkeypatch):
    monkeypatch.setattr(shapes, "clip_pixels", lambda model: model["nothing"])
    assert only(tiny()).got.startswith("the networks cannot be built: TypeError")


def test_the_probe_sizes_are_all_different():
    facts = ModelFacts(c=3, z=4, f=8, d=1024, m=3, num_frames=14, clip_size=224, scaling_factor=0.18215)
    axes = distinct_axes(facts)
    latents = [axes["h"] // 8, axes["w"] // 8]
    sizes = [axes["b"], axes["t"], axes["c"], axes["z"], 2 * axes["z"], axes["d"], *latents, axes["h"], axes["w"]]
    assert len(set(sizes)) == len(sizes)
    assert axes["b"] == 2
