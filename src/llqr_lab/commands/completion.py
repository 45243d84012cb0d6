"""``llqr completion SHELL``: a script for the shell's TAB key, generated from the commands."""

from __future__ import annotations

import argparse
import importlib

from ..recipes.config import RECIPES, written_keys
from .options import show_examples

__all__ = ["add_arguments", "main"]

EXAMPLES = """\
examples:
  llqr completion bash > ~/.local/share/bash-completion/completions/llqr
  llqr completion zsh >> ~/.zshrc
"""
SCRIPT = """\
_llqr() {{
    local words
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2> /dev/null ;; esac
}}
complete {options} -F _llqr llqr"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shell."""
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")
    show_examples(parser, EXAMPLES)


def main(arguments: argparse.Namespace) -> int:
    """Print the script: commands, their options, and the recipes and keys of ``llqr run``."""
    from .cli import COMMANDS

    options = "-o default"
    if arguments.shell == "zsh":
        options += " -o nospace"  # it has no compopt, and a space after KEY= would end the value
        print("autoload -U +X compinit && compinit; autoload -U +X bashcompinit && bashcompinit")
    words = {name: _options_of(module) for name, (module, _) in COMMANDS.items()}
    keys = dict.fromkeys(key for recipe in RECIPES for key in written_keys(recipe))
    words["run"] += [*RECIPES, *(f"{key}=" for key in keys if key != "recipe"), "--multirun"]
    words["select"] += RECIPES
    cases = "\n".join(f'        {name}) words="{" ".join(w)}" ;;' for name, w in words.items())
    print(SCRIPT.format(commands=" ".join(COMMANDS), cases=cases, options=options))
    return 0


def _options_of(module: str) -> list[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(module).add_arguments(parser)
    return [word for word in parser._option_string_actions if word.startswith("--")]
