"""Completion in shells, from the options' own tables."""

import shutil
import subprocess

import pytest

from gpt.cli import COMMANDS, main
from gpt.commands.completion import SCHEMAS

BASH = shutil.which("bash")


def script_of(shell, capsys):
    assert main(["--print-completion", shell]) == 0
    return capsys.readouterr().out


def completed(script, *words):
    """What bash offers for the last of the words."""
    listed = " ".join(f"'{word}'" for word in words)
    code = f"{script}\nCOMP_WORDS=({listed})\nCOMP_CWORD={len(words) - 1}\n_gpt\n"
    done = subprocess.run(
        [BASH, "--norc", "-c", code + 'printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


def test_every_command_has_its_options():
    assert {name.split()[0] for name in SCHEMAS} == set(COMMANDS)


@pytest.mark.skipif(not BASH, reason="needs bash")
def test_bash_completes_commands_options_and_values(capsys):
    script = script_of("bash", capsys)
    assert completed(script, "gpt", "tr") == ["train"]
    assert set(COMMANDS) <= set(completed(script, "gpt", ""))
    assert completed(script, "gpt", "tokenizer", "co") == ["compare"]
    assert completed(script, "gpt", "sample", "--temp") == ["--temperature"]
    assert completed(script, "gpt", "sample", "--weights", "int") == ["int8", "int4"]
    assert completed(script, "gpt", "serve", "--cache", "=", "i") == ["int8"]
    assert completed(script, "gpt", "serve", "--cache", "=") == ["float", "bfloat16", "int8"]
    assert completed(script, "gpt", "train", "--model.posit") == ["--model.position"]
    assert completed(script, "gpt", "tokenizer", "train", "--ou") == ["--out"]
    assert completed(script, "gpt", "train", "configs/shakes") == ["configs/shakespeare.toml"]
    assert completed(script, "gpt", "--print-completion", "z") == ["zsh"]


def test_zsh_runs_the_same_functions(capsys):
    zsh, bash = script_of("zsh", capsys), script_of("bash", capsys)
    assert zsh.startswith("autoload -Uz compinit bashcompinit")
    assert bash.splitlines()[1:] == zsh.splitlines()[2:]


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
def test_zsh_reads_the_script_in_a_new_shell(capsys, tmp_path):
    path = tmp_path / "gpt.zsh"
    path.write_text(script_of("zsh", capsys))
    words = ["zsh", "-f", "-c", f'source {path}; print -- "${{_comps[gpt]}}"; whence -w _gpt']
    run = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.split("\n")[:2] == ["_bash_complete -o filenames -F _gpt", "_gpt: function"]
    assert not run.stderr


def test_another_shell_is_refused(capsys):
    assert main(["--print-completion", "fish"]) == 2
    assert "must be one of bash, zsh" in capsys.readouterr().err
    assert main(["--print-completion"]) == 2
