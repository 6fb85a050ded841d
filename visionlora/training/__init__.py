"""Training with Lightning: what every image or text model needs and no model knows about."""
