"""`keras-efficient ursabench`: suites of Bayesian networks are run, looked at, and listed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from keras_efficient.atomic import check_target, replacing
from keras_efficient.cli.output import out
from keras_efficient.errors import UnknownName, WrongArgument

__all__ = ["app"]

ENGINES = ("local", "ray")
SHOWN = ("error", "nll", "ece", "seconds")  # metrics that people see in the terminal

app = typer.Typer(help="Bayesian networks: methods compared on a data set.", no_args_is_help=True)


@app.command("run")
def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A bundled suite (`ursabench list`), or a .yaml file.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="For results; those that are there stay.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Where the suite's data sets are; else KERAS_EFFICIENT_DATA says."),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="local, or ray: on a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option("--address", help="Of the cluster; without: one on this machine.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry-failed", help="Run what failed once more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
) -> None:
    """Run a suite: every method with every seed. Stopped at any moment, it goes on where it was.

    Cells that fail are named, beside the results of the others; the exit status is then 1.
    """
    out.begin(as_json=as_json)
    if engine not in ENGINES:
        raise UnknownName("engine", engine, ENGINES)
    if address is not None and engine != "ray":
        raise WrongArgument("`--address` is of a Ray cluster.", hint="Add --engine ray.")
    with out.hushed():
        from keras_efficient.bayes.benchmark import Benchmark, in_process, load_suite
        from keras_efficient.bayes.benchmark.ray_engine import on_ray

        wanted = load_suite(suite)
        wanted = wanted if data is None else wanted.with_path(data)
        if engine == "local":  # elsewhere it is the other machines that must have the data
            wanted.check_data()
        runs = on_ray(address) if engine == "ray" else in_process
    with out.progress(wanted.name) as show, out.hushed():

        def shown(done: int, total: int, what: str) -> None:
            show(done, total)
            if what:
                out.message(f"{done} of {total}: {what}")

        rows = Benchmark(wanted, output, runs).run(retry_failed=retry, progress=shown)
    _show(rows)
    _say_failed(rows, output)
    if any(row["metric"] == "failed" for row in rows):
        raise typer.Exit(1)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where `ursabench run` put its results.")],
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write one HTML page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list of rows.")] = False,
) -> None:
    """Show the results of a folder; those of a run that is still under way, too."""
    out.begin(as_json=as_json)
    if page is not None:
        check_target(page, overwrite=force)
    with out.hushed():
        from keras_efficient.bayes.benchmark import Results
        from keras_efficient.bayes.benchmark.report import page as page_of

        results = Results(folder)
        rows = results.rows()
        if page is not None:
            with replacing(page, overwrite=force) as temporary:
                temporary.write_text(page_of(results), "utf-8")
    _show(rows)
    _say_failed(rows, folder)
    if page is not None:
        out.message(f"{page} written.")


@app.command("list")
def list_suites(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False) -> None:
    """List the bundled suites."""
    out.begin(as_json=as_json)
    with out.hushed():
        from keras_efficient.bayes.benchmark import bundled

        rows = [
            {
                "suite": name,
                "data": suite.data["name"],
                "model": suite.model["name"],
                "seeds": len(suite.seeds),
                "methods": ", ".join(suite.methods),
            }
            for name, suite in bundled().items()
        ]
    out.rows(rows, {name: name for name in ("suite", "data", "model", "seeds", "methods")})


def _show(rows: list[dict[str, Any]]) -> None:
    """JSON has tidy rows; people see means of the main metrics."""
    if out.as_json:
        return out.rows(rows, {})
    from keras_efficient.bayes.benchmark.report import means

    table: dict[str, dict[str, Any]] = {}
    for one in means(rows):
        if one.metric in SHOWN and one.split in ("test", "train"):
            error = "" if one.standard_error is None else f" ± {one.standard_error:.1g}"
            mark = " *" if one.is_best else ""
            text = f"{one.mean:.4g}{error}{mark}"
            table.setdefault(one.method, {"method": one.method, "seeds": one.seeds})[one.metric] = text
    headings = {
        "method": "method",
        "seeds": "seeds",
        "error": "error",
        "nll": "NLL",
        "ece": "ECE",
        "seconds": "training, s",
    }
    out.rows(list(table.values()), headings)
    if any(row["seeds"] > 1 for row in table.values()):
        out.message("± standard error over seeds; * not beaten by more than two of them.")
    elif len(table) > 1:
        out.message("* the best; whether it is more than chance takes several seeds.")
    return None


def _say_failed(rows: list[dict[str, Any]], folder: Path) -> None:
    failed = [row for row in rows if row["metric"] == "failed"]
    for row in failed:
        out.message(f"{row['method']}, seed {row['seed']} failed: {row['reason']}")
    if failed:
        out.message(f"`keras-efficient ursabench run … --output {folder} --retry-failed` tries again.")
