"""Two cameras, one backbone: an adapter each, switched, weakened and taken off while the base stays what it was.

python examples/camera_fleet.py
"""

from pathlib import Path

import pytorch_lightning as pl
import torch

import visionlora as vl
from visionlora.data.scenes import write_scenes
from visionlora.vision import ImageClassifier, ImageFolderData, load_model

CAMERAS = {"gate": "night_tilted", "bridge": "fog"}


def main(folder: str = "runs/camera_fleet", per_class: int = 30, epochs: int = 6) -> dict[str, dict[str, float]]:
    root = Path(folder)
    domains = [name for domain in CAMERAS.values() for name in (domain, f"{domain}_test")]
    write_scenes(root / "scenes", domains=domains, per_class=per_class, test_per_class=per_class // 2)
    for camera, domain in CAMERAS.items():
        train(camera, images_of(root, domain), root / "adapters" / camera, epochs)

    fleet = load_model(root / "adapters" / "gate")  # one base in memory ...
    vl.load_adapter(fleet, root / "adapters" / "bridge")  # ... and any number of adapters
    views = {camera: test_images(images_of(root, domain)) for camera, domain in CAMERAS.items()}
    table = {camera: scores(fleet, camera, *view) for camera, view in views.items()}
    print(f"{'camera':<8}{'base':>8}{'gate':>8}{'bridge':>8}{'own, half':>11}")
    for camera, row in table.items():
        print(f"{camera:<8}" + "".join(f"{value:>8.0%}" for value in list(row.values())[:3]) + f"{row['half']:>11.0%}")
    return table


def images_of(root: Path, domain: str) -> ImageFolderData:
    return ImageFolderData(
        str(root / "scenes"),
        train_domains=[domain],
        test_domains=[f"{domain}_test"],
        model_name="scenes_resnet",
        num_workers=0,
    )


def train(camera: str, data: ImageFolderData, directory: Path, epochs: int) -> None:
    config = vl.LoraConfig(r=8)
    model = ImageClassifier(
        "scenes_resnet", data.num_classes, class_names=data.class_names, lora=config, adapter_name=camera
    )
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    model.save_adapter(directory)


def test_images(data: ImageFolderData) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels, _ = zip(*data.test_dataloader()[0], strict=True)
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def scores(fleet: torch.nn.Module, camera: str, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    def right() -> float:
        return (fleet(images).argmax(-1) == labels).float().mean().item()

    found = {}
    with vl.disabled(fleet):  # the base, bit for bit
        found["base"] = right()
    for name in CAMERAS:  # switching moves no weights: only which branch runs
        vl.activate(fleet, name)
        found[name] = right()
    vl.activate(fleet, camera, strength=0.5)
    found["half"] = right()
    return found


if __name__ == "__main__":
    main()
