"""The command line: parse, call, print. Data goes to stdout, prose and progress to stderr; the only error boundary.

Heavy imports happen inside the commands, so that ``--help`` answers at once. How results look is in ``display.py``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__, display
from .display import progress
from .errors import SteerBakeError, did_you_mean

if TYPE_CHECKING:
    from .interventions import Intervention

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
@_device
@_dtype
@_dry_run
@_json
def extract(recipe: Path, out: Path, device: str, dtype: str, dry_run: bool, as_json: bool) -> None:
    """Estimate the directions of a RECIPE and write them to a safetensors file.

    \b
    Example:
      steer-bake extract recipes/quickstart.yaml -o gloomy.safetensors
    """
    from .job import Job, save_directions
    from .models import pick_device
    from .stages import no_empty_folder

    job = Job(recipe, out.parent, device=pick_device(device), dtype=dtype, progress=progress)
    job.check()
    if dry_run:
        display.note(f"would read {', '.join(map(str, job.read_sites()))} of {job.ref.name} and write {out}")
        return
    with no_empty_folder(out.parent):
        directions = job.estimate()
        save_directions(directions, out)
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

    \b
    Example:
      steer-bake probe recipes/selective.yaml -o gates.safetensors
    """
    from .job import Job, save_gates
    from .models import pick_device
    from .stages import no_empty_folder

    job = Job(recipe, out.parent, device=pick_device(device), dtype=dtype, progress=progress)
    job.check()
    if dry_run:
        display.note(
            f"would fit {', '.join(map(str, job.gate_sites())) or 'nothing'} of {job.ref.name} and write {out}"
        )
        return
    with no_empty_folder(out.parent):
        found = job.fit_gates()
        save_gates(found, out)
    rows = [{**one.gate.described(), "measures": dict(one.measures)} for one in found]
    if as_json:
        display.as_json(rows)
        return
    display.gates(rows)
    display.note(f"written to {out}")


_prefer = click.option(
    "--prefer", default="smallest", show_default=True,
    metavar="smallest|bit_exact|widest_loading|keep_class|rehouse[:TYPE]",
    help="What to prefer where several ways to hold a vector are exact; rehouse takes another model class (docs: "
    "how it works).",
)  # fmt: skip

_VECTOR_OPTIONS = ("vector", "sites", "from_site", "name", "coefficient", "units", "gate")


def _vector_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        [
            click.option("--vector", type=click.Path(path_type=Path), help="Direction file (safetensors)."),
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
@click.option("--run-folder", type=click.Path(path_type=Path), help="Of a recipe; default: runs/<recipe's name>.")
@_json
def plan(
    model: str, vector: Path | None, sites: str | None, from_site: str | None, name: str, coefficient: float,
    units: str, gate: Path | None, prefer: str, run_folder: Path | None, as_json: bool,
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
        display.plan(make_plan(base, interventions, prefer), as_json)
        return
    from .job import Job
    from .models import pick_device
    from .stages import Stages

    given = click.get_current_context().get_parameter_source
    if any(given(option) is click.core.ParameterSource.COMMANDLINE for option in (*_VECTOR_OPTIONS, "prefer")):
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
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="The new checkpoint folder.")
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
    units: str, gate: Path | None, prefer: str, out: Path, stack: bool, no_download: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Fold one intervention into a copy of MODEL (hub id with optional @revision, folder or packaged name).

    \b
    Examples:
      steer-bake bake smollm2-135m --vector v.safetensors --sites resid_post.14 --coefficient 8 -o steered
      steer-bake bake ./my-model --vector v.safetensors --name ablate --sites writes --from resid_post.14 -o ablated
    """
    from . import pipeline
    from .checkpoint import check_no_weights
    from .models import open_base
    from .plan import make_plan

    ref, base, interventions = _request(
        model, vector, sites, from_site, name, coefficient, units, gate, away=no_download
    )
    found = make_plan(base, interventions, prefer)  # refused, if at all, before gigabytes are downloaded
    if dry_run:
        if no_download:
            check_no_weights(base, found.edits, found.rename, found.dropped)
        display.plan(found, as_json)
        display.note(f"this is what {out} would hold; nothing was written")
        return
    if base.remote is not None and not no_download:
        with progress("fetching the model") as advance:
            ref, base = open_base(model, progress=advance)
    pipeline.bake_opened(ref, base, interventions, out, prefer=prefer, stack=stack, progress=progress)
    if as_json:
        display.as_json(_read_json(out / "steering.json"))
    elif no_download:
        display.note(f"{out} holds what is new; steering.json lists the files of {model} that belong to it as well")
    else:
        display.note(f"{out} is ready; prove it with: steer-bake validate {out}")
        display.loading_code(out)


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
    out: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Prove that a baked FOLDER computes what hooks on its base compute. Fails with a non-zero exit where it does not.

    \b
    Example:
      steer-bake validate steered --base smollm2-135m
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
            folder, reference, found.interventions, rows,
            decode_tokens=decode_tokens, device=device, stream=stream, prefer=found.prefer, advance=advance,
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


@main.command(short_help="Write the model card of a baked folder.")
@_folder
@click.option("--report", type=click.Path(path_type=Path), help="report.json; default: beside the folder.")
@click.option("--evaluation", type=click.Path(path_type=Path), help="evaluation.json; default: beside the folder.")
@click.option("--template", type=click.Path(path_type=Path), help="Your own card template (jinja2).")
@_dry_run
def card(folder: Path, report: Path | None, evaluation: Path | None, template: Path | None, dry_run: bool) -> None:
    """Write the model card of a baked FOLDER (README.md) from its report and what was measured of its behaviour.

    \b
    Example:
      steer-bake card runs/quickstart/model --template my_card.md
    """
    from . import card as cards
    from .errors import RecipeError
    from .stages import write_text

    proof, measured = report or folder.parent / "report.json", evaluation or folder.parent / "evaluation.json"
    if not proof.is_file():
        raise RecipeError(f"{proof} is not there; make it with: steer-bake validate {folder} -o {proof}")
    if evaluation and not evaluation.is_file():
        raise RecipeError(f"{evaluation} is not there; 'steer-bake run' makes it")
    text = cards.render(folder, _read_json(proof), _read_json(measured) if measured.is_file() else None, template)
    if dry_run:
        click.echo(text)
        return
    write_text(folder / "README.md", text)
    display.note(f"written to {folder / 'README.md'}")


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
