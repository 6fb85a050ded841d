"""Small surveillance-like pictures, drawn from nothing but a seed."""

from visionlora.data.scenes.camera import CAMERAS, Camera
from visionlora.data.scenes.scene import CLASSES, render
from visionlora.data.scenes.weather import CONDITIONS
from visionlora.data.scenes.writer import DOMAINS, Domain, write_scenes

__all__ = ["CAMERAS", "CLASSES", "CONDITIONS", "DOMAINS", "Camera", "Domain", "render", "write_scenes"]
