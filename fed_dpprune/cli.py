"""The commands. Thin: each parses its arguments, calls one function of a room, and prints.

Heavy imports happen inside the commands, so that `--help` and a bad config answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fed_dpprune import __version__, console, places
from fed_dpprune import config as cfg
from fed_dpprune.errors import BadInput, FedDPPruneError

if TYPE_CHECKING:
    from fed_dpprune.federation.facts import Gathered
    from fed_dpprune.federation.pretrain import Epoch
    from fed_dpprune.federation.run import Outcome
    from fed_dpprune.plan import Plan


class Parser(argparse.ArgumentParser):
    """Errors in the one line that all commands use."""

    def error(self, message: str) -> NoReturn:
        """Exit 2."""
        console.print_error(BadInput(self.prog.removeprefix("fed-dpprune ") or "arguments", message, f"{self.prog} --help"))
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except FedDPPruneError as error:
        if arguments.debug:
            raise
        console.print_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("fed-dpprune: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
    except Exception as error:
        if arguments.debug:
            raise
        console.print_error(error)
        code = 1
    return code


def build_parser() -> Parser:
    """All commands with their arguments."""
    parser = Parser(
        prog="fed-dpprune",
        description="Federated learning in which every update is private and sparse.",
        epilog="first steps:\n  fed-dpprune init my.toml\n  fed-dpprune plan my.toml\n  fed-dpprune run my.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fed-dpprune {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        sub.set_defaults(command=run)
        return sub

    _run_arguments(command("run", run, "run one experiment", "fed-dpprune run configs/quickstart.toml --set federation.rounds=5"))

    sub = command("plan", plan, "print every number known before a run; spends nothing", "fed-dpprune plan my.toml --json")
    _config_arguments(sub)
    sub.add_argument("--ledger", type=Path, metavar="FILE", help="say how many rounds this ledger leaves at this setting")
    sub.add_argument("--picture", type=Path, metavar="FILE", help="draw how the clients share the labels (.png, .svg, .pdf)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "pretrain",
        pretrain,
        "train on public data, without privacy, and write weights to start from",
        "fed-dpprune pretrain my.toml && fed-dpprune run my.toml",
    )
    _config_arguments(sub)
    sub.add_argument("--out", type=Path, metavar="FILE", help="a .safetensors file (default: the config's model.weights)")
    sub.add_argument("--force", action="store_true", help="overwrite it")

    sub = command("init", init, "write a commented config to start from", "fed-dpprune init my.toml")
    sub.add_argument("file", type=Path, nargs="?", metavar="FILE", help="where to write it (default: the screen)")

    sub = command(
        "ledger", ledger, "show what each client spent, and verify the chain", "fed-dpprune ledger runs/x/ledger.sqlite"
    )
    sub.add_argument("file", type=Path, metavar="FILE")
    sub.add_argument("--recompute", action="store_true", help="work every figure out again from the charged entries")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("compare", compare, "put runs side by side", "fed-dpprune compare runs/a runs/b")
    sub.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command(
        "doctor", doctor, "say what is installed, what data is found, and what to do about the rest", "fed-dpprune doctor"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = command("export-app", export_app, "write the Flower app folder for `flwr run`", "fed-dpprune export-app my-app")
    sub.add_argument("dir", type=Path, metavar="DIR")

    sub = command("sweep", sweep, "run many experiments from one study file", "fed-dpprune sweep study.toml --jobs 2")
    sub.add_argument("study", type=Path, metavar="STUDY")
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (inline backend)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where the runs go")
    return parser


def _config_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file")
    sub.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override a key; repeatable"
    )


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    _config_arguments(sub)
    sub.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: a new one under runs/)")
    sub.add_argument("--backend", choices=("ray", "inline"), help="what carries the messages (default: the config's)")
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run")
    sub.add_argument("--force", action="store_true", help="overwrite an earlier run in --out")


def _load(arguments: argparse.Namespace) -> cfg.Config:
    backend = getattr(arguments, "backend", None)
    overrides = arguments.overrides + ([f"federation.backend={backend}"] if backend else [])
    return cfg.load(arguments.config, overrides)


def run(arguments: argparse.Namespace) -> int:
    """`fed-dpprune run`."""
    config = _load(arguments)
    if arguments.resume and arguments.force:
        raise BadInput("--resume and --force", "contradict each other", "choose one")
    console.calm_environment()
    from fed_dpprune.federation.facts import prepare
    from fed_dpprune.federation.run_dir import RunDir, default_path, latest_path

    choose = latest_path if arguments.resume else default_path
    out = arguments.out or choose(config, arguments.config)
    RunDir(out).check(config, resume=arguments.resume, force=arguments.force)
    prepared = prepare(config)
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        places.make_folder(out)
    except OSError as error:
        raise BadInput(str(out), f"cannot be made ({error.strerror})", "choose another --out") from None
    try:
        return _run_quietly(arguments, config, out, prepared)
    except (BadInput, KeyboardInterrupt):
        _leave_nothing(out, missing)
        raise


def _leave_nothing(out: Path, made: Sequence[Path]) -> None:
    """Take away the log and the folders of a run that was refused before it wrote anything."""
    if [path.name for path in out.iterdir()] == ["log.txt"]:
        (out / "log.txt").unlink()
        for folder in made:
            folder.rmdir()


def _run_quietly(arguments: argparse.Namespace, config: cfg.Config, out: Path, prepared: tuple[Gathered, Plan]) -> int:
    """The run, with the screen kept for progress and the closing summary."""
    log = out / "log.txt"
    if arguments.force:
        log.unlink(missing_ok=True)
    with console.quiet_screen(log) as screen:
        progress = console.Progress(screen)
        for text in prepared[1].warnings:
            progress.note(f"warning: {text}")
        progress.phase("loading")
        from fed_dpprune.federation.run import execute

        outcome = execute(config, out, resume=arguments.resume, force=arguments.force, observer=progress, prepared=prepared)
        _close(arguments, config, out, outcome, screen)
    if outcome.status == "failed" and arguments.debug and outcome.error is not None:
        raise outcome.error
    return outcome.exit_code


def _close(arguments: argparse.Namespace, config: cfg.Config, out: Path, outcome: Outcome, screen: console.Screen) -> None:
    """Print the closing summary, the error if there was one, and how to go on after Ctrl-C."""
    from fed_dpprune.study.closing import closing

    if outcome.summary and outcome.plan:
        for line in closing(outcome.summary, outcome.plan, config, out):
            print(line, file=screen.out)
    if outcome.status == "interrupted":
        words = ["fed-dpprune", "run", str(arguments.config)]
        words += [word for pair in arguments.overrides for word in ("--set", pair)]
        words += ["--backend", arguments.backend] if arguments.backend else []
        print(f"to go on:  {shlex.join([*words, '--out', str(out), '--resume'])}", file=screen.out)
    elif outcome.error is not None:
        console.print_error(outcome.error, file=screen.err, log_path=out / "log.txt")


def plan(arguments: argparse.Namespace) -> int:
    """`fed-dpprune plan`."""
    config = _load(arguments)
    from fed_dpprune.federation.facts import prepare
    from fed_dpprune.study.closing import planned

    gathered, made = prepare(config)
    if arguments.picture:
        from fed_dpprune.data import picture

        picture.draw(gathered.parts, gathered.labels.y, gathered.labels.classes, arguments.picture)
    left = _rounds_left(arguments.ledger, config, made) if arguments.ledger else None
    if arguments.json:
        print(json.dumps(made.as_json() | ({"ledger": left} if left is not None else {})))
        return 0
    for line in planned(made, config):
        print(line)
    if left is not None:
        print(f"ledger     {left['text']}")
    return 0


def _rounds_left(path: Path, config: cfg.Config, made: Plan) -> dict[str, Any]:
    """How many rounds of this setting each client of a ledger has left, by the rule that will be enforced."""
    from fed_dpprune.privacy.history import Entry
    from fed_dpprune.privacy.ledger import Ledger

    limit = config.policy.max_epsilon or config.privacy.epsilon
    if limit is None:
        raise BadInput("policy.max-epsilon", "is not set, so nothing limits the rounds", "set it or privacy.epsilon")
    left: dict[str, int] = {}
    with Ledger.read(path) as book:
        for name in book.clients():
            number = int(name) if name.isdigit() else -1
            rate = made.sample_rates[number] if 0 <= number < len(made.sample_rates) else max(made.sample_rates)
            entry = Entry(made.noise_multiplier, rate, config.federation.local_steps)
            left[name] = book.rounds_left(name, [entry], limit)
    fewest = min(left.values(), default=0)
    text = f"leaves at least {fewest} rounds at epsilon {limit:g} (fewest over {len(left)} clients, as a new run)"
    return {"rounds_left": left, "limit": limit, "text": text}


def pretrain(arguments: argparse.Namespace) -> int:
    """`fed-dpprune pretrain`."""
    config = _load(arguments)
    from fed_dpprune.federation import pretrain as pretraining

    out = pretraining.destination(config, arguments.config, arguments.out)
    done = pretraining.pretrain(config, out, force=arguments.force, on_epoch=_print_epoch)
    print(f"{done.path}: accuracy {done.accuracy:.4f} on {done.held_out:,} held-out rows of {config.data.public}")
    if config.model.weights != str(done.path):
        print(f"to start from it: --set model.weights={done.path}")
    return 0


def _print_epoch(epoch: Epoch) -> None:
    shown = f"held-out accuracy {epoch.accuracy:.3f}  loss {epoch.loss:.3f}  {epoch.seconds:.0f} s"
    print(f"pass {epoch.number}/{epoch.epochs}  {shown}", flush=True)


def init(arguments: argparse.Namespace) -> int:
    """`fed-dpprune init`."""
    from fed_dpprune.starter import starter

    if arguments.file is None:
        print(starter(), end="")
        return 0
    try:
        with open(arguments.file, "x", encoding="utf-8") as file:
            file.write(starter())
    except FileExistsError:
        raise BadInput(str(arguments.file), "exists already", "name another file") from None
    except OSError as error:
        raise BadInput(str(arguments.file), f"cannot be written ({error.strerror})", "name another place") from None
    print(f"wrote {arguments.file}; next: fed-dpprune plan {arguments.file}")
    return 0


def ledger(arguments: argparse.Namespace) -> int:
    """`fed-dpprune ledger`."""
    from fed_dpprune.privacy import report

    found = report.ledger_report(arguments.file)
    if arguments.recompute:
        report.recompute(found)
    print(json.dumps(found) if arguments.json else report.ledger_text(found))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """`fed-dpprune compare`."""
    from fed_dpprune.study import compare as comparing

    comparing.compare(arguments.runs, console.plain_screen(), json_only=arguments.json)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """`fed-dpprune doctor`."""
    from fed_dpprune import doctor as examine

    examine.render(examine.collect(), console.plain_screen(), json_only=arguments.json)
    return 0


def export_app(arguments: argparse.Namespace) -> int:
    """`fed-dpprune export-app`."""
    from fed_dpprune.federation import export_app as exporting

    for path in exporting.write(arguments.dir):
        print(path)
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """`fed-dpprune sweep`."""
    from fed_dpprune.study import sweep as sweeping

    return sweeping.main(arguments.study, jobs=arguments.jobs, out=arguments.out)


if __name__ == "__main__":
    raise SystemExit(main())
