"""The flags of `visionlora bench`. Imports nothing heavy."""

from __future__ import annotations

from visionlora.bench.settings import BASIC, ORDERS, Settings
from visionlora.commands.arguments import Parser


def bench(parser: Parser) -> None:
    """Declare the flags of bench."""
    default = Settings()
    parser.usage = "%(prog)s MODEL [MODEL ...] [options] | --compare BEFORE.json AFTER.json"
    parser.add_argument("models", nargs="*", help="timm names, or gpt2, bert-base, t5-small; random weights")
    for name, what in (
        ("batch", "images or texts in a batch"),
        ("size", "pixels a side, or tokens of a text"),
        ("rank", "rank of the adapters"),
        ("rounds", "rounds; each variant runs once in each"),
        ("threads", "threads of the processor"),
        ("seed", "of weights, images and the order of turns"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{what} (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of a variant in a round (default: 1, on a GPU 10)")
    parser.add_argument(
        "--variants",
        help=f"comma-separated, of {', '.join((*BASIC, *ORDERS))}; the orders force a computation order on ours "
        "(default: all but the orders); the floor is always measured",
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: automatic mixed precision")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--channels-last", action="store_true", help="memory layout of weights and images")
    parser.add_argument("--compile", action="store_true", help="time every variant under torch.compile")
    parser.add_argument(
        "--clock", choices=("cpu", "wall"), default="cpu", help="processor time or wall clock; a GPU has its own"
    )
    parser.add_argument(
        "--verbs",
        metavar="MODEL",
        default="vit_base_patch16_224",
        help="time attach, load, switch and the first import on this model, none: leave it out (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the record, raw samples included")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables")
    parser.add_argument(
        "--compare", nargs=2, metavar=("BEFORE", "AFTER"), help="compare two records; exit code 1 on a regression"
    )
