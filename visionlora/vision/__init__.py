"""Image classification on timm backbones with Lightning."""
