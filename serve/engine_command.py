"""The engine's command, for `qembed serve --print-command`."""

from __future__ import annotations

import os
import secrets
import shlex

import click

from qembed.text import strict_json
from qembed.vllm import machine, sglang, supervisor
from qembed.vllm.arguments import rules, server_environment
from qembed.vllm.gate_rules import VARIABLE
from qembed.vllm.settings import Launch


def show_command(launch: Launch, as_json: bool) -> int:
    """Print the command that starts the engine, or as JSON its words and variables. Returns the exit code 0."""
    if launch.settings.engine == "sglang":
        sglang.check_settings(launch.settings)
        variables: dict[str, str] = {}
    else:
        variables = server_environment(launch, os.environ, machine.cores())
        variables = {name: value for name, value in variables.items() if os.environ.get(name) != value}
        variables[VARIABLE] = rules(launch, secrets.token_urlsafe(), 0).dump().decode().strip()
    words = [f"{name}={value}" for name, value in variables.items()]
    if as_json:
        click.echo(strict_json.dumps({"command": supervisor.command(launch), "environment": variables}))
        return 0
    click.echo(shlex.join([*(["env", *words] if words else []), *supervisor.command(launch)]))
    return 0
