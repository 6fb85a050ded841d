"""Adapt a timm backbone to a night camera, save the adapter, load it, switch it off. No network, no data."""

from pathlib import Path

import pytorch_lightning as pl
import torch

import visionlora as vl
from visionlora.data.scenes import write_scenes
from visionlora.vision import ImageClassifier, ImageFolderData


def main(folder: str = "runs/adapt_timm", per_class: int = 40, epochs: int = 6) -> tuple[float, float]:
    scenes, adapter = Path(folder, "scenes"), Path(folder, "adapter")
    write_scenes(
        scenes, domains=["night_tilted", "night_tilted_test"], per_class=per_class, test_per_class=per_class // 2
    )
    data = ImageFolderData(str(scenes), test_domains=["night_tilted_test"], model_name="scenes_resnet", num_workers=0)
    config = vl.LoraConfig(r=8)  # any timm name does instead of scenes_resnet
    model = ImageClassifier("scenes_resnet", data.num_classes, class_names=data.class_names, lora=config)
    pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, data)
    model.save_adapter(adapter)

    net = vl.load_model(adapter)  # rebuilds the base by its name and checks its weights
    adapted = accuracy(net, data)
    with vl.disabled(net):  # the base, bit for bit
        base = accuracy(net, data)
    print(f"at night: base {base:.1%}, adapted {adapted:.1%}; the adapter is in {adapter}")
    return base, adapted


@torch.no_grad()
def accuracy(net: torch.nn.Module, data: ImageFolderData) -> float:
    right = torch.cat([net(images).argmax(-1) == labels for images, labels, _ in data.test_dataloader()[0]])
    return right.float().mean().item()


if __name__ == "__main__":
    main()
