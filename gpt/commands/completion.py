"""``gpt --print-completion``: completion for bash and zsh, from the tables of the options."""

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from gpt.config import (
    DoctorConfig,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    PlanConfig,
    PrepareConfig,
    ReportConfig,
    SampleConfig,
    ServeConfig,
    TrainConfig,
    UsageError,
    quoted,
)
from gpt.config.tokenizer import (
    TokenizerCompareConfig,
    TokenizerExportConfig,
    TokenizerShowConfig,
    TokenizerTrainConfig,
)

SCHEMAS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "sample": SampleConfig,
    "serve": ServeConfig,
    "prepare": PrepareConfig,
    "inspect": InspectConfig,
    "tokenizer train": TokenizerTrainConfig,
    "tokenizer compare": TokenizerCompareConfig,
    "tokenizer show": TokenizerShowConfig,
    "tokenizer export": TokenizerExportConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "plan": PlanConfig,
    "report": ReportConfig,
    "doctor": DoctorConfig,
}
"""The options of each command."""
SHELLS = ("bash", "zsh")
_SCRIPT = r"""# completion of gpt; put into ~/.{shell}rc:  source <(gpt --print-completion {shell})
_gpt() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command choices
    COMPREPLY=()
    if [[ $word == "=" ]]; then  # --option=
        word=""
    elif [[ $before == "=" ]]; then
        before=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    if (( COMP_CWORD == 1 )); then
        COMPREPLY=($(compgen -W {commands} -- "$word"))
        return
    fi
    if [[ $before == --print-completion ]]; then
        COMPREPLY=($(compgen -W "bash zsh" -- "$word"))
        return
    fi
    command=${{COMP_WORDS[1]}}
    if [[ $command == tokenizer ]]; then
        if (( COMP_CWORD == 2 )); then
            COMPREPLY=($(compgen -W {inner} -- "$word"))
            return
        fi
        command="tokenizer ${{COMP_WORDS[2]}}"
    fi
    case "$command $before" in
{values}
    esac
    if [[ -n $choices ]]; then
        COMPREPLY=($(compgen -W "$choices" -- "$word"))
        return
    fi
    if [[ $word == -* ]]; then
        case $command in
{options}
        esac
        COMPREPLY=($(compgen -W "$choices --help" -- "$word"))
        return
    fi
    COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _gpt gpt
"""
_ZSH = "autoload -Uz compinit bashcompinit && compinit -i && bashcompinit\n"


def script(shell: str) -> str:
    """The text that a shell reads; ``UsageError`` for another shell."""
    if shell not in SHELLS:
        raise UsageError(
            f"--print-completion is {quoted(shell)}, and must be one of {', '.join(SHELLS)}"
        )
    commands = dict.fromkeys(name.split()[0] for name in SCHEMAS)
    inner = [name.split()[1] for name in SCHEMAS if " " in name]
    made = _SCRIPT.format(
        shell=shell,
        commands=shlex.quote(" ".join([*commands, "--help", "--print-completion"])),
        inner=shlex.quote(" ".join(inner)),
        values="\n".join(_values()),
        options="\n".join(_options()),
    )
    return (_ZSH if shell == "zsh" else "") + made


def _values() -> Iterator[str]:
    """The lines for options with a few values."""
    for command, schema in SCHEMAS.items():
        for name, choices in options_of(schema).items():
            if choices:
                known = " ".join(choices)
                yield f'        "{command} --{name}") choices="{known}";;'


def _options() -> Iterator[str]:
    """The lines for the names of a command's options."""
    for command, schema in SCHEMAS.items():
        names = " ".join(f"--{name}" for name in options_of(schema))
        yield f'        "{command}") choices="{names}";;'


def options_of(schema: type[Any], group: str = "") -> Mapping[str, tuple[str, ...]]:
    """The options of a dataclass by name, each with its values if these are few."""
    found: dict[str, tuple[str, ...]] = {}
    for item in dataclasses.fields(schema):
        name, kind, no = f"{group}{item.name}", item.type, dataclasses.MISSING
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            found |= options_of(kind, f"{name}.")
        elif item.default is no and item.default_factory is no:
            continue  # a positional word
        elif kind is bool:
            found |= {name: (), f"{group}no_{item.name}": ()}
        else:
            found[name] = tuple(get_args(kind)) if get_origin(kind) is Literal else ()
    return found
