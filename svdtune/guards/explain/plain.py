"""Errors whose text names the kind of cause by itself: nothing is to be reasoned but what it means in SVD."""

from __future__ import annotations

from svdtune.guards.explain.explanation import Confidence, Explanation
from svdtune.guards.explain.messages import Message
from svdtune.guards.explain.numbers import Numbers

_SAYS = "the text says it"
# kind: (code, title, confidence, reason, why, fix)
_TEXTS: dict[str, tuple[str, str, Confidence, str, str, str]] = {
    "unscale": (
        "NUM601", "trained parameters are float16", "high", "the gradient scaler refuses nothing else with these words",
        "The scaler of fp16 training divides float32 gradients. The weights were loaded or cast to float16, also by a pipeline's "
        ".to(float16) that moved the network in training.",
        "Keep trained parameters in float32 (diffusers: cast_training_params) and only frozen ones in half; train.precision=bf16 needs no "
        "scaler."),
    "unreadable": (
        "CKP252", "the weight file is damaged, empty, or not weights", "medium", "diffusers gives no reason; these are the only "
        "ones it has",
        "A truncated download, an HTML page saved as weights, or an empty file.",
        "`svdtune inspect FILE` says which; download it again."),
    "lfs": (
        "CKP254", "the weight file is a git-lfs pointer, a few lines of text", "high", "diffusers recognises them",
        "The repository was cloned without git-lfs, so the large files were never fetched.",
        "git lfs install && git lfs pull in that folder, or download with `hf download`."),
    "targets": (
        "CFG106", "the LoRA targets match no layer of this network", "high", _SAYS,
        "Names of language models (q_proj, v_proj) do not occur in a UNet: its attention has to_q, to_k, to_v and to_out.0.",
        "Name endings of its own layers, such as attn1.to_q, attn2.to_v, ff.net.0.proj (adapt.targets; null takes a good default)."),
    "collate_none": (
        "DAT352", "a clip came as None", "high", "the batch holds a NoneType",
        "The data set returned None for a file that it could not read, and a batch cannot be made of it.",
        "`svdtune data scan CONFIG` names such files; data.on_bad_clip=skip takes the next clip instead."),
    "no_samples": (
        "DAT301", "the data set is empty", "high", _SAYS,
        "No file was found or none was accepted: a wrong folder, or endings that the search does not know.",
        "Check the folder (data.root); `svdtune data scan CONFIG` says what it finds there."),
    "stack_one": (
        "DAT350", "samples of one batch differ in shape", "medium", "the loader joins the samples of a batch; the text gives none or one "
        "of the shapes",
        "A batch is stacked: all its samples need the same shape, clips the same frames, height, width and channels.",
        "Print the shape of each sample. For clips: a fixed number of frames by time, a fixed size (data.resize=cover), RGB."),
    "shared_memory": (
        "ENV012", "shared memory is full", "high", "the text names it",
        "Loader workers and NCCL hand tensors over in /dev/shm; Docker gives 64 MB.",
        "Start the container with --shm-size=16g (or --ipc=host), or lower data.workers (0 needs none)."),
    "killed": (
        "MEM750", "a process was killed from outside", "medium", "SIGKILL comes from the kernel or an operator; the text does not say why",
        "Mostly the kernel's answer to full main memory: each process loads the model, each loader worker holds clips.",
        "`dmesg | grep -i oom` says whether memory was the reason; fewer processes or data.workers, more memory, or a higher limit of the "
        "container."),
    "decode": (
        "DAT352", "a video file cannot be decoded", "medium", "the decoder's own words; damaged, missing and unsupported files give the "
        "same ones",
        "A damaged or cut file, a path that does not exist, or a container that the decoder's FFmpeg cannot seek in.",
        "Find it with `svdtune data scan CONFIG`; re-encode it or leave it out. data.decoder=pyav has a newer FFmpeg than decord."),
    "frame_index": (
        "DAT351", "a frame after the end of the video was asked for", "high", _SAYS,
        "The number of frames was counted or promised otherwise than the file has: a header that lies, or windows made for another file.",
        "Sample by time within the file's own length; `svdtune data scan CONFIG` counts frames by their packets."),
    "reduction": (
        "DST802", "some trained parameters got no gradient on a rank", "high", "DDP waits for every trained parameter in every step",
        "Trained parameters that the loss does not use, a loss that skips a branch on one rank, or reentrant checkpointing with inputs "
        "that need no gradient.",
        "Freeze what the loss does not use; gradient checkpointing with use_reentrant=False; find_unused_parameters=True only hides it."),
    "no_grad": (
        "SHP406", "nothing that is trained reaches the loss", "medium", "backward found no gradient at all",
        "Nothing requires gradients, or the way to it is cut by a detach or no_grad; also reentrant checkpointing.",
        "Check that some parameter has requires_grad (adapt.method, adapt.targets), and that the network is called outside no_grad."),
    "no_parameters": (
        "CFG117", "nothing is trained", "high", _SAYS,
        "The filter of trainable names matched no parameter, or all were frozen after it.",
        "Print how many parameters require a gradient; choose another adapt.method or adapt.targets."),
    "recomputed": (
        "NUM650", "gradient checkpointing computed something else the second time", "high", _SAYS,
        "A block is run again in the backward pass and must give the same shapes and types. Another autocast state there, dropout without "
        "a saved random state, or code that depends on grad mode changes them.",
        "Compare saved and recomputed metadata in the text: other dtypes mean that forward and backward ran under different autocast."),
    "watchdog": (
        "DST803", "one rank waited for another that never came", "medium", "a collective timed out",
        "Ranks ran different code: save_state or another collective on the main process only, uneven data, or a rank that died earlier.",
        "Call accelerator.save_state on all ranks; look for the first rank that failed, its own traceback is the cause."),
    "peer": (
        "DST803", "another rank is gone", "medium", "its connection was closed",
        "A process that dies takes its connections with it; the ranks that stay report only that.",
        "Look for the first rank that failed (out of memory, a bad clip, a node that went away): its own traceback is the cause."),
    "optimizer": (
        "DST804", "the trained parameters are not those of the checkpoint", "high", "optimizer or EMA state counts other parameters",
        "Another set is trained than when the checkpoint was written (another adapt.method, rank or targets, or code that freezes others).",
        "Resume with the same adapt section, or start a new run from the exported weights."),
    "seed": (
        "DST805", "the seed is None", "high", _SAYS, "A script's default seed is None and it is used before that is checked.",
        "Give a seed (run.seed)."),
}  # fmt: skip


def told(message: Message, numbers: Numbers) -> list[Explanation]:
    """What is known of this kind of text; its line is the evidence."""
    code, title, confidence, reason, why, fix = _TEXTS[message.kind]
    return [Explanation(code, title, confidence, reason, message.line[:200], why, fix)]


CAUSES = dict.fromkeys(_TEXTS, told)
