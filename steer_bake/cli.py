"""The command line: parse, call, print. Data goes to stdout, prose and progress to stderr; the only error boundary.

Heavy imports happen inside the commands, so that ``--help`` answers at once. How results look is in ``display.py``.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__, display
from .display import progress
from .errors import SteerBakeError, did_you_mean

if TYPE_CHECKING:
    from .confidence import Aim
    from .interventions import Intervention
    from .job import Job
    from .models import Offload
    from .prompts import Prompt

_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_folder = click.argument("folder", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_dry_run = click.option("--dry-run", is_flag=True, help="Say what would be done and write nothing.")
_device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or mps.")
_dtype = click.option(
    "--dtype", default="auto", show_default=True,
    help="auto, float32, bfloat16 or float16: what the model computes in; auto is float32 on a CPU, else as stored.",
)  # fmt: skip
_base = click.option(
    "--base", help="The base model (hub id, folder or packaged name); default: what steering.json names."
)


def _offloading(command: Callable[..., None]) -> Callable[..., None]:
    memory = click.option(
        "--max-memory", multiple=True, metavar="DEVICE=SIZE",
        help="With --offload: at most so much per device, like cpu=8GiB or 0=20GiB; default: what is free.",
    )  # fmt: skip
    folder = click.option(
        "--offload", type=click.Path(path_type=Path), metavar="FOLDER",
        help="For a model larger than memory: spread it over all devices and keep the rest in FOLDER (accelerate).",
    )  # fmt: skip
    return folder(memory(command))


class _Commands(click.Group):
    """The error boundary: one sentence and a non-zero exit, never a traceback."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}: {did_you_mean(args[0], self.commands)}", context)
        return super().resolve_command(context, args)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except SteerBakeError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; what was finished is kept, run the same command again") from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it exits
            sys.exit(1)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{where}") from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                raise click.ClickException(f"out of memory: {error}; use a smaller model, or --device cpu") from error
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="steer-bake")
def main() -> None:
    """Turn activation steering into ordinary model weights, and prove that the file does what the hooks do."""
    # What these libraries say to stderr is for their own users: our errors are sentences of our own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Threads that wait by spinning slow a forward several times over as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@main.command(short_help="Do everything a recipe asks for, into a run folder.")
@_recipe
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Run folder; default: runs/<recipe's name>.")
@click.option("--no-safety", is_flag=True, help="Do not measure refusals of harmful and harmless requests (recorded).")
@click.option("--force", is_flag=True, help="Run every stage again, also those that are up to date.")
@_device
@_dtype
@_dry_run
@_json
def run(
    recipe: Path, out: Path | None, no_safety: bool, force: bool, device: str, dtype: str, dry_run: bool, as_json: bool
) -> None:
    """Do everything a RECIPE asks for: extract, plan, bake, validate, evaluate, write the card.

    Stages whose inputs have not changed are not run again.

    \b
    Example:
      steer-bake run recipes/quickstart.yaml -o runs/quickstart
    """
    from . import pipeline
    from .job import Job
    from .models import pick_device
    from .stages import Stages

    folder = out or Path("runs") / recipe.stem
    if dry_run:
        Stages(folder)
        job = Job(recipe, folder, device=pick_device(device), dtype=dtype, safety=not no_safety, progress=progress)
        display.plan(job.check(), as_json, sketch=job.recipe.estimator is not None or job.needs_probes)
        display.note(f"this is what {folder / 'model'} would hold; nothing was written")
        return
    done = pipeline.run(
        recipe, folder, device=device, dtype=dtype, safety=not no_safety, force=force, progress=progress
    )
    if as_json:
        display.as_json(
            {"model": str(done.model), "report": done.report, "evaluation": done.evaluation, "ran": dict(done.ran)}
        )
    else:
        display.outcome(done.model, done.report, done.evaluation, done.ran)


@main.command(short_help="Estimate the directions of a recipe.")
@_recipe
@click.option("-o", "--out", type=click.Path(path_type=Path), default="direction.safetensors", show_default=True)
@_offloading
@_device
@_dtype
@_dry_run
@_json
def extract(
    recipe: Path, out: Path, offload: Path | None, max_memory: tuple[str, ...], device: str, dtype: str,
    dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Estimate the directions of a RECIPE and write them to a safetensors file, or to a GGUF control vector (.gguf).

    Under torchrun every process reads its share of the prompts and the first one writes the file.

    \b
    Examples:
      steer-bake extract recipes/quickstart.yaml -o gloomy.safetensors
      torchrun --standalone --nproc-per-node 2 -m steer_bake extract recipes/quickstart.yaml
      steer-bake extract recipes/quickstart.yaml --offload /tmp/weights --max-memory cpu=8GiB
    """
    from . import distributed
    from .job import save_directions
    from .stages import no_empty_folder

    with _shared_job(recipe, out.parent, device, dtype, _offload(offload, max_memory)) as job:
        if dry_run:
            display.note(f"would read {', '.join(map(str, job.read_sites()))} of {job.ref.name} and write {out}")
            return
        directions = job.estimate()
        if not distributed.is_first():
            return
        with no_empty_folder(out.parent):
            save_directions(directions, out, job.layout.model_type)
    if as_json:
        display.as_json([one.provenance() for one in directions])
        return
    display.directions(directions)
    display.note(f"written to {out}")


@main.command(short_help="Fit the gates of a recipe.")
@_recipe
@click.option("-o", "--out", type=click.Path(path_type=Path), default="gates.safetensors", show_default=True)
@_device
@_dtype
@_dry_run
@_json
def probe(recipe: Path, out: Path, device: str, dtype: str, dry_run: bool, as_json: bool) -> None:
    """Fit the gates of a RECIPE on its labelled prompts, measure them, and write them to a safetensors file.

    Under torchrun every process answers and reads its share of the prompts and the first one writes the file.

    \b
    Example:
      steer-bake probe recipes/selective-refusal.yaml -o gates.safetensors
    """
    from . import distributed
    from .fitting import save_gates
    from .stages import no_empty_folder

    with _shared_job(recipe, out.parent, device, dtype) as job:
        if dry_run:
            sites = ", ".join(map(str, job.gate_sites())) or "nothing"
            display.note(f"would fit {sites} of {job.ref.name} and write {out}")
            return
        found = job.fit_gates()
        if not distributed.is_first():
            return
        with no_empty_folder(out.parent):
            save_gates(found, out)
    rows = [{**one.gate.described(), "measures": dict(one.measures)} for one in found]
    if as_json:
        display.as_json(rows)
        return
    display.gates(rows)
    display.note(f"written to {out}")


_prefer = click.option(
    "--prefer", default="smallest", show_default=True,
    metavar="smallest|bit_exact|widest_loading|keep_class|rehouse[:TYPE]|approximate",
    help="What to prefer where several ways to hold a vector are exact; rehouse takes another model class, "
    "approximate what is only close where nothing is exact.",
)  # fmt: skip

_target = click.option(
    "--target", default="checkpoint", show_default=True,
    help="What to write: checkpoint, lora (a PEFT adapter) or gguf-vector (a llama.cpp control vector).",
)  # fmt: skip

_VECTOR_OPTIONS = ("vector", "sites", "from_site", "name", "coefficient", "units", "gate")


def _vector_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option(
                "--vector", type=click.Path(path_type=Path),
                help="Direction file: .safetensors, .gguf (control vector), .npy, .npz or .pt.",
            ),
            click.option("--sites", help="Where to intervene: resid_post.14, resid_post.10-19, writes, ..."),
            click.option("--from", "from_site", help="Use the vector of this site at every site."),
            click.option("--name", default="add", show_default=True, help="The intervention: add, ablate, clamp, ..."),
            click.option(
                "--coefficient", type=float, default=1.0, show_default=True,
                help="How much; for ablate the share of the component that is removed.",
            ),
            click.option(
                "--units", default="scale", show_default=True,
                help="What coefficient 1 means: scale (the vector's natural length), unit (length 1) or dose (the "
                "mean length of the stream).",
            ),
            click.option(
                "--gate", type=click.Path(path_type=Path),
                help="Gate file (of 'probe'): add the vector only where the gate of each site opens.",
            ),
        ]
    ):  # fmt: skip
        command = option(command)
    return command


@main.command(short_help="Show what a bake would change.")
@click.argument("model")
@_vector_options
@_prefer
@_target
@click.option("--run-folder", type=click.Path(path_type=Path), help="Of a recipe; default: runs/<recipe's name>.")
@_json
def plan(
    model: str, vector: Path | None, sites: str | None, from_site: str | None, name: str, coefficient: float,
    units: str, gate: Path | None, prefer: str, target: str, run_folder: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Show what a bake would change, from config and tensor headers alone: of a hub model nothing else is downloaded.

    MODEL is a hub id with optional @revision, a folder, a packaged name, or a recipe (.yaml).

    \b
    Examples:
      steer-bake plan smollm2-135m --vector v.safetensors --sites resid_post.14 --coefficient 8
      steer-bake plan recipes/quickstart.yaml
    """
    if not model.endswith((".yaml", ".yml")):
        from .plan import make_plan

        _, base, interventions = _request(model, vector, sites, from_site, name, coefficient, units, gate)
        display.plan(make_plan(base, interventions, prefer, target), as_json)
        return
    from .job import Job
    from .models import pick_device
    from .stages import Stages

    given = click.get_current_context().get_parameter_source
    if any(
        given(option) is click.core.ParameterSource.COMMANDLINE for option in (*_VECTOR_OPTIONS, "prefer", "target")
    ):
        raise click.UsageError(f"{model} says itself what is done where: leave out the options about the vector")
    folder = run_folder or Path("runs") / Path(model).stem
    job = Job(Path(model), folder, device=pick_device("auto"), progress=progress)
    current = Stages(folder).is_current("extract", job.extract_key, job.directions_file)
    extracted = current or not job.recipe.estimator
    if job.needs_probes:
        extracted = extracted and Stages(folder).is_current("probe", job.probe_key, job.gates_file)
    display.plan(job.plan() if extracted else job.plan_sketch(), as_json, sketch=not extracted)


@main.command(short_help="Show what a model can hold, how, and where it loads.")
@click.argument("model")
@click.option("--site", "sites", multiple=True, help="Only this site (resid_post.14, writes, ...); may be repeated.")
@_json
def explain(model: str, sites: tuple[str, ...], as_json: bool) -> None:
    """Show what MODEL can hold: every site and operation with its exact representations, what they cost and where they
    load, or why it is refused. Of a hub model the config is enough.

    MODEL is a hub id with optional @revision, a folder, a packaged name, or a bare model type.

    \b
    Examples:
      steer-bake explain gemma2
      steer-bake explain smollm2-135m --site resid_post.14 --site writes
      steer-bake explain org/name --json
    """
    from .explain import explain as look

    with progress("asking the class") as advance:
        found = look(model, sites, progress=advance)
    if as_json:
        display.as_json(found.as_json())
    else:
        display.explanation(found)


@main.command(short_help="Fold one intervention into a copy of a model.")
@click.argument("model")
@_vector_options
@_prefer
@_target
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new folder.")
@click.option("--stack", is_flag=True, help="Allow a MODEL that was baked before, and steer it once more.")
@click.option(
    "--no-download",
    is_flag=True,
    help="Leave the weights of a hub MODEL there: write only what is new, to be completed on the hub.",
)
@_dry_run
@_json
def bake(
    model: str, vector: Path | None, sites: str | None, from_site: str | None, name: str, coefficient: float,
    units: str, gate: Path | None, prefer: str, target: str, out: Path, stack: bool, no_download: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Fold one intervention into a copy of MODEL (hub id with optional @revision, folder or packaged name), or write it
    as an adapter or a control vector for MODEL.

    \b
    Examples:
      steer-bake bake smollm2-135m --vector v.safetensors --sites resid_post.14 --coefficient 8 -o steered
      steer-bake bake ./my-model --vector v.safetensors --name ablate --sites writes --from resid_post.14 -o ablated
      steer-bake bake org/name --target lora --vector v.safetensors --name ablate --sites writers -o adapter
    """
    from . import pipeline
    from .checkpoint import check_no_weights
    from .models import open_base
    from .plan import make_plan

    ref, base, interventions = _request(
        model, vector, sites, from_site, name, coefficient, units, gate, away=no_download
    )
    found = make_plan(base, interventions, prefer, target)  # refused, if at all, before gigabytes are downloaded
    if dry_run:
        if no_download:
            check_no_weights(base, found.edits, found.rename, found.dropped)
        display.plan(found, as_json)
        display.note(f"this is what {out} would hold; nothing was written")
        return
    if base.remote is not None and not no_download:
        with progress("fetching the model") as advance:
            ref, base = open_base(model, progress=advance)
    pipeline.bake_opened(ref, base, interventions, out, target=target, prefer=prefer, stack=stack, progress=progress)
    if as_json:
        display.as_json(_read_json(out / "steering.json"))
    elif found.target == "gguf_vector":
        display.note(f"{out / 'control_vector.gguf'} is ready, for: llama-cli --control-vector FILE -m MODEL.gguf")
    elif no_download:
        display.note(f"{out} holds what is new; steering.json lists the files of {model} that belong to it as well")
    else:
        display.note(f"{out} is ready; prove it with: steer-bake validate {out}")
        display.loading_code(out, found.target)


@main.command(short_help="Prove that a baked folder computes what hooks compute.")
@_folder
@_base
@click.option("--prompts", default="plain", show_default=True, help="Prompt file or packaged set to compare on.")
@click.option("--limit", type=click.IntRange(min=1), default=24, show_default=True, help="How many prompts of the set.")
@click.option(
    "--decode-tokens", type=click.IntRange(min=1), default=24, show_default=True, help="Greedy tokens to compare."
)
@click.option(
    "--stream", is_flag=True,
    help="For a model larger than memory: weights stay on disk, one tensor at a time is read. Same figures; every "
    "batch and every decoded token reads the whole model anew, so it is slow.",
)  # fmt: skip
@click.option(
    "--gguf", type=click.Path(path_type=Path), help="Of a control vector: the GGUF file of the model it is for."
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the report here as JSON too.")
@_device
@_json
def validate(
    folder: Path,
    base: str | None,
    prompts: str,
    limit: int,
    decode_tokens: int,
    stream: bool,
    gguf: Path | None,
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Prove that a baked FOLDER computes what hooks on its base compute. Fails with a non-zero exit where it does not.

    A checkpoint is loaded by plain transformers, an adapter by PEFT, a control vector by llama.cpp.

    \b
    Examples:
      steer-bake validate steered --base smollm2-135m
      steer-bake validate vector --base smollm2-135m --gguf model.gguf
    """
    from . import manifest
    from .baked import certify, find_base, proof_rows
    from .models import pick_device
    from .recipe import Prompts
    from .stages import write_text

    device = pick_device(device)
    found = manifest.read(folder)
    reference = find_base(found, base, progress=progress)
    rows = proof_rows(Prompts(path=prompts, limit=limit), Path(), reference, decode_tokens)
    with progress("validating") as advance:
        report = certify(
            folder, reference, found.interventions, rows, gguf=gguf,
            decode_tokens=decode_tokens, device=device, stream=stream, prefer=found.prefer, target=found.target,
            advance=advance,
        )  # fmt: skip
    if out:
        write_text(out, json.dumps(report.as_json(), indent=2) + "\n")
    if as_json:
        display.as_json(report.as_json())
    else:
        display.report(report.as_json())
    report.require()


_hash = click.option("--hash", "hash_files", is_flag=True, help="Also read every file, and compare recorded hashes.")


@main.command(short_help="Prove that a baked folder is base plus plan, byte for byte.")
@_folder
@_base
@_hash
@_json
def audit(folder: Path, base: str | None, hash_files: bool, as_json: bool) -> None:
    """Prove from bytes that a baked FOLDER is its base plus its plan and nothing else. No model is loaded.

    Fails with a non-zero exit, naming what is wrong. Whether the model does what it should is what 'validate' tells.

    \b
    Examples:
      steer-bake audit steered
      steer-bake audit steered --base org/name@revision --hash
    """
    from .baked import audit_against

    found = audit_against(folder, base, hash_files=hash_files, progress=progress)
    if as_json:
        display.as_json(found.as_json())
    else:
        display.report(found.as_json(), "audit")
    found.require()


@main.command(short_help="Give back the base of a baked folder, bit for bit.")
@_folder
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Where the base goes: a new folder.")
@_base
@_hash
@_dry_run
@_json
def unbake(folder: Path, out: Path, base: str | None, hash_files: bool, dry_run: bool, as_json: bool) -> None:
    """Give back the base of a baked FOLDER, bit for bit, after proving that the folder is that base plus its plan.

    New biases and config flags come off with what the folder keeps; edited matrices are the base's own, which is then
    needed and linked. A model that was steered twice (bake --stack) is undone by one layer.

    \b
    Examples:
      steer-bake unbake steered -o original
      steer-bake unbake ablated -o original --base org/name@revision
    """
    from .baked import find_base, undo
    from .manifest import read
    from .unbake import steps

    if dry_run:
        told = read(folder)
        with_base = base is not None or told.originals.needs_base
        if with_base:
            find_base(told, base, progress=progress)
        planned = steps(folder, with_base=with_base)
        if as_json:
            display.as_json([{"name": step.name, "how": step.how} for step in planned])
        else:
            display.steps(planned)
        display.note(f"this is what {out} would hold; nothing was written")
        return
    done = undo(folder, out, base, hash_files=hash_files, progress=progress)
    if as_json:
        display.as_json(done.as_json())
    else:
        display.steps(done.steps)
        for name, why in done.unproven.items():
            display.note(f"{name} was taken as it is: {why}")
        display.note(f"{out} is ready: {folder} is that plus its plan")


_report = click.option("--report", type=click.Path(path_type=Path), help="report.json; default: beside the folder.")
_evaluation = click.option(
    "--evaluation", type=click.Path(path_type=Path), help="evaluation.json; default: beside the folder."
)
_template = click.option("--template", type=click.Path(path_type=Path), help="Your own card template (jinja2).")


@main.command(short_help="Write the model card of a baked folder.")
@_folder
@_report
@_evaluation
@_template
@click.option("--repo", help="The repository it is for (org/name), instead of the folder's own path.")
@_dry_run
def card(
    folder: Path, report: Path | None, evaluation: Path | None, template: Path | None, repo: str | None, dry_run: bool
) -> None:
    """Write the model card of a baked FOLDER (README.md) from its report and what was measured of its behaviour.

    \b
    Example:
      steer-bake card runs/quickstart/model --template my_card.md
    """
    from . import card as cards
    from .errors import RecipeError

    proof, measured = _beside(folder, report, evaluation)
    if proof is None:
        raise RecipeError(
            f"{report or folder.parent / 'report.json'} is not there; make it with: steer-bake validate {folder} -o "
            f"{report or folder.parent / 'report.json'}"
        )
    if dry_run:
        text, _ = cards.drawn(folder, proof, measured, template, cards.Publication(repo))
        click.echo(text)
        return
    cards.write(folder, proof, measured, template, cards.Publication(repo))
    display.note(f"written to {folder / 'README.md'}")


@main.command(short_help="Publish a baked folder on the hub.")
@_folder
@click.argument("repo")
@_report
@_evaluation
@_template
@click.option("--from-base", is_flag=True, help="Copy what the base's repository has too on the server.")
@click.option(
    "--certificate", "certified", default="function", show_default=True, metavar="function|bytes",
    help="What is demanded: that it does what the hooks do, or base plus plan only, which the card then says first.",
)  # fmt: skip
@click.option(
    "--acknowledge-safety-change", "acknowledged", metavar='"WHY"',
    help="Publish although refusals of harmful requests fell or were not measured; the reason goes on the card.",
)  # fmt: skip
@click.option("--license", "licence", help="The licence of the base, where the hub does not say it (apache-2.0, ...).")
@click.option(
    "--private/--public", default=None, help="Of a new repository; default: public, private where the base is gated."
)
@click.option("--revision", default="main", show_default=True, help="The branch; it is made where there is none.")
@click.option("--create-pr", is_flag=True, help="Open a pull request, or bring the open one up to date.")
@_dry_run
@_json
def push(
    folder: Path, repo: str, report: Path | None, evaluation: Path | None, template: Path | None, from_base: bool,
    certified: str, acknowledged: str | None, licence: str | None, private: bool | None, revision: str,
    create_pr: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Publish a baked FOLDER as REPO (name or org/name) on the hub, in one commit, and check every file of it.

    A second push of the same folder makes no commit, and one after a new card sends the card. Log in with 'hf auth
    login' or set HF_TOKEN.

    \b
    Examples:
      steer-bake push runs/quickstart/model my-model --dry-run
      steer-bake push steered org/name --private
      steer-bake bake org/base --vector v.safetensors --sites resid_post.14 -o new --no-download
      steer-bake push new org/name --from-base --certificate bytes
    """
    from .hub import push as publish

    proof, measured = _beside(folder, report, evaluation)
    done = publish(
        folder, repo, report=proof, evaluation=measured, certified=certified, acknowledged=acknowledged,
        licence=licence, template=template, from_base=from_base, private=private, revision=revision,
        create_pr=create_pr, dry_run=dry_run, progress=progress,
    )  # fmt: skip
    for line in done.notes:
        display.note(line)
    if as_json:
        display.as_json(done.as_json())
    else:
        display.pushed(done, dry_run=dry_run)


@main.command(short_help="Ask base and baked model the same, side by side.")
@_folder
@_base
@click.option("--prompts", help="Prompt file or packaged set; default: the questions given with --ask, or 'plain'.")
@click.option("--ask", multiple=True, help="A question to ask; may be given several times.")
@click.option("--limit", type=click.IntRange(min=1), default=5, show_default=True, help="How many prompts of the set.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=48, show_default=True)
@_device
@_dtype
@_json
def compare(
    folder: Path, base: str | None, prompts: str | None, ask: Sequence[str], limit: int, max_new_tokens: int,
    device: str, dtype: str, as_json: bool,
) -> None:  # fmt: skip
    """Ask the base and a baked FOLDER the same prompts, side by side.

    \b
    Example:
      steer-bake compare runs/quickstart/model --ask "Tell me about cats."
    """
    from .baked import ask_both
    from .models import pick_device
    from .prompts import Prompt
    from .recipe import Prompts

    chosen = [Prompt(messages=(("user", question),)) for question in ask]
    if prompts or not ask:
        chosen += Prompts(path=prompts or "plain").load(Path())[:limit]
    rows = ask_both(
        folder, base, chosen, max_new_tokens=max_new_tokens, device=pick_device(device), dtype=dtype, progress=progress
    )
    if as_json:
        display.as_json(rows)
    else:
        display.sides(rows)


@main.command(short_help="Compare judges with people's labels.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--judge", "names", multiple=True, default=("phrases",), show_default=True, help="May be repeated.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE",
    help="What a judge takes (model=..., endpoint=..., key=NAME_OF_VARIABLE); with several judges JUDGE.KEY=VALUE.",
)  # fmt: skip
@click.option("--show", is_flag=True, help="Also name the answers on which judge and people disagree.")
@_json
def agree(file: Path, names: Sequence[str], options: Sequence[str], show: bool, as_json: bool) -> None:
    """Label the answers in FILE by a judge, and compare with the labels that people gave: accuracy and Cohen's kappa.

    FILE is JSONL with "answer", "label" and, for judges that read it, "prompt".

    \b
    Examples:
      steer-bake agree answers.jsonl
      steer-bake agree answers.jsonl --judge llm --option model=my-model --option endpoint=http://127.0.0.1:8000/v1
    """
    from . import judges
    from .agreement import agree as compare_with
    from .agreement import read_labelled

    rows = read_labelled(file)
    given = {name: _judge_options(name, names, options) for name in names}
    made: dict[str, Any] = {}
    for name in names:
        took: list[Any] = []
        with progress(f"{name} judges") as advance:
            found = compare_with(rows, judges.make(name, given[name], progress=advance, report=took.append))
        made[name] = {**found.as_json(), "judging": took[0].as_json() if took else None}
    if as_json:
        display.as_json(made)
        return
    for name, found in made.items():
        display.agreement(name, found, show)


@main.command(short_help="Measure how surely a model refuses each prompt of a set.")
@click.argument("model")
@click.argument("prompts")
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The prompts with scores, JSONL.")
@click.option("--judge", default="phrases", show_default=True, help="Who labels the answers.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="What the judge takes; see 'agree'.")
@click.option("--samples", type=click.IntRange(min=1), default=5, show_default=True, help="Answers to each prompt.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="tau: how much likely answers weigh.")
@click.option(
    "--aim", type=click.Choice(["answer", "refusal"]), default="answer", show_default=True,
    help="What the model is to be steered to; incoherent answers count as the other.",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@_device
@_dtype
@_dry_run
@_json
def score(
    model: str, prompts: str, out: Path, judge: str, options: tuple[str, ...], samples: int, max_new_tokens: int,
    temperature: float, aim: Aim, seed: int, device: str, dtype: str, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Sample answers of MODEL to PROMPTS, have them judged, and write the prompts with their refusal confidence.

    The confidence c(x), from -1 (always answered) to 1 (always refused), is the paper's on Refusal Steering; recipes
    read it from the rows. Answers are not kept. A run that broke off goes on where it was. Under torchrun every process
    asks its share of the prompts.

    \b
    Examples:
      steer-bake score smollm2-135m selective/validation -o scored.jsonl
      torchrun --standalone --nproc-per-node 2 -m steer_bake score org/name prompts.jsonl -o scored.jsonl \\
          --judge llm --option model=my-judge --option endpoint=http://127.0.0.1:8000/v1
    """
    from dataclasses import replace

    from . import distributed, judges, scoring
    from .models import load_model, load_tokenizer, pick_device, resolve
    from .prompts import save
    from .recipe import Prompts
    from .stages import silent

    given = _judge_options(judge, (judge,), options)
    judges.make(judge, given)  # refused, if at all, before long work
    rows = Prompts(path=prompts).load(Path())
    if dry_run:
        display.note(f"would sample {len(rows)} x {samples} answers of {model} and write {out}")
        return
    with distributed.joined(pick_device(device)) as own:
        seen = progress if distributed.is_first() else silent
        with seen("fetching the model") as advance:
            ref = resolve(model, progress=advance)
        loaded, tokenizer = load_model(ref.folder, dtype=dtype, device=own), load_tokenizer(ref.folder)
        notes = out.with_name(f".{out.name}.votes")
        with seen("asking") as advance:
            found = scoring.score(
                loaded, tokenizer, rows, judges.make(judge, given), notes,
                made_by=json.dumps([ref.name, ref.revision, judge, given]), samples=samples,
                max_new_tokens=max_new_tokens, temperature=temperature, aim=aim, seed=seed, progress=advance,
            )  # fmt: skip
        if not distributed.is_first():
            return
        save([replace(row, score=one.value) for row, one in zip(rows, found, strict=True)], out)
        scoring.forget(notes)
    mean = sum(one.value for one in found) / len(found)
    labels = Counter(label for one in found for label in one.labels)
    if as_json:
        display.as_json({"prompts": len(rows), "mean": mean, "labels": dict(labels)})
    else:
        votes = ", ".join(f"{count} {label}" for label, count in sorted(labels.items()))
        display.note(f"mean refusal confidence {mean:.3f} of {len(rows)} prompts ({votes}); written to {out}")


@main.command(short_help="Draw and tell what a recipe's directions are like.")
@_recipe
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder; default: analysis/<recipe's name>.")
@click.option("--site", help="Where to look closely; default: the site with the best layer score.")
@click.option("--harmful", default="safety/harmful", show_default=True, help="Prompt set that ought to be refused.")
@click.option("--harmless", default="safety/harmless", show_default=True, help="Prompt set that ought to be answered.")
@click.option(
    "--limit", type=click.IntRange(min=0), default=24, show_default=True, help="Of these two; 0 leaves them out."
)
@click.option("--no-figures", is_flag=True, help="Only the numbers.")
@_device
@_dtype
@_dry_run
@_json
def analyze(
    recipe: Path, out: Path | None, site: str | None, harmful: str, harmless: str, limit: int, no_figures: bool,
    device: str, dtype: str, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Draw and tell what the directions of a RECIPE are like: figures (PNG and SVG) and analysis.json.

    Per layer the correlation with the refusal confidence and the separability; how a direction is spread over the
    dimensions; cosines between categories; activations by category; refusals under steering.

    \b
    Example:
      steer-bake analyze recipes/refusal-steering.yaml -o analysis
    """
    from .analysis import analyse
    from .job import Job
    from .models import pick_device
    from .sites import parse_site
    from .stages import write_text

    folder = out or Path("analysis") / recipe.stem
    job = Job(recipe, folder, device=pick_device(device), dtype=dtype, progress=progress)
    job.estimation.check()
    asked = [_prompts(job, name, limit) if limit else [] for name in (harmful, harmless)]
    chosen = None if site is None else parse_site(site, job.layers)
    if dry_run:
        display.note(f"would read {len(job.read_sites())} sites of {job.ref.name} and write {folder}")
        return
    if not no_figures:
        from .figures import check

        check()
    numbers = analyse(
        job.estimation, layers=job.layers, site=chosen, harmful=asked[0], harmless=asked[1], progress=progress
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "analysis.json", json.dumps(numbers, indent=1) + "\n")
    if not no_figures:
        from .figures import draw

        draw(numbers, folder)
    if as_json:
        display.as_json(numbers)
    else:
        display.analysis(numbers)
        display.note(f"written to {folder}")


@main.command(short_help="Choose layers and coefficient for a recipe's directions.")
@_recipe
@click.option(
    "--refused",
    required=True,
    help="Prompt set that the model tends to refuse, held out; a set of the recipe, packaged, or a file.",
)
@click.option("--conversations", default="plain", show_default=True, help="Prompt set whose answers are to stay.")
@click.option("--limit", type=click.IntRange(min=1), default=32, show_default=True, help="Of these two.")
@click.option("--top", default="2,4,8,16", show_default=True, help="How many of the best layers to try.")
@click.option("--coefficients", default="-0.15,-0.25,-0.5,-0.75,-1,-2", show_default=True, help="What to try.")
@click.option("--name", "names", multiple=True, default=("add",), help="The intervention; clamp repositions.")
@click.option("--target", type=float, default=0.5, show_default=True, help="Least drop of the refusal confidence.")
@_device
@_dtype
@_dry_run
@_json
def select(
    recipe: Path, refused: str, conversations: str, limit: int, top: str, coefficients: str, names: tuple[str, ...],
    target: float, device: str, dtype: str, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Choose layers and coefficient for the directions of a RECIPE, as the paper on Refusal Steering does.

    Layers are ranked on the recipe's validation prompts; of all configurations that lower the refusal confidence by
    the target, the one that changes the answers to other prompts least is taken. Nothing is written.

    \b
    Example:
      steer-bake select recipes/refusal-steering.yaml --refused refused --conversations answered
    """
    from .configure import configure
    from .job import Job
    from .models import pick_device
    from .selection import grid

    job = Job(recipe, Path(), device=pick_device(device), dtype=dtype, progress=progress)
    job.estimation.check()
    asked = [_prompts(job, name, limit) for name in (refused, conversations)]
    tried = grid(_numbers(top, int), _numbers(coefficients, float), names)
    if dry_run:
        display.note(f"would try {len(tried)} configurations on {job.ref.name}")
        return
    best, scores, found = configure(
        job.estimation, layers=job.layers, configurations=tried, refused=asked[0], conversations=asked[1],
        target=target, progress=progress,
    )  # fmt: skip
    content = {"layers": {str(site): scores[site] for site in best}, **found.as_json()}
    if as_json:
        display.as_json(content)
    else:
        display.selection(content)


def _prompts(job: Job, name: str, limit: int) -> list[Prompt]:
    """The first so many of each label of the recipe's set ``name``, or of a file or packaged set."""
    from .recipe import Prompts

    own = job.recipe.prompts.get(name)
    if own is not None:
        return own.model_copy(update={"limit": limit}).load(job.home)
    return Prompts(path=name, limit=limit).load(Path())


def _numbers(text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{text!r} is no list of numbers; write for example 2,4,8") from None


@main.command("list", short_help="List models, prompt sets and every extension point.")
@click.argument("what", required=False)
@_json
def list_(what: str | None, as_json: bool) -> None:
    """List what is there: models, prompt sets, architectures, estimators, interventions, judges, ...

    \b
    Examples:
      steer-bake list
      steer-bake list estimators
    """
    from . import models, prompts, registry
    from .errors import RecipeError

    there = [*registry.FOLDERS, "models", "prompts"]
    if what is not None and what not in there:
        raise RecipeError(f"there is no list of {what!r}: {did_you_mean(what, there)}")
    found: dict[str, dict[str, str]] = {}
    for folder in sorted(there) if what is None else [what]:
        if folder == "models":
            found[folder] = {
                name: f"{one.original}, {one.quantisation}, from the package {one.distribution}"
                for name, one in models.PACKAGED.items()
            }
        elif folder == "prompts":
            found[folder] = {
                path.relative_to(prompts.PACKAGED)
                .with_suffix("")
                .as_posix(): f"{len(path.read_bytes().splitlines())} prompts"
                for path in sorted(prompts.PACKAGED.rglob("*.jsonl"))
            }
        else:
            found[folder] = {name: _first_sentence(registry.module(folder, name)) for name in registry.names(folder)}
    if as_json:
        display.as_json(found)
    else:
        display.listing(found)


# --- what commands share


@contextmanager
def _shared_job(recipe: Path, folder: Path, device: str, dtype: str, offload: Offload | None = None) -> Iterator[Job]:
    """The checked job of ``recipe`` in each of the processes that torchrun started, of which the first one talks."""
    from . import distributed
    from .job import Job
    from .models import pick_device
    from .stages import silent

    with distributed.joined(pick_device(device)) as own:
        seen = progress if distributed.is_first() else silent
        job = Job(recipe, folder, device=own, dtype=dtype, offload=offload, progress=seen)
        job.check()
        yield job


def _offload(folder: Path | None, max_memory: Sequence[str]) -> Offload | None:
    from .models import Offload

    sizes: dict[int | str, str] = {}
    for one in max_memory:
        place, equals, size = one.partition("=")
        if not (place and equals and size):
            raise click.UsageError(f"--max-memory is {one!r}; write DEVICE=SIZE, like cpu=8GiB")
        sizes[int(place) if place.isdecimal() else place] = size
    if sizes and folder is None:
        raise click.UsageError("--max-memory says how a model is spread, and needs --offload FOLDER")
    return None if folder is None else Offload(folder, sizes or None)


def _request(
    model: str, vector: Path | None, sites: str | None, from_site: str | None, name: str, coefficient: float,
    units: str, gate: Path | None, *, away: bool = False,
) -> tuple[Any, Any, list[Intervention]]:  # fmt: skip
    """The base, opened without downloading weights, and the interventions that the options ask for.

    ``away``: the weights are to stay on the hub, also where the cache has them.
    """
    from . import architectures, direction, gating, registry
    from .interventions import intervene
    from .job import choose_direction
    from .models import open_base, open_remote
    from .sites import Site, parse_site, parse_sites

    if vector is None or sites is None:
        raise click.UsageError(
            "say what to add and where: --vector FILE --sites resid_post.14 (or write a recipe and use 'run')"
        )
    registry.module("interventions", name)
    directions = direction.load(vector)
    with progress("reading the model's headers") as advance:
        ref, base = open_remote(model, progress=advance) if away else open_base(model, weights=False, progress=advance)
    layers = architectures.layout(base.config).layers
    wanted = None if from_site is None else parse_site(from_site, layers)
    found = [
        intervene(name, choose_direction(directions, site, wanted), site, coefficient, units)
        for site in parse_sites(sites, layers)
    ]
    if gate is not None:
        gates = gating.load(gate)
        found = [replace(one, gate=gating.chosen(gates, Site("mlp_in", one.site.layer))) for one in found]
    return ref, base, found


def _judge_options(judge: str, judges: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """Those of the KEY=VALUE ``options`` that are for ``judge``; values are read as YAML, as a recipe's are."""
    import yaml

    found = {}
    for option in options:
        key, given, value = option.partition("=")
        named, dot, rest = key.partition(".")
        if not given or (dot and named not in judges) or (not dot and len(judges) > 1):
            raise click.UsageError(
                f"--option {option!r:.60}: write KEY=VALUE, or with several judges JUDGE.KEY=VALUE for one of "
                f"{', '.join(judges)}"
            )
        if not dot or named == judge:
            found[rest if dot else key] = yaml.safe_load(value)
    return found


def _beside(
    folder: Path, report: Path | None, evaluation: Path | None
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The report and the evaluation of a folder: those that are named, or those that lie beside it, if any."""
    from .errors import RecipeError

    for path, maker in ((report, "steer-bake validate"), (evaluation, "steer-bake run")):
        if path is not None and not path.is_file():
            raise RecipeError(f"{path} is not there; '{maker}' makes it")
    proofs = [report] if report else [folder.parent / "report.json", folder / "certificate.json"]
    measured = [evaluation or folder.parent / "evaluation.json"]
    proof, behaviour = (
        next((_read_json(path) for path in paths if path.is_file()), None) for paths in (proofs, measured)
    )
    return proof, behaviour


def _read_json(path: Path) -> Mapping[str, Any]:
    from .errors import RecipeError

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise RecipeError(f"{path} holds no JSON object; is it the right file?")
    return found


def _first_sentence(module: Any) -> str:
    text = " ".join((module.__doc__ or "").split("\n\n")[0].split())
    return text.replace("``", "")
