"""The command `visionlora`: find the verb, run it, turn an error into a message and an exit code.

Nothing here imports torch: help answers at once, and a verb's module is imported when it runs.
"""

from __future__ import annotations

import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from visionlora import __version__
from visionlora.commands import arguments, bench_arguments
from visionlora.commands.arguments import Parser
from visionlora.config import did_you_mean
from visionlora.errors import ConfigError, NonFiniteError, VisionLoRAError

OK, FAILED, MISUSE, NON_FINITE, INTERRUPTED = 0, 1, 2, 3, 130


@dataclass(frozen=True)
class Verb:
    """One word of the command."""

    help: str
    module: str
    """Where `run(options, rest) -> exit code` lives, or for a Lightning verb `main(args) -> exit code`."""
    arguments: Callable[[Parser], None] | None = None
    """Declares the flags; None for verbs whose flags come from the classes they configure."""


_LIGHTNING = "visionlora.commands.lightning"

VERBS = {
    "fit": Verb("train an adapter, keep the best, show what was gained and what was forgotten", _LIGHTNING),
    "validate": Verb("measure a checkpoint or an adapter on the validation images", _LIGHTNING),
    "test": Verb("measure a checkpoint or an adapter on the test images, domain by domain", _LIGHTNING),
    "predict": Verb("classify a file, a folder or a glob; write CSV and JSONL", _LIGHTNING),
    "info": Verb("show what is in an adapter, or what would be attached", "visionlora.commands.info", arguments.info),
    "plan": Verb(
        "find the largest adapter in a budget of parameters, memory or time",
        "visionlora.commands.plan",
        arguments.plan,
    ),
    "merge": Verb(
        "fold an adapter into its base: a plain timm checkpoint", "visionlora.commands.merge", arguments.merge
    ),
    "convert": Verb(
        "take an adapter to or from PEFT, kohya, LyCORIS, loralib", "visionlora.commands.convert", arguments.convert
    ),
    "combine": Verb("make one adapter of several", "visionlora.commands.combine", arguments.combine),
    "doctor": Verb("check a data set before training", "visionlora.commands.doctor", arguments.doctor),
    "bench": Verb(
        "time a training step over the physical floor, full fine-tuning and PEFT",
        "visionlora.commands.bench",
        bench_arguments.bench,
    ),
    "scenes": Verb(
        "write small surveillance scenes, drawn from a seed", "visionlora.commands.scenes", arguments.scenes
    ),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command, return its exit code: 0 done, 1 failed, 2 misuse, 3 a loss that is not finite, 128 + signal."""
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    try:
        return _dispatch([word for word in words if word != "--debug"])
    except SystemExit as e:  # argparse after --help or an error, a run that saved after a signal
        return _exit_code(e)
    except NonFiniteError as e:
        return _fail(e, NON_FINITE, debug)
    except VisionLoRAError as e:
        return _fail(e, MISUSE, debug)
    except OSError as e:
        return _fail(e, FAILED, debug)
    except KeyboardInterrupt as e:
        return _fail(e, INTERRUPTED, debug)
    except Exception as e:
        if type(e).__name__ == "MisconfigurationException":  # Lightning's, of settings it cannot run; not imported here
            return _fail(e, MISUSE, debug)
        raise


def overview() -> str:
    """Return the text of `visionlora --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return textwrap.dedent(
        """\
        usage: visionlora VERB [options]

        One frozen backbone, many small adapters.

        verbs:
        {verbs}

        visionlora VERB --help   the options of a verb
        visionlora --version     the version
        --debug                  show where an error came from

        Try it, no data needed:  visionlora fit --config quickstart
        On text:                 visionlora fit --config text_sentiment --data.root FILE
        """
    ).format(verbs=verbs)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return OK if words else MISUSE
    if words[0] in ("-V", "--version"):
        print(f"visionlora {__version__}")
        return OK
    name, *rest = words
    if name not in VERBS:
        raise ConfigError(_unknown(name))
    verb = VERBS[name]
    if verb.arguments is None:
        return int(import_module(verb.module).main(words))
    parser = Parser(prog=f"visionlora {name}", description=verb.help[0].upper() + verb.help[1:] + ".")
    verb.arguments(parser)
    options, passed_on = parser.split(rest)
    return int(import_module(verb.module).run(options, passed_on))


def _unknown(name: str) -> str:
    near = did_you_mean(name, list(VERBS))
    return f'there is no verb "{name}"{near}\nverbs: {", ".join(VERBS)}; visionlora --help explains them'


def _exit_code(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return end.code or OK
    print(end.code, file=sys.stderr)
    return FAILED


def _fail(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"visionlora: {str(error) or 'interrupted'}", file=sys.stderr)
    return code
