"""Language models by name, with the head of a task: what the weights do not bring belongs to the head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from visionlora.errors import ConfigError
from visionlora.hub import host, local_only
from visionlora.targets import head_layers
from visionlora.targets.heads import declare_new
from visionlora.text.columns import check_task
from visionlora.text.extras import need

__all__ = ["AUTO", "checkpoint_activations", "create_backbone", "untie"]

log = logging.getLogger(__name__)

AUTO: dict[str, str] = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
"""Task type, as the field writes it -> the class of transformers that builds its model."""
_SHOWN = 5


def create_backbone(
    model_name: str,
    task_type: str,
    *,
    pretrained: bool = True,
    label_names: list[str] | None = None,
    problem_type: str | None = None,
    new_tokens: int = 0,
    untied: bool = False,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Return a transformers model for a task, from the hub or from a folder, in eval mode.

    Every layer that the weights do not bring belongs to the head and is trained and saved with the adapter; its last
    one starts at zero, the others from a fixed seed, whatever was drawn before. Weights that lack a part of the
    backbone are refused. `new_tokens` adds rows to the embeddings, the mean of those there; `untied` gives the scores
    of tokens a weight of their own. `model_args` go to from_pretrained unchanged.
    Raises ConfigError: unknown name or task, weights that cannot be had or do not fit.
    """
    auto = getattr(need("transformers"), AUTO[check_task(task_type)])
    labels = _labels(task_type, label_names, problem_type)
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, new = _built(auto, model_name, task_type, pretrained, {**labels, **(model_args or {})})
    if pretrained:
        _start_at_zero(net, new)
    if new_tokens:
        _add_tokens(net, new_tokens)
    if untied:
        untie(net)
    _fill_config(net)
    return net.eval()


def untie(model: nn.Module) -> nn.Module:
    """Change the model in place: the scores of tokens get a weight of their own, a copy of the embedding's. Return it.

    The model then gives what it gave, and both can be adapted, merged and saved.
    """
    out, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if out is None or out.weight is not embedding.weight:
        raise ConfigError(f"{type(model).__name__} has no tied embeddings; leave untie away")
    name = next(n for n, m in model.named_modules() if m is out)
    out.weight = nn.Parameter(out.weight.detach().clone(), requires_grad=out.weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False  # type: ignore[union-attr, operator]
    for table in ("all_tied_weights_keys", "_tied_weights_keys"):  # what save_pretrained leaves out
        kept = {key: source for key, source in (getattr(model, table) or {}).items() if key != f"{name}.weight"}
        model.__dict__[table] = kept  # on this model: the class has one for all of its kind
    return model


def checkpoint_activations(model: nn.Module) -> None:
    """Change the model: it computes its activations again in the backward pass instead of keeping them."""
    renamed = hasattr(model, "activation_checkpointing_enable")  # transformers 5.23 gave it this name
    enable: Any = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _labels(task_type: str, names: list[str] | None, problem_type: str | None) -> dict[str, Any]:
    if task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return {}
    if problem_type == "regression":
        return {"num_labels": 1, "problem_type": problem_type}
    if not names:
        raise ConfigError(f"{task_type} needs label_names, one a label, in the order of their numbers")
    maps = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {**maps, **({"problem_type": problem_type} if task_type == "SEQ_CLS" and problem_type else {})}


def _built(
    auto: Any, model_name: str, task_type: str, pretrained: bool, args: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    transformers = need("transformers")
    local = local_only(model_name)
    args = {**local, **args}
    try:
        if not pretrained:
            return auto.from_config(transformers.AutoConfig.from_pretrained(model_name, **args)), []
        if local:  # where PEFT is installed, an adapter is looked for first, and not told of it
            args = {"adapter_kwargs": local, **args}
        net, info = auto.from_pretrained(model_name, output_loading_info=True, ignore_mismatched_sizes=True, **args)
    except OSError as e:  # huggingface_hub's errors come as this one
        reason = f"{host()} is out of reach, and its cache lacks a file of it" if local else _short(str(e))
        raise ConfigError(
            f"no model {model_name!r}: {reason}. Give a name of the hub, or the folder of a saved model"
        ) from None
    except ValueError as e:
        known = "Unrecognized configuration class" in str(e)
        reason = f"this architecture has no model for {task_type}" if known else _short(str(e))
        raise ConfigError(f"{model_name} cannot be built for {task_type}: {reason}") from None
    except (TypeError, AttributeError) as e:  # an argument the model does not take, in model_args
        raise ConfigError(f"transformers cannot build {model_name}: {_short(str(e))}; check model_args") from None
    return net, _new_layers(net, info, model_name)


def _new_layers(net: nn.Module, info: dict[str, Any], model_name: str) -> list[str]:
    """Return the layers without weights, known to the model as its head. Raises ConfigError for a lost backbone."""
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    layers, heads = list(dict.fromkeys(key.rpartition(".")[0] for key in new)), head_layers(net)
    lost = [key for key in new if key.rpartition(".")[0] not in heads and "pooler" not in key]
    if lost:
        shown = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
        cure = "choose weights of this architecture"
        if net.base_model_prefix not in {key.partition(".")[0] for key in info["unexpected_keys"]} and len(lost) > 1:
            cure = (
                "transformers looks for them under other names; save the bare model once and use that folder: "
                f'transformers.AutoModel.from_pretrained("{model_name}").save_pretrained(FOLDER)'
            )
        raise ConfigError(
            f"{model_name} does not bring {len(lost)} tensor(s) of the backbone of a {type(net).__name__}, which would "
            f"be random: {shown}; {cure}"
        )
    declare_new(net, [name for name in layers if name not in heads])
    if layers:
        log.info("%s: new layers, trained and saved with the adapter: %s", model_name, ", ".join(layers))
    return layers


@torch.no_grad()
def _start_at_zero(net: nn.Module, new: list[str]) -> None:
    heads = head_layers(net)
    if heads and heads[-1] in new:
        for parameter in net.get_submodule(heads[-1]).parameters():
            parameter.zero_()


@torch.no_grad()
def _add_tokens(net: nn.Module, count: int) -> None:
    known = net.get_input_embeddings().num_embeddings  # type: ignore[operator]
    net.resize_token_embeddings(known + count, mean_resizing=False)  # type: ignore[operator]
    for layer in (net.get_input_embeddings(), net.get_output_embeddings()):  # type: ignore[operator]
        for tensor in () if layer is None else layer.parameters():
            tensor[known:] = tensor[:known].double().mean(0)  # the same on every machine, unlike transformers' draw


def _fill_config(net: nn.Module) -> None:
    config: Any = net.config
    if getattr(config, "pad_token_id", None) is None:
        end = getattr(config, "eos_token_id", None)
        # sequences of several lengths in a batch need one to find their ends (GPT-2, Llama)
        config.pad_token_id = end[0] if isinstance(end, list) else end


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' table of keys and its progress bars away: what matters of them is checked and logged here."""
    report = need("transformers").utils.logging
    level, bars = report.get_verbosity(), report.is_progress_bar_enabled()
    report.set_verbosity_error()
    report.disable_progress_bar()
    try:
        yield
    finally:
        report.set_verbosity(level)
        if bars:
            report.enable_progress_bar()


def _short(text: str, most: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."
