"""The same with a loop of your own: torch and timm, no Lightning.

python examples/plain_torch.py
"""

from pathlib import Path

import timm
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import visionlora as vl
from visionlora.data.dataset import ImageDataset, collate_images
from visionlora.data.folders import read_tree
from visionlora.data.scenes import CLASSES, write_scenes
from visionlora.data.transforms import InputConfig, Preprocess
from visionlora.vision import data_config


def main(folder: str = "runs/plain_torch", per_class: int = 40, epochs: int = 6) -> tuple[float, float]:
    torch.manual_seed(0)
    scenes = Path(folder, "scenes")
    write_scenes(
        scenes, domains=["night_tilted", "night_tilted_test"], per_class=per_class, test_per_class=per_class // 2
    )
    train, test = (loader(scenes, domain) for domain in ("night_tilted", "night_tilted_test"))

    net = timm.create_model("scenes_resnet", pretrained=True)
    base = accuracy(net, test)
    vl.apply_lora(net, vl.LoraConfig(r=8, norm="stats"), name="night")
    vl.estimate_statistics(net.eval(), (images for images, _, _ in train), net)  # norm="stats": once, before training
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    for epoch in range(epochs):
        net.train()  # BatchNorm stays as it is: an adapted model never drifts
        for step, (images, labels, _) in enumerate(train):
            loss = cross_entropy(net(images), labels)
            loss.backward()
            if epoch == step == 0:
                vl.check_gradients(net)  # an adapter that learns nothing is an error, not a surprise
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    adapted = accuracy(net, test)
    config = data_config(net)
    vl.save_adapter(net, Path(folder, "adapter"), name="night", classes=sorted(CLASSES), data=config)
    print(f"at night: base {base:.1%}, adapted {adapted:.1%}\n{vl.summary(net).totals()}")
    return base, adapted


def loader(scenes: Path, domain: str) -> DataLoader:
    samples = [sample for sample in read_tree(scenes) if sample.domain == domain]
    labels = [sorted(CLASSES).index(sample.label) for sample in samples]
    wanted = {key: tuple(v) if isinstance(v, list) else v for key, v in data_config("scenes_resnet").items()}
    images = ImageDataset([sample.path for sample in samples], labels, Preprocess(InputConfig(**wanted)))
    return DataLoader(images, batch_size=32, shuffle=not domain.endswith("_test"), collate_fn=collate_images)


@torch.no_grad()
def accuracy(net: torch.nn.Module, images: DataLoader) -> float:
    net.eval()
    right = torch.cat([net(batch.images).argmax(-1) == batch.labels for batch in images])
    return right.float().mean().item()


if __name__ == "__main__":
    main()
