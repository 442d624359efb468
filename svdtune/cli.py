"""The verbs, a few lines each. What needs torch is imported inside them: help and config errors stay instant."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from svdtune import __version__, launch
from svdtune.config.load import load_config, resolved_yaml
from svdtune.config.schema import Config
from svdtune.errors import PreflightError, SvdtuneError, UsageError

_EXAMPLES = """\b
Examples:
  svdtune data demo demo/                              clips of moving shapes to try things with
  svdtune train configs/tiny.yaml                      fine-tune the embedded tiny base, on a CPU
  svdtune train configs/tiny.yaml train.lr=3e-4        change an option
  svdtune sample runs/tiny first_frame.png             a video from the result
  svdtune preflight configs/svd_lora.yaml              what would go wrong, before it does
  accelerate launch -m svdtune train configs/svd_xt_lora.yaml
"""

_TRAIN_EXAMPLES = """\b
Examples:
  svdtune train configs/tiny.yaml
  svdtune train configs/tiny.yaml train.steps=50 run.name=short
  svdtune train configs/svd_xt_lora.yaml -- --num_processes 2      all after -- goes to accelerate launch
  accelerate launch --multi_gpu -m svdtune train configs/svd_xt_full.yaml
  torchrun --nproc_per_node 2 -m svdtune train configs/tiny.yaml
The same command again resumes the run.
"""

_PREFLIGHT_EXAMPLES = """\b
Examples:
  svdtune preflight configs/svd_xt_lora.yaml
  svdtune preflight configs/svd_xt_lora.yaml data.num_frames=14 --json
  svdtune preflight my.yaml --fix repaired.yaml        write the changes that were proved to help
  svdtune preflight my.yaml --gpu 24GiB                a laptop asks for a rented card
  svdtune preflight my.yaml --all                      every clip, not a sample
  svdtune preflight my.yaml --only probe               does the base agree that this is RGB, forwards, at this fps
  svdtune preflight --only env                         versions and devices, for a bug report
"""

_PLAN_EXAMPLES = """\b
Examples:
  svdtune plan configs/svd_xt_lora.yaml --gpu 24GiB
  svdtune plan configs/svd_xt_full.yaml --gpu 40GiB --apply planned.yaml
  svdtune plan configs/svd_xt_lora.yaml data.num_frames=14 --json
"""

_TRACE_EXAMPLES = """\b
Examples:
  svdtune trace model.py:Net --input 2,1,28,28
  svdtune trace model.py:Net --input 2,1,28,28 --like 2,10 --json
  svdtune trace model.py:Tagger --input int64:2,16 --args '{"hidden": 32}'
"""

_EXPLAIN_EXAMPLES = """\b
Examples:
  svdtune explain train.log
  svdtune train cfg.yaml 2>&1 | svdtune explain - --config cfg.yaml
  svdtune explain "mat1 and mat2 shapes cannot be multiplied (4x256 and 768x1280)"
  svdtune explain SHP402
"""

_CACHE_EXAMPLES = """\b
Examples:
  svdtune cache configs/tiny.yaml data.latents=latents/ data.windows=4
  svdtune train configs/tiny.yaml data.latents=latents/ data.windows=4
  accelerate launch --multi_gpu -m svdtune cache configs/svd_xt_lora.yaml data.latents=latents/ data.windows=4
The same command again encodes what is missing, and nothing else.
"""

_SAMPLE_EXAMPLES = """\b
Examples:
  svdtune sample runs/tiny first_frame.png
  svdtune sample runs/tiny first_frame.png --out video.mp4 --seed 3 --motion-bucket 200
  svdtune sample runs/tiny pictures/ --compare         the base beside every checkpoint, for every picture
  svdtune sample svd_xt.safetensors first_frame.png --lora mine.safetensors --lora-scale 0.7
  svdtune sample runs/tiny/checkpoints/step-00000150 pictures/ --seed 1 --seed 2 --sheet
"""

_CONVERT_EXAMPLES = """\b
Examples:
  svdtune convert svd_xt.safetensors svd-xt/                     the original's single file to a diffusers folder
  svdtune convert svd-xt/ svd_xt.safetensors --dtype fp16        and back: for ComfyUI
  svdtune convert runs/x x.safetensors                           a LoRA run: a LoRA with ComfyUI's names; others: the whole model
  svdtune convert runs/x x.safetensors --into svd_xt.safetensors for the original code too: all but the trained is kept
  svdtune convert runs/x merged/ --merge                         a LoRA in the weights of its base
  svdtune convert lora.safetensors adapter/ --base svd-xt/       a LoRA file to peft's folder
"""

_INSPECT_EXAMPLES = """\b
Examples:
  svdtune inspect svd_xt.safetensors
  svdtune inspect unet/ --against svd-xt
  svdtune inspect my-svd-folder --against svd-xt --json
"""

_DEMO_EXAMPLES = """\b
Examples:
  svdtune data demo demo/
  svdtune data demo demo/ --clips 48 --motion up --seed 1
"""

_SCAN_EXAMPLES = """\b
Examples:
  svdtune data scan configs/tiny.yaml
  svdtune data scan configs/svd_lora.yaml data.root=clips/ data.fps=12
"""

_CONFIG_EXAMPLES = """\b
Examples:
  svdtune config show configs/tiny.yaml train.lr=3e-4
  svdtune config schema > configs/schema.json
"""

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it: 128 + SIGINT."""

_STYLE: dict[str, Any] = {"rich_markup_mode": None, "no_args_is_help": True, "add_completion": False}
app = typer.Typer(
    **_STYLE,
    help="Fine-tune Stable Video Diffusion from a YAML, and prove the run before it starts.",
    epilog=_EXAMPLES,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(**_STYLE, help="Clips: write demo clips, check your own.", epilog=_DEMO_EXAMPLES)
config_app = typer.Typer(**_STYLE, help="Options: show the resolved ones, print their schema.", epilog=_CONFIG_EXAMPLES)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of the run.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", show_default=False)]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"svdtune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


@app.command(epilog=_TRAIN_EXAMPLES)
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    preflight_only: Annotated[bool, typer.Option("--preflight-only", help="Run the checks and stop.")] = False,
) -> None:
    """Check, then fine-tune. The same command again resumes."""
    loaded = load_config(config, overrides or ())
    if not preflight_only:
        launch.join_world(sys.argv[1:])
    with _explained(loaded):
        loaded = _planned(loaded)
        if preflight_only:
            _require_preflight(loaded)
            return
        from svdtune.trainer.early import early

        checked = loaded.preflight.enabled
        with early(loaded):
            report = _require_preflight(loaded) if checked and launch.rank() == 0 else None
            from svdtune.trainer.run import train as run_training

        watch = _watcher(report) if checked else None
        run_training(loaded, config_text=config.read_text(encoding="utf-8"), watch=watch)


@app.command(epilog=_PREFLIGHT_EXAMPLES)
def preflight(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML of the run.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    only: Annotated[
        Literal["env", "config", "checkpoint", "data", "shapes", "memory", "live", "probe"] | None,
        typer.Option(
            help="One stage. `env` needs no CONFIG and is the report to paste into an issue; `live` builds the run and proves its step; "
            "`probe` asks the base which conventions your clips agree with."
        ),
    ] = None,
    exhaustive: Annotated[bool, typer.Option("--all", help="Look at every clip, not at a sample.")] = False,
    gpu: Annotated[str | None, typer.Option(metavar="24GiB", help="Memory of the GPU that the run is for.")] = None,
    fix: Annotated[
        Path | None, typer.Option(metavar="OUT.yaml", help="Write CONFIG with the verified changes, comments kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Everything that can go wrong, before it does. Exit code 3 when something would."""
    from svdtune.guards.cli import preflight_verb

    code = preflight_verb(config, overrides or (), only=only, exhaustive=exhaustive, gpu=gpu, fix=fix, as_json=as_json)
    if code:
        raise typer.Exit(code)


@app.command(epilog=_CACHE_EXAMPLES)
def cache(config: ConfigPath, overrides: Overrides = None) -> None:
    """Encode the clips of CONFIG once, into data.latents, so that training needs neither videos nor CLIP. Goes on where it stands."""
    loaded = load_config(config, overrides or ())
    launch.join_world(sys.argv[1:])
    with _explained(loaded):
        from svdtune.trainer.caching import run_cache

        print(run_cache(loaded))


@app.command(epilog=_PLAN_EXAMPLES)
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="24GiB", help="Memory of the GPU that the run is for; default: this machine's."),
    ] = None,
    apply: Annotated[
        Path | None, typer.Option(metavar="OUT.yaml", help="Write CONFIG with the settings picked, comments kept.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a run needs of a GPU, and the fastest settings that fit: no weights, no GPU."""
    from svdtune.guards.plan_verb import plan_verb

    plan_verb(config, overrides or (), gpu=gpu, apply=apply, as_json=as_json)


@app.command(epilog=_TRACE_EXAMPLES)
def trace(
    target: Annotated[
        str, typer.Argument(metavar="FILE.py:NAME", help="A module, its class or a function that makes one.")
    ],
    inputs: Annotated[list[str] | None, typer.Option("--input", help="[DTYPE:]SIZE,SIZE,... of each input.")] = None,
    like: Annotated[str | None, typer.Option(help="SIZE,SIZE,... that the output should have.")] = None,
    arguments: Annotated[str, typer.Option("--args", help="JSON object: arguments of NAME.")] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Any torch module layer by layer, where it fails, and what mends it. Exit code 3 when something is wrong."""
    from svdtune.guards.trace import trace_file

    report = trace_file(target, inputs or (), like, arguments)
    print(json.dumps(report.as_json(), indent=2) if as_json else report.render())
    if not report.ok:
        raise typer.Exit(PreflightError.exit_code)


@app.command(epilog=_INSPECT_EXAMPLES)
def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", show_default=False)],
    against: Annotated[str | None, typer.Option(help="svd-xt, svd, or a folder to compare with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a checkpoint is, from headers alone. Exit code 3 when it cannot be used or differs from --against."""
    from svdtune.guards.inspecting import inspect_path, render_inspection

    found = inspect_path(path, against)
    print(json.dumps(found.as_json(), indent=2) if as_json else render_inspection(found))
    if not found.ok:
        raise typer.Exit(PreflightError.exit_code)


@app.command(epilog=_CONVERT_EXAMPLES)
def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Run, diffusers folder, single file, LoRA, hub id or tiny.", show_default=False
        ),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="A name in .safetensors, or a new folder.", show_default=False)
    ],
    into: Annotated[
        Path | None, typer.Option(help="The base's single file: DST is it, with the trained weights.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the base with the LoRA in its weights.")] = False,
    base: Annotated[
        str | None, typer.Option(help="The model a LoRA is for; default: the one it was trained on, if it is here.")
    ] = None,
    dtype: Annotated[
        Literal["fp16", "bf16", "fp32"] | None, typer.Option(help="Default: that of SRC, or of its base.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A folder of RUN/checkpoints; default: the newest.")] = None,
) -> None:
    """A checkpoint in another format: original single file, diffusers folder, LoRA. DST is read back before it gets its name."""
    from svdtune.convert.cli import convert as convert_source

    for line in convert_source(
        source, destination, into=into, merge=merge, base=base, dtype=dtype, checkpoint=checkpoint
    ):
        print(line)


@app.command(epilog=_EXPLAIN_EXAMPLES)
def explain(
    target: Annotated[
        str, typer.Argument(metavar="[FILE|-|CODE|MESSAGE]", help="An error text, or a rule's code.")
    ] = "-",
    config: Annotated[Path | None, typer.Option(help="YAML of the run, for its model's own numbers.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout; no findings when unknown.")
    ] = False,
) -> None:
    """The cause of an error, from a traceback, a log or a bare message."""
    from svdtune.guards.explain.verb import explain_verb

    print(explain_verb(target, config, json_out=as_json))


@app.command(epilog=_SAMPLE_EXAMPLES)
def sample(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Run, checkpoint, diffusers folder, single file, hub id or tiny.", show_default=False
        ),
    ],
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE|FOLDER", help="First frame, or a folder of them.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="An .mp4 for one video, else a folder; default: RUN/samples, or samples/ here.")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(metavar="<int>", help="Another seed, another video; may be repeated. Default: 0."),
    ] = None,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="<text>", help="Step or folder of RUN/checkpoints; may be repeated. Default: the newest."),
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="LoRA file (ComfyUI, kohya) or peft folder to put on SOURCE.")
    ] = None,
    lora_scale: Annotated[
        float | None, typer.Option(help="How much the LoRA acts, or that of a LoRA run; 1: as trained.")
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="The base beside each --checkpoint (default: all) or the --lora, in one video and one sheet.",
        ),
    ] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="One contact sheet of all videos too.")] = False,
    frames: Annotated[
        bool, typer.Option("--frames", help="Each frame as PNG too, in a folder beside the mp4.")
    ] = False,
    num_frames: Annotated[int | None, typer.Option(help="This and all below: default as trained.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.")] = None,
    motion_bucket: Annotated[float | None, typer.Option(help="More is more motion, 0 to 1023.")] = None,
    noise_aug_strength: Annotated[float | None, typer.Option(help="Noise on the first frame.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.")] = None,
    guidance_min: Annotated[float | None, typer.Option(help="Guidance of the first frame.")] = None,
    guidance_max: Annotated[float | None, typer.Option(help="Guidance of the last frame.")] = None,
    decode_chunk: Annotated[
        int | None, typer.Option(help="Frames that the VAE decodes at once; fewer need less memory.")
    ] = None,
) -> None:
    """Videos that start with IMAGE. Each written path is one line on stdout."""
    from svdtune.sample.cli import Request, sample
    from svdtune.sample.shot import Asked
    from svdtune.sample.sources import Choice

    asked = Asked(
        num_frames=num_frames,
        fps=fps,
        motion_bucket=motion_bucket,
        noise_aug_strength=noise_aug_strength,
        steps=steps,
        guidance_min=guidance_min,
        guidance_max=guidance_max,
        height=height,
        width=width,
        decode_chunk=decode_chunk,
    )
    choice = Choice(source, tuple(checkpoint or ()), lora, lora_scale, compare)
    for path in sample(Request(choice, image, out, tuple(seed or (0,)), asked, frames, sheet)):
        print(path, flush=True)


@data_app.command(epilog=_DEMO_EXAMPLES)
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the clips go.", show_default=False)],
    clips: Annotated[int, typer.Option(min=1, help="Number of files.")] = 24,
    motion: Annotated[Literal["right", "left", "down", "up"], typer.Option(help="Where the shapes move.")] = "down",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write H.264 clips of moving shapes. The same arguments write the same files."""
    from svdtune.data.demo import write_demo

    paths = write_demo(folder, clips=clips, motion=motion, seed=seed)
    print(f"{len(paths)} clips in {folder}")


@data_app.command(name="scan", epilog=_SCAN_EXAMPLES)
def scan_clips(config: ConfigPath, overrides: Overrides = None) -> None:
    """Say which files below data.root CONFIG can use, and why not the others. Exit code 3 when it can use none."""
    from svdtune.data.catalog import scan

    catalog = scan(load_config(config, overrides or ()).data)
    for rejected in catalog.rejected:
        print(rejected.reason)
    print(
        f"{len(catalog.train)} files to train on, {len(catalog.held_out)} held out, "
        f"{len(catalog.rejected)} that cannot be used"
    )


@config_app.command(epilog=_CONFIG_EXAMPLES)
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print every option as the run would use it."""
    print(resolved_yaml(load_config(config, overrides or ())), end="")


@config_app.command(epilog=_CONFIG_EXAMPLES)
def schema() -> None:
    """Print the JSON schema of a config, for editors."""
    from svdtune.config.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


def main() -> None:
    """Run a verb; an error that a person caused becomes `error: ...` and its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that knows ASCII alone must not hide an error
    # transformers otherwise opens every run with a line about torchvision, which svdtune does not need.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when torch is loaded: its CPU threads otherwise spin while they wait, and on a core that others use too they wait for long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        own, for_launcher = launch.split_arguments(sys.argv[1:])
        if for_launcher and own[:1] not in (["train"], ["cache"]):
            raise UsageError(
                f"arguments after -- go to accelerate launch, which only `svdtune train` and `svdtune cache` use: {for_launcher}"
            )
        app(args=own, prog_name="svdtune")
    except SvdtuneError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _print_interrupted()
        sys.exit(_INTERRUPTED)
    except SystemExit as stop:
        # Inside a verb typer turns Ctrl-C into this exit code and says nothing.
        if stop.code == _INTERRUPTED:
            _print_interrupted()
        raise


def _planned(config: Config) -> Config:
    """What memory.plan=auto picks on this machine; every rank finds the same, and the first says it."""
    if config.memory.plan is None:
        return config
    from svdtune.guards.plan import planned

    config, told = planned(config)
    if launch.rank() == 0:
        print(told, file=sys.stderr)
    return config


def _require_preflight(config: Config) -> Any:
    from svdtune.guards.cli import require_preflight

    return require_preflight(config)


def _watcher(report: Any) -> Any:
    from svdtune.guards.live.watcher import Watcher

    return Watcher(report)


@contextmanager
def _explained(config: Config) -> Iterator[None]:
    """What nobody foresaw gets the explainer's word before the traceback."""
    try:
        yield
    except SvdtuneError:
        raise
    except Exception as error:
        from svdtune.guards.explain.report import explain_exception

        try:
            told = explain_exception(error, config)
        except Exception as fault:  # a fault of the explainer must not hide the error it was asked about
            told = f"(svdtune explain failed on this error: {type(fault).__name__}: {fault})"
        if told:
            _clear_progress_line()
            print(f"{told}\n", file=sys.stderr)
        raise


def _print_interrupted() -> None:
    _clear_progress_line()
    print("interrupted", file=sys.stderr)


def _clear_progress_line() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _print_error(error: SvdtuneError) -> None:
    from rich.console import Console
    from rich.text import Text

    _clear_progress_line()
    who = f"rank {launch.rank()}: " if launch.rank() else ""
    Console(stderr=True).print(Text.assemble(f"{who}", ("error:", "bold red"), f" {error}"), soft_wrap=True)
