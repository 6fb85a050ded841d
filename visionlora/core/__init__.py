"""Adapters on layers: what a layer does with its weight, what changes the weight, and how the change is put on."""
