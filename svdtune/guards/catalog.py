"""Every rule that a finding can name: `svdtune explain CODE` prints it, docs/rules.md is generated from it.

The first three letters are the topic; the first digit goes with it (ENV0xx, CFG1xx, ... DST8xx).
"""

from __future__ import annotations

from dataclasses import dataclass

TOPICS = {
    "ENV": "environment",
    "CFG": "configuration",
    "CKP": "checkpoint and architecture",
    "DAT": "data",
    "SHP": "shapes",
    "SEM": "meaning of values",
    "NUM": "precision",
    "MEM": "memory",
    "DST": "ranks",
}


@dataclass(frozen=True)
class Rule:
    """One kind of mistake."""

    code: str
    title: str
    """What is wrong, in a few words."""
    why: str
    """What would happen, and why it happens in SVD."""
    fix: str
    """The change that usually mends it."""


# fmt: off
_ENVIRONMENT: tuple[Rule, ...] = (
    Rule("ENV001", "a package is missing or too old",
         "Each lower bound in svdtune's metadata closes a bug that matters for SVD: before diffusers 0.28 the conditioning of "
         "different clips was mixed at batch > 1, before 0.27 guidance and CLIP normalisation were wrong.",
         "Run the pip command of the finding, or install with constraints.txt, the tested set."),
    Rule("ENV002", "xformers is built for another torch",
         "Its compiled kernels belong to the torch that its metadata names.",
         "Update or uninstall xformers; svdtune uses torch's own attention by default."),
    Rule("ENV003", "torch cannot use the GPU",
         "The machine has an NVIDIA GPU, but torch is a CPU build or does not get along with the driver; training would run on the CPU.",
         "Install torch for this driver's CUDA, or update the driver."),
    Rule("ENV004", "a video reader is missing",
         "PyAV indexes every clip; decord, where asked for, decodes them.",
         "Install PyAV, or set data.decoder=auto."),
    Rule("ENV005", "the attention cannot run on this device",
         "xformers has no CPU kernel, and a build without CUDA kernels imports well and fails at the first call. Preflight puts one "
         "token through it.",
         "Set memory.attention=sdpa."),
    Rule("ENV006", "too many rows for an attention kernel",
         "SVD's temporal attention sees every position as a batch entry of its own: batch x h/8 x w/8 rows (xformers: x heads). "
         "CUDA grids end at 65535: \"CUDA error: invalid configuration argument\".",
         "Set memory.attention=sdpa, or a smaller train.batch_size with more train.accumulation."),
    Rule("ENV007", "a precision that this device cannot compute in",
         "fp16 with its gradient scaler needs an NVIDIA GPU; GPUs before Ampere only emulate bf16.",
         "Set train.precision=bf16 on CPUs and newer GPUs, fp16 on older ones."),
    Rule("ENV008", "the optimizer cannot run here",
         "adamw8bit needs bitsandbytes and an NVIDIA GPU.",
         "Set train.optimizer=adamw, or install svdtune[bitsandbytes]."),
    Rule("ENV009", "a tracker is not installed",
         "tracking.backends names a package that is missing.",
         "Install it, or take it out of tracking.backends."),
    Rule("ENV010", "no key for a service that asks for one",
         "wandb online and the Hugging Face hub's gated models need a key; a run without a terminal stops where they ask for it.",
         "Log in (`wandb login`, `hf auth login`), or work offline."),
    Rule("ENV011", "the run folder cannot be written",
         "Checkpoints, samples and logs go below run.dir.",
         "Set run.dir to a folder that you can write to."),
    Rule("ENV012", "too little shared memory for the loader's workers",
         "Workers hand clips over in /dev/shm; when it is full the kernel kills them (\"Bus error\"). Docker gives 64 MB.",
         "Lower data.workers, or start the container with a larger --shm-size."),
    Rule("ENV013", "too little disk for the checkpoints",
         "A checkpoint holds each trained number in float32, the optimizer's state (AdamW: two more), and averages with train.ema.",
         "Free space, another run.dir, or a smaller checkpoint.keep."),
    Rule("ENV014", "a check could not be made",
         "A file or folder cannot be read by this user, or code that preflight ran raised something that nobody foresaw.",
         "Make it readable; where a line of svdtune is named, mend that line or report it."),
    Rule("ENV015", "more threads than cores",
         "torch's threads wait for each other in every operator; too many of them make a step many times slower.",
         "Set run.threads=null: the cores of the machine, divided by its processes."),
    Rule("ENV016", "an accelerate config asks for another engine",
         "DeepSpeed, FSDP and Megatron shard or wrap the network in ways that svdtune's checkpoints and export do not know.",
         "Unset the variable, or take the engine out of the accelerate config."),
    Rule("ENV050", "a kernel's grid is too large",
         "Temporal attention has one row for every latent position. xformers puts rows x heads on a grid axis that ends at 65,535 and "
         "CUDA answers \"invalid configuration argument\".",
         "Use torch's scaled_dot_product_attention, or a smaller batch or size."),
    Rule("ENV051", "an operator that this device or build lacks",
         "SVD needs Conv3d and attention of wide heads (the VAE has one of 512); some devices and xformers builds have no kernel for them.",
         "Do not enable xformers, use float32 on a CPU, or take another device or a newer torch."),
    Rule("ENV052", "tensors on two devices",
         "One operation needs all its tensors on one device. mix_factor parameters of SVD ignore `with torch.device(...)`.",
         "Move the whole network after building it, and the inputs with it."),
    Rule("ENV055", "a class without that function",
         "diffusers' video pipeline has no LoRA functions, old versions save attention processors otherwise; a script finds out at its "
         "first checkpoint.",
         "Save adapters with peft, or upgrade."),
)

_CONFIGURATION: tuple[Rule, ...] = (
    Rule("CFG101", "the configuration cannot be read",
         "A key, a value or the YAML itself is not what the schema allows, so nothing can start.",
         "Change the named line; `svdtune config show CONFIG` prints every option as a run would use it."),
    Rule("CFG102", "a size is no multiple of the VAE's factor",
         "The VAE makes one latent of f x f pixels (SVD: 8) and floors what is left over without a word.",
         "Round data.height and data.width to the multiple that the finding names."),
    Rule("CFG103", "this diffusers needs sizes that are multiples of 64",
         "Before diffusers 0.32 SVD's UNet could not join latents whose size does not halve three times: the error is \"Sizes of "
         "tensors must match except in dimension 1\".",
         "Update diffusers, or round data.height and data.width to multiples of 64."),
    Rule("CFG104", "another number of frames than the base was trained with",
         "SVD's UNet takes any number of frames, but its temporal layers have seen one only: 14 (SVD) or 25 (SVD-XT).",
         "Set data.num_frames to the base's number, or take the other base."),
    Rule("CFG105", "LoRA targets that cannot learn",
         "SVD gives cross-attention one image token. Softmax over one token is always 1, so attn2.to_q and attn2.to_k have no effect "
         "and no gradient.",
         "Leave them out; attn2.to_v and attn2.to_out.0 do learn."),
    Rule("CFG106", "LoRA targets that match no layer",
         "An entry of adapt.targets must be the ending of a linear or convolution layer's full name in this UNet.",
         "Take the ending that the finding offers, or adapt.targets=null."),
    Rule("CFG107", "an update sees the same file twice",
         "batch_size x accumulation x processes exceeds the number of files, so one update repeats files.",
         "Lower train.accumulation or train.batch_size, or add clips."),
    Rule("CFG108", "the run folder holds another kind of run",
         "The same run.name resumes the run in that folder, and a checkpoint fits only the model and the adapt section it was made with.",
         "Give the new run another run.name, or restore the old options."),
    Rule("CFG109", "a learning rate that destroys the base",
         "Adam moves each trained number by about the learning rate per step; SVD's weights are around 0.02.",
         "1e-5 for full and temporal training, 1e-4 for LoRA."),
    Rule("CFG110", "guidance without dropout",
         "Classifier-free guidance needs the prediction without the image, which only conditioning.dropout trains.",
         "Set conditioning.dropout=0.15, or sample with guidance 1."),
    Rule("CFG111", "noise levels outside what sampling visits",
         "ln(sigma) is drawn from a normal distribution; most of it lies beyond the scheduler's sigma_min and sigma_max.",
         "SVD-XT: objective.p_mean=1.0, p_std=1.6; SVD: p_mean=0.7."),
    Rule("CFG112", "the conditioning frame drowns in noise",
         "exp(conditioning.noise_aug[0]) is the usual standard deviation of the noise on a frame with pixels in [-1, 1].",
         "Set conditioning.noise_aug=[-3.0,0.5], as SVD was trained."),
    Rule("CFG113", "a micro-condition beyond SVD's training",
         "fps and motion_bucket are given to the UNet as numbers; SVD was trained with fps 5 to 30 and motion buckets 1 to 255.",
         "Choose a value in that range."),
    Rule("CFG114", "preflight.ignore names no rule",
         "The code is that of no rule, so nothing is silenced.",
         "Take the code from the report."),
    Rule("CFG115", "a bridge where none is needed",
         "conditioning.bridge trains a new projection between the image encoder and the UNet. Where their widths are equal it would "
         "only put noise between two parts that were trained together.",
         "Leave conditioning.bridge out."),
    Rule("CFG116", "nothing to validate on",
         "Held-out loss and sample videos were asked for, and no clip is held out to make them from.",
         "Set data.holdout above 0, give validation.images, or switch validation off."),
    Rule("CFG118", "the run is written among the clips",
         "data.root is searched with all its folders, so the run's own sample videos become clips when it goes on.",
         "Put run.dir beside data.root, not below it."),
    Rule("CFG119", "more clips held out than trained on",
         "data.holdout is the share of files kept away from training.",
         "Set data.holdout=0.1."),
    Rule("CFG120", "the run is finished",
         "Its newest checkpoint is at train.steps already: the same command would train nothing, whatever clips it is given.",
         "Raise train.steps, or set another run.name."),
    Rule("CFG117", "no parameter would be trained",
         "The method or the targets of `adapt` match nothing that can learn in this UNet, or only dead layers.",
         "Choose another adapt.method or other adapt.targets."),
)

_CHECKPOINT: tuple[Rule, ...] = (
    Rule("CKP201", "the model folder cannot be used",
         "The path does not exist, is not a diffusers folder, or one of its JSON files is missing or damaged.",
         "Give the whole folder of an SVD release, a hub id (owner/name) or 'tiny'."),
    Rule("CKP203", "the weights are not on this machine yet",
         "Training begins with their download (gigabytes), and preflight cannot check what is not here.",
         "Nothing must be done; to check them first, download with `hf download` and run preflight again."),
    Rule("CKP204", "a single file stands where a folder is needed",
         "svdtune reads diffusers folders, in which each part has its config. A single file has no config.",
         "Give the hub id or the diffusers folder of the same release."),
    Rule("CKP205", "a weight file is not what its name says",
         "Truncated downloads, git-LFS pointers, web pages and pickles are found under the names of weights. Loaders then fail with "
         "messages such as MetadataIncompleteBuffer, or give no reason.",
         "Download the file again; take safetensors, not .bin or .ckpt."),
    Rule("CKP206", "the weights that model.variant names are not there",
         "A folder often holds *.fp16.safetensors only, or plain names only; pickles (.bin, .pt, .ckpt) are never read.",
         "Set model.variant to what the folder holds: fp16, or null for plain names."),
    Rule("CKP207", "the weights are of another kind of model",
         "Image models, LoRAs, ControlNets, SV3D and derivatives with a mask or another condition have other layers than SVD. Forced "
         "in with ignore_mismatched_sizes=True, the layers that differ would be random.",
         "Take the part from an SVD release; for image weights see model.on_mismatch=adapt."),
    Rule("CKP208", "every weight's name carries a wrapper's prefix",
         "The file was saved from DataParallel (module.), torch.compile (_orig_mod.) or a training class. No name fits, all weights "
         "would stay random, and diffusers raises nothing.",
         "Save the file again without the prefix."),
    Rule("CKP209", "weights are missing",
         "diffusers' from_pretrained never raises on missing keys: they train from random values.",
         "Take all shards and all keys from one release; no setting leaves a weight random."),
    Rule("CKP210", "weights that the network has no place for",
         "LoRA adapters, a text tower, quantisation data or layers of another network lie in the file and would be left out.",
         "Take weights and config.json from one release."),
    Rule("CKP211", "weights have another shape than config.json says",
         "conv_in shows other conditioning channels, attn2.to_k another encoder, add_embedding other ids; everything else other layer "
         "sizes or class defaults. ignore_mismatched_sizes=True would load and leave these layers random.",
         "Take weights and config.json from one release."),
    Rule("CKP212", "the weights are quantised",
         "int8 and fp8 weights are made for inference; training cannot start from them.",
         "Take the fp16 or fp32 weights of the same model."),
    Rule("CKP213", "a number that no weight's shape shows is not SVD's",
         "The number of attention heads (64 wide at every level of SVD's UNet; 16 in its CLIP tower) and the tower's activation leave "
         "every weight shape as it is: all loads, and computes something else.",
         "Copy config.json from the release."),
    Rule("CKP214", "the scheduler is not SVD's",
         "SVD needs EulerDiscrete with v_prediction, timestep_type continuous, Karras sigmas, sigma_max 700 and sigma_min 0.002. With "
         "class defaults the UNet gets t = 999...0 and samples start at a noise level of about 12 instead of 700; nothing raises.",
         "Copy scheduler/scheduler_config.json from the release."),
    Rule("CKP215", "the image encoder's config is missing or incomplete",
         "transformers fills in ViT-B/32: hidden size 768, patches of 32, projection 512. SVD's tower is ViT-H/14: 1280, 14, 1024.",
         "Copy image_encoder/config.json from the release."),
    Rule("CKP216", "a config lacks numbers that shapes follow from",
         "diffusers fills in class defaults; those of the VAE are one level of 64 channels instead of four.",
         "Copy the config.json of this part from the release."),
    Rule("CKP217", "the VAE's scaling_factor is not SVD's",
         "A VAE with SVD's shapes has 0.18215. Another factor gives latents another spread than the noise levels are made for.",
         "Copy vae/config.json from the release."),
    Rule("CKP218", "weights are widened by model.on_mismatch=adapt",
         "conv_in gets zeros for the conditioning latents, missing temporal layers start so that they change nothing. Both learn only "
         "with a method that trains them.",
         "adapt.method=full; or take SVD's own weights and set model.on_mismatch=error."),
    Rule("CKP221", "a checkpoint of this run is damaged",
         "A file of it is missing or shorter than its manifest says: copied while it was written, or cut by a full disk.",
         "Restore it from a copy, or remove it so that an older one is used."),
    Rule("CKP220", "CLIP's picture statistics are not CLIP's",
         "image_mean and image_std normalise the first frame for the image encoder; every CLIP of SVD's kind has the same three "
         "numbers each, and no shape shows others.",
         "Copy feature_extractor/preprocessor_config.json from the release."),
    Rule("CKP219", "the feature extractor's config is missing",
         "It holds the mean and standard deviation that CLIP's pictures are normalised with.",
         "Copy feature_extractor/preprocessor_config.json from the release."),
    Rule("CKP222", "a variant given as revision",
         "A revision is a state of the hub's repository, a variant an ending of its files (fp16). The hub finds no such revision.",
         "Set model.variant, and model.revision=null."),
    Rule("CKP250", "a weight has another shape than the model",
         "Class, config.json and weights are not of one model. The usual advice, ignore_mismatched_sizes=True, leaves the layer random.",
         "Open the file with the class and config.json of its own release; `svdtune inspect FILE` says which."),
    Rule("CKP251", "keys are missing or too many",
         "Weights of another architecture, with another prefix, or saved in part. A loader that is not strict leaves missing ones random.",
         "Compare the header with the model: `svdtune inspect FILE --against svd-xt`."),
    Rule("CKP252", "a weight file that is damaged",
         "A download that stopped early, an empty file, or something else under the name of weights.",
         "Delete it and download it again."),
    Rule("CKP253", "a file that is not in the folder",
         "Only a variant's files are there, the part is in a subfolder, or config.json was not copied. The name in the message is the last "
         "one that was tried.",
         "Set model.variant to what the folder has, or copy the whole folder of the release."),
    Rule("CKP254", "a git-lfs pointer instead of weights",
         "The repository was cloned without git-lfs.",
         "git lfs install && git lfs pull."),
    Rule("CKP255", "a model class and its config of different versions",
         "The config names arguments that this version of the class does not take, or leaves out ones it needs.",
         "Install the version of the code that the config was written for."),
    Rule("CKP256", "the hub does not give it",
         "Offline, no token, a licence that was not accepted, or a variant given as revision.",
         "Accept the licence and log in, or give a local folder as model.pretrained; variant=fp16, not revision=fp16."),
    Rule("CKP257", "the image encoder is not loaded",
         "A checkpoint of UNet and VAE alone has none, and the loader goes on with None.",
         "Load image_encoder/ of the SVD release."),
)

_DATA: tuple[Rule, ...] = (
    Rule("DAT301", "no clip can be used",
         "The folder is missing, holds no videos, or none of its files gives a clip.",
         "Point data.root at a folder of videos; the other DAT findings say why each file is left out."),
    Rule("DAT302", "a file cannot be read",
         "It is no video, is cut or damaged, or holds pictures that would come out wrong (HDR, alpha).",
         "Copy it again, re-encode it with ffmpeg as the finding says, or remove it."),
    Rule("DAT303", "a validation image cannot be opened",
         "Sample videos start from validation.images; the run would stop at the first sample.",
         "Mend the path, or give a picture that opens."),
    Rule("DAT304", "files too short for a clip",
         "A clip lasts (num_frames - 1) / fps seconds; shorter files give none. Frames are never repeated to fill it.",
         "Raise data.fps, lower data.num_frames, or use longer files."),
    Rule("DAT305", "files slower than data.fps",
         "A file with fewer frames per second than the clip would have its frames repeated: the model would learn to stutter.",
         "Lower data.fps to the files' own rate."),
    Rule("DAT306", "files of another shape than the frame",
         "More than half of the picture is cropped, or more than half of the frame is border.",
         "Choose data.height and data.width of the clips' shape."),
    Rule("DAT307", "files much smaller than the frame",
         "They are scaled up more than two times; the model learns blur.",
         "Choose a smaller data.height and data.width, or larger clips."),
    Rule("DAT308", "files that decord reads wrongly",
         "decord ignores edit lists, miscounts open groups of pictures and converts only one colour matrix.",
         "Set data.decoder=auto, which reads such files with PyAV."),
    Rule("DAT309", "the same file several times",
         "All files are one, or a held-out file is trained on under another name, so that the held-out loss says nothing.",
         "Remove the copies."),
    Rule("DAT310", "too few files to hold one out",
         "With one usable file there is no held-out loss, and samples start from what is trained on.",
         "Add a file, or set validation.clips=0."),
    Rule("DAT311", "the loader's batch is not what the step takes",
         "The first clips were read as training reads them, and shape, dtype or range differ from the table.",
         "The finding names the field and the repair; mend the loader or the transform."),
    Rule("DAT312", "interlaced files",
         "Each picture holds two half pictures of different times; moving edges are combs.",
         "Deinterlace them with ffmpeg's bwdif."),
    Rule("DAT313", "clips behind a linked folder",
         "Linked folders are not followed, so that a link to a parent cannot make the search endless.",
         "Move the clips, or point data.root at the folder that is linked to."),
    Rule("DAT314", "clips that stand still",
         "A picture that is shown several times in a row teaches the model to stand still and then jump. Converted GIFs, animation and "
         "recordings with a made-up frame rate are such files.",
         "Sample slower (data.fps), or take files that hold as many pictures as their frame rate says."),
    Rule("DAT350", "clips of one batch differ in shape",
         "A batch is stacked: all its clips need the same frames, height and width.",
         "Sample a fixed number of frames by time, and crop to a fixed size."),
    Rule("DAT351", "a clip with too few frames",
         "The check runs only when that clip is drawn, so training stops at a random step.",
         "`svdtune data scan CONFIG` finds it first; data.on_bad_clip=skip leaves it out."),
    Rule("DAT352", "a video that cannot be decoded",
         "Damaged, missing, or of a kind that the decoder does not know.",
         "`svdtune data scan CONFIG` names it; re-encode it, or data.decoder=pyav."),
)

_SHAPES: tuple[Rule, ...] = (
    Rule("SHP401", "the training step fails on these shapes",
         "`train_step`, forward or backward, raised on tensors of the shapes of this configuration. It would raise on the GPU, "
         "after the weights are loaded.",
         "The finding names the record field or the module, what came, what was expected, and the repair that would fit."),
    Rule("SHP402", "time ids do not fill the embedding that eats them",
         "Each of SVD's three micro-conditions (fps - 1, motion_bucket_id, noise_aug_strength) becomes addition_time_embed_dim "
         "numbers, and `add_embedding` takes all of them at once: ids x addition_time_embed_dim must equal "
         "projection_class_embeddings_input_dim (SVD: 3 x 256 = 768). One id gives the error "
         "\"mat1 and mat2 shapes cannot be multiplied (4x256 and 768x1280)\".",
         "Give added_time_ids of shape (batch, 3), or take the UNet and its config.json from one SVD release."),
    Rule("SHP403", "the CLIP embedding is not as wide as the cross-attention",
         "The image encoder's projection_dim goes into every `attn2.to_k` and `attn2.to_v` of the UNet, whose input width is "
         "cross_attention_dim. SVD has OpenCLIP ViT-H/14 with 1024; ViT-B/32 (the class default) has 512, ViT-L/14 768.",
         "Put the image encoder of the UNet's own release in place, or train a projection: conditioning.bridge=linear."),
    Rule("SHP404", "latent channels of UNet and VAE differ",
         "SVD's UNet takes the noisy latents and the conditioning latents side by side, 2 x latent_channels, and answers with "
         "latent_channels. A text-to-image UNet takes only the noisy ones, a mask-trained derivative 1 more.",
         "Take UNet and VAE from one SVD release, or set model.on_mismatch=adapt where a widening is known to be safe."),
    Rule("SHP405", "two axes could be swapped unseen",
         "At the sizes of the configuration the step passes, at sizes that are all different it fails: two axes have the same "
         "length here and are mixed up, so training would run and learn nonsense.",
         "Mend the code that the finding names; no setting of the configuration makes swapped axes right."),
    Rule("SHP407", "what is drawn for a clip is not what the step takes",
         "Noise level, noises and dropout masks are drawn per clip by `diffusion/draws.py`; one of them has another shape, dtype or "
         "is not finite, and the first step would stop.",
         "One noise level per clip, noises of the latents' shape, masks of 0 and 1, all float32."),
    Rule("SHP408", "trainable parameters and the trained set differ",
         "Some parameters require a gradient and are not handed to the optimizer, or the reverse: they would cost memory and never "
         "move, or be saved without having learned.",
         "Let `adapt` alone decide which parameters require a gradient."),
    Rule("SHP406", "a trained parameter gets no gradient",
         "After the backward pass some trained parameters have none: they are not used in the loss, or the way to them is cut by a "
         "detach or no_grad. They would never learn, and DDP would stop or hang.",
         "Train only parameters that the loss depends on, and call the UNet inside the graph."),
    Rule("SHP410", "two sizes that must agree do not",
         "A layer or an operation got a tensor whose axes do not fit. No pattern of SVD was recognised in the sizes.",
         "Print both shapes before the line; `svdtune trace` follows them through a module."),
    Rule("SHP411", "a height or width that does not halve evenly",
         "Every level of the UNet halves and rounds up, then doubles: 68, 34, 17, 9, and back 18 instead of 17.",
         "Sizes that are multiples of 64 for SVD, the same for every video and condition; or diffusers >= 0.32."),
    Rule("SHP412", "a layer takes another number of channels",
         "A checkpoint of another variant, an RGBA picture, or something joined on the channel axis that the weights were not made for.",
         "Take the variant that fits the input; convert pictures to RGB."),
    Rule("SHP413", "another number of frames than a layer or condition has",
         "Positional tables, temporal patches and control videos fix the number of frames. SVD's own UNet takes any.",
         "Use a legal number of frames, and as many in every condition as in the clip."),
    Rule("SHP414", "rows of a condition that do not match the clips",
         "encoder_hidden_states and added_time_ids have one row for each clip, twice that with classifier-free guidance; the UNet repeats "
         "them for frames itself.",
         "Give one row for each clip of `sample`, and double all inputs or none."),
    Rule("SHP415", "an axis is missing or too many",
         "The UNet reads (batch, frames, channels, height, width), its attention (batch, tokens, width), VAE and CLIP (batch, channels, "
         "height, width).",
         "unsqueeze the missing axis, or flatten batch and frames for the VAE."),
    Rule("SHP416", "pictures or patches of another size than the vision tower's",
         "An image encoder has one picture size and one patch size.",
         "Resize to its size, and take the encoder that belongs to the model."),
)

_MODULES: tuple[Rule, ...] = (
    Rule("SHP450", "a module raises in forward",
         "`svdtune trace` ran the module and one layer, or a line of a module's own forward, cannot take what came.",
         "Take one of the remedies of the report: each was run, forward and backward, with the change."),
    Rule("SHP451", "a module raises in backward",
         "Forward runs, but a gradient cannot be computed: a tensor that it needs was overwritten in place, or a custom "
         "autograd function gives a gradient of another shape.",
         "Write a new tensor in place of `x += ...` or `inplace=True`; give gradients the shape of the inputs."),
    Rule("SHP452", "no gradient reaches the parameters",
         "Everything that the module returns is detached, made under no_grad, or not differentiable: loss.backward() raises.",
         "Return the tensor before the detach; leave torch.no_grad to the code that only infers."),
    Rule("SHP453", "the output has another shape than it should equal",
         "Nothing raises in forward. A loss may raise, or broadcast both and compare numbers that do not belong together.",
         "Give the last layer the right number of features, or bridge, squeeze or permute the output, as the report says."),
    Rule("SHP454", "samples of a batch are mixed",
         "Changing one sample changes the output of others, or the batch axis was merged: `view` keeps the order in memory and "
         "only cuts it elsewhere, it does not swap axes; `flatten()` and `view(-1, n)` swallow the batch.",
         "permute or transpose to swap axes; flatten(1) to keep the batch; softmax and mean over an axis that is not the batch."),
    Rule("SHP455", "a single sample gives other axes",
         "`squeeze()` removes every axis of length 1; with one sample the batch axis is one of them.",
         "squeeze(1), or another named axis."),
    Rule("SHP456", "a picture without batch axis",
         "A picture (channels, height, width) is flattened from axis 1: it runs, and the channels pass for the samples.",
         "x.unsqueeze(0) makes a batch of one."),
)

_SEMANTICS: tuple[Rule, ...] = (
    Rule("SEM550", "a scheduler of another kind of training",
         "SVD is trained with continuous noise levels: sigma is drawn, x = x0 + sigma n, timestep = ln(sigma) / 4. Image recipes draw "
         "integer timesteps.",
         "Compute noisy latents from sigma, and take scheduler_config.json of the release."),
    Rule("SEM551", "an input that is None",
         "In image-to-video mostly the first frame, not given or not found.",
         "Give a first frame, and check its path."),
)

_PRECISION: tuple[Rule, ...] = (
    Rule("NUM601", "trained parameters are not float32",
         "A step of 1e-5 vanishes in bf16 weights (0.02 - 1e-5 == 0.02), and the gradient scaler of fp16 refuses fp16 gradients "
         "(\"Attempting to unscale FP16 gradients\").",
         "Keep trained parameters in float32 and cast only frozen ones."),
    Rule("NUM650", "tensors of different types in one operation",
         "Without autocast torch multiplies only tensors of one type; frozen parts in half precision meet float32 inputs.",
         "Run it under autocast, or cast the input to the weights' type."),
    Rule("NUM651", "values that are not finite",
         "float16 ends at 65504, which activations of the VAE pass; a learning rate that is too high does the same to weights.",
         "The VAE in float32 or bfloat16; train.precision=bf16, a lower train.lr."),
)

_MEMORY: tuple[Rule, ...] = (
    Rule("MEM701", "the step does not fit into the device",
         "The peak of all tensors alive during forward, backward and optimizer step exceeds the memory of the device.",
         "Fewer frames, a smaller size, LoRA instead of full training, or gradient checkpointing."),
    Rule("MEM702", "this machine cannot run it",
         "No GPU is visible, and the step needs more memory than this machine has. That is expected where a laptop checks a run "
         "for a rented card.",
         "Run it on the card, or check against its memory with `svdtune preflight CONFIG --gpu 24GiB`."),
    Rule("MEM750", "the machine's main memory is full, or a process was killed",
         "The kernel kills the largest process when main memory is full; it leaves no message of its own. An allocation on the CPU that "
         "fails does.",
         "Fewer processes or loader workers, more memory, or a higher limit of the container."),
)

_RANKS: tuple[Rule, ...] = (
    Rule("DST801", "a wrapper asked for what only the network has",
         "accelerator.prepare wraps the network when there are several processes, and not when there is one.",
         "accelerator.unwrap_model(model) for attributes, the wrapped model for forward."),
    Rule("DST802", "a rank without gradients for some parameters",
         "DDP waits for every trained parameter in every step.",
         "Freeze what the loss does not use; gradient checkpointing with use_reentrant=False."),
    Rule("DST803", "a rank waited for another that never came",
         "Ranks ran different code, mostly a save on the main process alone, or one died earlier.",
         "Save on all ranks; look for the first rank that failed."),
    Rule("DST804", "optimizer state of another set of parameters",
         "Another set is trained than when the checkpoint was written.",
         "Resume with the same adapt section, or start a new run from the exported weights."),
    Rule("DST805", "a seed that is None",
         "It is used before it is checked.",
         "Give a seed (run.seed)."),
)
# fmt: on

RULES: dict[str, Rule] = {
    rule.code: rule
    for block in (
        _ENVIRONMENT,
        _CONFIGURATION,
        _CHECKPOINT,
        _DATA,
        _SHAPES,
        _MODULES,
        _SEMANTICS,
        _PRECISION,
        _MEMORY,
        _RANKS,
    )
    for rule in block
}


def only_explained(code: str) -> bool:
    """Whether only `explain` and `trace` name the rule: their numbers end in 50 and more."""
    return int(code[-2:]) >= 50
