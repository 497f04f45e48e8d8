"""The commands, their options, and what each end of theirs means. The work is done by the modules beside this one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusterpool.cli.failures import CommandFailed, ExitCode
from clusterpool.config import WORKING_DIR_VARIABLE
from clusterpool.errors import ClusterpoolError
from clusterpool.processes.standard_descriptors import fill_standard_descriptors
from clusterpool.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from clusterpool.cli.cluster_file import NodePlan
    from clusterpool.cli.start import StartedCluster
    from clusterpool.cli.stop import StopReport

# Where standard output is no terminal, a line is as long as it needs to be.
_WIDTH_OF_PIPES = 200


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; its exit code. A script that was asked for runs last, outside of all error handling."""
    fill_standard_descriptors()
    try:
        result = cli.main(arguments, prog_name="clusterpool", standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return ExitCode.INTERRUPTED
    except CommandFailed as exc:
        return _failed(exc, exc.exit_code)
    except (ClusterpoolError, OSError) as exc:
        return _failed(exc, ExitCode.FAILED)
    except BrokenPipeError:
        return ExitCode.FAILED
    if callable(result):
        return int(result())
    return int(result or ExitCode.OK)


def _failed(exc: BaseException, exit_code: ExitCode) -> int:
    click.secho("Error: ", fg="red", nl=False, err=True)
    click.echo(str(exc), err=True)
    return exit_code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="clusterpool")
def cli() -> None:
    """Start, look at, use and end clusters that run your pools.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no cluster, 4 a cluster runs already, 5 done in part.
    """


def _parse_resources(_context: Any, _parameter: Any, text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as exc:
        raise click.BadParameter(f"not JSON: {exc}; write for example '{{\"ssd\": 1}}'") from exc
    if not isinstance(found, dict) or any(type(amount) not in (int, float) for amount in found.values()):
        raise click.BadParameter("a JSON object of names and numbers is wanted, for example '{\"ssd\": 1}'")
    return {str(name): float(amount) for name, amount in found.items()}


def _parse_labels(_context: Any, _parameter: Any, texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if not text.partition("=")[0] or "=" not in text:
            raise click.BadParameter(f"NAME=VALUE is wanted, not {text!r}")
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}


_NODE_OPTIONS = (
    click.option("--num-cpus", type=float, help="CPUs that tasks may take. Default: what this machine has."),
    click.option("--num-gpus", type=float, help="GPUs that tasks may take. Default: what this machine has."),
    click.option("--memory", help="Memory that tasks may take, as 8GiB. Default: what this machine has."),
    click.option("--object-store-memory", help="Shared memory for objects, as 2GiB. Default: 30 % of the memory."),
    click.option(
        "--memory-limit", help="When its processes use more, workers are ended. Default: the machine's memory."
    ),
    click.option("--resources", callback=_parse_resources, help="Amounts of anything, as '{\"ssd\": 1}'."),
    click.option("--name", default="", help="A name for the node; it becomes the label `name`."),
    click.option("--label", "labels", multiple=True, callback=_parse_labels, help="NAME=VALUE; may be repeated."),
    click.option("--port", type=click.IntRange(0, 65535), default=0, help="Where other nodes reach it. Default: any."),
    click.option("--spill-folder", help="Where objects go that no longer fit into shared memory."),
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
_address_option = click.option("--address", help="Session folder or node socket. Default: the recorded cluster.")


def _node_options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_NODE_OPTIONS):
        function = option(function)
    return function


def _node_plan(options: dict[str, Any]) -> NodePlan:
    from clusterpool.cli.cluster_file import ClusterPlan, NodePlan, check_plan

    plan = NodePlan(**options)
    try:
        check_plan(ClusterPlan(head=plan))
    except ValueError as exc:
        place, _, text = str(exc).removeprefix("head.").partition(": ")
        raise click.UsageError(f"--{place.replace('_', '-')}: {text}") from exc
    return plan


@cli.command()
@click.argument("cluster_file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_node_options
@_json_option
@click.pass_context
def up(context: click.Context, /, cluster_file: Path | None, as_json: bool, **options: Any) -> None:
    """Start a cluster on this machine: a control store, a head, and the nodes of CLUSTER_FILE if there is one.

    It is recorded as yours: programs of yours that use clusterpool run on it from now on.
    """
    from clusterpool.cli.cluster_file import ClusterPlan, read_cluster_file
    from clusterpool.cli.start import start_cluster

    if cluster_file is None:
        plan = ClusterPlan(head=_node_plan(options))
    else:
        for name in options:
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
                raise click.UsageError(f"--{name.replace('_', '-')} belongs into the cluster file, when there is one")
        plan = read_cluster_file(cluster_file)
    _show_started(start_cluster(plan), as_json=as_json)


@cli.command()
@click.option("--head", is_flag=True, help="Start a new cluster: a control store and a head.")
@click.option(
    "--address", "join_file", type=click.Path(dir_okay=False, path_type=Path),
    help="Join a cluster: the join file that `up` or `start --head` wrote on its head's host.",
)  # fmt: skip
@click.option("--host", help="The address of this machine at which other nodes reach it.")
@click.option("--store-port", type=click.IntRange(0, 65535), default=0, help="With --head: of the control store.")
@_node_options
@_json_option
def start(head: bool, join_file: Path | None, host: str | None, store_port: int, as_json: bool, **options: Any) -> None:
    """Start a node on this machine, as the head of a new cluster or as part of a running one."""
    from clusterpool.cli.cluster_file import ClusterPlan, ControlStorePlan
    from clusterpool.cli.join_file import read_join_file
    from clusterpool.cli.start import join_cluster, start_cluster

    if head is (join_file is not None):
        raise click.UsageError("say --head for a new cluster, or --address FILE to join one")
    plan = _node_plan(options)
    if join_file is not None:
        if store_port:
            raise click.UsageError("--store-port goes with --head: a node that joins starts no control store")
        _show_started(join_cluster(read_join_file(join_file), plan, host), as_json=as_json, has_joined=True)
        return
    store = ControlStorePlan(port=store_port)
    started = start_cluster(ClusterPlan(listen_host=host or "127.0.0.1", control_store=store, head=plan))
    _show_started(started, as_json=as_json)


@cli.command()
@_json_option
def down(as_json: bool) -> int:
    """End the recorded cluster: every node, then the control store; remove its files."""
    from clusterpool.cli.stop import end_cluster

    return _show_stopped([end_cluster()], as_json=as_json, is_whole=True)


@cli.command()
@click.option("--node", "node_id", help="Only this node. Default: all of this host.")
@_json_option
def stop(node_id: str | None, as_json: bool) -> int:
    """End the nodes of this host; the rest of the cluster goes on."""
    from clusterpool.cli.stop import end_local_nodes

    return _show_stopped(end_local_nodes(node_id), as_json=as_json, is_whole=False)


@cli.command()
@_address_option
@_json_option
@click.option("--watch", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Show it anew every so often.")
def status(address: str | None, as_json: bool, watch: float | None) -> None:
    """Show the nodes: their resources, workers, object stores and queues."""
    from clusterpool.cli import status as module

    if as_json and watch is not None:
        raise click.UsageError("--watch is for people; a program asks again when it wants to")
    target = module.find_cluster(address)
    nodes = module.read_nodes(target)
    if as_json:
        click.echo(json.dumps(module.to_json(target, nodes), indent=2))
    elif watch is None:
        console = _console()
        console.print(module.render(target, nodes, width=console.width))
    else:
        _watch(module, target, nodes, watch)


def _watch(module: Any, target: Any, nodes: Any, period_s: float) -> None:
    import time

    from rich.live import Live

    console = _console()
    with Live(module.render(target, nodes, width=console.width), console=console, auto_refresh=False) as live:
        while True:
            try:
                time.sleep(period_s)
            except KeyboardInterrupt:
                return  # that is how it is meant to end
            nodes = module.read_nodes(target)
            live.update(module.render(target, nodes, width=console.width), refresh=True)


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--patch", is_flag=True, help="Let the script's standard pools run on the cluster.")
@_address_option
@click.option(
    "--working-dir", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder that goes along to every node: tasks run in a copy of it, and find its modules.",
)  # fmt: skip
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    patch: bool, address: str | None, working_dir: Path | None, script: Path, arguments: tuple[str, ...]
) -> Callable[[], int]:
    """Run a Python SCRIPT with its ARGUMENTS on the cluster; its exit code is the command's.

    With --patch the script needs no change: its multiprocessing, its ProcessPoolExecutor and joblib's default backend
    are the cluster's, in its workers too. Use `--address local` for a private cluster of this run alone, and
    --working-dir where nodes on other machines lack the modules beside the script.
    """
    from clusterpool.cli import run_script
    from clusterpool.cli.status import find_cluster

    where = "local" if address == "local" else find_cluster(address).node_socket
    environment = {**os.environ, "CLUSTERPOOL_ADDRESS": where}
    if working_dir is not None:
        environment[WORKING_DIR_VARIABLE] = str(working_dir.absolute())
    runner = run_script.run_patched if patch else run_script.replace_process
    return lambda: runner(script, arguments, environment)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_PIPES)


def _show_started(started: StartedCluster, *, as_json: bool, has_joined: bool = False) -> None:
    from clusterpool.cli.status import node_to_json

    if as_json:
        fields = {
            "cluster_id": started.cluster_id, "address": started.node_socket, "session_folder": started.session_folder,
            "control_store": started.control_store, "join_file": started.join_file,
            "nodes": [node_to_json(node) for node in started.nodes],
        }  # fmt: skip
        click.echo(json.dumps(fields, indent=2))
        return
    cpus = sum(node.total.get("CPU", 0) for node in started.nodes)
    count = f"{len(started.nodes)} node{'s' if len(started.nodes) != 1 else ''}"
    if has_joined:
        from clusterpool.config import NodePaths

        node_id = NodePaths(Path(started.node_socket).parent).node_id
        click.secho(f"Node {node_id} is part of cluster {started.cluster_id}: {count}, {cpus:g} CPUs.", fg="green")
    else:
        click.secho(f"Cluster {started.cluster_id} is up: {count}, {cpus:g} CPUs.", fg="green")
    click.echo(f"  control store  {started.control_store}")
    click.echo(f"  join file      {started.join_file} (secret: it holds the cluster's keys)")
    click.echo("\nPrograms of yours on this machine that use clusterpool now run on it.")
    click.echo("  clusterpool status                   what it has and does")
    click.echo("  clusterpool run --patch script.py    a script that uses multiprocessing, unchanged")
    click.echo("  clusterpool start --address FILE     on another machine, with the join file: one node more")
    click.echo("  clusterpool down                     end it")


def _show_stopped(reports: list[StopReport], *, as_json: bool, is_whole: bool) -> int:
    if as_json:
        fields = [
            {
                "cluster_id": report.cluster_id, "ended": report.ended, "killed": report.killed,
                "remaining": report.remaining, "control_store_ended": report.is_store_ended,
            }
            for report in reports
        ]  # fmt: skip
        click.echo(json.dumps(fields[0] if is_whole else fields, indent=2))
    exit_code = ExitCode.OK
    for report in reports:
        if report.killed or (is_whole and report.remaining):
            exit_code = ExitCode.INCOMPLETE
        if not as_json:
            _tell_stopped(report, is_whole=is_whole)
    return exit_code


def _tell_stopped(report: StopReport, *, is_whole: bool) -> None:
    count = len(report.ended) + len(report.killed)
    store = " and its control store" if report.is_store_ended else ""
    click.echo(f"Cluster {report.cluster_id}: {count} node{'s' if count != 1 else ''}{store} ended.")
    if report.killed:
        click.secho(f"These did not end when asked and were killed: {', '.join(report.killed)}", fg="yellow", err=True)
    if report.remaining and is_whole:
        click.secho(
            f"These did not end; end them where they run: {', '.join(report.remaining)}",
            fg="yellow",
            err=True,
        )
    elif report.remaining:
        click.echo(f"The cluster goes on with {', '.join(report.remaining)}; `clusterpool down` ends all of it.")


if __name__ == "__main__":
    sys.exit(main())
