"""The engine's command, for `qembed serve --print-command`."""

from __future__ import annotations

import os
import secrets
import shlex

import click

from qembed.vllm import machine, sglang, supervisor
from qembed.vllm.arguments import rules, server_environment
from qembed.vllm.gate_rules import VARIABLE
from qembed.vllm.settings import Launch


def show_command(launch: Launch) -> int:
    """Print the command that starts the engine. Returns the exit code 0."""
    if launch.settings.engine == "sglang":
        sglang.check_settings(launch.settings)
        variables: dict[str, str] = {}
    else:
        variables = server_environment(launch, os.environ, machine.cores())
        variables = {name: value for name, value in variables.items() if os.environ.get(name) != value}
        variables[VARIABLE] = rules(launch, secrets.token_urlsafe(), 0).dump().decode().strip()
    words = [f"{name}={value}" for name, value in variables.items()]
    click.echo(shlex.join([*(["env", *words] if words else []), *supervisor.command(launch)]))
    return 0
