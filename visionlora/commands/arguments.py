"""The flags of the plain verbs. Imports nothing heavy: `visionlora VERB --help` answers at once."""

from __future__ import annotations

import argparse
from typing import NoReturn

from visionlora.bench.settings import ORDERS
from visionlora.config import did_you_mean
from visionlora.errors import ConfigError

TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM")
LAYOUTS = ("auto", "class", "split/class", "domain/class", "domain/split/class")


class Parser(argparse.ArgumentParser):
    """argparse without guessed abbreviations, whose errors are two lines with a "did you mean"."""

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.passed_on = ""
        """Flags that begin so are the verb's own business: they are passed on unread, each with its value."""

    def split(self, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the options this parser knows and the words that are passed on."""
        own: list[str] = []
        rest: list[str] = []
        waiting = iter(words)
        for word in waiting:
            if not self.passed_on or not word.startswith(self.passed_on):
                own.append(word)
            else:
                rest += [word] if "=" in word else [word, next(waiting, "")]
        options, unknown = self.parse_known_args(own)
        if unknown:
            raise ConfigError(self.unknown_option(unknown[0]))
        return options, rest

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.prog} --help shows the options")

    def unknown_option(self, word: str) -> str:
        """Return the message for a word that is no option."""
        flag = word.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        return f"there is no option {flag}{did_you_mean(flag, known)}\n{self.prog} --help shows the options"


def info(parser: Parser) -> None:
    """Declare the flags of info."""
    parser.passed_on = "--lora."
    parser.usage = "%(prog)s ADAPTER | --model NAME [--lora.FIELD VALUE ...]"
    parser.add_argument("adapter", nargs="?", help="directory of a saved adapter")
    parser.add_argument("--model", help="timm name of a backbone: show what would be attached to it")
    parser.add_argument("--num_classes", type=int, help="classes of the head (default: the model's own)")
    parser.add_argument("--cost", action="store_true", help="what a training step costs, layer by layer")
    parser.add_argument("--order", choices=ORDERS, help="with --cost: force a computation order on every layer")
    parser.add_argument("--time", action="store_true", help="with --cost: also estimate milliseconds on this machine")
    step(parser)
    parser.epilog = "--lora.r, --lora.target_modules, ...: the fields of LoraConfig, written as for `visionlora fit`"


def step(parser: Parser) -> None:
    """Declare which training step is counted."""
    parser.add_argument("--batch", type=int, default=8, help="images in the step (default: %(default)s)")
    parser.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: automatic mixed precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="decides the order of a layer")


def plan(parser: Parser) -> None:
    """Declare the flags of plan."""
    parser.passed_on = "--lora."
    parser.usage = "%(prog)s MODEL [--parameters N] [--memory SIZE] [--milliseconds T] [--lora.FIELD VALUE ...]"
    parser.add_argument("model", help="timm name of a backbone; nothing is downloaded")
    parser.add_argument("--parameters", help="trained numbers at most, the head's too: 300k, 1.5M")
    parser.add_argument("--memory", help="weights, optimiser and the peak of a step at most: 400MiB, 8GB")
    parser.add_argument("--milliseconds", type=float, help="a forward and backward pass at most, estimated")
    parser.add_argument("--num_classes", type=int, help="classes of the head (default: the model's own)")
    step(parser)
    parser.set_defaults(order=None)
    parser.epilog = "--lora.target_modules, --lora.variant, ...: what the adapter is otherwise"


def merge(parser: Parser) -> None:
    """Declare the flags of merge."""
    parser.add_argument("adapter", help="directory of a saved adapter")
    parser.add_argument("out", help="OUT.safetensors, which timm loads with checkpoint_path=OUT; for text a folder")
    parser.add_argument(
        "--checkpoint", help="weights of the base (for text its folder), if not at their public address"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def convert(parser: Parser) -> None:
    """Declare the flags of convert."""
    parser.add_argument("source", help="directory of an adapter of ours or of PEFT, or a .safetensors or .pt file")
    parser.add_argument("out", help="what to write: a directory, for kohya OUT.safetensors")
    parser.add_argument("--to", required=True, choices=("visionlora", "peft", "kohya"), help="format of OUT")
    parser.add_argument(
        "--from",
        dest="from_",
        default="auto",
        choices=("auto", "visionlora", "peft", "kohya", "loralib"),
        help="format of SOURCE; kohya is LyCORIS too (default: %(default)s, told by its content)",
    )
    parser.add_argument("--model", help="timm name of the base; adapters of ours record it")
    parser.add_argument("--num_classes", type=int, help="classes of its head (default: those of its weights)")
    parser.add_argument("--img_size", type=int, help="size of its input, where it is not timm's default")
    parser.add_argument("--checkpoint", help="weights of the base, where they are not at their public address")
    parser.add_argument("--approximate", type=int, metavar="RANK", help="keep the nearest factors where none are exact")
    parser.add_argument("--alpha", type=float, help="lora_alpha of a loralib file, which lacks it")
    parser.add_argument("--parts", help="parts of fused layers that a loralib file changes: q,v")
    parser.add_argument("--prefix", help="before the layer names of a kohya file: lora_unet (default: lycoris or any)")
    parser.add_argument("--name", default="default", help="name of the adapter (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what OUT holds")


def combine(parser: Parser) -> None:
    """Declare the flags of combine."""
    parser.add_argument("adapters", nargs="+", help="directories of saved adapters of one base")
    parser.add_argument("--out", required=True, help="directory to write the new adapter to")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each adapter (default: their average)")
    parser.add_argument(
        "--method",
        default="concat",
        help="concat: the exact sum; svd: the nearest of --rank; ties, dare_linear, dare_ties, magnitude_prune: merges "
        "of entries, cut to --rank (default: %(default)s)",
    )
    parser.add_argument("--rank", type=int, help="rank of every layer (default: the largest of the adapters there)")
    parser.add_argument("--density", type=float, help="share of entries kept by ties, dare_* and magnitude_prune")
    parser.add_argument("--seed", type=int, default=0, help="of the entries dare_* drops (default: %(default)s)")
    for what in ("head", "norm"):
        text = f"average, first, base, or the name of the adapter whose {what} is taken over (default: %(default)s)"
        parser.add_argument(f"--{what}", default="average", help=text)
    parser.add_argument("--name", default="combined", help="name of the new adapter (default: %(default)s)")
    parser.add_argument("--checkpoint", help="weights of the base, where they are not at their public address")
    parser.add_argument("--force", action="store_true", help="replace the adapter in OUT if there is one")


def doctor(parser: Parser) -> None:
    """Declare the flags of doctor."""
    parser.add_argument(
        "data", help="folder of class folders, a CSV with path,label[,domain][,split]; with --task a text data set"
    )
    parser.add_argument(
        "--layout", default="auto", choices=LAYOUTS, help="the tree of the folder (default: %(default)s)"
    )
    parser.add_argument("--classes", help="comma-separated class names that must be met (default: those found)")
    parser.add_argument("--most", type=int, default=10, help="lines for each kind of finding (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="images decoded at once (default: one per core)")
    parser.add_argument("--task", choices=TASKS, help="examine text for this task instead of images")
    parser.add_argument("--columns", help="columns of a text data set: text=sentence,label=sentiment")
    parser.add_argument("--header", help="comma-separated names of the columns of tables without a header line")
    parser.add_argument("--template", help='prompt of a text data set: "Summarize: {dialogue}"')
    parser.add_argument("--tokenizer", help="model or tokenizer whose tokens are counted (default: words are counted)")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of an input (default: %(default)s)")


def scenes(parser: Parser) -> None:
    """Declare the flags of scenes."""
    parser.add_argument("out", help="folder to write to: OUT/<domain>/<class>/<number>.jpg")
    parser.add_argument(
        "--domains",
        default="day,night_tilted,day_test,night_tilted_test",
        help="comma-separated <condition>[_tilted][_test] (default: %(default)s)",
    )
    parser.add_argument("--per_class", type=int, default=60, help="images a class and domain (default: %(default)s)")
    parser.add_argument(
        "--test_per_class", type=int, default=30, help="the same for _test domains (default: %(default)s)"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (default: %(default)s)")
